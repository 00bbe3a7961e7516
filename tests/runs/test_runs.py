"""What a run writes of itself: record, curves, samples, tables."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from prefkit.config import load_config
from prefkit.config.errors import UserError
from prefkit.data.ledger import Ledger, data_report
from prefkit.runs.identity import check_same_config
from prefkit.runs.plots import plot_curves
from prefkit.runs.record import read_record, write_record
from prefkit.runs.report import make_console, print_ledger
from prefkit.runs.samples import Sample, print_samples, write_samples


def test_record_and_config_come_back(write_config, tmp_path: Path) -> None:
    config = load_config(write_config(run_name="5e-6", warmup_ratio=0.1), []).config
    write_record(tmp_path, config, {"finished": False})
    record = read_record(tmp_path)
    assert record is not None and record["finished"] is False
    assert record["versions"].keys() >= {"prefkit", "torch", "transformers", "peft"}
    assert load_config(tmp_path / "config.yaml", []).config == config
    check_same_config(tmp_path, config)


def test_no_record_and_a_damaged_one(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    (tmp_path / "prefkit.json").write_text("{")
    with pytest.raises(UserError, match=r"prefkit.json is damaged"):
        read_record(tmp_path)


def test_curves_need_two_points(tmp_path: Path) -> None:
    log = [
        {"step": step, "loss": 1 / step, "rewards/accuracies": 0.5, "rewards/margins": step}
        for step in (1, 2, 3)
    ]
    log.append({"step": 3, "eval_loss": 0.5, "eval_rewards/accuracies": 0.7})
    assert {file.name for file in plot_curves(log, tmp_path)} == {
        "training_loss.png",
        "training_rewards_accuracies.png",
        "training_rewards_margins.png",
        "training_curves.png",
    }
    assert (tmp_path / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert plot_curves(log[:1], tmp_path) == []


def test_samples(tmp_path: Path) -> None:
    sample = Sample("f:1", "Why [not]?", "long\n\nanswer", "")
    write_samples([sample], tmp_path)
    text = (tmp_path / "samples.md").read_text()
    assert "## Why [not]?" in text and "> long\n>\n> answer" in text and "> (nothing)" in text
    assert json.loads((tmp_path / "samples.jsonl").read_text())["before"] == "long\n\nanswer"
    console = make_console(io.StringIO())
    print_samples(console, [sample], 20)
    assert "Why [not]?" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_ledger_table_adds_up() -> None:
    ledger = Ledger("d", ("d.json",), "0" * 64, num_rows=10, trained=4, held_out=1, pairs=6, held_out_pairs=1)
    ledger.not_sampled["max_samples"] += 3
    ledger.reject("d.json:2", "empty response")
    ledger.reject("d.json:3", "empty response")
    console = make_console(io.StringIO())
    print_ledger(console, [ledger])
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "d: 2 rejected: empty response." in printed
    assert "d: 3 not sampled: max_samples." in printed
    assert "6 pairs to train on, 1 held out." in printed
    assert ledger.is_balanced
    totals = data_report([ledger])["totals"]
    assert (
        totals["rows"] == totals["trained"] + totals["held_out"] + totals["not_sampled"] + totals["rejected"]
    )
