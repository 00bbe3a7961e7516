"""The head that says what is to come: the value of each response token, upon the trunk of the policy.

It is a linear layer in fp32 with a bias, zero at first, so that no value moves the trunk before it has been
learnt. It is trained beside whatever else is, and written as `value_head.safetensors`, whose names are
LLaMA-Factory's; neither the adapter nor the model that is saved holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefkit.files import fsync
from prefkit.model.adapter import base_of
from prefkit.model.errors import ModelError
from prefkit.model.reward import VALUE_HEAD

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "value_head"
_WEIGHT, _BIAS = "v_head.summary.weight", "v_head.summary.bias"


def add_value_head(policy: nn.Module) -> nn.Linear:
    """Give the model under the policy's adapter a value head, which its forward for packed batches reads."""
    base = base_of(policy)
    hidden = base.config.get_text_config().hidden_size
    head = nn.Linear(hidden, 1, dtype=torch.float32, device=base.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    base.add_module(NAME, head)
    ignored: Any = base
    ignored._keys_to_ignore_on_save = [
        *(base._keys_to_ignore_on_save or ()),
        f"{NAME}.weight",
        f"{NAME}.bias",
    ]
    return head


def value_head_of(policy: nn.Module) -> nn.Linear | None:
    """The value head of a policy, None where it has none."""
    return cast("nn.Linear | None", getattr(base_of(policy), NAME, None))


def values_at(model: PreTrainedModel, hidden: Tensor) -> Tensor | None:
    """Values (T,) in fp32 of hidden states (T, H), whatever mixed precision does below; None without a
    head."""
    head: Any = getattr(model, NAME, None)
    if head is None:
        return None
    with torch.autocast(hidden.device.type, enabled=False):
        return cast("Tensor", head(hidden.to(head.weight.dtype))[:, 0].float())


def save_value_head(policy: nn.Module, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write `value_head.safetensors`, where the policy has such a head; `weights` has all weights by name
    where the policy holds a part of them."""
    head = value_head_of(policy)
    if head is None:
        return
    own: dict[str, Tensor] = {"weight": head.weight, "bias": head.bias}
    for name, value in (weights or {}).items():
        path, _, last = name.rpartition(".")
        if path.split(".")[-1] == NAME:
            own[last] = value
    named = {_WEIGHT: own["weight"], _BIAS: own["bias"]}
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in named.items()}
    save_file(tensors, folder / VALUE_HEAD, {"format": "pt"})
    fsync(folder / VALUE_HEAD)


def load_value_head(policy: nn.Module, folder: Path) -> None:
    """Take the value head of a folder. Raises `ModelError` where it is missing or of another size."""
    head = value_head_of(policy)
    if head is None:
        return
    file = folder / VALUE_HEAD
    if not file.is_file():
        raise ModelError(f"{file} is missing")
    tensors = load_file(file)
    with torch.no_grad():
        if _WEIGHT not in tensors or tensors[_WEIGHT].shape != head.weight.shape:
            raise ModelError(f"{file} is no value head of this model")
        head.weight.copy_(tensors[_WEIGHT])
        head.bias.copy_(tensors[_BIAS])
