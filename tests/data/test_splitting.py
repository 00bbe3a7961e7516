"""A part of a batch equals the batch of a part."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair
from prefkit.data.packing import Layout, pack
from prefkit.data.splitting import split


def make_example(number: int, draw: random.Random) -> TokenizedExample:
    """Up to four responses of up to nine tokens, and some of their pairs, perhaps none."""
    responses = [
        [draw.randrange(1, 99) for _ in range(draw.randint(1, 9))] for _ in range(draw.randint(1, 4))
    ]
    order = range(len(responses))
    every = [Pair(i, j, draw.random(), draw.random()) for i in order for j in order if i != j]
    pairs = draw.sample(every, draw.randint(0, len(every)))
    prompt = [draw.randrange(1, 99) for _ in range(draw.randint(1, 7))]
    return TokenizedExample(prompt, responses, tuple(pairs), f"f:{number}")


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
            assert found[name].is_contiguous(), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("layout", ["shared", "repeat"])
@pytest.mark.parametrize(
    ("number", "parts", "sizes"),
    [(1, 4, [1]), (2, 2, [1, 1]), (3, 2, [2, 1]), (3, 8, [1, 1, 1]), (8, 1, [8]), (11, 4, [3, 3, 3, 2])],
)
def test_each_part_is_what_pack_gives(layout: Layout, number: int, parts: int, sizes: list[int]) -> None:
    for seed in range(5):
        draw = random.Random(seed)
        examples = [make_example(i, draw) for i in range(number)]
        found = split(pack(examples, layout).to_dict(), parts)
        assert [len(part["rows"]) for part in found] == sizes
        start = 0
        for part, size in zip(found, sizes, strict=True):
            assert_equal(part, pack(examples[start : start + size], layout).to_dict())
            start += size
