"""Every file in examples/ loads and trains two steps."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from prefkit.config import load_config, load_use_config
from prefkit.config.uses import EXPORT, SCORING, TALKING
from prefkit.objectives.pairwise import LOSSES
from prefkit.runs.report import make_console
from prefkit.train.run import train

ROOT = Path(__file__).parent.parent
USE, SCORE = (ROOT / "examples" / name for name in ("use.yaml", "score.yaml"))
EXAMPLES = sorted({*(ROOT / "examples").glob("*.yaml")} - {USE, SCORE})


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
    weights = "model" if loaded.config.tuning.finetuning_type == "full" else "adapter_model"
    assert (tmp_path / "out" / f"{weights}.safetensors").is_file()
    assert (tmp_path / "out" / "eval_results.json").is_file()


def test_the_example_of_use_takes_every_verb() -> None:
    for rules, keys in ((TALKING, []), (EXPORT, ["export_dir=x"])):
        loaded = load_use_config(USE, keys, {}, rules)
        assert loaded.config.model.adapter_name_or_path == ("saves/dpo",)
        assert all(warning.startswith("not used here") for warning in loaded.warnings)


def test_the_example_of_scoring_takes_every_key() -> None:
    loaded = load_use_config(SCORE, [], {}, SCORING)
    assert loaded.config.model.adapter_name_or_path == ("saves/reward",) and not loaded.warnings


def test_there_is_one_for_each_loss() -> None:
    methods = [load_config(file, []).config.method for file in EXAMPLES]
    assert {method.pref_loss for method in methods if method.stage == "dpo"} == LOSSES.keys()
    assert {method.stage for method in methods} == {"dpo", "kto", "rm"}
