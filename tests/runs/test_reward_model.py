"""What is known for a reward model by its files, and what might be one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from prefkit.config import ModelConfig
from prefkit.config.schema import TuningConfig
from prefkit.model.adapter import add_lora
from prefkit.runs.reward_model import has_value_head, names_reward_model
from tests.conftest import make_model
from tests.model.test_reward import make_reward_model, put_value_head


def config(model: object, *adapters: Path) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(model), adapter_name_or_path=tuple(map(str, adapters)))


def test_its_files_say_so(tmp_path: Path, tiny_model: Path) -> None:
    reward = make_reward_model()
    reward.save_pretrained(tmp_path / "reward")
    add_lora(reward, TuningConfig(lora_rank=2)).save_pretrained(str(tmp_path / "of-reward"))
    add_lora(make_model(), TuningConfig(lora_rank=2)).save_pretrained(str(tmp_path / "of-language"))
    assert names_reward_model(config(tmp_path / "reward"))
    assert names_reward_model(config(tiny_model, tmp_path / "of-language", tmp_path / "of-reward"))
    assert not names_reward_model(config(tiny_model))
    assert not names_reward_model(config(tiny_model, tmp_path / "of-language"))


@pytest.mark.parametrize("record", [{"stage": "rm"}, {"run": {"stage": "rm"}}])
def test_the_record_says_so(record: dict[str, object], tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "run" / "checkpoint-2"
    shutil.copytree(tiny_model, folder)
    put_value_head(folder)
    (tmp_path / "run" / "prefkit.json").write_text(json.dumps(record))
    assert names_reward_model(config(folder)) and not has_value_head(config(folder))


def test_a_value_head_that_nothing_speaks_of(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(tiny_model, folder)
    assert not has_value_head(config(folder))
    put_value_head(folder)
    assert has_value_head(config(folder)) and not names_reward_model(config(folder))
    (folder / "prefkit.json").write_text(json.dumps({"stage": "ppo"}))
    assert not has_value_head(config(folder))
    assert not has_value_head(config("some/model"))  # of the hub, which is not asked in tests
