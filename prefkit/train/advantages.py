"""From the scores of a rollout to what its tokens are learnt from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefkit.config.schema import PpoConfig
from prefkit.data.packing import DRAWN
from prefkit.objectives.ppo import generalized_advantages, measure, token_rewards, whiten
from prefkit.train.answering import Measured

Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """A packed batch of a rollout: drawn responses, then, with `ppo_ptx`, answers to learn as they are.

    `places` are the drawn rows by their place in the rollout, `num_drawn` their responses, `num_tokens` the
    tokens of these, which come first among the T of the batch.
    """

    batch: dict[str, Any]
    places: list[int]
    num_drawn: int
    measured: Measured

    @property
    def num_tokens(self) -> int:
        """Tokens of responses that were drawn."""
        return sum(self.batch["response_lengths"][: self.num_drawn])

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of answers that are learnt as they are."""
        return len(self.batch["target"]) - self.num_tokens

    def drawn(self, values: Tensor) -> Tensor:
        """Of values (T,) those of tokens that were drawn."""
        return values[: self.num_tokens]

    def padded(self, values: Tensor) -> Tensor:
        """Values of tokens that were drawn, and 0 for the others, (T,)."""
        return torch.nn.functional.pad(values, (0, self.num_answer_tokens))


def add_advantages(
    batches: Sequence[MicroBatch],
    scores: Sequence[Tensor],
    config: PpoConfig,
    kl_coef: float,
    gather: Gather,
    device: torch.device,
) -> None:
    """Give each batch, in `drawn`, log-probs and values as they are now, advantages, whitened over the whole
    rollout, and returns; `scores` (N,) are those of each batch's responses."""
    rewards = []
    for one, own in zip(batches, scores, strict=True):
        logps, reference = (one.drawn(it) for it in (one.measured.logps, one.measured.reference))
        owner = one.drawn(one.batch["owner"])
        rewards.append(token_rewards(own, logps, reference, owner, kl_coef=kl_coef))
    if config.ppo_whiten_rewards:
        moments = measure(torch.cat(rewards).to(device), gather)
        rewards = [whiten(it, moments, keep_mean=True) for it in rewards]
    found = [
        generalized_advantages(
            reward,
            one.drawn(one.measured.values),
            one.drawn(one.batch["owner"]),
            gamma=config.ppo_gamma,
            lam=config.ppo_lambda,
        )
        for one, reward in zip(batches, rewards, strict=True)
    ]
    moments = measure(torch.cat([advantages for advantages, _ in found]).to(device), gather)
    for one, (advantages, returns) in zip(batches, found, strict=True):
        one.batch[DRAWN] = {
            "old_logps": one.measured.logps,
            "old_values": one.measured.values,
            "advantages": one.padded(whiten(advantages, moments)),
            "returns": one.padded(returns),
        }


def scale_losses(batches: Sequence[MicroBatch], counts: Tensor, ptx: float) -> None:
    """Make the loss of an update the mean over drawn tokens, and `ptx` times the mean over those of answers.

    `batches` are those of one update on this rank, `counts` (2,) tells the tokens of either kind on all
    ranks. Each batch gets in `drawn` what the loss of each token is multiplied by, `scale` (T,), and which
    are answers, `is_answer` (T,).
    """
    drawn, answers = counts.tolist()
    for one in batches:
        is_answer = torch.arange(len(one.batch["target"])) >= one.num_tokens
        total = drawn + answers
        of_answers = ptx * total / answers if answers else 0.0
        one.batch[DRAWN] |= {
            "is_answer": is_answer,
            "scale": torch.where(is_answer, of_answers, total / drawn),
        }
