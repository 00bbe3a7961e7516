"""The cheapest change of a config whose training fits into some memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from prefkit.config.schema import KEYS, RunConfig

Keys = dict[str, Any]
_SHORTEST = 256  # tokens that are left of cutoff_len at least


@dataclass(frozen=True)
class Advice:
    """Keys to write, what that costs, and the bytes of the peak with it."""

    keys: Keys
    cost: str
    total: int


def find_advice(config: RunConfig, budget: int, peak_with: Callable[[RunConfig], int]) -> Advice | None:
    """The change that fits into `budget` bytes and costs least, or None where nothing suffices.

    Changes are tried in the order of what they cost, each by itself and upon all before it that lower the
    peak. `peak_with` gives the bytes of a config.
    """
    together: Keys = {}
    costs: list[str] = []
    lowest = peak_with(config)
    tried: list[Keys] = []
    # What is possible depends on what was changed: a batch can be made smaller again.
    while step := next((it for it in _changes(change(config, together)) if it[0] not in tried), None):
        keys, cost = step
        tried.append(keys)
        total = peak_with(change(config, keys))
        if total <= budget:
            return Advice(keys, cost, total)
        if together:
            total = peak_with(change(config, together | keys))
        if total < lowest:
            together, lowest = together | keys, total
            costs = [*costs, cost] if cost not in costs else costs
        if lowest <= budget:
            return Advice(together, "; ".join(costs), lowest)
    return None


def _changes(config: RunConfig) -> Iterator[tuple[Keys, str]]:
    """Changes that are possible, those first that alter least of result and speed."""
    full = config.tuning.finetuning_type != "lora"
    if (full or config.reference.ref_model) and not config.value("ref_cache"):
        yield {"ref_cache": True}, "same result; log-probs of the reference are computed beforehand"
    if not _checkpoints(config):
        yield {"disable_gradient_checkpointing": False}, "same result; about a third more time"
    batch = config.value("per_device_train_batch_size")
    if batch > 1:
        steps = config.value("gradient_accumulation_steps")
        # A divisor, so that the examples of an update stay as many.
        smaller = max(n for n in range(1, batch) if batch % n == 0)
        yield (
            {
                "per_device_train_batch_size": smaller,
                "gradient_accumulation_steps": steps * (batch // smaller),
            },
            "same result but for rounding; smaller batches are slower on a GPU",
        )
    mixed = config.value("bf16") or config.value("fp16") or config.tuning.pure_bf16
    if not mixed:
        yield {"bf16": True}, "forward in bfloat16: rounded; faster on a GPU, slower on most CPUs"
    if not full and config.model.dtype == "float32":
        yield {"dtype": "bfloat16", "bf16": True}, "frozen weights in bfloat16: rounded"
    if full:
        yield (
            {"finetuning_type": "lora"},
            "an adapter is trained instead of the weights; its learning_rate is some 20 times larger",
        )
    elif (
        config.model.quantization_bit is None and not config.merged_adapters and not config.tuning.pissa_init
    ):
        yield {"quantization_bit": 4}, "frozen weights in 4 bits: rounded, and slower"
    if config.data.cutoff_len // 2 >= _SHORTEST:
        yield {"cutoff_len": config.data.cutoff_len // 2}, "longer rows lose text"


def _checkpoints(config: RunConfig) -> bool:
    asked = config.training.get("gradient_checkpointing", config.training.get("activation_checkpointing"))
    return bool(asked) or config.model.disable_gradient_checkpointing is False


def change(config: RunConfig, keys: Keys) -> RunConfig:
    """The config with other values for some keys."""
    if "disable_gradient_checkpointing" in keys:  # the other names of this key would win
        others = ("gradient_checkpointing", "activation_checkpointing")
        kept = {name: value for name, value in config.training.items() if name not in others}
        config = replace(config, training=kept)
    for name, value in keys.items():
        group = KEYS[name].group
        if group == "training":
            config = replace(config, training={**config.training, name: value})
        else:
            config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return config
