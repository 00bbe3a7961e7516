"""The stage of a reward model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from prefkit.config.schema import MethodConfig
from prefkit.model.reward import response_scores
from prefkit.objectives.metrics import reward_metrics
from prefkit.objectives.pairwise import Rewards
from prefkit.objectives.reward import bradley_terry_loss
from prefkit.train.stages import StageOutput


class RewardStage:
    """Scores of the responses, compared in pairs (`bradley_terry_loss`).

    A pair's loss depends on nothing but the pair, so that there is nothing to keep between batches.
    """

    name = "rm"
    joins_ranks = False
    gather: Callable[[Tensor], Tensor]

    def __init__(self, method: MethodConfig) -> None:
        self.center = method.rm_center_coefficient

    def compute(self, model: nn.Module, batch: dict[str, Any]) -> StageOutput:
        """Losses and metrics of a packed batch; the rewards are the scores."""
        chosen, rejected = response_scores(model, batch)[batch["pairs"]].unbind(1)
        losses = bradley_terry_loss(chosen, rejected, batch["margins"], self.center) * batch["weights"]
        return StageOutput(losses, reward_metrics(Rewards(chosen, rejected)))

    def statistics(self, model: nn.Module, pieces: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def forget_step(self) -> None:
        """Nothing was gathered."""

    def end_step(self) -> None:
        """Nothing was gathered."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""
