"""A resumed run is the same run: whatever differs is refused by name, or classified as harmless."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from prefkit.config import load_config
from prefkit.config.errors import UserError
from prefkit.config.schema import KEYS, RunConfig, keys_of
from prefkit.runs.identity import MAY_CHANGE, check_same_config, check_same_run
from prefkit.runs.record import write_record

IDENTITY: dict[str, Any] = {
    "config": {"pref_beta": 0.1, "dataset": ["pairs"]},
    "data set": {"pairs": "a" * 64},
    "template": {"chat template": "b" * 24, "tokenizer": "c" * 24},
    "model": {"models/tiny": "d" * 64},
    "prefkit": {"version": "1.0"},
    "step": {"rows": 2},
    "processes": {"number": 1},
    "machine": {"torch": "2.13.0", "threads": 1},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text(json.dumps(IDENTITY))
    return tmp_path


def test_the_same_run_goes_on(checkpoint: Path) -> None:
    assert check_same_run(checkpoint, IDENTITY) == []


@pytest.mark.parametrize(
    "part, name, value, said",
    [
        ("config", "pref_beta", 0.2, "\n  pref_beta: 0.1 -> 0.2\n"),
        ("data set", "pairs", "e" * 64, "\n  data set pairs: aaaaaaaaaaaa... -> eeeeeeeeeeee...\n"),
        ("data set", "more", "e" * 64, "\n  data set more: None -> eeeeeeeeeeee...\n"),
        ("template", "chat template", "e" * 24, "\n  template chat template: bbbbbbbbbbbb... -> "),
        ("model", "models/tiny", "e" * 64, "\n  model models/tiny: dddddddddddd... -> "),
        ("prefkit", "version", "1.1", "\n  prefkit version: 1.0 -> 1.1\n"),
        ("step", "rows", 4, "\n  step rows: 2 -> 4\n"),
    ],
)
def test_another_run_is_refused_with_the_difference(
    checkpoint: Path, part: str, name: str, value: Any, said: str
) -> None:
    changed = copy.deepcopy(IDENTITY)
    changed[part][name] = value
    with pytest.raises(UserError) as error:
        check_same_run(checkpoint, changed)
    assert said in str(error.value) and "save_steps" in str(error.value)


def test_all_differences_are_said_at_once(checkpoint: Path) -> None:
    changed = IDENTITY | {"config": {"pref_beta": 0.3, "dataset": ["more"]}, "prefkit": {"version": "2"}}
    with pytest.raises(UserError, match=r"pref_beta: .*\n  dataset: .*\n  prefkit version: "):
        check_same_run(checkpoint, changed)


def test_another_machine_is_only_named(checkpoint: Path) -> None:
    changed = IDENTITY | {"machine": {"torch": "2.14.0", "threads": 4}}
    assert check_same_run(checkpoint, changed) == [
        "machine torch: 2.13.0 -> 2.14.0",
        "machine threads: 1 -> 4",
    ]


def test_another_number_of_processes_is_only_named(checkpoint: Path) -> None:
    assert check_same_run(checkpoint, IDENTITY | {"processes": {"number": 2}}) == ["processes number: 1 -> 2"]


def test_a_checkpoint_without_identity_is_no_checkpoint_of_this_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not say of which run it is .*\n?.*adapter_name_or_path"):
        check_same_run(tmp_path, IDENTITY)


@pytest.mark.parametrize("key", sorted(set(keys_of(RunConfig)) - MAY_CHANGE - {"warmup_ratio"}))
def test_every_other_key_is_compared(key: str, write_config, tmp_path: Path) -> None:
    config = load_config(write_config(), []).config
    was = {name: config.value(name) for name in keys_of(RunConfig)} | {key: "something else"}
    (tmp_path / "run.json").write_text(json.dumps({"config": was}))
    with pytest.raises(UserError, match=f"\n  {key}: something else -> "):
        check_same_config(tmp_path, config)


def test_harmless_keys_may_change(write_config, tmp_path: Path) -> None:
    write_record(tmp_path, load_config(write_config(), []).config, {})
    harmless = ["save_steps=7", "logging_steps=3", "overwrite_output_dir=true", "run_name=other"]
    check_same_config(tmp_path, load_config(write_config(), harmless).config)
    assert set(KEYS) >= MAY_CHANGE
