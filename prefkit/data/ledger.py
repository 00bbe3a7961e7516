"""What became of the rows of a data set: every one is counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

MAX_REPORTED = 20


@dataclass
class Ledger:
    """The rows of one data set.

    Each is trained on, held out, not sampled (by the key that says so), or rejected (by a reason):
    `num_rows` is the sum of these. `truncated` counts among those trained on, `held_out_truncated` among
    those held out. `pairs` and `held_out_pairs` are what the rows of either compare, and `repeats` the
    further uses of a row within an epoch; none of these is a row. `examples` names the first rejected rows.
    """

    name: str
    places: tuple[str, ...] = ()
    sha256: str = ""
    num_rows: int = 0
    trained: int = 0
    held_out: int = 0
    not_sampled: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    held_out_truncated: int = 0
    pairs: int = 0
    held_out_pairs: int = 0
    repeats: int = 0
    examples: list[str] = field(default_factory=list)

    def reject(self, source: str, reason: str, message: str = "") -> None:
        """Count a row that is not used."""
        self.rejected[reason] += 1
        if len(self.examples) < MAX_REPORTED:
            self.examples.append(f"{source}: {message or reason}")

    @property
    def is_balanced(self) -> bool:
        """Whether every row is accounted for."""
        counted = self.trained + self.held_out + self.not_sampled.total() + self.rejected.total()
        return self.num_rows == counted

    def explain(self) -> str:
        """Why no row of it is there, in words."""
        counts = [f"{count} rejected: {reason}" for reason, count in self.rejected.items()]
        counts += [f"{count} not sampled: {key}" for key, count in self.not_sampled.items()]
        return f"{self.name}: {self.num_rows} rows, {', '.join(counts) or 'none used'}"

    def to_dict(self) -> dict[str, Any]:
        """The ledger as JSON."""
        return {
            "name": self.name,
            "files": list(self.places),
            "sha256": self.sha256,
            "rows": self.num_rows,
            "trained": self.trained,
            "held_out": self.held_out,
            "not_sampled": dict(self.not_sampled),
            "rejected": dict(self.rejected),
            "truncated": self.truncated,
            "held_out_truncated": self.held_out_truncated,
            "pairs": self.pairs,
            "held_out_pairs": self.held_out_pairs,
            "repeats": self.repeats,
            "rejected_examples": self.examples,
        }


def data_report(ledgers: Iterable[Ledger]) -> dict[str, Any]:
    """The ledgers with their totals, as `data_report.json` has them."""
    rows = list(ledgers)
    numbers = ("rows", "trained", "held_out", "truncated", "pairs", "held_out_pairs", "repeats")
    described = [ledger.to_dict() for ledger in rows]
    totals: dict[str, Any] = {name: sum(one[name] for one in described) for name in numbers}
    totals["not_sampled"] = sum(ledger.not_sampled.total() for ledger in rows)
    totals["rejected"] = sum(ledger.rejected.total() for ledger in rows)
    return {"data_sets": described, "totals": totals}
