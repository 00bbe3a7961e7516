"""What draws the responses of a rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from prefkit.config.schema import GenerationConfig, RunConfig
from prefkit.data.vision import Seen
from prefkit.model.rollout import Sampled, Stream, sample_responses
from prefkit.train.policy import Policy, Say
from prefkit.train.strategy import Strategy, together


class Engine(Protocol):
    """Draws from the newest weights of the policy."""

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        numbers: Sequence[int],
        num_responses: int,
        generation: GenerationConfig,
        stop_ids: Sequence[int],
        stream: Stream,
        seen: Sequence[Seen] = (),
    ) -> list[Sampled]:
        """Responses to each prompt, as `sample_responses`."""

    def close(self) -> None:
        """Let go of what it holds besides the policy."""


@dataclass(frozen=True)
class PolicyEngine:
    """The model that is trained draws by itself; `beat` is called for each token."""

    policy: Policy
    beat: Callable[[], None]
    strategy: Strategy

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        numbers: Sequence[int],
        num_responses: int,
        generation: GenerationConfig,
        stop_ids: Sequence[int],
        stream: Stream,
        seen: Sequence[Seen] = (),
    ) -> list[Sampled]:
        """Responses to each prompt, as `sample_responses`."""
        return sample_responses(
            self.policy.model,
            prompts,
            numbers=numbers,
            num_responses=num_responses,
            generation=generation,
            stop_ids=stop_ids,
            stream=stream,
            all_done=self._all_done,
            seen=seen,
        )

    def close(self) -> None:
        """Nothing: it holds the policy alone."""

    def _all_done(self, here: bool) -> bool:
        self.beat()
        return bool(together(self.strategy, torch.min, int(here)))


def build_engine(
    config: RunConfig, policy: Policy, beat: Callable[[], None], say: Say, strategy: Strategy
) -> Engine:
    """The engine that `rollout_engine` names. Raises `UserError` where it cannot be had."""
    if config.ppo.rollout_engine == "transformers":
        return PolicyEngine(policy, beat, strategy)
    from prefkit.train.vllm_engine import open_vllm_engine

    return open_vllm_engine(config, policy, say)
