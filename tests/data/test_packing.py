"""Both layouts of a batch, number by number."""

from __future__ import annotations

import torch

from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair
from prefkit.data.packing import pack

EXAMPLES = [
    TokenizedExample([10, 11], [[1, 2, 3], [4]], (Pair(0, 1),), "f:1"),
    TokenizedExample([12], [[5], [6, 7]], (Pair(1, 0),), "f:2"),
]


def test_shared() -> None:
    batch = pack(EXAMPLES, "shared")
    assert batch.input_ids.tolist() == [[10, 11, 1, 2, 3, 4, 12, 5, 6, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 1, 2]]
    assert batch.segments == ((0, 2, ((2, 5), (5, 6))), (6, 7, ((7, 8), (8, 10))))
    assert batch.attention_mask is None
    assert batch.source.tolist() == [1, 2, 3, 1, 6, 6, 8]
    assert batch.target.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.owner.tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert batch.pairs.tolist() == [[0, 1], [3, 2]]
    assert batch.rows == ("f:1", "f:2")


def test_repeat() -> None:
    batch = pack(EXAMPLES, "repeat")
    assert batch.input_ids.tolist() == [
        [10, 11, 1, 2, 3],
        [10, 11, 4, 0, 0],
        [12, 5, 0, 0, 0],
        [12, 6, 7, 0, 0],
    ]
    assert batch.attention_mask is not None and batch.segments is None
    assert batch.attention_mask.sum(1).tolist() == [5, 3, 2, 3]
    assert batch.source.tolist() == [1, 2, 3, 6, 10, 15, 16]


def test_the_source_of_each_token_is_the_token_before_it() -> None:
    for layout in ("shared", "repeat"):
        batch = pack(EXAMPLES, layout)
        before = batch.input_ids.flatten()[batch.source]
        assert before.tolist() == [11, 1, 2, 11, 12, 12, 6]
        same = torch.equal(batch.target, pack(EXAMPLES, "shared").target)
        assert same and batch.pairs.numel() == 4
