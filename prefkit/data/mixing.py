"""Which rows of several data sets a run uses, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")
Start = Callable[[], Iterator[T]]


class _Source(Iterator[T]):
    """A pass over a data set that knows whether it is at its end."""

    def __init__(self, start: Start[T]) -> None:
        self.start = start
        self.was_exhausted = False
        self._begin()

    def _begin(self) -> None:
        self._items = self.start()
        self._next = list(islice(self._items, 1))

    def __next__(self) -> T:
        if not self._next:
            raise StopIteration
        (item,) = self._next
        self._next = list(islice(self._items, 1))
        self.was_exhausted |= not self._next
        return item

    @property
    def is_over(self) -> bool:
        return not self._next

    def restart(self) -> None:
        """Begin again where it is over."""
        if self.is_over:
            self._begin()


def mix(starts: Sequence[Start[T]], strategy: str, probs: Sequence[float], seed: int) -> Iterator[T]:
    """The items of several data sets in one order; `starts` begin a pass over each.

    `concat`: one after the other. The others take an item from each in turn, or from one drawn by
    `probs`: `interleave_under` until the first data set is used up, `interleave_over` until each was, the
    short ones over and over, `interleave_once` until every item was taken once. Without `probs` a round is
    completed before it ends.

    >>> letters = [lambda: iter("ab"), lambda: iter("123")]
    >>> ["".join(mix(letters, f"interleave_{how}", [], 0)) for how in ("under", "over", "once")]
    ['a1b2', 'a1b2a3', 'a1b23']
    """
    if strategy == "concat":
        for start in starts:
            yield from start()
        return
    passes = [(number, _Source(start)) for number, start in enumerate(starts)]
    numbers = [number for number, source in passes if not source.is_over]
    sources = [source for _, source in passes if not source.is_over]
    enough = {"interleave_under": any, "interleave_over": all, "interleave_once": all}[strategy]
    rounds = _drawn([probs[i] for i in numbers], seed) if probs else _in_turn(len(sources))
    for turns in rounds:
        for number in turns:
            source = sources[number]
            if strategy == "interleave_over":
                source.restart()
            if not source.is_over:
                yield next(source)
        if enough(source.was_exhausted for source in sources):
            return


def _in_turn(number: int) -> Iterator[Sequence[int]]:
    while number:
        yield range(number)


def _drawn(probs: Sequence[float], seed: int) -> Iterator[Sequence[int]]:
    generator = np.random.default_rng(seed)
    weights = np.asarray(probs, dtype=float)
    while len(weights):
        for drawn in generator.choice(len(weights), 1000, p=weights / weights.sum()).tolist():
            yield (drawn,)


def sample_rows(num_rows: int, number: int | None, seed: int) -> list[int]:
    """How often each row is read, (num_rows,): once, or as often as it was drawn for `num_samples`.

    No row is drawn a second time before each was drawn once.
    """
    if number is None:
        return [1] * num_rows
    whole, rest = divmod(number, max(num_rows, 1))
    order = np.random.default_rng(seed).permutation(num_rows)
    times = np.full(num_rows, whole)
    times[order[:rest]] += 1
    return times.tolist()


def hold_out(num_rows: int, val_size: float, seed: int) -> np.ndarray:
    """Which of the rows are held out, as (num_rows,) of bool: a share of them if below 1, else their number.

    Raises `ValueError` when none would be left to train on.
    """
    number = int(val_size) if val_size >= 1 else max(1, round(num_rows * val_size))
    if number >= num_rows:
        raise ValueError(f"{val_size:g} holds out {number} of {num_rows} rows; none is left to train on")
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    held_out = np.zeros(num_rows, dtype=bool)
    held_out[order[:number].numpy()] = True
    return held_out
