"""The one forward that training uses: from a packed batch to the log-probs of its response tokens.

It replaces `forward` on the model itself, inside whatever wraps it, so that LoRA, DDP, DeepSpeed and
FSDP see an ordinary call. Without a packed batch the model behaves as before.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefkit.config.errors import UserError
from prefkit.data.vision import Pixels
from prefkit.model.architecture import Architecture
from prefkit.model.attention import Visit
from prefkit.model.value import values_at
from prefkit.model.vision import idle_weights, image_inputs
from prefkit.objectives.head import (
    LogitTransform,
    chunk_size,
    frozen_token_logps,
    token_logps,
    token_logps_and_entropies,
)
from prefkit.objectives.logps import ResponseLogps, sum_by_response

LogpsOf = Callable[[nn.Module, dict[str, Any]], ResponseLogps]  # (model, packed batch) -> its log-probs
# What the model's forward takes of a packed batch.
_FORWARD_KEYS = ("input_ids", "position_ids", "attention_mask", "segments", "pixels", "source", "target")


def attach_logps_forward(
    model: PreTrainedModel, architecture: Architecture, router_loss: bool = False
) -> None:
    """Give the model a forward that returns `{"token_logps": (T,)}` when called with `source` and `target`.

    With `router_loss` it returns also `"router_loss"`, (), while the model trains: the load-balancing loss of
    its experts over the tokens of the batch as they lie in it, padding left out.

    Call it after adapters are in place: PEFT replaces modules, the head among them. Raises `ValueError` when
    the model has no router loss.
    """
    if router_loss and not has_router_loss(model):
        raise ValueError(f"{architecture.name} has no load-balancing loss of its experts")
    if architecture.logits is None:
        _replace_forward(model, partial(_own_forward, router_loss=router_loss))
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
    balance = _load_balancing(model) if router_loss else None
    _replace_forward(model, partial(_chunked_forward, balance=balance))


def _replace_forward(model: PreTrainedModel, forward: partial[Any]) -> None:
    # `generate` looks at the signature for what the model takes: without position ids in it, a padded prompt
    # would have other positions than an unpadded one.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)


def has_router_loss(model: PreTrainedModel) -> bool:
    """Whether the model, without what wraps it, has experts and a load-balancing loss for them."""
    return _load_balancing(model) is not None and getattr(model, "num_experts", 0) > 1


def _load_balancing(model: PreTrainedModel) -> Callable[..., Tensor] | None:
    """The function (router logits of all layers, experts, experts of a token, mask) -> loss that the
    architecture's own module defines."""
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)


def _chunked_forward(
    self: PreTrainedModel,
    *args: Any,
    source: Tensor | None = None,
    target: Tensor | None = None,
    balance: Callable[..., Tensor] | None = None,
    entropies: bool = False,
    pixels: Sequence[Pixels] = (),
    **kwargs: Any,
) -> Any:
    if source is None:
        return type(self).forward(self, *args, **kwargs)
    kwargs = _without_none(kwargs) | image_inputs(self.config, pixels, kwargs["input_ids"])
    if not (self.training and torch.is_grad_enabled()):
        balance = None
    routers = {} if balance is None else {"output_router_logits": True}
    output = self.model(*args, use_cache=False, **kwargs, **routers)
    # One call of the head for the whole batch: ZeRO-3 gathers its weights once, however many chunks.
    hidden = output.last_hidden_state.flatten(0, 1)[source]
    found = _read_head(self.get_output_embeddings(), hidden, target, entropies)
    if (idle := idle_weights(self, pixels)) is not None:
        found["token_logps"] = found["token_logps"] + idle
    if (values := values_at(self, hidden)) is not None:
        found["values"] = values
    if balance is not None:
        mask = kwargs.get("attention_mask")
        loss = balance(output.router_logits, self.num_experts, self.num_experts_per_tok, mask)
        found["router_loss"] = _with_gradient(loss)
    return found


def _read_head(head: Any, hidden: Tensor, target: Tensor | None, entropies: bool) -> dict[str, Tensor]:
    if not entropies:
        return {"token_logps": head(hidden, target)}
    return dict(zip(("token_logps", "entropies"), head(hidden, target, entropies=True), strict=True))


def _with_gradient(router_loss: Tensor) -> Tensor:
    if not router_loss.requires_grad:
        raise UserError(
            "moe_aux_loss_coef: the loss of the routers has no gradient: nothing they depend on is trained, "
            "or gradient checkpointing is reentrant (gradient_checkpointing_kwargs: {use_reentrant: false})"
        )
    return router_loss


def _head_forward(
    self: nn.Module,
    hidden: Tensor,
    target: Tensor | None = None,
    entropies: bool = False,
    *,
    transform: LogitTransform,
    vocabulary: int,
) -> Tensor | tuple[Tensor, Tensor]:
    plain = partial(type(self).forward, self)
    if target is None:
        logits: Tensor = plain(hidden)
        return logits
    chunk = chunk_size(vocabulary, hidden.device)
    if entropies:
        return token_logps_and_entropies(plain, hidden, target, transform, chunk)
    if type(self) is nn.Linear and not any(parameter.requires_grad for parameter in self.parameters()):
        return frozen_token_logps(self.weight, self.bias, hidden, target, transform, chunk)
    return token_logps(plain, hidden, target, transform, chunk)


def _own_forward(
    self: PreTrainedModel,
    *args: Any,
    source: Tensor | None = None,
    target: Tensor | None = None,
    router_loss: bool = False,
    pixels: Sequence[Pixels] = (),
    **kwargs: Any,
) -> Any:
    """For a head that is not known: the model's own logits, of every position."""
    if source is None or target is None:
        return type(self).forward(self, *args, **kwargs)
    balanced = router_loss and self.training and torch.is_grad_enabled()
    routers = {"output_router_logits": True} if balanced else {}
    kwargs = _without_none(kwargs) | image_inputs(self.config, pixels, kwargs["input_ids"])
    output = type(self).forward(self, *args, use_cache=False, **kwargs, **routers)
    logits = output.logits.flatten(0, 1)[source].float()
    found = {"token_logps": logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)}
    if balanced:
        found["router_loss"] = _with_gradient(output.aux_loss)
    return found


def _without_none(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if value is not None}


def response_logps(
    model: nn.Module,
    batch: dict[str, Any],
    prompt_states: Visit | None = None,
    entropies: bool = False,
) -> ResponseLogps:
    """Log-probs of the responses in a packed batch (`PackedBatch.to_dict()`) under the model, with the
    entropy before each token if that is asked for.

    Of a shared batch, keys and values of each layer pass through `prompt_states`, where there is one.

    Raises `TypeError` when something on the way took precision from them: they are fp32 whatever the
    model's dtype.
    """
    inputs = {key: batch[key] for key in _FORWARD_KEYS} | ({"entropies": True} if entropies else {})
    found: dict[str, Tensor] = model(**inputs, prompt_states=prompt_states)
    token_logps = found["token_logps"]
    if token_logps.dtype != torch.float32:
        raise TypeError(f"log-probs arrived as {token_logps.dtype}; a wrapper cast the model's output")
    responses = sum_by_response(token_logps, batch["owner"], batch["num_responses"])
    return replace(
        responses,
        router_loss=found.get("router_loss"),
        values=found.get("values"),
        entropies=found.get("entropies"),
    )
