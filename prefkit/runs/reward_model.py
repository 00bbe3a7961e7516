"""The reward model that a run or an export has left in its folder, and how a folder is known for one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from prefkit.config import ModelConfig, load_config
from prefkit.model.adapter import brings_head, find_adapter, read_adapter_config
from prefkit.model.errors import ModelError
from prefkit.model.load import is_classifier, load_model_config
from prefkit.model.reward import PICKLED_VALUE_HEAD, VALUE_HEAD
from prefkit.model.reward_model import RewardModel, open_reward_model
from prefkit.runs.record import CONFIG_FILE, read_record

# What the record of an exported adapter says of the model under it.
_OF_THE_BASE = ("dtype", "rope_scaling")


def load_reward_model(folder: str | Path) -> RewardModel:
    """The reward model in the folder of a run or of its checkpoint, or with a head of LLaMA-Factory's.

    Its scores are compared with those saved beside it. Base, adapters below and number format are those of
    the run's config or of the export's record; without one they are the adapter's base, and what the weights
    are stored in. Raises
    `ModelError` for a folder of no reward model, and for another than the one that was saved.
    """
    path = Path(folder).expanduser()
    if not any((path / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise ModelError(f"{folder} holds neither a model (config.json) nor an adapter (adapter_config.json)")
    is_adapter = (path / "adapter_config.json").is_file()
    run = path.parent if path.name.startswith("checkpoint-") else path
    if is_adapter and (run / CONFIG_FILE).is_file():
        config = load_config(run / CONFIG_FILE).config
        model = replace(config.model, adapter_name_or_path=(*config.merged_adapters, str(path)))
        return open_reward_model(model, config.data.cutoff_len)
    if not is_adapter:
        return open_reward_model(ModelConfig(model_name_or_path=str(path)))
    adapter = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    usage = (read_record(path) or {}).get("usage", {})
    given = {name: usage[name] for name in _OF_THE_BASE if name in usage}
    model = ModelConfig(
        model_name_or_path=adapter["base_model_name_or_path"], adapter_name_or_path=(str(path),), **given
    )
    return open_reward_model(model, usage.get("cutoff_len", 0))


def names_reward_model(config: ModelConfig) -> bool:
    """Whether base and adapters are a reward model by their files: the last adapter brings a head for scores,
    the model's own gives them, or the record says so. Raises `ModelError` where these cannot be read."""
    if adapters := config.adapter_name_or_path:
        if brings_head(read_adapter_config(find_adapter(adapters[-1], config))):
            return True
    elif is_classifier(load_model_config(config)):
        return True
    return _recorded_stage(config) == "rm"


def has_value_head(config: ModelConfig) -> bool:
    """Whether LLaMA-Factory's head lies beside the last adapter, or the model where there is none, and no
    record says whose it is: a reward model's, or that of a policy which PPO has trained."""
    from transformers.utils import has_file

    if _recorded_stage(config):
        return False
    heads = (VALUE_HEAD, PICKLED_VALUE_HEAD)
    if adapters := config.adapter_name_or_path:
        return any((find_adapter(adapters[-1], config) / head).is_file() for head in heads)
    name = str(Path(config.model_name_or_path).expanduser())
    return any(has_file(name, it, config.model_revision, cache_dir=config.cache_dir) for it in heads)


def _recorded_stage(config: ModelConfig) -> str | None:
    """The stage that trained the last adapter, or the model, by the record of its run."""
    folder = Path(config.trained_last).expanduser()
    run = folder.parent if folder.name.startswith("checkpoint-") else folder
    record = read_record(run) or {}
    stage: str | None = record.get("stage") or record.get("run", {}).get("stage")
    return stage
