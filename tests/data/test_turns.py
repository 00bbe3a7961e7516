"""Rows in turns without end."""

from __future__ import annotations

from prefkit.data.encode import TokenizedExample
from prefkit.data.turns import Turns

ROWS = [TokenizedExample([i], [[]], (), f"f:{i}") for i in range(5)]


def taken(turns: Turns, number: int) -> list[str]:
    return [turns[i].source for i in range(number)]


def test_each_turn_has_every_row_once_in_an_order_of_its_own() -> None:
    found = taken(Turns(ROWS, seed=3, shuffles=True), 15)
    parts = [found[:5], found[5:10], found[10:]]
    assert all(sorted(part) == [row.source for row in ROWS] for part in parts)
    assert len({tuple(part) for part in parts}) > 1


def test_the_order_follows_from_the_seed() -> None:
    one, same, other = (taken(Turns(ROWS, seed, shuffles=True), 10) for seed in (1, 1, 2))
    assert one == same and one != other
    assert taken(Turns(ROWS, seed=1, shuffles=False), 6) == ["f:0", "f:1", "f:2", "f:3", "f:4", "f:0"]
