"""What a run writes of itself beside the weights: its config and `prefkit.json`."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from prefkit import __version__
from prefkit.config import RunConfig, dump_yaml, load_config
from prefkit.config.errors import UserError
from prefkit.config.schema import KEYS

RECORD_FILE, CONFIG_FILE = "prefkit.json", "config.yaml"
_ALIASES = ("warmup_ratio",)  # resolved into warmup_steps
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "safetensors")


def library_versions() -> dict[str, str]:
    """Versions of prefkit and of the libraries that numbers depend on."""
    return {"prefkit": __version__, **{name: importlib.metadata.version(name) for name in _LIBRARIES}}


def write_record(folder: Path, config: RunConfig, facts: dict[str, Any]) -> None:
    """Write `config.yaml`, the resolved config, and `prefkit.json`, the facts of the run."""
    _replace(folder / CONFIG_FILE, dump_yaml(config.to_yaml_dict()))
    record = {**facts, "versions": library_versions()}
    _replace(folder / RECORD_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The facts of the run in a folder; None when there was none.

    Raises `UserError` when the record cannot be read.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): set another output_dir") from error
    return record


def changed_keys(folder: Path, config: RunConfig) -> list[str]:
    """Keys whose value differs from that of the run in the folder, as `key: old -> new`."""
    before = load_config(folder / CONFIG_FILE).config
    return [
        f"{key}: {before.value(key)} -> {config.value(key)}"
        for key in KEYS
        if before.value(key) != config.value(key) and key not in ("overwrite_output_dir", *_ALIASES)
    ]


def _replace(file: Path, text: str) -> None:
    """Write a file so that a kill leaves the old text or the new one."""
    scratch = file.with_name(f".{file.name}.new")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(file)
