"""From a folder, id or YAML to the config that the model in it is used by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefkit.config import ConfigError
from prefkit.config.errors import UserError
from prefkit.config.uses import TALKING
from prefkit.runs.use import read_use_config
from tests.train.runs import run


def read(source: Any, *overrides: str):
    return read_use_config(str(source), overrides, TALKING).config


@pytest.fixture
def trained(write_config, tmp_path: Path) -> Path:
    """A run with settings of its own."""
    keys = {"template": "qwen3", "enable_thinking": False, "default_system": "Be kind.", "dtype": "float32"}
    run(write_config(**keys))
    return tmp_path / "out"


def test_a_run_says_how_it_was_trained(trained: Path, tiny_model: Path) -> None:
    config = read(trained)
    assert config.model.model_name_or_path == str(tiny_model)
    assert config.model.adapter_name_or_path == (str(trained),)
    assert (config.data.template, config.data.enable_thinking) == ("qwen3", False)
    assert (config.data.default_system, config.model.dtype) == ("Be kind.", "float32")


def test_what_is_written_holds_instead(trained: Path, tmp_path: Path, tiny_model: Path) -> None:
    assert read(trained, "enable_thinking=true", "temperature=0.5").data.enable_thinking is True
    file = tmp_path / "use.yaml"
    file.write_text(
        f"model_name_or_path: {tiny_model}\nadapter_name_or_path: {trained}\ndefault_system: Hi.\n"
    )
    config = read(file)
    assert (config.data.template, config.data.default_system) == ("qwen3", "Hi.")
    assert read(file, "top_k=3").generation.top_k == 3


def test_a_training_yaml_talks_to_its_base(write_config, tiny_model: Path) -> None:
    loaded = read_use_config(str(write_config()), [], TALKING)
    assert loaded.config.model.model_name_or_path == str(tiny_model)
    assert any(warning.startswith("not used here: ") and "stage" in warning for warning in loaded.warnings)


def test_models_ids_and_adapters_of_other_tools(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert read(tiny_model).model.model_name_or_path == str(tiny_model)
    assert read("some/model").model.model_name_or_path == "some/model"
    assert read("model_name_or_path=some/model").model.model_name_or_path == "some/model"
    (trained / "prefkit.json").unlink()
    (trained / "config.yaml").unlink()
    config = read(trained)
    assert config.model.model_name_or_path == str(tiny_model)
    assert config.model.adapter_name_or_path == (str(trained),) and config.data.template is None


def test_a_checkpoint_is_used_as_its_run(write_config, tmp_path: Path, tiny_model: Path) -> None:
    run(write_config(template="qwen3", enable_thinking=False, save_steps=1))
    config = read(tmp_path / "out" / "checkpoint-1")
    assert config.model.model_name_or_path == str(tiny_model)
    assert config.model.adapter_name_or_path == (str(tmp_path / "out" / "checkpoint-1"),)
    assert (config.data.template, config.data.enable_thinking) == ("qwen3", False)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.yaml does not exist"):
        read(tmp_path / "gone.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds neither a model \(config\.json\)"):
        read(tmp_path / "empty")
    with pytest.raises(ConfigError, match="did you mean temperature"):
        read("some/model", "temperatur=1")
    with pytest.raises(ConfigError, match="model_name_or_path: missing"):
        read("temperature=1")


def test_remote_code_is_never_switched_on_by_a_file(trained: Path) -> None:
    text = (trained / "config.yaml").read_text()
    (trained / "config.yaml").write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    record = json.loads((trained / "prefkit.json").read_text())
    (trained / "prefkit.json").write_text(json.dumps(record | {"trust_remote_code": True}))
    assert read(trained).model.trust_remote_code is False
