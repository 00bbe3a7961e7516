"""Rows one after the other without end, each by its number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from prefkit.data.encode import TokenizedExample


@dataclass(frozen=True)
class Turns:
    """`rows` in turns without end, so that nothing but a number says where a run is in them.

    Each turn has an order of its own, drawn by `seed`, unless the rows keep theirs (`shuffles`).

    >>> rows = [TokenizedExample([i], [[]], (), f"f:{i}") for i in range(3)]
    >>> [Turns(rows, seed=0, shuffles=False)[i].source for i in range(4)]
    ['f:0', 'f:1', 'f:2', 'f:0']
    """

    rows: Sequence[TokenizedExample]
    seed: int
    shuffles: bool

    def __getitem__(self, number: int) -> TokenizedExample:
        """The row with this number, counted from 0."""
        turn, place = divmod(number, len(self.rows))
        return self.rows[_order(self.seed, turn, len(self.rows))[place] if self.shuffles else place]


@lru_cache(maxsize=8)
def _order(seed: int, turn: int, number: int) -> list[int]:
    order: list[int] = np.random.default_rng((seed, turn)).permutation(number).tolist()
    return order
