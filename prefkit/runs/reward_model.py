"""How a folder is known for a reward model."""

from __future__ import annotations

from pathlib import Path

from prefkit.config import ModelConfig
from prefkit.model.adapter import brings_head, find_adapter, read_adapter_config
from prefkit.model.load import is_classifier, load_model_config
from prefkit.model.reward import PICKLED_VALUE_HEAD, VALUE_HEAD
from prefkit.runs.record import read_record


def names_reward_model(config: ModelConfig) -> bool:
    """Whether base and adapters are a reward model by their files: the last adapter brings a head for scores,
    the model's own gives them, or the record says so. Raises `ModelError` where these cannot be read."""
    if adapters := config.adapter_name_or_path:
        if brings_head(read_adapter_config(find_adapter(adapters[-1], config))):
            return True
    elif is_classifier(load_model_config(config)):
        return True
    return recorded_stage(config) == "rm"


def has_value_head(config: ModelConfig) -> bool:
    """Whether LLaMA-Factory's head lies beside the last adapter, or the model where there is none, and no
    record says whose it is: a reward model's, or that of a policy which PPO has trained."""
    from transformers.utils import has_file

    if recorded_stage(config):
        return False
    heads = (VALUE_HEAD, PICKLED_VALUE_HEAD)
    if adapters := config.adapter_name_or_path:
        return any((find_adapter(adapters[-1], config) / head).is_file() for head in heads)
    name = str(Path(config.model_name_or_path).expanduser())
    return any(has_file(name, it, config.model_revision, cache_dir=config.cache_dir) for it in heads)


def recorded_stage(config: ModelConfig) -> str | None:
    """The stage that trained the last adapter, or the model, by the record of its run."""
    folder = Path(config.trained_last).expanduser()
    run = folder.parent if folder.name.startswith("checkpoint-") else folder
    record = read_record(run) or {}
    stage: str | None = record.get("stage") or record.get("run", {}).get("stage")
    return stage
