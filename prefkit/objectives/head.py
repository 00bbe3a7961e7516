"""Log-probs of tokens through a language-model head, in chunks, so that memory ignores the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Logits held at once, as numbers: 2^23 are 32 MB in fp32. A larger chunk is faster on an accelerator.
_CHUNK_NUMBERS = {"cpu": 2**23, "cuda": 2**27}


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the output of its head: `logits * scale`, then `cap * tanh(logits / cap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Transformed logits, of the same shape."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def derivative(self, transformed: Tensor) -> Tensor | float:
        """d transformed / d logits, from the transformed logits."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (transformed / self.softcap) ** 2)


def chunk_size(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits are held at once: fewer for a larger vocabulary."""
    return max(1, _CHUNK_NUMBERS.get(device.type, 2**25) // vocabulary)


def token_logps(
    head: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor, transform: LogitTransform, chunk: int
) -> Tensor:
    """log softmax(transform(head(hidden)))[target] in fp32, (T,), for hidden states (T, H).

    Logits of `chunk` tokens exist at a time; the backward computes them again.
    """

    def one(hidden: Tensor, target: Tensor) -> Tensor:
        logits = transform(head(hidden).float())
        return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)

    pieces = list(zip(hidden.split(chunk), target.split(chunk), strict=True))
    if not torch.is_grad_enabled():
        return torch.cat([one(h, t) for h, t in pieces])
    # Reentrant checkpoints would accumulate the head's gradient once for each chunk, which DDP refuses.
    return torch.cat([_checkpointed(one, h, t) for h, t in pieces])


@torch.no_grad()
def token_logps_and_entropies(
    head: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor, transform: LogitTransform, chunk: int
) -> tuple[Tensor, Tensor]:
    """`token_logps` without gradient, and -sum p log p in nats and fp32, (T,) each, of
    p = softmax(transform(head(hidden))) for hidden (T, H)."""
    logps, entropies = [], []
    for states, tokens in zip(hidden.split(chunk), target.split(chunk), strict=True):
        logits = transform(head(states).float())
        logps.append(logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1))
        all_logps = logits.log_softmax(1)
        entropies.append(-(all_logps.exp() * all_logps).nan_to_num(0.0).sum(1))
    return torch.cat(logps), torch.cat(entropies)


def _checkpointed(fn: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, target: Tensor) -> Tensor:
    logps: Tensor = checkpoint(fn, hidden, target, use_reentrant=False)
    return logps


def frozen_token_logps(
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    target: Tensor,
    transform: LogitTransform,
    chunk: int,
) -> Tensor:
    """`token_logps` for a linear head that is not trained, at two thirds of the matrix products.

    Each log-prob depends on its own hidden state alone, so its gradient, (onehot - softmax) @ weight, is
    found in the forward while the logits are there, and only scaled in the backward.
    """
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return token_logps(lambda h: F.linear(h, weight, bias), hidden, target, transform, chunk)
    logps: Tensor = _FrozenHead.apply(weight, bias, hidden, target, transform, chunk)
    return logps


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        hidden: Tensor,
        target: Tensor,
        transform: LogitTransform,
        chunk: int,
    ) -> Tensor:
        logps = torch.empty(len(target), device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(target), chunk):
            part = slice(start, start + chunk)
            index = target[part, None]
            logits = transform(F.linear(hidden[part], weight, bias).float())
            normaliser = logits.logsumexp(1)
            logps[part] = logits.gather(1, index)[:, 0] - normaliser
            slope = transform.derivative(logits)
            # onehot - softmax, in place of the logits
            onehot_minus_p = logits.sub_(normaliser[:, None]).exp_().neg_()
            onehot_minus_p.scatter_add_(1, index, torch.ones_like(index, dtype=logits.dtype))
            gradient[part] = (onehot_minus_p.mul_(slope).to(weight.dtype) @ weight).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = (gradient * grads[0][:, None]).to(gradient.dtype)
        return None, None, scaled, None, None, None
