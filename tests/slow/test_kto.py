"""KTO on the real model and the shipped set: about three minutes of one thread for each of two runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from prefkit.config import load_config
from prefkit.runs.report import make_console
from prefkit.train.run import train

ROOT = Path(__file__).parent.parent.parent
SETS = ("kto_en_demo", "kto_en_demo_heldout")

pytestmark = pytest.mark.slow


def held_out_auc(folder: Path, *overrides: str) -> float:
    """AUC of the implicit reward on held-out rows after the first 12 steps of the example."""
    given = [f"output_dir={folder}", "dtype=float32", "max_steps=12", *overrides]
    train(load_config(ROOT / "examples" / "kto.yaml", given).config, make_console(io.StringIO()))
    auc: float = json.loads((folder / "eval_results.json").read_text())["eval_rewards/auc"]
    return auc


def flip(folder: Path) -> Path:
    """The demo's data with the labels exchanged in training."""
    folder.mkdir()
    for name in (*SETS, "dataset_info"):
        (folder / f"{name}.json").write_bytes((ROOT / "data" / f"{name}.json").read_bytes())
    rows = json.loads((folder / f"{SETS[0]}.json").read_text())
    flipped = [{**row, "label": not row["label"]} for row in rows]
    (folder / f"{SETS[0]}.json").write_text(json.dumps(flipped))
    return folder


def test_held_out_rows_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert held_out_auc(tmp_path / "demo") >= 0.9


def test_flipped_labels_turn_the_order_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert held_out_auc(tmp_path / "flipped", f"dataset_dir={flip(tmp_path / 'data')}") <= 0.2
