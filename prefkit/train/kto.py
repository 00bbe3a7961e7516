"""`stage: kto`: single responses that are judged desirable or undesirable."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prefkit.config.schema import MethodConfig
from prefkit.data.packing import counted
from prefkit.model.policy import LogpsOf
from prefkit.model.reference import Reference
from prefkit.objectives.kto import kl_estimate, kto_loss
from prefkit.objectives.logps import ResponseLogps
from prefkit.objectives.metrics import judged_metrics
from prefkit.train.stages import StageOutput, check_first_losses, check_identity


class KtoStage:
    """KTO, where each row has a judged response and after it its partner (`data.partners`).

    `policy_logps` computes the policy's log-probs of a batch; those of partners enter as constants. `gather`
    joins a vector from all ranks; `expects_identity` asks for the first batch to be checked against
    `IDENTITY_TOLERANCE[dtype]`.
    """

    joins_ranks = True

    def __init__(
        self,
        method: MethodConfig,
        reference: Reference,
        policy_logps: LogpsOf,
        dtype: torch.dtype,
        router_loss_weight: float = 0.0,
    ) -> None:
        self.name = method.stage
        self.method = method
        self.reference = reference
        self.policy_logps = policy_logps
        self.dtype = dtype
        self.router_loss_weight = router_loss_weight
        self.expects_identity = False
        self.gather: Callable[[Tensor], Tensor] = lambda values: values
        self.numbers = {
            "beta": method.pref_beta,
            "chosen_weight": method.kto_chosen_weight,
            "rejected_weight": method.kto_rejected_weight,
        }

    def compute(self, model: nn.Module, batch: dict[str, Any]) -> StageOutput:
        """Losses and metrics of the judged responses of a packed batch.

        Where it is a piece of a micro-batch, its `statistics` are those of the whole. The router loss alone
        is taken over the piece.

        Raises `IdentityError` when the first batch shows that the reference is not what it should be.
        """
        policy, reference = self.policy_logps(model, batch), self.reference.logps(model, batch)
        if self.expects_identity:
            check_identity(policy, reference, self.reference, self.dtype, batch["rows"])
        judged, partners = _places(batch)
        desirable = torch.tensor(
            [label == "desirable" for label in batch["labels"] if label != "partner"], device=judged.device
        )
        given = batch.get("statistics")
        statistics = (
            self._kl([counted(_logratios(policy, reference, partners), batch)]) if given is None else given
        )
        logratios = policy.logps[judged] - reference.logps[judged]
        losses = kto_loss(logratios, desirable, **statistics, **self.numbers)
        if self.expects_identity:
            equal = kto_loss(torch.zeros_like(losses), desirable, kl=0.0, **self.numbers)
            check_first_losses(losses, equal, self.dtype)
        self.expects_identity = False
        if self.method.pref_ftx:
            losses = losses - self.method.pref_ftx * desirable * policy.mean_logps[judged]
        rewards = self.method.pref_beta * logratios
        metrics = judged_metrics(policy.logps[judged], rewards, desirable, statistics["kl"])
        if policy.router_loss is not None:
            losses = losses + self.router_loss_weight * policy.router_loss
            metrics["router_loss"] = policy.router_loss.detach().expand(len(losses))
        read = {
            "reference logps": reference.logps[judged],
            "partner's logps": policy.logps[partners].detach(),
            "partner's reference logps": reference.logps[partners],
        }
        return StageOutput(losses, metrics, read)

    def statistics(self, model: nn.Module, pieces: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
        """The KL of a micro-batch that is computed in pieces. Costs a pass over them, without gradient."""
        logratios = []
        for piece in pieces:
            policy, reference = self.policy_logps(model, piece), self.reference.logps(model, piece)
            logratios.append(counted(_logratios(policy, reference, _places(piece)[1]), piece))
        return self._kl(logratios)

    def forget_step(self) -> None:
        """Nothing is gathered in a step."""

    def end_step(self) -> None:
        """Nothing moves with a step."""

    def state(self) -> dict[str, Any]:
        """Nothing besides weights."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""

    def _kl(self, logratios: list[Tensor]) -> dict[str, Tensor]:
        """The estimate from the partners of all ranks, whose numbers may differ."""
        own = torch.cat(logratios)
        table = self.gather(torch.stack([own.sum(), own.new_tensor(len(own))])).view(-1, 2)
        return {"kl": kl_estimate(*table.sum(0))}


def _places(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Which of the responses of a batch are judged, and which are their partners, (M,) each."""
    is_partner = torch.tensor([label == "partner" for label in batch["labels"]], device=batch["owner"].device)
    return (~is_partner).nonzero()[:, 0], is_partner.nonzero()[:, 0]


def _logratios(policy: ResponseLogps, reference: ResponseLogps, places: Tensor) -> Tensor:
    return (policy.logps[places] - reference.logps[places]).detach()
