"""How rows are dealt to ranks: each once, equally many, at nearly equal cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given
from hypothesis import strategies as st

from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair
from prefkit.data.lengths import WHOLE, Lengths, lengths_of_rows
from prefkit.data.partners import PartneredRows
from prefkit.data.store import EncodedRows, RowWriter
from prefkit.data.view import RowView
from prefkit.train.dealing import Dealer, DealtBatches, Share, costs_of, deal

COSTS = st.lists(st.integers(1, 10_000), min_size=1, max_size=40)
RANKS, SIZES = st.integers(1, 5), st.integers(1, 4)


def loads(costs: list[int], cells: list[list[list[int]]]) -> list[int]:
    """The cost of each rank."""
    return [sum(costs[i] for rows in own for i in rows) for own in zip(*cells, strict=True)]


def undealt(costs: list[int], num_ranks: int, size: int) -> list[int]:
    """The cost of each rank where each takes a batch in turn."""
    return [
        sum(cost for i, cost in enumerate(costs) if i // size % num_ranks == rank)
        for rank in range(num_ranks)
    ]


@given(COSTS, RANKS, SIZES)
def test_each_row_is_dealt_once_and_counts_are_even(costs: list[int], num_ranks: int, size: int) -> None:
    cells = deal(costs, num_ranks, size)
    dealt = [row for step in cells for rows in step for row in rows]
    assert sorted(dealt) == list(range(len(costs)))
    assert len(cells) == -(-len(costs) // (num_ranks * size))
    assert max(len(rows) for step in cells for rows in step) <= size
    counts = [sum(map(len, own)) for own in zip(*cells, strict=True)]
    assert max(counts) - min(counts) <= 1 and counts[0] == max(counts)
    assert cells == deal(costs, num_ranks, size)


@given(COSTS, st.integers(2, 5), SIZES)
def test_dealt_is_no_worse_than_undealt(costs: list[int], num_ranks: int, size: int) -> None:
    """Where either gives equally many; and no rank is further from the mean than one row could put it."""
    costs = costs * num_ranks * size
    found = loads(costs, deal(costs, num_ranks, size))
    assert max(found) <= max(undealt(costs, num_ranks, size))
    assert max(found) - min(found) <= max(costs)


@given(COSTS)
def test_one_rank_has_its_rows_in_their_order(costs: list[int]) -> None:
    assert [row for (rows,) in deal(costs, 1, 3) for row in rows] == list(range(len(costs)))


def test_long_rows_are_spread_also_over_micro_batches() -> None:
    """Of eight long ones each of four ranks has two, in different micro-steps."""
    costs = [100] * 8 + [1] * 8
    assert undealt(costs, 4, 2) == [202, 202, 202, 202]
    assert undealt(costs, 4, 1) == [202, 202, 202, 202]
    cells = deal(costs, 4, 2)
    assert [sum(costs[i] for i in rows) for step in cells for rows in step] == [101] * 8
    assert undealt([9, 9, 1, 1], 2, 2) == [18, 2]
    assert loads([9, 9, 1, 1], deal([9, 9, 1, 1], 2, 2)) == [10, 10]


def test_micro_batches_of_a_micro_step_are_alike() -> None:
    costs = [1, 50, 2, 51, 3, 52, 4, 53]
    for step in deal(costs, 2, 1):
        (one,), (other,) = step
        assert abs(costs[one] - costs[other]) <= 2


# A rank's batches


def batches_of(
    costs: list[int], *, seed: int | None = 3, drop_last: bool = False, **dealer: Any
) -> list[Any]:
    """What each rank gets in an epoch: a list of shares."""
    num_ranks = dealer.pop("num_ranks")
    return [
        list(DealtBatches(Dealer(num_ranks, rank, **dealer), np.array(costs), seed, drop_last))
        for rank in range(num_ranks)
    ]


@given(COSTS, st.integers(1, 2), st.integers(1, 2), st.booleans())
def test_an_epoch_has_each_row_once(costs: list[int], size: int, accumulation: int, joins: bool) -> None:
    """And steps have the same rows on two ranks as on one with batches twice as large."""
    keys = {"accumulation": accumulation, "together": 1 if joins else accumulation}
    ranks = batches_of(costs, num_ranks=2, size=size, **keys)
    (one,) = batches_of(costs, num_ranks=1, size=2 * size, **keys)
    assert len(ranks[0]) == len(ranks[1]) == len(one) == -(-len(costs) // (2 * size))
    per_step = 1 if joins else accumulation
    for first in range(0, len(one), per_step):
        steps = [own[first : first + per_step] for own in ranks]
        learnt = sorted(row for own in steps for share in own if share.learns for row in share.rows)
        assert learnt == sorted(row for share in one[first : first + per_step] for row in share.rows)


def test_a_rank_without_a_row_has_a_filler() -> None:
    """The cheapest row of the step; the work of a step comes with its first batch."""
    first, second = batches_of([5, 4, 3], num_ranks=2, size=1, seed=None, accumulation=2, together=2)
    assert first == [Share([1], work=(7, 6, 8)), Share([2])]
    assert second == [Share([0], work=(7, 6, 8)), Share([2], learns=False)]


def test_fillers_and_work_are_unknown_to_one_rank() -> None:
    (own,) = batches_of([5, 4, 3], num_ranks=1, size=2)
    assert all(share.learns and share.work is None for share in own)


def test_drop_last_leaves_out_what_fills_no_micro_step() -> None:
    ranks = batches_of([1] * 7, num_ranks=2, size=1, seed=None, drop_last=True)
    assert [[share.rows for share in own] for own in ranks] == [[[0], [2], [4]], [[1], [3], [5]]]


def test_the_order_is_the_one_of_a_single_process_under_accelerate() -> None:
    batches = DealtBatches(Dealer(1, 0, 2), np.ones(9), seed=7)
    sampler = SeedableRandomSampler(range(9), generator=torch.Generator(), data_seed=7)
    orders = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        sampler.set_epoch(epoch)
        orders.append([row for share in batches for row in share.rows])
        assert orders[-1] == list(sampler)
    assert orders[0] != orders[1]


# Costs


def example(prompt: int, *responses: int, pairs: tuple[Pair, ...] = (Pair(0, 1),)) -> TokenizedExample:
    ids = [[5] * number for number in responses]
    return TokenizedExample([7] * prompt, ids, pairs, "f:1", labels=("ranked",) * len(ids))


ROWS = [
    example(3, 2, 5),
    example(40, 1, 2, 3, pairs=(Pair(0, 1), Pair(2, 1))),
    example(1, 9, 9),
]


def as_lists(lengths: Lengths) -> list[list[int]]:
    return [column.tolist() for column in lengths]


def test_lengths_are_read_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows on disk, more than a batch of them, as of rows in memory; whole, and pair by pair."""
    from prefkit.data.ledger import Ledger

    many = ROWS * 30
    with RowWriter(tmp_path / "rows") as writer:
        for row in many:
            writer.append(row)
        writer.finish(Ledger("f", ("f",)), {})
    stored = EncodedRows(tmp_path / "rows" / "rows.arrow")
    places = np.array([[1, i, WHOLE] for i in range(90)] + [[0, 1, 0], [0, 1, 1], [1, 88, 1], [0, 2, 0]])
    split = RowView([ROWS, stored], places)
    expected = lengths_of_rows([*many, *(split[i] for i in range(90, 94))])
    monkeypatch.setattr(EncodedRows, "__getitem__", None)
    assert as_lists(split.lengths()) == as_lists(expected)
    assert as_lists(expected)[2][-4:] == [3, 5, 5, 18]


def test_lengths_include_partners() -> None:
    rows = [example(6, 3, pairs=()), example(2, 9, pairs=())]
    view = RowView([rows], np.array([[0, 0, WHOLE], [0, 1, WHOLE]]))
    partnered = PartneredRows(view, view[np.array([1, 0])], cutoff_len=12)
    assert as_lists(partnered.lengths()) == as_lists(lengths_of_rows([partnered[0], partnered[1]]))


def test_a_prompt_that_is_shared_costs_once() -> None:
    lengths = lengths_of_rows([example(1000, 10, 10), example(10, 1000, 10)])
    shared, repeated = (costs_of(lengths, layout, width=64) for layout in ("shared", "repeat"))
    assert (repeated[0] / shared[0], repeated[1] / shared[1]) == pytest.approx((1.95, 1.02), abs=0.05)


def test_long_rows_cost_more_than_their_tokens() -> None:
    one, many = costs_of(lengths_of_rows([example(0, 9000), example(0, *[900] * 10)]), "shared", width=1024)
    assert many == pytest.approx(9000, rel=0.1) and one > 1.5 * 9000
