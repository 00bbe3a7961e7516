"""What a stage is: how a batch becomes losses and metrics; and the checks that stages share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prefkit.config.errors import UserError
from prefkit.model.reference import Reference
from prefkit.objectives.logps import ResponseLogps

# How far policy and reference may differ, in nats per token, where they are the same weights; the loss may
# differ by ten times the number. The forward is the same, so that the difference is 0 but for DoRA, which
# rescales its weights in rounded numbers.
IDENTITY_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class IdentityError(UserError):
    """Policy and reference differ before training although they must not."""


@dataclass(frozen=True)
class StageOutput:
    """Losses (M,), with gradient, and metrics by name, (M,) each, without; `reference` has the log-probs by
    name, (M,) each, that the losses rest on besides those of the policy, and `largest` numbers, () each, of
    which the log has the largest since its last line.

    M counts pairs, or judged responses, or tokens that were drawn.
    """

    losses: Tensor
    metrics: dict[str, Tensor]
    reference: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)

    def of_no_rows(self) -> StageOutput:
        """The same names, of nothing: M is 0."""
        metrics, reference = (
            {name: values[:0] for name, values in named.items()} for named in (self.metrics, self.reference)
        )
        return replace(self, losses=self.losses[:0], metrics=metrics, reference=reference, largest={})


class Stage(Protocol):
    """What the trainer asks of a stage.

    `name` is what messages call it; `gather` joins a vector from all ranks; `joins_ranks` says that a loss
    takes something from all rows of a micro-step, on whatever rank they are.
    """

    name: str
    joins_ranks: bool
    gather: Callable[[Tensor], Tensor]

    def compute(self, model: nn.Module, batch: dict[str, Any]) -> StageOutput:
        """Losses and metrics of a packed batch; a filler adds nothing to what is gathered.

        Where it is a piece of a micro-batch, its `statistics` are those of the whole.
        """

    def statistics(self, model: nn.Module, pieces: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
        """What the losses of a micro-batch take from all of it, () each, when it is computed in pieces.

        Costs a pass over the pieces, to be made without gradient; none where the loss has no such number.
        """

    def forget_step(self) -> None:
        """Drop what the optimiser step has gathered so far, since it is computed anew."""

    def end_step(self) -> None:
        """After an optimiser step."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides weights, as JSON."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""


def check_identity(
    policy: ResponseLogps,
    reference: ResponseLogps,
    source: Reference,
    dtype: torch.dtype,
    rows: tuple[str, ...],
) -> None:
    """Raises `IdentityError` unless policy and reference agree on `rows`, as before the first update;
    `source` is where the reference's numbers are from."""
    tolerance = IDENTITY_TOLERANCE[dtype]
    difference = (policy.token_logps.detach() - reference.token_logps).abs().mean().item()
    if not difference <= tolerance:
        raise IdentityError(
            "Before the first update policy and reference must agree, but their log-probs differ by "
            f"{difference:.2g} nats per token (tolerance {tolerance:g} in {dtype}) on "
            f"{', '.join(rows)}. The reference is {source.describe()}. Nothing was trained: "
            "every margin would start from a wrong zero."
        )


def check_first_losses(losses: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raises `IdentityError` unless losses (M,) are as expected where policy and reference are equal."""
    slack = 10 * IDENTITY_TOLERANCE[dtype]
    if not torch.allclose(losses.detach(), expected, rtol=slack, atol=slack):
        raise IdentityError(
            f"Before the first update the loss must be {expected.mean():.4f}, its value where policy and "
            f"reference agree, but it is {losses.mean():.4f} (tolerance {slack:g} in {dtype}). "
            "Nothing was trained."
        )
