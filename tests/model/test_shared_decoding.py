"""Attention to prompts that are there once, against plain attention of each row to all that it sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prefkit.model.shared_decoding import SharedPrompts, can_share_prompts, decoding_attention
from tests.conftest import make_model
from tests.model.test_policy import SHARING, WINDOWED, shorten

# Which of three prompts, of 4, 1 and 3 tokens, each row is under.
ROWS = [0, 0, 0, 1, 2, 2]
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]])


class Layer(nn.Module):
    layer_idx = 1


def plain(
    query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Attention of one row, query (heads, D), keys (kv_heads, L, D), in plain steps. (heads, E)"""
    groups = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    scores = torch.einsum("hd,hld->hl", query, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(1)
    return torch.einsum("hl,hle->he", weights, values)


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("width", [8, 6], ids=["equal", "narrow values"])
def test_each_row_sees_its_prompt_and_itself(
    softcap: float | None, scaling: float | None, width: int
) -> None:
    """Also when rows and whole prompts have left, and with room to spare in the stores."""
    torch.manual_seed(0)
    heads, kv_heads, depth = 4, 2, 8
    shared = SharedPrompts(make_model(), MASK)
    prompt_keys, prompt_values = torch.randn(3, kv_heads, 4, depth), torch.randn(3, kv_heads, 4, width)
    for layer in range(2):
        shared.cache.update(prompt_keys, prompt_values, layer)
    shared.begin(torch.tensor(ROWS))
    own_keys, own_values = torch.zeros(6, kv_heads, 0, depth), torch.zeros(6, kv_heads, 0, width)
    rows = torch.arange(6)
    for step in range(22):
        if step in (2, 5, 19):
            kept = torch.tensor({2: [0, 2, 3, 4, 5], 5: [0, 1, 3, 4], 19: [2]}[step])
            shared.keep(kept)
            rows, own_keys, own_values = rows[kept], own_keys[kept], own_values[kept]
        keys, values = torch.randn(len(rows), kv_heads, 1, depth), torch.randn(len(rows), kv_heads, 1, width)
        own_keys, own_values = torch.cat([own_keys, keys], 2), torch.cat([own_values, values], 2)
        query = torch.randn(len(rows), heads, 1, depth)
        given = shared.cache.update(keys, values, 1)
        found, _ = decoding_attention(
            Layer(), query, *given, None, scaling, softcap=softcap, shared_prompts=shared
        )
        assert found.shape == (len(rows), 1, heads, width)
        for number, row in enumerate(rows.tolist()):
            prompt = ROWS[row]
            expected = plain(
                query[number, :, 0],
                torch.cat([prompt_keys[prompt], own_keys[number]], 1),
                torch.cat([prompt_values[prompt], own_values[number]], 1),
                torch.cat([MASK[prompt] == 0, torch.zeros(step + 1, dtype=torch.bool)]),
                depth**-0.5 if scaling is None else scaling,
                softcap,
            )
            torch.testing.assert_close(found[number, 0], expected, rtol=1e-5, atol=1e-5)


def begin() -> tuple[SharedPrompts, Tensor, Tensor]:
    """Two rows under one prompt, and the states of their first tokens."""
    shared = SharedPrompts(make_model(), torch.ones(1, 3, dtype=torch.long))
    for layer in range(2):
        shared.cache.update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), layer)
    shared.begin(torch.tensor([0, 0]))
    keys, values = shared.cache.update(torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8), 1)
    return shared, keys, values


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"s_aux": torch.ones(4)}, "cannot honour s_aux"),
        ({"sliding_window": 3}, "longer than the window of 3"),
        ({"dropout": 0.1}, "neither mask nor dropout"),
        ({"is_causal": False}, "is causal"),
    ],
)
def test_what_it_cannot_honour_is_refused(given: dict[str, Any], message: str) -> None:
    shared, keys, values = begin()
    query = torch.randn(2, 4, 1, 8)
    decoding_attention(Layer(), query, keys, values, None, sliding_window=4, shared_prompts=shared)
    with pytest.raises(RuntimeError, match=message):
        decoding_attention(Layer(), query, keys, values, None, shared_prompts=shared, **given)


def test_states_that_are_not_those_of_the_cache_are_refused() -> None:
    shared, keys, values = begin()
    with pytest.raises(RuntimeError, match="other states than those in its cache"):
        decoding_attention(Layer(), torch.randn(2, 4, 1, 8), keys * 1, values, None, shared_prompts=shared)


@pytest.mark.parametrize("name", SHARING)
def test_who_shares_prompts(name: str) -> None:
    """All whose batches do, up to their window; not those who keep something else than keys and values."""
    model = make_model(name.split()[0], **SHARING[name])
    assert can_share_prompts(model, 12) == (name != "deepseek_v3")
    if name in WINDOWED:
        assert not can_share_prompts(make_model(name.split()[0], **shorten(SHARING[name])), 12)
