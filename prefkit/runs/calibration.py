"""Scores of held-out pairs: how often the higher one is right, and whether their difference says how surely.

By the model's own account the chosen response is better with probability `sigmoid(margin)`, the margin being
the score of chosen less that of rejected.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefkit.files import naming, replace_text

SCORES_FILE = "generated_predictions.jsonl"
CALIBRATION_FILE, CALIBRATION_PLOT = "calibration.json", "calibration.png"
_BINS = 10


@dataclass(frozen=True)
class ScoredPair:
    """The scores of a pair and the tokens of its responses; `source` is `file:row`."""

    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int
    source: str

    @property
    def margin(self) -> float:
        """The score of chosen less that of rejected."""
        return self.chosen - self.rejected

    @property
    def confidence(self) -> float:
        """Probability, by the scores, that the response with the higher one is better: from 1/2 to 1."""
        return 1 / (1 + math.exp(-abs(self.margin)))

    @property
    def length_gap(self) -> int:
        """Tokens of chosen less those of rejected."""
        return self.chosen_tokens - self.rejected_tokens


def write_scored_pairs(pairs: Sequence[ScoredPair], folder: Path) -> None:
    """Write `generated_predictions.jsonl`, a line for each pair, scores as exact as they were computed."""
    lines = (
        json.dumps({"chosen": pair.chosen, "rejected": pair.rejected, "source": pair.source}) + "\n"
        for pair in pairs
    )
    replace_text(folder / SCORES_FILE, "".join(lines))


def write_calibration(pairs: Sequence[ScoredPair], folder: Path) -> None:
    """Write `calibration.json` and draw it as `calibration.png`."""
    report = calibrate(pairs)
    replace_text(folder / CALIBRATION_FILE, json.dumps(report, indent=1) + "\n")
    _draw(report, folder / CALIBRATION_PLOT)


def calibrate(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """The report as JSON values.

    `expected_calibration_error` is that of https://arxiv.org/abs/1706.04599, Eq. 3, with ten bins of
    confidence from 1/2 to 1. The other bins hold about a tenth of the pairs each. A tie counts as wrong.

    >>> sure, wrong = ScoredPair(3.0, -3.0, 5, 9, "f:1"), ScoredPair(-3.0, 3.0, 9, 5, "f:2")
    >>> report = calibrate([sure, wrong])
    >>> report["accuracy"], round(report["expected_calibration_error"], 3)
    (0.5, 0.498)
    >>> [(it["mean"], it["accuracy"]) for it in report["by_length_gap"]]
    [(-4.0, 1.0), (4.0, 0.0)]
    """
    confidence = _summarise(_by_width(pairs))
    gaps = [it["pairs"] * abs(it["accuracy"] - it["mean"]) for it in confidence]
    return {
        "pairs": len(pairs),
        "accuracy": _accuracy(pairs),
        "mean_margin": sum(pair.margin for pair in pairs) / len(pairs),
        "expected_calibration_error": sum(gaps) / len(pairs),
        "by_confidence": confidence,
        "by_margin": _by_rank(pairs, lambda pair: abs(pair.margin)),
        "by_length_gap": _by_rank(pairs, lambda pair: pair.length_gap),
    }


def _accuracy(pairs: Sequence[ScoredPair]) -> float:
    return sum(pair.margin > 0 for pair in pairs) / len(pairs)


def _by_width(pairs: Sequence[ScoredPair]) -> list[tuple[list[ScoredPair], list[float]]]:
    """Pairs in bins of confidence of equal width, with their confidences; empty bins are left out."""
    bins: list[list[ScoredPair]] = [[] for _ in range(_BINS)]
    for pair in pairs:
        bins[min(int((pair.confidence - 0.5) * 2 * _BINS), _BINS - 1)].append(pair)
    return [(inside, [pair.confidence for pair in inside]) for inside in bins if inside]


def _by_rank(pairs: Sequence[ScoredPair], value: Callable[[ScoredPair], float]) -> list[dict[str, Any]]:
    """Bins of about as many pairs each, by rising value; equal values share a bin."""
    ordered = sorted(pairs, key=value)
    bins: dict[int, list[ScoredPair]] = {}
    number, before = 0, None
    for rank, pair in enumerate(ordered):
        if value(pair) != before:
            number, before = rank * _BINS // len(ordered), value(pair)
        bins.setdefault(number, []).append(pair)
    return _summarise([(inside, [float(value(pair)) for pair in inside]) for inside in bins.values()])


def _summarise(bins: Sequence[tuple[Sequence[ScoredPair], Sequence[float]]]) -> list[dict[str, Any]]:
    return [
        {
            "from": min(values),
            "to": max(values),
            "mean": sum(values) / len(values),
            "pairs": len(inside),
            "accuracy": _accuracy(inside),
        }
        for inside, values in bins
    ]


def _draw(report: dict[str, Any], file: Path) -> None:
    """One panel for each kind of bin."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "by_confidence": "confidence",
        "by_margin": "difference of the scores",
        "by_length_gap": "chosen longer than rejected by (tokens)",
    }
    figure, panels = pyplot.subplots(1, len(titles), figsize=(12, 3.6), layout="constrained", sharey=True)
    for axes, (kind, title) in zip(panels, titles.items(), strict=True):
        bins = report[kind]
        axes.plot([it["mean"] for it in bins], [it["accuracy"] for it in bins], "o-", color="#1f5a93")
        if kind == "by_confidence":
            axes.plot([0.5, 1], [0.5, 1], "--", color="grey", linewidth=1, label="as sure as right")
            axes.legend(frameon=False)
        axes.set(xlabel=title, ylim=(-0.05, 1.05))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out accuracy")
    error = report["expected_calibration_error"]
    figure.suptitle(f"{report['pairs']} held-out pairs, expected calibration error {error:.3f}")
    with naming(file):
        figure.savefig(file, dpi=120)
    pyplot.close(figure)
