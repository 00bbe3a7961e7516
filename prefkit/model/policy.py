"""The one forward that training uses: from a packed batch to the log-probs of its response tokens.

It replaces `forward` on the model itself, inside whatever wraps it, so that LoRA, DDP, DeepSpeed and
FSDP see an ordinary call. Without a packed batch the model behaves as before.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefkit.model.architecture import Architecture
from prefkit.objectives.head import LogitTransform, chunk_size, frozen_token_logps, token_logps
from prefkit.objectives.logps import ResponseLogps, sum_by_response

# What the model's forward takes of a packed batch.
_FORWARD_KEYS = ("input_ids", "position_ids", "attention_mask", "segments", "source", "target")


def attach_logps_forward(model: PreTrainedModel, architecture: Architecture) -> None:
    """Give the model a forward that returns `{"token_logps": (T,)}` when called with `source` and `target`.

    Call it after adapters are in place: PEFT replaces modules, the head among them.
    """
    if architecture.logits is None:
        model.forward = MethodType(_own_forward, model)
        return
    head = model.get_output_embeddings()
    # Not a captured bound method: a copy of the model must call its own class's forward.
    head.forward = MethodType(
        partial(
            _head_forward,
            transform=architecture.logits,
            vocabulary=model.config.get_text_config().vocab_size,
        ),
        head,
    )
    model.forward = MethodType(_chunked_forward, model)


def _chunked_forward(
    self: PreTrainedModel,
    *args: Any,
    source: Tensor | None = None,
    target: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    if source is None:
        return type(self).forward(self, *args, **kwargs)
    decoder = getattr(self, self.base_model_prefix)
    hidden = decoder(*args, use_cache=False, **_without_none(kwargs)).last_hidden_state
    # One call of the head for the whole batch: ZeRO-3 gathers its weights once, however many chunks.
    return {"token_logps": self.get_output_embeddings()(hidden.flatten(0, 1)[source], target)}


def _head_forward(
    self: nn.Module,
    hidden: Tensor,
    target: Tensor | None = None,
    *,
    transform: LogitTransform,
    vocabulary: int,
) -> Tensor:
    plain = partial(type(self).forward, self)
    if target is None:
        logits: Tensor = plain(hidden)
        return logits
    chunk = chunk_size(vocabulary, hidden.device)
    if type(self) is nn.Linear and not any(parameter.requires_grad for parameter in self.parameters()):
        return frozen_token_logps(self.weight, self.bias, hidden, target, transform, chunk)
    return token_logps(plain, hidden, target, transform, chunk)


def _own_forward(
    self: PreTrainedModel,
    *args: Any,
    source: Tensor | None = None,
    target: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """For a head that is not known: the model's own logits, of every position."""
    if source is None or target is None:
        return type(self).forward(self, *args, **kwargs)
    logits = type(self).forward(self, *args, use_cache=False, **_without_none(kwargs)).logits
    logits = logits.flatten(0, 1)[source].float()
    return {"token_logps": logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)}


def _without_none(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if value is not None}


def response_logps(model: nn.Module, batch: dict[str, Any]) -> ResponseLogps:
    """Log-probs of the responses in a packed batch (`PackedBatch.to_dict()`) under the model.

    Raises `TypeError` when something on the way took precision from them: they are fp32 whatever the
    model's dtype.
    """
    token_logps: Tensor = model(**{key: batch[key] for key in _FORWARD_KEYS})["token_logps"]
    if token_logps.dtype != torch.float32:
        raise TypeError(f"log-probs arrived as {token_logps.dtype}; a wrapper cast the model's output")
    return sum_by_response(token_logps, batch["owner"], batch["pairs"].numel())
