"""What the YAML says of DeepSpeed and FSDP, read and checked without either.

An engine has keys of its own, in JSON. Those that the YAML says as well must agree with it, or be `auto`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .suggest import nearest

# Keys of the JSON, and those of the YAML that say the same.
_SAID_TWICE = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
    "optimizer.params.eps": "adam_epsilon",
    "scheduler.params.warmup_max_lr": "learning_rate",
}
_STAGES = (0, 1, 2, 3)
# What may be `auto` beside parts of their own, filled in from the YAML.
_AUTO = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
# Optimisers whose states are one number for each weight, and numbers of steps: those can be put together from
# the parts that ranks hold.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "sgd", "rmsprop", "adagrad")
_FSDP_WORDS = {"full_shard", "shard_grad_op", "auto_wrap", "offload"}


def read_deepspeed(value: str | dict[str, Any]) -> dict[str, Any]:
    """The settings of DeepSpeed. Raises `ValueError` that says what is wrong with them."""
    settings = value if isinstance(value, dict) else _read(value)
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage") not in _STAGES:
        raise ValueError("zero_optimization.stage is wanted: 0, 1, 2 or 3")
    for name in (key for key, value in settings.items() if value == "auto" and key not in _AUTO):
        near = nearest(name, _AUTO)
        raise ValueError(f"{name} cannot be auto{f'; did you mean {near}?' if near else ''}")
    for unit in ("tensor_parallel", "pipeline", "sequence_parallel_size", "autotuning"):
        if settings.get(unit):
            raise ValueError(f"{unit} is not in this version: remove it")
    if not zero.get("stage") and settings.keys() & {"optimizer", "scheduler"}:
        raise ValueError("ZeRO stage 0 runs as DDP, which knows no optimizer and scheduler of DeepSpeed")
    return settings


def _read(path: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; examples/deepspeed has one for each ZeRO stage") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be one mapping of settings")
    return settings


def stage_of(deepspeed: Any) -> int | None:
    """The ZeRO stage that the key `deepspeed` asks for; None without it, or where it is wrong."""
    if not deepspeed:
        return None
    try:
        return int(read_deepspeed(deepspeed).get("zero_optimization", {}).get("stage", 0))
    except ValueError:
        return None


def zero_stage(v: SimpleNamespace) -> int | None:
    """That of a config's values."""
    return stage_of(v.deepspeed)


def has_own_optimizer(v: SimpleNamespace) -> bool:
    """Whether the settings of DeepSpeed name an optimiser."""
    return bool(zero_stage(v)) and "optimizer" in read_deepspeed(v.deepspeed)


def splits_weights(v: SimpleNamespace) -> bool:
    """Whether no process holds the whole model."""
    return bool(v.fsdp) or zero_stage(v) == 3


def find_deepspeed_problem(v: SimpleNamespace) -> str:
    """What is wrong with the settings of DeepSpeed; nothing where all is well."""
    if not v.deepspeed:
        return ""
    try:
        settings = read_deepspeed(v.deepspeed)
    except ValueError as error:
        return str(error)
    differing = [
        f"{name} is {_look_up(settings, name)} there and {key}: {getattr(v, key)} here"
        for name, key in _SAID_TWICE.items()
        if _look_up(settings, name) not in (None, "auto", getattr(v, key))
    ]
    return f"{'; '.join(differing)}: write auto there" if differing else ""


def find_fsdp_problem(v: SimpleNamespace) -> str:
    """What is wrong with the settings of FSDP; nothing where all is well."""
    words = set() if isinstance(v.fsdp, bool) else set(str(v.fsdp or "").split())
    if odd := sorted(words - _FSDP_WORDS):
        return f"{odd[0]} is not in this version: write full_shard, or shard_grad_op, and offload beside it"
    given = v.fsdp_config if isinstance(v.fsdp_config, dict) else {}
    settings = {name.removeprefix("fsdp_"): value for name, value in given.items()}
    if v.fsdp and settings.get("version", 2) != 2:
        return "version 1 is not in this version, which runs FSDP2: remove it from fsdp_config"
    if v.fsdp and settings.get("cpu_ram_efficient_loading"):
        return "cpu_ram_efficient_loading is not in this version: remove it from fsdp_config"
    return ""


def _look_up(settings: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        settings = settings.get(part, {}) if isinstance(settings, dict) else {}
    return None if settings == {} else settings
