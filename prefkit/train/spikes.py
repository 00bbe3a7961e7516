"""Steps whose loss stands out, with the rows to blame."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

SPIKE_FILE = "loss_spikes.jsonl"
WINDOW, LEAST, FACTOR = 100, 20, 8.0
# What a loss must rise by at least: a part of the usual one, and a number of nats.
RISE, RISE_NATS = 0.5, 0.05
FEWEST, RISE_AT_FIRST, RISE_NATS_AT_FIRST = 2, 1.0, 1.0
SHOWN_ROWS = 5
# Of a normal distribution, the standard deviation over the median distance from the median.
_SIGMA_OF_MAD = 1.4826


@dataclass(frozen=True)
class Spike:
    """A step whose loss stands out; `rows` are its (row, loss), the highest first."""

    step: int
    loss: float
    usual: float
    rows: Sequence[tuple[str, float]]

    def __str__(self) -> str:
        """One line for the user."""
        rows = ", ".join(f"{row} ({loss:.3g})" for row, loss in self.rows)
        return f"step {self.step}: loss {self.loss:.3g} stands out (usual {self.usual:.3g}); highest: {rows}"

    def to_json(self) -> str:
        """One line of `loss_spikes.jsonl`."""
        rows = [{"row": row, "loss": loss} for row, loss in self.rows]
        facts = {"current_steps": self.step, "loss": self.loss, "usual": self.usual, "rows": rows}
        return json.dumps(facts) + "\n"


class SpikeWatch:
    """The losses of the last `WINDOW` steps.

    One stands out when it lies further above their median than `FACTOR` standard deviations, estimated from
    the median distance, which a few spikes do not move; and by no less than `RISE` and `RISE_NATS` say. Among
    fewer than `LEAST` losses, which tell little of what is usual, the rise alone counts, a larger one.
    """

    def __init__(self, losses: Sequence[float] = ()) -> None:
        self.losses = deque(losses, WINDOW)

    def usual_if_spike(self, loss: float) -> float | None:
        """Add a step's loss; the usual loss where this one stands out, else None.

        >>> watch = SpikeWatch([0.625, 0.75, 0.625, 0.75] * 10)
        >>> watch.usual_if_spike(0.875), watch.usual_if_spike(3.0)
        (None, 0.75)
        """
        before = list(self.losses)
        self.losses.append(loss)
        if len(before) < FEWEST:
            return None
        usual = median(before)
        if len(before) < LEAST:
            least = max(RISE_AT_FIRST * abs(usual), RISE_NATS_AT_FIRST)
        else:
            spread = _SIGMA_OF_MAD * median(abs(value - usual) for value in before)
            least = max(FACTOR * spread, RISE * abs(usual), RISE_NATS)
        return usual if loss - usual > least else None
