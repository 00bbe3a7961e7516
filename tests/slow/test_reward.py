"""A reward model on the real model: it tells held-out pairs, and the other way round with flipped labels.

About four minutes of one thread.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from prefkit.config import load_config
from prefkit.runs.report import make_console
from prefkit.runs.reward_model import load_reward_model
from prefkit.train.run import train
from tests.slow.test_demo import ROOT, swap

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(1)


def held_out_accuracy(folder: Path, *overrides: str) -> float:
    """After the training of the example."""
    given = [f"output_dir={folder}", "plot_loss=false", *overrides]
    config = load_config(ROOT / "examples" / "reward.yaml", given).config
    train(config, make_console(io.StringIO()))
    assert load_reward_model(folder).proof == pytest.approx(0, abs=1e-5)
    accuracy: float = json.loads((folder / "eval_results.json").read_text())["eval_rewards/accuracies"]
    return accuracy


def test_held_out_accuracy_and_that_of_flipped_labels(tmp_path: Path) -> None:
    assert held_out_accuracy(tmp_path / "reward") >= 0.9
    data = swap(tmp_path / "data")
    flipped = ["do_predict=false", f"dataset_dir={data}"]
    assert held_out_accuracy(tmp_path / "flipped", *flipped) <= 0.2
