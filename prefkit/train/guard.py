"""No update and no save with a number that is not finite; steps whose loss stands out are logged.

It costs next to nothing: a sum over finite numbers is looked at, which the log needs anyway, and only when
that is not finite does anything search for the number to blame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from prefkit.config.errors import UserError
from prefkit.data.packing import rows_of_losses
from prefkit.train.spikes import SHOWN_ROWS, Spike, SpikeWatch

_SHOWN = 5
_ADVICE = (
    "The same command would come to the same. If the loss rose before, a smaller learning_rate or "
    "max_grad_norm helps, or bf16 for fp16; otherwise look at these rows. With other keys it is another run: "
    "set another output_dir, or overwrite_output_dir: true. Checkpoints saved before are whole and finite, "
    "but may be bad."
)


class NotFinite(UserError):
    """A loss, log-prob, reward, gradient, weight or state is NaN or infinite; the message says which."""

    exit_code = 65


@dataclass(frozen=True)
class Seen:
    """Numbers of a micro-batch: the batch, and by name of what they are a vector (M,), `loss` among them.

    Whatever others are computed from comes first, since a report begins with the first that is wrong.
    """

    batch: Mapping[str, Any]
    values: Mapping[str, Tensor]

    def rows(self) -> list[str]:
        """The name of the row of each of the M values."""
        return rows_of_losses(self.batch)


@dataclass(frozen=True)
class StepNumbers:
    """What all ranks know of a step: its mean loss, and the number of the signal that came, or 0."""

    loss: float
    signal: int


class StepGuard:
    """Looks at the numbers of each optimiser step before its update.

    `gather` joins vectors (n,) from all ranks to (ranks * n,); `stage` is what messages call the stage;
    `report` gets each `Spike`; without it losses are not compared.
    """

    def __init__(
        self, stage: str, gather: Callable[[Tensor], Tensor], report: Callable[[Spike], None] | None
    ) -> None:
        self.stage = stage
        self.gather = gather
        self.report = report
        self.watch = SpikeWatch()
        self._seen: list[Seen] = []

    def see(self, seen: Seen) -> None:
        """Note the numbers of a micro-batch."""
        self._seen.append(seen)

    def forget(self) -> None:
        """Drop what was noted since the last step: it will be computed again."""
        self._seen = []

    def end_step(
        self,
        step: int,
        sums: Mapping[str, tuple[float, float]],
        norm: float,
        model: nn.Module,
        signal: int = 0,
        scaled: bool = False,
    ) -> StepNumbers:
        """Check a step before its update.

        `sums` has (sum, count) of each number on this rank, `norm` the gradient's; `signal` is the number of
        a signal that this rank got, `scaled` says that a loss scaler skips updates by itself.

        Raises `NotFinite`, on every rank, when any rank has a number that is not finite.
        """
        is_finite = all(math.isfinite(total) for total, _ in sums.values())
        is_finite = is_finite and (math.isfinite(norm) or scaled)
        loss, count = sums["loss"]
        facts = torch.tensor([loss, count, not is_finite, signal], dtype=torch.float64)
        table = self.gather(facts.to(next(model.parameters()).device, torch.float32)).view(-1, 4)
        loss, count, num_bad, _ = table.sum(0).tolist()
        if num_bad:
            found = gather_object([text for seen in self._seen for text in not_finite(seen)])
            raise NotFinite(self._describe(step, found or gather_object(self._gradients(model))))
        mean = loss / count
        usual = self.watch.usual_if_spike(mean) if self.report else None
        if self.report and usual is not None:
            self.report(Spike(step, mean, usual, self._highest()))
        self._seen = []
        return StepNumbers(mean, int(table[:, 3].max()))

    def state(self) -> list[float]:
        """The losses that the next ones are compared with."""
        return list(self.watch.losses)

    def load_state(self, losses: list[float]) -> None:
        """Take back what `state` gave."""
        self.watch = SpikeWatch(losses)

    def _highest(self) -> list[tuple[str, float]]:
        """The rows of the highest losses, on any rank."""
        losses = [(seen.rows(), seen.values["loss"].tolist()) for seen in self._seen]
        own = [pair for names, values in losses for pair in zip(names, values, strict=True)]
        rows: list[tuple[str, float]] = gather_object(sorted(own, key=lambda pair: -pair[1])[:SHOWN_ROWS])
        return sorted(rows, key=lambda pair: -pair[1])[:SHOWN_ROWS]

    def _gradients(self, model: nn.Module) -> list[str]:
        """The gradients of this rank that are not finite, in words."""
        gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
        names = [name for name, gradient in gradients if not gradient.isfinite().all()]
        rows = list(dict.fromkeys(row for seen in self._seen for row in seen.batch["rows"]))
        what = f"the gradient of {_some(names)}" if names else "the norm of the gradient"
        return [f"{what} is not finite, in a step of {_some(rows)}"]

    def _describe(self, step: int, found: list[str]) -> str:
        lines = list(dict.fromkeys(found))
        more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        return "\n  ".join(
            [
                f"{self.stage}, step {step}: a number is not finite, so nothing was updated or saved:",
                *lines[:_SHOWN],
                *more,
                _ADVICE,
            ]
        )


def not_finite(seen: Seen) -> Iterator[str]:
    """Each row of a micro-batch with a number that is not finite, in words, one line for each number."""
    for name, values in seen.values.items():
        if not values.isfinite().all():
            pairs = zip(seen.rows(), values.tolist(), strict=True)
            bad = [pair for pair in pairs if not math.isfinite(pair[1])]
            rows = _some([row if math.isnan(value) else f"{row} ({value:g})" for row, value in bad])
            yield f"{name} is {'NaN' if math.isnan(bad[0][1]) else 'infinite'} for {rows}"


def check_finite(
    what: str, named: Iterable[tuple[str, Tensor]], gather: Callable[[Tensor], Tensor] = lambda values: values
) -> None:
    """Raises `NotFinite`, on every rank that `gather` joins, when a tensor of one has a number that is not
    finite; the message begins with `what`."""
    tensors = [(name, it) for name, it in named if it.is_floating_point() and it.numel()]
    norm = get_total_norm([it for _, it in tensors], norm_type=math.inf) if tensors else torch.zeros(())
    device = tensors[0][1].device if tensors else None
    if not gather((~norm.isfinite())[None].to(device)).any():
        return
    bad = [name for name, it in tensors if not it.isfinite().all()] or ["the part of another process"]
    raise NotFinite(f"{what}: not finite in {_some(bad)}, so nothing was saved.\n  {_ADVICE}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
