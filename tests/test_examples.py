"""Every file in examples/ loads and trains two steps."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from prefkit.config import load_config
from prefkit.objectives.pairwise import LOSSES
from prefkit.runs.report import make_console
from prefkit.train.run import train

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_trains(
    file: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    overrides = [f"model_name_or_path={tiny_model}", f"output_dir={tmp_path / 'out'}", "max_steps=2"]
    if "demo" in file.stem:
        overrides += ["sample_prompts=1", "sample_max_new_tokens=4"]
    loaded = load_config(file, overrides)
    assert all("without effect" in warning for warning in loaded.warnings)
    train(loaded.config, make_console(io.StringIO()))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "eval_results.json").is_file()


def test_there_is_one_for_each_loss() -> None:
    losses = {load_config(file, []).config.method.pref_loss for file in EXAMPLES}
    assert losses == LOSSES.keys()
