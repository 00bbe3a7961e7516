"""Ways of spreading a run over two processes of this machine, for tests."""

from __future__ import annotations

import warnings
from typing import Any

import accelerate.state
import torch
from accelerate.utils import DistributedType

from prefkit.train import fully_sharded

with warnings.catch_warnings():
    # Here, so that processes that are forked need not; it brings inductor along.
    warnings.simplefilter("ignore")
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

# What a tiny model is big enough for: everything is partitioned, and summed in many pieces.
_ZERO = {
    "overlap_comm": False,
    "contiguous_gradients": True,
    "reduce_bucket_size": 1000000,
    "stage3_param_persistence_threshold": 0,
    "stage3_gather_16bit_weights_on_model_save": True,
}
_AUTO = (
    "train_micro_batch_size_per_gpu",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """The settings of DeepSpeed for a stage."""
    formats = {name: {"enabled": "auto"} for name in ("bf16", "fp16")}
    return {
        **dict.fromkeys(_AUTO, "auto"),
        **formats,
        "zero_optimization": {"stage": stage, **_ZERO, **more},
    }


KEYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    **{f"zero{stage}": {"deepspeed": zero(stage)} for stage in range(4)},
    "fsdp": {"fsdp": "full_shard"},
}


def use_fsdp_on_cpu() -> None:
    """Let accelerate take FSDP where there is no GPU, and prefkit let it; call it in a process of its own.

    accelerate turns it into DDP otherwise, which `check_fsdp` refuses.
    """
    fully_sharded.check_fsdp = lambda has_accelerator, num_processes: None
    state = accelerate.state.AcceleratorState
    own = state.__init__

    def init(
        self: Any,
        mixed_precision: Any = None,
        cpu: bool = False,
        dynamo_plugin: Any = None,
        deepspeed_plugin: Any = None,
        fsdp_plugin: Any = None,
        **more: Any,
    ) -> None:
        own(self, mixed_precision, cpu, dynamo_plugin, deepspeed_plugin, fsdp_plugin, **more)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if fsdp_plugin is not None and self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
            self.distributed_type = DistributedType.FSDP

    state.__init__ = init  # type: ignore[method-assign]
    torch.set_num_threads(1)
