"""From scores to advantages, held to a plain loop, and the weights of losses with answers among them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from prefkit.config.schema import PpoConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import DRAWN, pack
from prefkit.train.advantages import MicroBatch, add_advantages, scale_losses
from prefkit.train.answering import Measured

CONFIG = PpoConfig()


def make_batch(lengths: list[int], answers: list[int], seed: int) -> MicroBatch:
    """One prompt with responses of these lengths, and answers to others, with random numbers."""
    rows = [TokenizedExample([7, 8], [[1] * n for n in lengths], (), "f:1")]
    rows += [TokenizedExample([9], [[2] * n], (), f"a:{i}") for i, n in enumerate(answers)]
    batch = pack(rows, "shared").to_dict()
    generator = torch.Generator().manual_seed(seed)
    of_tokens = torch.randn(4, len(batch["target"]), generator=generator)
    kls = torch.zeros(batch["num_responses"])
    return MicroBatch(batch, [0], len(lengths), Measured(*of_tokens, kls))


def by_hand(
    batches: list[MicroBatch], scores: list[list[float]], config: PpoConfig, kl_coef: float
) -> tuple[list[float], list[float]]:
    """Advantages, whitened, and returns of all drawn tokens, response by response."""
    rewards, values, lengths = [], [], []
    for one, own in zip(batches, scores, strict=True):
        start = 0
        for number, score in enumerate(own):
            length = one.batch["response_lengths"][number]
            span = slice(start, start + length)
            start += length
            ratio = (one.measured.logps - one.measured.reference)[span].tolist()
            rewards += [-kl_coef * it for it in ratio]
            rewards[-1] += score
            values += one.measured.values[span].tolist()
            lengths.append(length)
    if config.ppo_whiten_rewards:
        table = torch.tensor(rewards, dtype=torch.float64)
        rewards = ((table - table.mean()) / (table.var() + 1e-8).sqrt() + table.mean()).tolist()
    advantages, start = [0.0] * len(rewards), 0
    for length in lengths:
        following = 0.0
        for t in reversed(range(start, start + length)):
            next_value = values[t + 1] if t + 1 < start + length else 0.0
            delta = rewards[t] + config.ppo_gamma * next_value - values[t]
            following = advantages[t] = delta + config.ppo_gamma * config.ppo_lambda * following
        start += length
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    table = torch.tensor(advantages, dtype=torch.float64)
    return ((table - table.mean()) / (table.var() + 1e-8).sqrt()).tolist(), returns


@pytest.mark.parametrize("whitens", [False, True])
def test_advantages_of_a_rollout(whitens: bool) -> None:
    config = replace(CONFIG, ppo_whiten_rewards=whitens, ppo_gamma=0.9)
    batches = [make_batch([3, 1], [2], 0), make_batch([4], [1, 3], 1)]
    scores = [[1.0, -2.0], [0.5]]
    add_advantages(
        batches, [torch.tensor(it) for it in scores], config, 0.3, torch.clone, torch.device("cpu")
    )
    found = [one.batch[DRAWN] for one in batches]
    advantages, returns = by_hand(batches, scores, config, 0.3)
    for name, expected in (("advantages", advantages), ("returns", returns)):
        drawn = torch.cat([one.drawn(it[name]) for one, it in zip(batches, found, strict=True)])
        torch.testing.assert_close(drawn, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert all(len(it[name]) == len(one.batch["target"]) for one, it in zip(batches, found, strict=True)
               for name in it)  # fmt: skip


def test_scaled_losses_are_a_mean_over_drawn_tokens_and_one_over_answers() -> None:
    """Over the whole update, however its tokens lie in its batches; the Trainer divides by all of them."""
    batches = [make_batch([3, 1], [2], 0), make_batch([4], [1, 3], 1)]
    losses: list[Any] = [torch.arange(1.0, 1 + len(one.batch["target"])) for one in batches]
    counts = torch.tensor([sum(one.num_tokens for one in batches), sum(o.num_answer_tokens for o in batches)])
    for one in batches:
        one.batch[DRAWN] = {}
    scale_losses(batches, counts, ptx=0.5)
    total = sum((loss * one.batch[DRAWN]["scale"]).sum() for loss, one in zip(losses, batches, strict=True))
    drawn = torch.cat([one.drawn(loss) for loss, one in zip(losses, batches, strict=True)])
    answers = torch.cat([loss[one.num_tokens :] for loss, one in zip(losses, batches, strict=True)])
    assert total / counts.sum() == pytest.approx(drawn.mean() + 0.5 * answers.mean())
    assert [it.batch[DRAWN]["is_answer"].tolist().count(True) for it in batches] == [2, 4]
