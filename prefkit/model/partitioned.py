"""Weights that are split among processes.

DeepSpeed (ZeRO stage 3) does so while transformers reads a model, so that what is done to a model before it
is trained has to know: such a weight is an empty tensor, whose own numbers stand aside. FSDP2 makes a DTensor
of each when training begins, which is whole within a forward of the outermost module.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_partitioned(weights: Tensor) -> bool:
    """Whether a weight is split among processes."""
    return hasattr(weights, "ds_id")


def size_of(weights: Tensor) -> int:
    """How many numbers a weight has on all processes together."""
    return int(getattr(weights, "ds_numel", weights.numel()))


def shape_of(weights: Tensor) -> torch.Size:
    """The shape of a weight when it is whole."""
    shape: torch.Size = getattr(weights, "ds_shape", weights.shape)
    return shape


def gathered(*weights: Tensor, writes: bool = False) -> AbstractContextManager[Any]:
    """Within it weights are whole; where it `writes`, what the first process puts into them stays. All
    processes have to enter it."""
    split = [it for it in weights if is_partitioned(it)]
    if not split:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        split, modifier_rank=0 if writes else None
    )
    return context


@contextmanager
def through_root(root: nn.Module, base: nn.Module) -> Iterator[None]:
    """Within it, to call `base` is to call `root`, which adapts it, where FSDP2 has split them."""
    if root is base or not any(isinstance(weights, DTensor) for weights in base.parameters()):
        yield
        return
    own: Any = base.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        base.forward = own  # the root calls it
        try:
            return root(*args, **kwargs)
        finally:
            base.forward = forward

    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    base.forward = forward
    try:
        yield
    finally:
        base.forward = own
