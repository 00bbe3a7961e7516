"""The reward model that a run has left in its folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from prefkit.config import ModelConfig, load_config
from prefkit.model.errors import ModelError
from prefkit.model.reward_model import RewardModel, open_reward_model
from prefkit.runs.record import CONFIG_FILE


def load_reward_model(folder: str | Path) -> RewardModel:
    """The reward model in the folder of a run or of its checkpoint, or with a head of LLaMA-Factory's.

    Its scores are compared with those saved beside it. Base, adapters below and number format are those of
    the run's config; without one they are the adapter's base, and what the weights are stored in. Raises
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
    base = str(path)
    if is_adapter:
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))[
            "base_model_name_or_path"
        ]
    return open_reward_model(
        ModelConfig(model_name_or_path=base, adapter_name_or_path=(str(path),) if is_adapter else ())
    )
