"""The three ways to attend under a shared prompt agree with a dense mask."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import Segments, pack
from prefkit.model.attention import (
    flash_attention,
    flex_attention,
    plain_attention,
    segment_attention,
    shared_prompt_attention,
    use_shared_prompts,
)
from tests.conftest import make_model

EXAMPLES = [
    TokenizedExample([1] * 5, [[2] * 3, [3] * 4], [(0, 1)], "f:1"),
    TokenizedExample([1], [[2] * 2, [3]], [(0, 1)], "f:2"),
    TokenizedExample([1] * 2, [[2], [3] * 6, [4] * 2], [(0, 1)], "f:3"),
]


@pytest.fixture
def segments() -> Segments:
    found = pack(EXAMPLES, "shared").segments
    assert found is not None
    return found


@pytest.fixture
def states(segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    length = segments[-1][2][-1][1]
    return torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)


def dense(states: tuple[Tensor, Tensor, Tensor], segments: Segments) -> Tensor:
    """By the rule itself: own prompt, own response, nothing later."""
    length = states[0].shape[2]
    mask = torch.zeros(length, length, dtype=torch.bool)
    for start, end, responses in segments:
        for q in range(start, end):
            mask[q, start : q + 1] = True
        for first, last in responses:
            for q in range(first, last):
                mask[q, start:end] = True
                mask[q, first : q + 1] = True
    return F.scaled_dot_product_attention(*states, attn_mask=mask, enable_gqa=True, scale=0.3)


def test_segments(states, segments) -> None:
    found = segment_attention(*states, segments, 0.3)
    torch.testing.assert_close(found, dense(states, segments), atol=1e-5, rtol=1e-5)


def test_flex(states, segments) -> None:
    with pytest.warns(UserWarning, match="flex_attention called without torch.compile"):
        found = flex_attention(*states, segments, 0.3)
    torch.testing.assert_close(found, dense(states, segments), atol=1e-5, rtol=1e-5)


def test_flash_is_called_with_ragged_sequences(states, segments, monkeypatch) -> None:
    """A plain stand-in with the signature and the lower-right causal mask of flash-attn's function."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
    ):
        assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        outputs = []
        queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert queries[-1] == len(q) and keys[-1] == len(k)
        for i in range(len(queries) - 1):
            one = q[queries[i] : queries[i + 1]]
            them = slice(keys[i], keys[i + 1])
            assert len(one) <= max_seqlen_q and keys[i + 1] - keys[i] <= max_seqlen_k
            mask = torch.ones(len(one), keys[i + 1] - keys[i], dtype=torch.bool)
            mask = mask.tril(mask.shape[1] - mask.shape[0])
            parts = [part.transpose(0, 1)[None] for part in (one, k[them], v[them])]
            out = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    found = flash_attention(*states, segments, 0.3)
    torch.testing.assert_close(found, dense(states, segments), atol=1e-5, rtol=1e-5)


def test_attention_without_segments_is_refused(states) -> None:
    with pytest.raises(RuntimeError, match="needs segments"):
        shared_prompt_attention(torch.nn.Module(), *states, None)


def test_generation_gets_ordinary_attention() -> None:
    model = make_model()
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    use_shared_prompts(model)
    with plain_attention(model):
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.config._attn_implementation == "prefkit_shared"
