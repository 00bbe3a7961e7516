"""`stage: ppo`: responses that were drawn from the policy, and how good each token of them turned out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prefkit.config.errors import UserError
from prefkit.config.schema import PpoConfig
from prefkit.data.packing import DRAWN
from prefkit.model.policy import response_logps
from prefkit.objectives.ppo import policy_loss, policy_metrics, value_loss
from prefkit.train.stages import StageOutput

# How far the ratio of the policy to the one that drew may be from 1 before the first update of a rollout.
RATIO_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class RatioError(UserError):
    """Before the first update of a rollout the policy is not the one that drew it."""


class PpoStage:
    """The clipped losses of policy and value of a packed batch of drawn responses, which has in `drawn` their
    `old_logps`, `old_values`, `advantages` and `returns`, (T,) each. Where it has answers to learn as they
    are too, `is_answer` (T,) tells their tokens, whose loss is the negative log-likelihood, and `scale` (T,)
    what the loss of each token is multiplied by.

    `expects_identity` asks for the ratio of the next batch to be 1; `RolloutSource` sets it for the first of
    each rollout. The KL and the scores are kept there too.
    """

    joins_ranks = False

    def __init__(self, config: PpoConfig, dtype: torch.dtype, router_loss_weight: float = 0.0) -> None:
        self.name = "ppo"
        self.config = config
        self.dtype = dtype
        self.router_loss_weight = router_loss_weight
        self.gather: Callable[[Tensor], Tensor] = lambda values: values
        self.expects_identity = False

    def compute(self, model: nn.Module, batch: dict[str, Any]) -> StageOutput:
        """Losses and metrics of each token of the responses.

        Raises `RatioError` when the first batch of a rollout shows that log-probs are not what they were.
        """
        policy = response_logps(model, batch)
        assert policy.values is not None
        drawn: dict[str, Tensor] = batch[DRAWN]
        old = drawn["old_logps"]
        if self.expects_identity:
            self._check_ratio(policy.token_logps.detach(), old, batch["rows"])
            self.expects_identity = False
        config = self.config
        logps = policy.token_logps
        of_policy = policy_loss(logps, old, drawn["advantages"], clip=config.ppo_clip)
        of_value = value_loss(
            policy.values, drawn["old_values"], drawn["returns"], clip=config.ppo_value_clip
        )
        losses = of_policy + config.ppo_value_coefficient * of_value
        moved = policy_metrics(logps, old, clip=config.ppo_clip)
        metrics = {f"ppo/{name}": moved[name] for name in ("clip_fraction", "approx_kl")}
        metrics |= {"ppo/policy_loss": of_policy.detach(), "ppo/value_loss": of_value.detach()}
        ratios = moved["ratio"]
        if (is_answer := drawn.get("is_answer")) is not None:
            losses = torch.where(is_answer, -logps, losses) * drawn["scale"]
            metrics |= {"is_answer": is_answer.float(), "ppo/ptx_loss": -logps.detach()}
            ratios = ratios[~is_answer]
        if policy.router_loss is not None:
            losses = losses + self.router_loss_weight * policy.router_loss
            metrics["router_loss"] = policy.router_loss.detach().expand(len(losses))
        reference = {"old logps": old, "advantages": drawn["advantages"]}
        largest = {"ppo/ratio_max": ratios.max()} if len(ratios) else {}
        return StageOutput(losses, metrics, reference, largest)

    def _check_ratio(self, logps: Tensor, old: Tensor, rows: tuple[str, ...]) -> None:
        tolerance = RATIO_TOLERANCE[self.dtype]
        apart = ((logps - old).exp() - 1).abs().max().item()
        if not apart <= tolerance:
            raise RatioError(
                "Before the first update of a rollout the policy must be the one that drew it, but the ratio "
                f"of their probabilities is {apart:.2g} away from 1 (tolerance {tolerance:g} in "
                f"{self.dtype}) on {', '.join(rows)}."
            )

    def statistics(self, model: nn.Module, pieces: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def forget_step(self) -> None:
        """Nothing was gathered."""

    def end_step(self) -> None:
        """Nothing was gathered."""

    def state(self) -> dict[str, Any]:
        """Nothing: what moves between rollouts is kept with them."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""
