"""The config as it is understood: the keys that were set or that matter, and what each means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefkit.config.errors import is_secret, show
from prefkit.config.schema import KEYS, RunConfig, keys_of

# Shown with their defaults too: what most decides about a training.
_ALWAYS = (
    *("model_name_or_path", "stage", "pref_loss", "pref_beta", "dataset", "template", "cutoff_len"),
    *("finetuning_type", "dtype", "bf16", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "num_train_epochs", "seed", "ref_cache", "output_dir"),
)
_OF_ADAPTERS = ("lora_rank", "lora_alpha", "lora_target")


@dataclass(frozen=True)
class Setting:
    """A key with the value that holds, whether that is the default, and what it means."""

    key: str
    value: Any
    is_default: bool
    meaning: str

    def to_dict(self) -> dict[str, Any]:
        """The setting as JSON."""
        return {"value": self.value, "default": self.is_default, "meaning": self.meaning}


def read_settings(config: RunConfig) -> list[Setting]:
    """Every key whose value is not its default, and those that always matter, in the order of the groups."""
    always = {*_ALWAYS, *(_OF_ADAPTERS if config.tuning.finetuning_type == "lora" else ())}
    always = {name for name in always if config.method.stage in KEYS[name].stages}
    found = []
    for name in keys_of(RunConfig):
        key, value = KEYS[name], _plain(config.value(name))
        is_default = value == _plain(key.default)
        if not is_secret(name) and (name in always or not is_default):
            found.append(Setting(name, value, is_default, key.help))
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def show_value(value: Any) -> str:
    """A value as YAML has it.

    >>> show_value(["a", "b"]), show_value(None), show_value("dpo")
    ('a, b', 'null', 'dpo')
    """
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {it}" for name, it in value.items())
    return show("", value).strip('"')
