"""From a run, an adapter, a model or a YAML to the config of its use."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefkit.config.errors import UserError
from prefkit.config.load import LoadedConfig, load_config, load_use_config
from prefkit.config.rules import Rules
from prefkit.config.schema import KEYS, UseConfig
from prefkit.config.source import read_file
from prefkit.config.uses import SCORING
from prefkit.runs.record import CONFIG_FILE, RECORD_FILE, read_record

# What a run's config says of how its model is to be used. Not trust_remote_code: that is asked for each time.
_TEMPLATE = ("template", "default_system", "tool_format", "enable_thinking", "preserve_thinking")
_SEEN = ("image_max_pixels", "image_min_pixels")
_SCORED = ("cutoff_len", "truncation")
_ADAPTED = ("rope_scaling", "cutoff_len", "add_tokens", "add_special_tokens", "resize_vocab")


def read_use_config(source: str | None, overrides: Sequence[str], rules: Rules) -> LoadedConfig[UseConfig]:
    """The config of a use: `source` is a YAML or JSON file, the folder of a run, adapter or model, or the
    Hugging Face id of a model.

    A run's folder says which base, adapters, template and thinking mode it was trained with; what is
    written or overridden holds instead. Raises `ConfigError`, and `UserError` for a folder of neither.
    """
    if source is not None and "=" in source:
        overrides = [source, *overrides]
        source = None
    file = source if source and Path(source).is_file() else None
    if file is not None and rules is SCORING and (trained := _reward_run(file)):
        source, file = trained, None
    if source and file is None and re.search(r"\.(ya?ml|json)$", source):
        raise UserError(f"{source} does not exist")
    defaults = _defaults_of(source) if source and file is None else {}
    loaded = load_use_config(file, overrides, defaults, rules)
    recorded = recorded_usage(Path(loaded.config.model.trained_last))
    return load_use_config(file, overrides, {**recorded, **defaults}, rules)


def _reward_run(file: str) -> str | None:
    """The folder into which a YAML file trains a reward model, None where it trains something else or
    nothing: the base that it names has no head for scores, so that nothing else can be meant."""
    entries, _ = read_file(Path(file))
    written = {entry.key: entry.value for entry in entries}
    if written.get("stage") != "rm" or "output_dir" not in written:
        return None
    folder = str(load_config(file).config.training["output_dir"])
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"{file} trains a reward model in {folder}, which is not there: prefkit train {file}")
    return folder


def _defaults_of(source: str) -> dict[str, Any]:
    """Model and adapters of a folder or id."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return {"model_name_or_path": source}
    if not (folder / "adapter_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{source} holds neither a model (config.json) nor an adapter (adapter_config.json)"
            )
        return {"model_name_or_path": source}
    record = read_record(_run_folder(folder))
    if record is None:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return {
            "model_name_or_path": config.get("base_model_name_or_path"),
            "adapter_name_or_path": [source],
        }
    below = record.get("adapters_below", [])
    return {"model_name_or_path": record["base_model"], "adapter_name_or_path": [*below, source]}


def _run_folder(folder: Path) -> Path:
    """The folder of the run, where this is one of its checkpoints."""
    is_checkpoint = folder.name.startswith("checkpoint-") and (folder.parent / RECORD_FILE).is_file()
    return folder.parent if is_checkpoint else folder


def recorded_usage(folder: Path) -> dict[str, Any]:
    """How the model in a run's folder, or exported from one, is to be used; empty for other folders."""
    folder = _run_folder(folder)
    if (folder / CONFIG_FILE).is_file():
        config = load_config(folder / CONFIG_FILE).config
        names: tuple[str, ...] = (*_TEMPLATE, *_SEEN, "dtype")
        if config.method.stage == "rm":
            names += _SCORED
        if config.tuning.finetuning_type == "lora":
            names += _ADAPTED  # a model saved whole carries these itself
        return {name: config.value(name) for name in names}
    record = read_record(folder)
    usage = record.get("usage", {}) if record else {}
    names = (*_TEMPLATE, *_SEEN, "dtype", *_ADAPTED, *_SCORED)
    return {name: usage[name] for name in names if name in usage}


def usage_of(config: UseConfig, is_adapter: bool = False, scores: bool = False) -> dict[str, Any]:
    """What the record of an exported model says of its use; of an adapter, what its base is made by too, and
    of a model that `scores`, how long its rows are."""
    values = vars(config.data) | vars(config.model)
    seen = tuple(name for name in _SEEN if values[name] != KEYS[name].default)
    names = (*_TEMPLATE, *seen, *(("dtype", *_ADAPTED) if is_adapter else ()), *(_SCORED if scores else ()))
    return {name: values[name] for name in names}
