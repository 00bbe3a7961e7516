"""The demo's claims, on the real model: about ten minutes on two cores."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from prefkit.config import load_config
from prefkit.runs.report import make_console
from prefkit.train.run import train

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from demo_report import count_short  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(2)


def run_demo(folder: Path, *overrides: str) -> tuple[dict[str, float], tuple[int, int, int]]:
    """Held-out metrics and (short before, short after, all)."""
    config = load_config(ROOT / "examples" / "demo_dpo.yaml", [f"output_dir={folder}", *overrides]).config
    train(config, make_console(io.StringIO()))
    metrics = json.loads((folder / "eval_results.json").read_text())
    return metrics, count_short(folder / "samples.jsonl")


def swap(folder: Path) -> Path:
    """The demo's data with chosen and rejected exchanged in training."""
    folder.mkdir()
    for name in ("dpo_en_demo.json", "dpo_en_demo_heldout.json", "dataset_info.json"):
        (folder / name).write_bytes((ROOT / "data" / name).read_bytes())
    rows = json.loads((folder / "dpo_en_demo.json").read_text())
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (folder / "dpo_en_demo.json").write_text(json.dumps(swapped))
    return folder


def test_the_demo_teaches_short_answers_and_swapped_pairs_unteach_them(tmp_path: Path) -> None:
    metrics, (before, after, total) = run_demo(tmp_path / "demo")
    assert total == 20
    assert metrics["eval_rewards/accuracies"] >= 0.9
    assert before <= 0.3 * total
    assert after >= 0.8 * total
    data = swap(tmp_path / "data")
    metrics, (base, swapped, _) = run_demo(tmp_path / "swapped", f"dataset_dir={data}")
    assert metrics["eval_rewards/accuracies"] <= 0.1
    assert base == before
    assert swapped < before


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "orpo", "simpo", "kto_pair"])
def test_every_loss_separates_held_out_pairs(tmp_path: Path, loss: str) -> None:
    """Ten steps move the mean reward margin of held-out pairs up."""
    beta = "2.0" if loss == "simpo" else "0.1"
    given = [f"pref_loss={loss}", f"pref_beta={beta}", "pref_ftx=0", "max_steps=10", "sample_prompts=0"]
    config = load_config(
        ROOT / "examples" / "demo_dpo.yaml",
        [f"output_dir={tmp_path}", "eval_on_start=true", "eval_steps=10", *given],
    ).config
    train(config, make_console(io.StringIO()))
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    margins = [line["eval_rewards/margins"] for line in log if "eval_rewards/margins" in line]
    assert len(margins) == 2 and margins[1] > margins[0] + 0.01
