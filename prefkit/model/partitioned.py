"""Weights that DeepSpeed (ZeRO stage 3) has split among processes.

It does so while transformers reads a model, so that what is done to a model before it is trained has to know:
such a weight is an empty tensor, whose own numbers stand aside.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


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
