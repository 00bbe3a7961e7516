"""Changes of a config that save memory, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prefkit.config.schema import RunConfig

Keys = dict[str, Any]
_SHORTEST = 256  # tokens that are left of cutoff_len at least


def savings(config: RunConfig) -> Iterator[tuple[Keys, str]]:
    """Keys to write and what they cost: those that are possible, those first that alter least of result and
    speed."""
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
