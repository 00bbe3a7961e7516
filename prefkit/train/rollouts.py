"""Rollouts: responses are drawn from the policy, judged, and learnt from in several passes.

One rollout is one epoch of the Trainer, whose loader is a `RolloutSource`: the Trainer asks for the batches
of an epoch when the last update of the one before is done, so that what is drawn is always drawn from the
newest policy. Where the run is in its prompts follows from the number of the epoch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from prefkit.config.schema import RunConfig
from prefkit.data.conversation import read_conversation
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Label
from prefkit.data.packing import DRAWN, pack
from prefkit.data.template import ChatTemplate
from prefkit.model.generate import stop_ids
from prefkit.model.policy import response_logps
from prefkit.model.reference import Reference
from prefkit.model.rollout import Sampled, Stream, sample_responses
from prefkit.objectives.ppo import (
    AdaptiveKL,
    Moments,
    explained_variance,
    generalized_advantages,
    measure,
    token_rewards,
    whiten,
)
from prefkit.train.judges import Answered, Judge
from prefkit.train.policy import Policy
from prefkit.train.ppo import PpoStage

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from prefkit.train.trainer import PrefTrainer


_SCORED: tuple[Label, ...] = ("scored",)


def updates_per_rollout(config: RunConfig) -> int:
    """Optimiser updates of one rollout: what the Trainer calls steps."""
    return config.ppo.ppo_epochs * config.ppo.ppo_buffer_size


def prompts_per_rollout(config: RunConfig, args: TrainingArguments) -> int:
    """Prompts of one rollout on all ranks."""
    per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return per_update * config.ppo.ppo_buffer_size * args.world_size


def count_in_rollouts(config: RunConfig, args: TrainingArguments, num_prompts: int) -> None:
    """Make steps of the Trainer, which are updates, of those in the YAML, which are rollouts.

    A pass over the prompts is an epoch of the YAML, whose number becomes `max_steps`.
    """
    updates, per_pass = updates_per_rollout(config), -(-num_prompts // prompts_per_rollout(config, args))
    rollouts = args.max_steps if args.max_steps > 0 else max(round(args.num_train_epochs * per_pass), 1)
    args.max_steps = rollouts * updates
    if args.warmup_steps >= 1:
        args.warmup_steps *= updates
    for what in ("logging", "save", "eval"):
        every = getattr(args, f"{what}_steps")
        if (
            str(getattr(args, f"{what}_strategy")).endswith("EPOCH")
            or getattr(args, f"{what}_strategy") == "epoch"
        ):
            setattr(args, f"{what}_strategy", type(getattr(args, f"{what}_strategy"))("steps"))
            every = per_pass
        elif every is not None and every < 1:
            every = max(round(every * rollouts), 1)
        if every is not None:
            setattr(args, f"{what}_steps", int(every) * updates)


@dataclass(frozen=True)
class Told:
    """How the responses to some prompts were judged: vectors (N,) over the responses, on the CPU."""

    scores: Tensor
    kls: Tensor
    lengths: Tensor
    ended: Tensor

    def means(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Means over the responses of all ranks."""
        sums = torch.stack(
            [
                self.scores.sum(),
                self.kls.sum(),
                self.lengths.sum(),
                self.ended.sum(),
                torch.tensor(float(len(self.scores))),
            ]
        ).double()
        total = gather(sums.float().to(device)[None]).double().sum(0).tolist()
        names = ("score", "kl", "response_length", "eos_rate")
        return {name: total[i] / total[-1] for i, name in enumerate(names)}


class RolloutSource:
    """The batches of one rollout after the other, as the Trainer's loader: its length is that of one.

    `trainer` is set before training.
    """

    def __init__(
        self,
        config: RunConfig,
        args: TrainingArguments,
        policy: Policy,
        reference: Reference,
        judge: Judge,
        template: ChatTemplate,
        prompts: Sequence[TokenizedExample],
        stage: PpoStage,
    ) -> None:
        self.config, self.args = config, args
        self.policy, self.reference, self.judge = policy, reference, judge
        self.template, self.prompts, self.stage = template, prompts, stage
        self.trainer: PrefTrainer | None = None
        self.epoch = 0
        ppo = config.ppo
        self.kl = AdaptiveKL(ppo.ppo_init_kl, ppo.ppo_target, ppo.ppo_kl_horizon)
        self.moments = Moments()
        self.window: list[dict[str, float]] = []  # numbers of the rollouts since the last line of the log
        self.seconds: dict[str, float] = {}

    @property
    def number(self) -> int:
        """How many rollouts were learnt from."""
        assert self.trainer is not None
        return self.trainer.state.global_step // updates_per_rollout(self.config)

    def __len__(self) -> int:
        """Micro-batches of a rollout on this rank."""
        ppo = self.config.ppo
        return ppo.ppo_epochs * ppo.ppo_buffer_size * self.args.gradient_accumulation_steps

    def set_epoch(self, epoch: int) -> None:
        """Say which rollout is next; the Trainer does, also after a resume."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = self._make()
        self.stage.expects_identity = not self.config.tuning.lora_dropout
        for number in range(self.config.ppo.ppo_epochs):
            drawn = np.random.default_rng((self.args.seed, self.epoch, number))
            order = drawn.permutation(len(batches)) if number else range(len(batches))
            with self._timed("learn"):
                yield from (batches[i] for i in order)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {"kl": asdict(self.kl), "moments": asdict(self.moments), "window": self.window}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.kl, self.moments = AdaptiveKL(**state["kl"]), Moments(**state["moments"])
        self.window = state["window"]

    def numbers(self) -> dict[str, float]:
        """The means of the rollouts since this was last asked for, by the names of the log."""
        window, self.window = self.window, []
        seconds, self.seconds = self.seconds, {}
        found = (
            {f"ppo/{name}": sum(it[name] for it in window) / len(window) for name in window[0]}
            if window
            else {}
        )
        return found | {f"ppo/seconds_{phase}": round(time, 3) for phase, time in seconds.items()}

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def _picked(self) -> list[tuple[int, TokenizedExample]]:
        """The prompts of this rank in this rollout, each with its number in the rollout."""
        total = prompts_per_rollout(self.config, self.args)
        own = total // self.args.world_size
        first = self.args.process_index * own
        found = []
        for number in range(first, first + own):
            turn, place = divmod(self.epoch * total + number, len(self.prompts))
            found.append((number, self.prompts[self._order(turn)[place]]))
        return found

    def _order(self, turn: int) -> Sequence[int]:
        """The prompts of one pass over them, by index."""
        if self.config.data.disable_shuffling:
            return range(len(self.prompts))
        if getattr(self, "_turn", None) != turn:
            self._turn = turn
            self._permuted = np.random.default_rng((self.args.seed, turn)).permutation(len(self.prompts))
        return self._permuted.tolist()

    def _make(self) -> list[dict[str, Any]]:
        """Draw and judge; the micro-batches of one pass, with what is learnt from them."""
        assert self.trainer is not None
        gather, ppo = self.trainer.accelerator.gather, self.config.ppo
        picked = self._picked()
        with self._timed("generate"):
            stream = Stream(self.args.seed, self.epoch)
            rows, ended = self.draw(
                [row for _, row in picked],
                [n for n, _ in picked],
                stream,
                self.config.generation,
                ppo.ppo_group_size,
            )
        with self._timed("score"):
            scores = self.judge_rows(rows, ended)
        with self._timed("forward"):
            batches = self._micro_batches(rows)
            packed = [self.measured(batch) for batch, _ in batches]
        places = [place for _, which in batches for place in which]
        flat_scores = torch.tensor([score for i in places for score in scores[i]])
        told = Told(
            flat_scores,
            torch.cat([it["kls"] for it in packed]),
            torch.tensor([float(len(ids)) for i in places for ids in rows[i].response_ids]),
            torch.tensor([float(it) for i in places for it in ended[i]]),
        )
        found = told.means(gather, self.args.device)
        rewarded = self._normed(flat_scores)
        self._advise(batches, packed, rewarded)
        number = prompts_per_rollout(self.config, self.args) * ppo.ppo_group_size
        entropy = torch.cat([it["entropies"] for it in packed])
        old, returns = (
            torch.cat([batch[DRAWN][name] for batch, _ in batches]) for name in ("old_values", "returns")
        )
        self.window.append(
            {
                **found,
                "kl_coef": self.kl.coefficient,
                "value_explained_variance": explained_variance(
                    old.to(self.args.device), returns.to(self.args.device), gather
                ),
                "entropy": measure(entropy.to(self.args.device), gather).mean,
            }
        )
        self.kl = self.kl.update(found["kl"], number)
        return [batch for batch, _ in batches]

    def draw(
        self,
        rows: Sequence[TokenizedExample],
        numbers: Sequence[int],
        stream: Stream,
        generation: Any,
        group: int,
    ) -> tuple[list[TokenizedExample], list[list[bool]]]:
        """Prompts with the responses that the policy draws to each, and which of these ended."""
        sampled: list[Sampled] = sample_responses(
            self.policy.model,
            [row.prompt_ids for row in rows],
            numbers=numbers,
            num_responses=group,
            generation=generation,
            stop_ids=stop_ids(self.policy.base, self.template),
            stream=stream,
        )
        answered = [
            replace(row, response_ids=it.response_ids, labels=_SCORED * len(it.response_ids), pairs=())
            for row, it in zip(rows, sampled, strict=True)
        ]
        return answered, [it.ended for it in sampled]

    def text_of(self, ids: Sequence[int]) -> str:
        """A response as text without control tokens."""
        return cast("str", self.template.tokenizer.decode(list(ids), skip_special_tokens=True))

    def judge_rows(
        self, rows: Sequence[TokenizedExample], ended: Sequence[Sequence[bool]]
    ) -> list[list[float]]:
        """The score of each response to each prompt."""
        answered = []
        for row, ends in zip(rows, ended, strict=True):
            prompt, tools = read_conversation(row.conversation)
            for ids, end in zip(row.response_ids, ends, strict=True):
                answered.append(Answered(prompt, tools, row.prompt_ids, ids, end, self.text_of(ids)))
        scores = iter(self.judge.score(answered))
        return [[next(scores) for _ in row.response_ids] for row in rows]

    def _micro_batches(self, rows: Sequence[TokenizedExample]) -> list[tuple[dict[str, Any], list[int]]]:
        """Packed batches of rows of like length, each with the indices of its rows."""
        size = self.args.per_device_train_batch_size
        order = sorted(range(len(rows)), key=lambda i: (-rows[i].num_tokens, i))
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        return [(pack([rows[i] for i in group], self.policy.layout).to_dict(), group) for group in groups]

    @torch.no_grad()
    def measured(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Log-probs under the policy as it is and under the reference, values and entropies (T,), and the KL
        of each response (N,), on the CPU. The first two go into the batch."""
        trainer = self.trainer
        assert trainer is not None
        model = trainer.model_wrapped
        was_training = model.training
        model.eval()
        here = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            policy = response_logps(model, here, entropies=True)
            reference = self.reference.logps(model, here)
        model.train(was_training)
        assert policy.values is not None and policy.entropies is not None
        batch[DRAWN] = {"old_logps": policy.token_logps.cpu(), "old_values": policy.values.cpu()}
        return {
            "reference": reference.token_logps.cpu(),
            "entropies": policy.entropies.cpu(),
            "kls": (policy.logps - reference.logps).cpu(),
        }

    def _normed(self, scores: Tensor) -> Tensor:
        """Scores by the running mean and deviation of all so far, these included, where that is asked for."""
        if not self.config.ppo.ppo_score_norm:
            return scores
        assert self.trainer is not None
        self.moments = self.moments.merge(
            measure(scores.to(self.args.device), self.trainer.accelerator.gather)
        )
        return whiten(scores, self.moments)

    def _advise(
        self, batches: list[tuple[dict[str, Any], list[int]]], packed: list[dict[str, Tensor]], scores: Tensor
    ) -> None:
        """Give each batch its advantages and returns, whitened over the whole rollout."""
        assert self.trainer is not None
        gather, ppo = self.trainer.accelerator.gather, self.config.ppo
        device = self.args.device
        rewards, start = [], 0
        for (batch, _), of_batch in zip(batches, packed, strict=True):
            own = scores[start : (start := start + batch["num_responses"])]
            rewards.append(
                token_rewards(
                    own,
                    batch[DRAWN]["old_logps"],
                    of_batch["reference"],
                    batch["owner"],
                    kl_coef=self.kl.coefficient,
                )
            )
        if ppo.ppo_whiten_rewards:
            moments = measure(torch.cat(rewards).to(device), gather)
            rewards = [whiten(it, moments, keep_mean=True) for it in rewards]
        for (batch, _), reward in zip(batches, rewards, strict=True):
            drawn = batch[DRAWN]
            drawn["advantages"], drawn["returns"] = generalized_advantages(
                reward, drawn["old_values"], batch["owner"], gamma=ppo.ppo_gamma, lam=ppo.ppo_lambda
            )
        moments = measure(torch.cat([batch[DRAWN]["advantages"] for batch, _ in batches]).to(device), gather)
        for batch, _ in batches:
            batch[DRAWN]["advantages"] = whiten(batch[DRAWN]["advantages"], moments)
