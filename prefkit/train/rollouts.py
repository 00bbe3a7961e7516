"""Rollouts: responses are drawn from the policy, judged, and learnt from in several passes.

One rollout is one epoch of the Trainer, whose loader is a `RolloutSource`: the Trainer asks for the batches
of an epoch when the last update of the one before is done, so that what is drawn is always drawn from the
newest policy. Where the run is in its prompts follows from the number of the epoch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prefkit.config.schema import RunConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import DRAWN
from prefkit.data.turns import Turns
from prefkit.model.rollout import Stream
from prefkit.objectives.ppo import AdaptiveKL, Moments, explained_variance, measure, whiten
from prefkit.train.advantages import MicroBatch, add_advantages, scale_losses
from prefkit.train.answering import Answerer, Drawn
from prefkit.train.ppo import PpoStage
from prefkit.train.rollout_count import prompts_per_rollout, updates_per_step

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from prefkit.train.trainer import PrefTrainer


@dataclass(frozen=True)
class Told:
    """What is known of the responses of a rollout on this rank: vectors (N,), on the CPU."""

    scores: Tensor
    kls: Tensor
    lengths: Tensor
    ended: Tensor

    def means(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Means over the responses of all ranks."""
        columns = torch.stack([self.scores, self.kls, self.lengths, self.ended, torch.ones_like(self.scores)])
        *sums, number = gather(columns.sum(1).to(device)[None]).sum(0).tolist()
        names = ("score", "kl", "response_length", "eos_rate")
        return {name: total / number for name, total in zip(names, sums, strict=True)}


class RolloutSource:
    """The batches of one rollout after the other, as the Trainer's loader: its length is that of one.

    `trainer` is set before training, and `show` tells the user what goes on, in a word. `answers` are rows
    to learn as they are beside what is drawn, for `ppo_ptx`.
    """

    def __init__(
        self,
        config: RunConfig,
        args: TrainingArguments,
        answerer: Answerer,
        stage: PpoStage,
        prompts: Sequence[TokenizedExample],
        answers: Sequence[TokenizedExample],
    ) -> None:
        self.config, self.args = config, args
        self.answerer, self.stage = answerer, stage
        shuffles = not config.data.disable_shuffling
        self.prompts, self.answers = (Turns(rows, args.seed, shuffles) for rows in (prompts, answers))
        self.trainer: PrefTrainer | None = None
        self.show: Callable[[str], None] = lambda what: None
        self.epoch = 0
        ppo = config.ppo
        self.kl = AdaptiveKL(ppo.ppo_init_kl, ppo.ppo_target, ppo.ppo_kl_horizon)
        self.moments = Moments()  # of all scores so far, where they are scaled by them
        self.window: list[dict[str, float]] = []  # numbers of the rollouts since the last line of the log
        self.latest: dict[str, float] = {}  # those of the newest rollout, by the names of the log
        self.seconds: dict[str, float] = {}
        self._learning_since: float | None = None

    @property
    def number(self) -> int:
        """How many rollouts were learnt from."""
        return self._trainer.state.global_step // updates_per_step(self.config)

    @property
    def _trainer(self) -> PrefTrainer:
        assert self.trainer is not None
        return self.trainer

    def __len__(self) -> int:
        """Micro-batches of a rollout on this rank."""
        return updates_per_step(self.config) * self.args.gradient_accumulation_steps

    def set_epoch(self, epoch: int) -> None:
        """Say which rollout is next; the Trainer does, also after a resume."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches, counts = self._make()
        self.stage.expects_identity = not self.config.tuning.lora_dropout
        self.show("learning")
        size = self.args.gradient_accumulation_steps
        for number in range(self.config.ppo.ppo_epochs):
            drawn = np.random.default_rng((self.args.seed, self.epoch, number))
            for update in drawn.permutation(self.config.ppo.ppo_buffer_size).tolist():
                own = slice(update * size, (update + 1) * size)
                if self.config.ppo.ppo_ptx:
                    scale_losses(batches[own], counts[own].sum(0), self.config.ppo.ppo_ptx)
                self._learning_since = time.perf_counter()
                yield from (one.batch for one in batches[own])

    def end_update(self) -> None:
        """Say that the batches of an update were learnt from."""
        assert self._learning_since is not None
        self._add_seconds("learn", time.perf_counter() - self._learning_since)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON; the same on all ranks."""
        return {"kl": asdict(self.kl), "moments": asdict(self.moments), "window": self.window}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.kl, self.moments = AdaptiveKL(**state["kl"]), Moments(**state["moments"])
        self.window = state["window"]

    def numbers(self) -> dict[str, float]:
        """The means of the rollouts since this was last asked for, by the names of the log."""
        window, self.window = self.window, []
        seconds, self.seconds = self.seconds, {}
        names = window[0] if window else ()
        found = {f"ppo/{name}": sum(it[name] for it in window) / len(window) for name in names}
        return found | {f"ppo/{phase}_seconds": round(spent, 3) for phase, spent in seconds.items()}

    @contextmanager
    def _phase(self, name: str, shown: str) -> Iterator[None]:
        self.show(shown)
        start = time.perf_counter()
        yield
        self._add_seconds(name, time.perf_counter() - start)

    def _add_seconds(self, phase: str, spent: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    def _own_numbers(self) -> list[int]:
        """The numbers, in this rollout, of the prompts that are this rank's: a part of those of each update.

        An update has consecutive ones, the same for any number of ranks.
        """
        own, rank, world = self._prompts_per_update, self.args.process_index, self.args.world_size
        starts = ((update * world + rank) * own for update in range(self.config.ppo.ppo_buffer_size))
        return [number for start in starts for number in range(start, start + own)]

    @property
    def _prompts_per_update(self) -> int:
        """Prompts of an update on this rank."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps

    def _make(self) -> tuple[list[MicroBatch], Tensor]:
        """Draw and judge: the micro-batches of one pass with what is learnt from them, and of each, on all
        ranks, the number of drawn tokens and of tokens of answers, (batches, 2)."""
        trainer, ppo = self._trainer, self.config.ppo
        gather, device = trainer.accelerator.gather, self.args.device
        numbers = self._own_numbers()
        first = self.epoch * prompts_per_rollout(self.config, self.args)
        with self._phase("generate", "drawing responses"):
            drawn = self.answerer.draw(
                trainer,
                [self.prompts[first + number] for number in numbers],
                numbers,
                ppo.ppo_group_size,
                self.config.generation,
                Stream(self.args.seed, self.epoch),
            )
        trainer.stop_if_asked()
        with self._phase("score", "scoring"):
            scores = self.answerer.score(trainer, drawn)
        with self._phase("forward", "measuring"):
            answers = [self.answers[first + number] for number in numbers] if ppo.ppo_ptx else []
            batches = self._pack(drawn, answers)
        told = _tell(batches, drawn, scores)
        found = told.means(gather, device)
        of_batches = self._normed(told.scores).split([one.num_drawn for one in batches])
        add_advantages(batches, of_batches, ppo, self.kl.coefficient, gather, device)
        self.window.append(found | self._numbers_of(batches))
        self.latest = {f"ppo/{name}": value for name, value in self.window[-1].items()}
        self.kl = self.kl.update(
            found["kl"], prompts_per_rollout(self.config, self.args) * ppo.ppo_group_size
        )
        counts = torch.tensor([[one.num_tokens, one.num_answer_tokens] for one in batches], device=device)
        return batches, gather(counts[None]).sum(0).cpu()

    def _pack(self, drawn: Drawn, answers: Sequence[TokenizedExample]) -> list[MicroBatch]:
        """Packed batches, update by update, of drawn rows of like length, each with as many answers where
        there are any."""
        rows, size, own = drawn.rows, self.args.per_device_train_batch_size, self._prompts_per_update
        order = sorted(range(len(rows)), key=lambda i: (i // own, -rows[i].num_tokens, i))
        batches = []
        for start in range(0, len(order), size):
            places = order[start : start + size]
            batch = self.answerer.policy.packer([rows[i] for i in places] + [*answers[start : start + size]])
            num_drawn = sum(len(rows[i].response_ids) for i in places)
            batches.append(MicroBatch(batch, places, num_drawn, self.answerer.measure(self._trainer, batch)))
        return batches

    def _numbers_of(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """What the log says of a rollout besides what is known of its responses."""
        gather, device = self._trainer.accelerator.gather, self.args.device
        values, entropies = (
            torch.cat([one.drawn(getattr(one.measured, name)) for one in batches]).to(device)
            for name in ("values", "entropies")
        )
        returns = torch.cat([one.drawn(one.batch[DRAWN]["returns"]) for one in batches]).to(device)
        return {
            "kl_coef": self.kl.coefficient,
            "value_explained_variance": explained_variance(values, returns, gather),
            "entropy": measure(entropies, gather).mean,
        }

    def _normed(self, scores: Tensor) -> Tensor:
        """Scores by the running mean and deviation of all so far, these included, where that is asked for."""
        if not self.config.ppo.ppo_score_norm:
            return scores
        own = measure(scores.to(self.args.device), self._trainer.accelerator.gather)
        self.moments = self.moments.merge(own)
        return whiten(scores, self.moments)


def _tell(batches: Sequence[MicroBatch], drawn: Drawn, scores: Sequence[Sequence[float]]) -> Told:
    """What is known of each response, in the order of the batches."""
    places = [place for one in batches for place in one.places]
    return Told(
        torch.tensor([score for i in places for score in scores[i]]),
        torch.cat([one.measured.kls[: one.num_drawn] for one in batches]),
        torch.tensor([float(len(ids)) for i in places for ids in drawn.rows[i].response_ids]),
        torch.tensor([float(end) for i in places for end in drawn.ended[i]]),
    )
