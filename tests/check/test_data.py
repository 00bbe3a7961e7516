"""Numbers about data, by hand."""

from __future__ import annotations

import pytest

from prefkit.check.data import Balance, find_duplicates, kinds_of, summarize
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair


def example(prompt: int, chosen: int, rejected: int, truncated: bool = False) -> TokenizedExample:
    return TokenizedExample(
        [prompt] * prompt, [[1] * chosen, [2] * rejected], (Pair(0, 1),), "f:1", truncated
    )


def test_lengths_and_truncation() -> None:
    summary = summarize("set", [example(4, 2, 1), example(4, 4, 8, truncated=True)], cutoff_len=15)
    assert (summary.examples, summary.truncated, summary.limit) == (2, 1, 15)
    assert list(summary.lengths) == ["prompt", "chosen", "rejected", "prompt + longest"]
    chosen = summary.lengths["chosen"]
    assert (chosen.smallest, chosen.median, chosen.mean, chosen.largest) == (2, 3, 3.0, 4)
    assert summary.lengths["prompt + longest"].largest == 12
    assert all(sum(lengths.histogram) == 2 for lengths in summary.lengths.values())
    # Where all is short, the histogram ends at the longest rather than at cutoff_len.
    assert summarize("set", [example(4, 2, 1)], cutoff_len=1000).limit == 6


def test_bias_counts_ties_half_and_is_strong_only_with_enough_pairs() -> None:
    pairs = [example(1, 9, 1), example(1, 3, 3), example(1, 2, 5)]
    bias = summarize("set", pairs, 64).bias
    assert bias is not None
    assert (bias.pairs, bias.longer, bias.difference) == (3, 0.5, pytest.approx(5 / 3, abs=0.01))
    few, many = (summarize("set", [example(1, 9, 1)] * n, 64).bias for n in (10, 40))
    assert few is not None and many is not None
    assert not few.is_strong and many.is_strong
    shorter = summarize("set", [example(1, 1, 9)] * 40, 64).bias
    assert shorter is not None and shorter.is_strong


def test_duplicates_within_and_across() -> None:
    a, b, c = example(3, 1, 2), example(3, 1, 4), example(5, 1, 2)
    found = find_duplicates([a, b, a, c], [b, c])
    assert (found.prompts, found.rows, found.leaked) == (2, 1, 2)


@pytest.mark.parametrize("desirable, undesirable", [(1, 1), (10, 100), (100, 10), (4, 3), (140, 100), (1, 9)])
def test_weights_balance_as_the_paper_says(desirable: int, undesirable: int) -> None:
    chosen, rejected = Balance(desirable, undesirable).weights
    ratio = chosen * desirable / (rejected * undesirable)
    assert 1 - 1e-3 <= ratio <= 4 / 3 + 1e-3
    assert min(chosen, rejected) == 1


def test_labels_name_the_kinds() -> None:
    rows = [TokenizedExample([1], [[2, 3]], (), "f:1", labels=("desirable",))]
    assert kinds_of(rows[0]) == ["desirable"]
    summary = summarize("set", rows, 64)
    assert summary.bias is None and summary.balance == Balance(1, 0)
    assert kinds_of(TokenizedExample([1], [[2], [3]], (Pair(1, 0),), "f:1")) == ["rejected", "chosen"]
