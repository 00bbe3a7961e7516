"""How long the rows of a run are, without decoding them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prefkit.data.encode import TokenizedExample
from prefkit.data.store import EncodedRows

WHOLE = -1  # in the place of a pair: the example with all its pairs


class Lengths(NamedTuple):
    """Of n rows, (n,) each: tokens of the prompt, their responses, the sum of the tokens of these and the sum
    of the squares."""

    prompts: np.ndarray
    numbers: np.ndarray
    totals: np.ndarray
    squares: np.ndarray

    def with_responses(self, tokens: np.ndarray) -> Lengths:
        """With one response more to each row, of so many tokens."""
        return Lengths(self.prompts, self.numbers + 1, self.totals + tokens, self.squares + tokens**2)


def lengths_of(tables: Sequence[Sequence[TokenizedExample]], places: np.ndarray) -> Lengths:
    """The lengths of rows that `places` (n, 3) names by table, row and pair, or `WHOLE`.

    >>> from prefkit.data.examples import Pair
    >>> row = TokenizedExample([7], [[1, 2], [3], [4, 5, 6]], (Pair(0, 1), Pair(2, 1)), "f:1")
    >>> found = lengths_of([[row]], np.array([[0, 0, WHOLE], [0, 0, 1]]))
    >>> found.numbers.tolist(), found.totals.tolist(), found.squares.tolist()
    ([3, 2], [6, 4], [14, 10])
    """
    found = np.zeros((4, len(places)), dtype=np.int64)
    for number, table in enumerate(tables):
        of_table = np.flatnonzero(places[:, 0] == number)
        if len(of_table):
            found[:, of_table] = _lengths(table, places[of_table, 1], places[of_table, 2])
    return Lengths(*found)


def lengths_of_rows(rows: Sequence[TokenizedExample]) -> Lengths:
    """The lengths of rows in memory."""
    number = len(rows)
    places = np.column_stack([np.zeros(number, int), np.arange(number), np.full(number, WHOLE)])
    return lengths_of([rows], places)


def _lengths(table: Sequence[TokenizedExample], rows: np.ndarray, pairs: np.ndarray) -> Lengths:
    """Those of rows of one table."""
    if isinstance(table, EncodedRows):
        prompts, numbers, responses = table.lengths()
        num_pairs, members = table.num_pairs(), table.pair_members()
    else:
        prompts = np.array([len(row.prompt_ids) for row in table])
        numbers = np.array([len(row.response_ids) for row in table])
        responses = np.array([len(ids) for row in table for ids in row.response_ids], dtype=np.int64)
        num_pairs = np.array([len(row.pairs) for row in table])
        flat = [(pair.chosen, pair.rejected) for row in table for pair in row.pairs]
        members = np.array(flat, dtype=np.int64).reshape(-1, 2)
    starts, first_pairs = (np.concatenate([[0], np.cumsum(it)]) for it in (numbers, num_pairs))
    sums, squares = (
        np.concatenate([[0], np.cumsum(it)]) for it in (responses, responses.astype(np.int64) ** 2)
    )
    first, end = starts[rows], starts[rows + 1]
    found = np.stack([prompts[rows], numbers[rows], sums[end] - sums[first], squares[end] - squares[first]])
    if len(single := np.flatnonzero(pairs != WHOLE)):
        own = members[first_pairs[rows[single]] + pairs[single]] + first[single, None]
        tokens = responses[own].astype(np.int64)
        found[1:, single] = np.stack([np.full(len(single), 2), tokens.sum(1), (tokens**2).sum(1)])
    return Lengths(*found)
