"""Held-out scores: accuracy in bins, and the error of their own account."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from prefkit.runs.calibration import ScoredPair, calibrate, write_calibration, write_scored_pairs


def pair(margin: float, gap: int = 0) -> ScoredPair:
    return ScoredPair(1.0 + margin, 1.0, 10 + gap, 10, f"f:{margin}")


def test_expected_calibration_error_by_hand() -> None:
    # Confidence 0.7311, right in three of four; and 0.9526, always right.
    report = calibrate([pair(1.0), pair(1.0), pair(1.0), pair(-1.0), pair(3.0), pair(3.0)])
    low, high = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))
    expected = (4 * abs(0.75 - low) + 2 * (1 - high)) / 6
    assert report["expected_calibration_error"] == pytest.approx(expected)
    assert [(it["pairs"], it["accuracy"]) for it in report["by_confidence"]] == [(4, 0.75), (2, 1.0)]
    assert report["accuracy"] == pytest.approx(5 / 6)
    assert report["mean_margin"] == pytest.approx(8 / 6)


def test_bins_hold_every_pair_once_and_equal_values_together() -> None:
    pairs = [pair(0.1 * (i % 7) - 0.2, gap=i % 3 - 1) for i in range(50)]
    report = calibrate(pairs)
    for kind in ("by_confidence", "by_margin", "by_length_gap"):
        assert sum(it["pairs"] for it in report[kind]) == 50
        edges = [(it["from"], it["to"]) for it in report[kind]]
        assert all(a[1] < b[0] for a, b in pairwise(edges))
        right = sum(it["pairs"] * it["accuracy"] for it in report[kind])
        assert right == pytest.approx(50 * report["accuracy"])
    assert [it["mean"] for it in report["by_length_gap"]] == [-1.0, 0.0, 1.0]


def test_a_tie_is_wrong_and_an_extreme_margin_is_sure() -> None:
    report = calibrate([pair(0.0), pair(800.0)])
    assert report["accuracy"] == 0.5
    assert [it["mean"] for it in report["by_confidence"]] == [0.5, 1.0]


def test_files(tmp_path: Path) -> None:
    pairs = [ScoredPair(0.1234567891234567, -1e-17, 3, 4, "data.json:7")]
    write_scored_pairs(pairs, tmp_path)
    write_calibration(pairs, tmp_path)
    line = (tmp_path / "generated_predictions.jsonl").read_text()
    assert json.loads(line) == {"chosen": 0.1234567891234567, "rejected": -1e-17, "source": "data.json:7"}
    assert json.loads((tmp_path / "calibration.json").read_text()) == calibrate(pairs)
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
