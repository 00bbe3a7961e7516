"""The layer that writes beside what it has is transformers' own in what it gives."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from prefkit.model.growing_cache import GrowingLayer, RepeatedPrompts
from tests.conftest import make_model


def test_it_gives_what_transformers_own_layer_gives() -> None:
    torch.manual_seed(0)
    own, growing = DynamicLayer(), GrowingLayer()
    rows = 3
    for step in range(60):
        keys, values = (
            torch.randn(rows, 2, 5 if step == 0 else 1, 4),
            torch.randn(rows, 2, 5 if step == 0 else 1, 6),
        )
        for found, expected in zip(growing.update(keys, values), own.update(keys, values), strict=True):
            assert torch.equal(found, expected)
        assert growing.get_seq_length() == own.get_seq_length()
        assert growing.get_mask_sizes(1) == own.get_mask_sizes(1)
        if step in (1, 20, 21, 40):
            index = torch.tensor({1: [0, 0, 1, 1, 2, 2], 20: [5, 0, 3], 21: [2, 1], 40: [1]}[step])
            rows = len(index)
            growing.reorder_cache(index)
            own.reorder_cache(index)


def test_it_copies_seldom() -> None:
    layer = GrowingLayer()
    stores = set()
    for _ in range(100):
        layer.update(torch.randn(1, 1, 1, 2), torch.randn(1, 1, 1, 2))
        stores.add(layer.stores[0].data_ptr())
    assert len(stores) < 10


def test_a_window_stays_transformers_own() -> None:
    model = make_model("gemma3_text", sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    layers = RepeatedPrompts(model).cache.layers
    assert [type(layer) for layer in layers] == [DynamicSlidingWindowLayer, GrowingLayer]
