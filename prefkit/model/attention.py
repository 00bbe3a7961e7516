"""Attention under a shared prompt, registered with transformers as the implementation `prefkit_shared`.

A token sees its own prompt and its own response, causally. Three ways compute the same: a loop over
segments with scaled-dot-product attention (CPU), flash attention over ragged sequences, and
FlexAttention (CUDA, with and without the flash-attn package). The first two hold no mask of the whole row;
FlexAttention keeps one of blocks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from prefkit.data.packing import Segments

NAME = "prefkit_shared"


def shared_prompt_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments = (),
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer.

    query (1, heads, L, D), key and value (1, kv_heads, L, D); returns (1, L, heads, D).
    Raises `RuntimeError` when no segments reached it or dropout or a mask did.
    """
    if not segments or attention_mask is not None or dropout:
        raise RuntimeError("shared-prompt attention needs segments, and takes neither mask nor dropout")
    if query.is_cuda:
        has_flash = importlib.util.find_spec("flash_attn") is not None
        half = query.dtype in (torch.float16, torch.bfloat16)
        attend = flash_attention if has_flash and half else flex_attention
    else:
        attend = segment_attention
    return attend(query, key, value, segments, scaling).transpose(1, 2).contiguous(), None


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None
) -> Tensor:
    """One call for each prompt with its first response, which are one causal sequence, and one for each
    further response, whose queries see the prompt and, causally, themselves. (1, heads, L, D)."""
    outputs = []
    for start, end, responses in segments:
        first_end = responses[0][1]
        whole = slice(start, first_end)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, whole],
                key[:, :, whole],
                value[:, :, whole],
                is_causal=True,
                scale=scaling,
                enable_gqa=True,
            )
        )
        for first, last in responses[1:]:
            keys, values = (
                torch.cat([states[:, :, start:end], states[:, :, first:last]], 2) for states in (key, value)
            )
            mask = _lower_right_mask(last - first, end - start, query.device)
            outputs.append(
                F.scaled_dot_product_attention(
                    query[:, :, first:last], keys, values, attn_mask=mask, scale=scaling, enable_gqa=True
                )
            )
    return torch.cat(outputs, 2)


@lru_cache(maxsize=32)
def _lower_right_mask(num_queries: int, num_before: int, device: torch.device) -> Tensor:
    """(R, P + R): a query sees the P tokens before all queries, and the queries up to itself."""
    ones = torch.ones(num_queries, num_before + num_queries, dtype=torch.bool, device=device)
    return ones.tril(num_before)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None
) -> Tensor:
    """The same through `flash_attn_varlen_func`, whose causal mask is aligned to the lower right.

    Queries are the row as it is; the keys of each further response are its prompt's, gathered again, and
    its own. (1, heads, L, D).
    """
    from flash_attn import flash_attn_varlen_func

    gather, query_ends, key_ends, longest = _ragged(segments, query.device)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    output: Tensor = flash_attn_varlen_func(
        q.contiguous(),
        k[gather],
        v[gather],
        cu_seqlens_q=query_ends,
        cu_seqlens_k=key_ends,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        causal=True,
    )
    return output.transpose(0, 1)[None]


@lru_cache(maxsize=4)
def _ragged(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Positions of the keys, the bounds of each sequence's queries and keys, and the longest sequence."""
    gather: list[int] = []
    query_ends, key_ends = [0], [0]
    longest = 0
    for start, end, responses in segments:
        sequences = [(start, start, responses[0][1])]  # (prompt start, first query, last)
        sequences += [(start, first, last) for first, last in responses[1:]]
        for prompt_start, first, last in sequences:
            before = range(prompt_start, end) if first > prompt_start else range(0)
            gather += [*before, *range(first, last)]
            query_ends.append(last)
            key_ends.append(len(gather))
            longest = max(longest, len(before) + last - first)
    bounds = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in (query_ends, key_ends))
    return (torch.tensor(gather, device=device), *bounds, longest)  # type: ignore[return-value]


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None
) -> Tensor:
    """The same through FlexAttention with a block mask, for CUDA without flash-attn. (1, heads, L, D)."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    attend = torch.compile(flex) if query.is_cuda else flex
    output: Tensor = attend(
        query, key, value, block_mask=_block_mask(segments, query.device), scale=scaling, enable_gqa=True
    )
    return output


@lru_cache(maxsize=4)
def _block_mask(segments: Segments, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    length = segments[-1][2][-1][1]
    prompt_of = torch.zeros(length, dtype=torch.long, device=device)
    response_of = torch.full((length,), -1, device=device)  # -1: a prompt token
    number = 0
    for prompt, (start, _, responses) in enumerate(segments):
        prompt_of[start : responses[-1][1]] = prompt
        for first, last in responses:
            response_of[first:last] = number
            number += 1

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (response_of[k] == -1) | (response_of[k] == response_of[q])
        return (q >= k) & (prompt_of[q] == prompt_of[k]) & own

    return create_block_mask(sees, None, None, length, length, device=str(device))


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """No mask is built: the segments say who sees whom."""


def use_shared_prompts(model: PreTrainedModel) -> None:
    """Make the model compute attention by `segments`, a keyword argument of its forward."""
    AttentionInterface.register(NAME, shared_prompt_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Ordinary attention within the block, for generation."""
    before = model.config._attn_implementation
    if before == NAME:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if before == NAME:
            model.set_attn_implementation(NAME)
