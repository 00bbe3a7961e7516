"""Attention under a shared prompt, registered with transformers as implementations `prefkit_shared...`.

A token sees its own prompt and its own response, causally. Three ways compute the same: a loop over
segments with scaled-dot-product attention (CPU), flash attention over ragged sequences, and
FlexAttention (CUDA, with and without the flash-attn package). The first two hold no mask of the whole row;
FlexAttention keeps one of blocks. All of them cap the scores where the model does (`softcap`), and take more
keys than queries: the first keys are then of prompts that an earlier forward has computed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from prefkit.data.packing import Segments
from prefkit.model.errors import ModelError

NAME = "prefkit_shared"
Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float | None, float | None], Tensor]
Visit = Callable[[torch.nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]  # (layer, key, value) -> both
# Keyword arguments that models pass along and that mean nothing to attention.
_HARMLESS = {
    *("position_ids", "use_cache", "output_router_logits", "output_hidden_states", "return_dict"),
    "logits_to_keep",
}
# The attribute of a model that remembers its own implementation.
_PLAIN = "_prefkit_plain_implementation"


def shared_prompt_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments = (),
    softcap: float | None = None,
    prompt_states: Visit | None = None,
    *,
    kernel: Kernel,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer.

    query (1, heads, L, D), key (1, kv_heads, L, D), value (1, kv_heads, L, E); returns (1, L, heads, E).
    Keys and values pass through `prompt_states`, where there is such a function.
    Raises `RuntimeError` when no segments reached it, and when a mask, dropout, a window shorter than a
    sequence or anything else did that would change the result.
    """
    if not segments:
        raise RuntimeError("shared-prompt attention needs segments")
    check_honoured(module, _longest_sequence(segments), attention_mask, dropout, **kwargs)
    if prompt_states is not None:
        key, value = prompt_states(module, key, value)
    return kernel(query, key, value, segments, scaling, softcap).transpose(1, 2).contiguous(), None


def check_honoured(
    module: torch.nn.Module,
    longest: int,
    attention_mask: Tensor | None,
    dropout: float,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> None:
    """Raises `RuntimeError` when plain causal attention among up to `longest` tokens is not what the model
    wants, by what it hands over."""
    if attention_mask is not None or dropout:
        raise RuntimeError("shared-prompt attention takes neither mask nor dropout")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise RuntimeError("shared-prompt attention is causal, and the model's is not")
    given = [name for name, it in kwargs.items() if it is not None and it is not False]
    if unknown := [name for name in given if name not in _HARMLESS]:
        raise RuntimeError(f"shared-prompt attention cannot honour {', '.join(unknown)}")
    window = _shortest_window(module, sliding_window)
    if window is not None and longest > window:
        raise RuntimeError(
            f"shared-prompt attention: a sequence is longer than the window of {window} tokens"
        )


def _shortest_window(module: torch.nn.Module, given: int | None) -> int | None:
    """The window that the model passed, or that its layer or config has."""
    chunk = getattr(getattr(module, "config", None), "attention_chunk_size", None)
    windows = (given, getattr(module, "sliding_window", None), chunk)
    return min((size for size in windows if size is not None), default=None)


@lru_cache(maxsize=4)
def _longest_sequence(segments: Segments) -> int:
    """Tokens of the longest prompt with one of its responses."""
    return max(end - start + last - first for start, end, responses in segments for first, last in responses)


def fitting_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    softcap: float | None = None,
) -> Tensor:
    """The fastest of the three that device and dtype allow. (1, heads, L, E)."""
    attend = segment_attention
    if query.is_cuda:
        has_flash = importlib.util.find_spec("flash_attn") is not None
        half = query.dtype in (torch.float16, torch.bfloat16)
        attend = flash_attention if has_flash and half else flex_attention
    return attend(query, key, value, segments, scaling, softcap)


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    softcap: float | None = None,
) -> Tensor:
    """One call for each prompt with its first response, which are one causal sequence, and one for each
    further response, whose queries see the prompt and, causally, themselves. (1, heads, L, E), L queries."""
    num_before = key.shape[2] - query.shape[2]
    outputs = []
    for prompt, own in _sequences(segments, num_before):
        keys, values = (_join(states, prompt, own) for states in (key, value))
        asking = query[:, :, own.start - num_before : own.stop - num_before]
        outputs.append(_attend(asking, keys, values, scaling, softcap))
    return torch.cat(outputs, 2)


def _sequences(segments: Segments, num_before: int) -> Iterator[tuple[range, range]]:
    """(keys before all queries, keys of the queries) of each causal sequence, in the order of the queries.

    The first `num_before` keys have no queries: prompts that lie there are keys alone.
    """
    for start, end, responses in segments:
        further = responses
        if start >= num_before and responses[0][0] == end:
            yield range(0), range(start, responses[0][1])
            further = responses[1:]
        for first, last in further:
            yield range(start, end), range(first, last)


def _join(states: Tensor, prompt: range, own: range) -> Tensor:
    """Keys or values of a sequence; no copy where they lie together."""
    states_of_own = states[:, :, own.start : own.stop]
    if not prompt:
        return states_of_own
    return torch.cat([states[:, :, prompt.start : prompt.stop], states_of_own], 2)


def math_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    softcap: float | None = None,
) -> Tensor:
    """`segment_attention` without fused kernels. (1, heads, L, E)."""
    with sdpa_kernel(SDPBackend.MATH):
        return segment_attention(query, key, value, segments, scaling, softcap)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """Causal attention of the last tokens among the keys, (1, heads, queries, E)."""
    num_queries = query.shape[2]
    num_before = key.shape[2] - num_queries
    if softcap is not None:
        mask = _lower_right_mask(num_queries, num_before, query.device)
        return _capped_attention(query, key, value, mask, scaling, softcap)
    if not num_before:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
    mask = _lower_right_mask(num_queries, num_before, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float
) -> Tensor:
    """softmax(softcap * tanh(scores / softcap)) @ value in plain steps, as torch has no kernel for it.

    Scores in the dtype of the query and a softmax in fp32, as in the models' own eager attention.
    """
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


@lru_cache(maxsize=32)
def _lower_right_mask(num_queries: int, num_before: int, device: torch.device) -> Tensor:
    """(R, P + R): a query sees the P tokens before all queries, and the queries up to itself."""
    ones = torch.ones(num_queries, num_before + num_queries, dtype=torch.bool, device=device)
    return ones.tril(num_before)


def forget_masks() -> None:
    """Let go of the masks that are kept between calls."""
    _lower_right_mask.cache_clear()


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    softcap: float | None = None,
) -> Tensor:
    """The same through `flash_attn_varlen_func`, whose causal mask is aligned to the lower right.

    Queries are the row as it is; the keys of each further response are its prompt's, gathered again, and
    its own. Values narrower than the keys are padded, since the kernel wants one width. (1, heads, L, E).
    """
    from flash_attn import flash_attn_varlen_func

    gather, query_ends, key_ends, longest = _ragged(segments, key.shape[2] - query.shape[2], query.device)
    width = value.shape[-1]
    padded = F.pad(value, (0, query.shape[-1] - width))
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, padded))
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
        softcap=softcap or 0.0,  # 0 is none
    )
    return output[..., :width].transpose(0, 1)[None]


@lru_cache(maxsize=4)
def _ragged(segments: Segments, num_before: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Positions of the keys, the bounds of each sequence's queries and keys, and the longest sequence."""
    gather: list[int] = []
    query_ends, key_ends = [0], [0]
    longest = 0
    for prompt, own in _sequences(segments, num_before):
        gather += [*prompt, *own]
        query_ends.append(query_ends[-1] + len(own))
        key_ends.append(len(gather))
        longest = max(longest, len(prompt) + len(own))
    bounds = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in (query_ends, key_ends))
    return (torch.tensor(gather, device=device), *bounds, longest)  # type: ignore[return-value]


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    softcap: float | None = None,
) -> Tensor:
    """The same through FlexAttention with a block mask, for CUDA without flash-attn. (1, heads, L, E)."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    attend = torch.compile(flex) if query.is_cuda else flex
    output: Tensor = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capping(softcap),
        block_mask=_block_mask(segments, key.shape[2] - query.shape[2], query.device),
        scale=scaling,
        enable_gqa=True,
    )
    return output


@lru_cache(maxsize=4)
def _capping(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """One function for each cap, since another function is another kernel to compile."""

    def cap(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@lru_cache(maxsize=4)
def _block_mask(segments: Segments, num_before: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    length = segments[-1][2][-1][1]
    prompt_of = torch.zeros(length, dtype=torch.long, device=device)
    response_of = torch.full((length,), -1, device=device)  # -1: a prompt token
    number = 0
    for prompt, (start, end, responses) in enumerate(segments):
        prompt_of[start:end] = prompt
        for first, last in responses:
            prompt_of[first:last] = prompt
            response_of[first:last] = number
            number += 1

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        place = q + num_before
        own = (response_of[k] == -1) | (response_of[k] == response_of[place])
        return (place >= k) & (prompt_of[place] == prompt_of[k]) & own

    return create_block_mask(sees, None, None, length - num_before, length, device=str(device))


def no_mask(*args: Any, **kwargs: Any) -> None:
    """No mask is built: the segments say who sees whom."""


# Of each value of `flash_attn`: the name under which transformers knows our attention, and what computes it.
# Transformers looks for sdpa, flash and flex_attention in a name: ours must contain none of them.
_KERNELS: dict[str, tuple[str, Kernel]] = {
    "auto": (NAME, fitting_attention),
    "sdpa": (f"{NAME}_loop", segment_attention),
    "disabled": (f"{NAME}_math", math_attention),
    "fa2": (f"{NAME}_fa2", flash_attention),
}
_IMPLEMENTATIONS = {"auto": None, "sdpa": "sdpa", "disabled": "eager", "fa2": "flash_attention_2"}


def plain_implementation(flash_attn: str) -> str | None:
    """The `attn_implementation` that the model itself is loaded with; None leaves the choice to transformers.

    Raises `ModelError` when flash-attn is asked for and not installed.

    >>> plain_implementation("disabled")
    'eager'
    """
    if flash_attn == "fa2" and importlib.util.find_spec("flash_attn") is None:
        raise ModelError(
            "flash_attn: fa2 needs the package flash-attn: pip install flash-attn, or write flash_attn: auto"
        )
    return _IMPLEMENTATIONS[flash_attn]


def use_shared_prompts(model: PreTrainedModel, flash_attn: str = "auto") -> None:
    """Make the model compute attention by `segments`, a keyword argument of its forward.

    `flash_attn` chooses the kernel: `auto` the fastest there is, `sdpa` the loop over segments, `disabled`
    the same without fused kernels, `fa2` flash-attn.
    """
    name, kernel = _KERNELS[flash_attn]
    AttentionInterface.register(name, partial(shared_prompt_attention, kernel=kernel))
    AttentionMaskInterface.register(name, no_mask)
    before = implementation_of(model)
    if not before.startswith(NAME):
        setattr(model, _PLAIN, before)
    set_implementation(model, name)


def implementation_of(model: PreTrainedModel) -> str:
    """The attention of the model, or of the language model in one that sees."""
    return str(model.config.get_text_config()._attn_implementation)


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """What reads the images keeps its own."""
    sees = model.config.get_text_config() is not model.config
    model.set_attn_implementation({"text_config": name} if sees else name)


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether the model computes attention by `segments`."""
    return implementation_of(model).startswith(NAME)


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """The attention that the model had of its own within the block, for generation."""
    before = implementation_of(model)
    if before.startswith(NAME):
        set_implementation(model, getattr(model, _PLAIN))
    try:
        yield
    finally:
        set_implementation(model, before)
