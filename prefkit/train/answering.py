"""Prompts answered by the policy, and what is then known of the answers: in rollouts and in evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from prefkit.config.schema import GenerationConfig
from prefkit.data.conversation import read_conversation
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Label
from prefkit.data.packing import see
from prefkit.data.template import ChatTemplate
from prefkit.model.generate import stop_ids
from prefkit.model.policy import response_logps
from prefkit.model.reference import Reference
from prefkit.model.rollout import Stream
from prefkit.train.answered import Answered, Judge, JudgeFailed, JudgeOfAnotherFailed
from prefkit.train.engine import Engine
from prefkit.train.policy import Policy

if TYPE_CHECKING:
    from prefkit.train.trainer import PrefTrainer

_SCORED: tuple[Label, ...] = ("scored",)


@dataclass(frozen=True)
class Drawn:
    """Prompts with the responses that were drawn to each, and of each prompt which of these ended."""

    rows: list[TokenizedExample]
    ended: list[list[bool]]


@dataclass(frozen=True)
class Measured:
    """Of the tokens of a packed batch, (T,) each on the CPU: log-probs, values and entropies under the policy
    as it is, log-probs under the reference; of each response its summed log-ratio, (N,)."""

    logps: Tensor
    values: Tensor
    entropies: Tensor
    reference: Tensor
    kls: Tensor


@dataclass(frozen=True)
class Answerer:
    """Draws responses from the policy, has them judged, and measures what they are to it."""

    policy: Policy
    reference: Reference
    judge: Judge
    engine: Engine
    template: ChatTemplate
    generation: GenerationConfig
    missing_eos_penalty: float = 0.0

    def draw_greedy(
        self, trainer: PrefTrainer, rows: Sequence[TokenizedExample], longest: int | None = None
    ) -> Drawn:
        """The likeliest tokens as the one response to each prompt, `longest` at most if that is given."""
        most = min(longest or self.generation.max_new_tokens, self.generation.max_new_tokens)
        greedy = replace(self.generation, do_sample=False, max_new_tokens=most)
        return self.draw(trainer, rows, range(len(rows)), 1, greedy, Stream(0, 0))

    def draw(
        self,
        trainer: PrefTrainer,
        rows: Sequence[TokenizedExample],
        numbers: Sequence[int],
        num_responses: int,
        generation: GenerationConfig,
        stream: Stream,
    ) -> Drawn:
        """Responses to the prompts of rows, in the precision that is trained in."""
        with trainer.compute_loss_context_manager():
            sampled = self.engine.draw(
                [row.prompt_ids for row in rows],
                numbers=numbers,
                num_responses=num_responses,
                generation=generation,
                stop_ids=stop_ids(self.policy.base, self.template),
                stream=stream,
                seen=[see(row, self.policy.packer.vision) for row in rows],
            )
        answered = [
            replace(row, response_ids=it.response_ids, labels=_SCORED * len(it.response_ids), pairs=())
            for row, it in zip(rows, sampled, strict=True)
        ]
        return Drawn(answered, [it.ended for it in sampled])

    def text_of(self, ids: Sequence[int]) -> str:
        """A response as text without control tokens."""
        return cast("str", self.template.tokenizer.decode(list(ids), skip_special_tokens=True))

    def score(self, trainer: PrefTrainer, drawn: Drawn) -> list[list[float]]:
        """The score of each response to each prompt; one that did not end loses `missing_eos_penalty`.

        Raises `JudgeFailed`, on all ranks when it could not be had on one.
        """
        answered = []
        for row, ends in zip(drawn.rows, drawn.ended, strict=True):
            prompt, tools = read_conversation(row.conversation)
            for ids, end in zip(row.response_ids, ends, strict=True):
                text = self.text_of(ids)
                answered.append(Answered(prompt, tools, row.prompt_ids, ids, end, text, row.images))
        failure, found = None, []
        try:
            found = self.judge.score(answered)
        except JudgeFailed as error:
            failure = error
        failed = torch.tensor([failure is not None], device=trainer.args.device)
        if trainer.accelerator.gather(failed).any():
            raise failure or JudgeOfAnotherFailed("Another process could not have its responses judged.")
        scores = iter(found)
        return [
            [next(scores) - (0 if end else self.missing_eos_penalty) for end in ends] for ends in drawn.ended
        ]

    @torch.no_grad()
    def measure(self, trainer: PrefTrainer, batch: dict[str, Any]) -> Measured:
        """What policy and reference say of a packed batch, by the forward of training."""
        model = trainer.model_wrapped
        was_training = model.training
        model.eval()
        here = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            policy = response_logps(model, here, entropies=True)
            reference = self.reference.logps(model, here)
        model.train(was_training)
        assert policy.values is not None and policy.entropies is not None
        return Measured(
            policy.token_logps.cpu(),
            policy.values.cpu(),
            policy.entropies.cpu(),
            reference.token_logps.cpu(),
            (policy.logps - reference.logps).cpu(),
        )
