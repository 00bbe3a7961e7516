"""The rows of an optimiser step dealt to the ranks: as many to each, and as nearly as can be equal work.

Which rows make a step depends on the seed alone. All ranks compute the same dealing of the same rows, so that
none has to be told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from prefkit.data.lengths import Lengths
from prefkit.data.packing import Layout

Cells = list[list[list[int]]]  # for each micro-step, for each rank, rows by their place


class Work(NamedTuple):
    """The cost of a step, between the places where ranks wait for each other: of the rank that has most, the
    mean of all ranks, and of the one that would have most if rows were taken in their order."""

    largest: float
    mean: float
    undealt: float

    def imbalances(self) -> list[tuple[str, tuple[float, float]]]:
        """How much more the rank with most has than the mean, dealt as it was and undealt: by the names of
        the log, as (sum, count)."""
        named = (("work_imbalance", self.largest), ("work_imbalance/undealt", self.undealt))
        return [(name, (most, self.mean)) for name, most in named]


class Share(NamedTuple):
    """What a rank computes in a micro-step: rows by their number, or without `learns` a filler, a row whose
    numbers count nowhere, so that every rank makes as many passes as the others. The first of a step among
    several ranks tells the `work` of the step."""

    rows: list[int]
    learns: bool = True
    work: Work | None = None


def costs_of(lengths: Lengths, layout: Layout, width: int) -> np.ndarray:
    """What it costs to compute each row, in tokens, (n,); `width` is the hidden size of the model.

    All but attention costs the same for each token. Attention costs more with each token that a token sees:
    about 24 h^2 multiplications of a layer of width h are for the token, and 4 h for each it sees, so that
    6 h tokens seen are one token more. With P tokens of prompt and R of a response under it, they see
    P^2 / 2 + sum of (P R + R^2 / 2) in all under a shared prompt, which is there once; else the prompt is
    computed and seen again with each response. A partner counts as any response, though it needs no backward.

    >>> lengths = Lengths(*(np.array([it]) for it in (100, 2, 30, 500)))  # 100, under it 10 and 20
    >>> [costs_of(lengths, layout, width=1).round().tolist() for layout in ("shared", "repeat")]
    [[1505.0], [2438.0]]
    """
    prompts, numbers, totals, squares = (it.astype(np.float64) for it in lengths)
    times = np.ones_like(numbers) if layout == "shared" else numbers
    tokens = times * prompts + totals
    seen = times * prompts**2 / 2 + prompts * totals + squares / 2
    costs: np.ndarray = tokens + seen / (6 * width)
    return costs


def deal(costs: Sequence[float], num_ranks: int, size: int) -> Cells:
    """Rows, in the order of a run, as micro-batches of up to `size`: those of each rank in each micro-step.

    Each rank gets as many rows, or one less than others where they cannot be divided, and each of its
    micro-batches likewise; the costs of ranks, and of the micro-batches of a rank, are nearly equal. Costly
    micro-batches come first, so that those of a micro-step are alike. One rank has its rows in their order.

    >>> deal([9, 1, 1, 9], num_ranks=2, size=1)
    [[[0], [3]], [[1], [2]]]
    >>> deal([1, 2, 3], num_ranks=2, size=2), deal([1, 2, 3], num_ranks=1, size=2)
    ([[[0, 1], [2]]], [[[0, 1]], [[2]]])
    """
    number = len(costs)
    if num_ranks == 1:
        return [[list(range(first, min(first + size, number)))] for first in range(0, number, size)]
    num_micro = -(-number // (num_ranks * size))
    cells = [_micro_batches(costs, rows, num_micro) for rows in _deal_to_ranks(costs, num_ranks, size)]
    return [[own[micro] for own in cells] for micro in range(num_micro)]


def _deal_to_ranks(costs: Sequence[float], num_ranks: int, size: int) -> list[list[int]]:
    """The rows of each rank: spread, or in their order where that is as even in number and better in cost."""
    spread = _spread(costs, range(len(costs)), num_ranks)
    in_order = _in_order(costs, num_ranks, size)
    is_even = all(len(one) == len(other) for one, other in zip(spread, in_order, strict=True))
    return in_order if is_even and _largest(costs, in_order) < _largest(costs, spread) else spread


def _in_order(costs: Sequence[float], num_ranks: int, size: int) -> list[list[int]]:
    """The rows of each rank where each takes a batch in turn."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    for row in range(len(costs)):
        ranks[row // size % num_ranks].append(row)
    return ranks


def _largest(costs: Sequence[float], groups: Sequence[Sequence[int]]) -> float:
    return max(_sum(costs, group) for group in groups)


def _sum(costs: Sequence[float], rows: Sequence[int]) -> float:
    return sum(costs[i] for i in rows)


def _micro_batches(costs: Sequence[float], rows: Sequence[int], number: int) -> list[list[int]]:
    """The rows of a rank in micro-batches, the costliest first; those without a row come last."""
    return sorted(_spread(costs, rows, number), key=lambda own: -_sum(costs, own))


def _spread(costs: Sequence[float], rows: Sequence[int], number: int) -> list[list[int]]:
    """Rows in groups whose sizes differ by one at most, the larger first, and whose costs are nearly equal.

    The costliest row goes first, each to the group that has least and has room; then groups with most and
    least exchange rows while that helps.
    """
    size, larger = divmod(len(rows), number)
    room = [size + (group < larger) for group in range(number)]
    groups: list[list[int]] = [[] for _ in range(number)]
    totals = [0.0] * number
    for row in sorted(rows, key=lambda i: (-costs[i], i)):
        group = min((g for g in range(number) if len(groups[g]) < room[g]), key=lambda g: (totals[g], g))
        groups[group].append(row)
        totals[group] += costs[row]
    for _ in rows:
        if not _exchange(costs, groups):
            break
    return [sorted(group) for group in groups]


def _exchange(costs: Sequence[float], groups: list[list[int]]) -> bool:
    """Let the groups with most and least exchange the rows that make them most nearly equal, if any do."""
    totals = [_sum(costs, group) for group in groups]
    most, least = int(np.argmax(totals)), int(np.argmin(totals))
    gap = totals[most] - totals[least]
    if not groups[most] or not groups[least]:
        return False
    given, taken = (np.array([costs[i] for i in groups[which]]) for which in (most, least))
    apart = np.abs(gap - 2 * (given[:, None] - taken[None, :]))
    i, j = np.unravel_index(int(apart.argmin()), apart.shape)
    if apart[i, j] > gap * (1 - 1e-9):
        return False
    groups[most][i], groups[least][j] = groups[least][j], groups[most][i]
    return True


@dataclass(frozen=True)
class Dealer:
    """Deals steps of `accumulation` micro-steps, in which each of `num_ranks` ranks has up to `size` rows.

    `together` says among how many consecutive micro-steps rows may change places: 1 where a loss takes
    something from all rows of a micro-step, which then has the same rows as on one rank.
    """

    num_ranks: int
    rank: int
    size: int
    accumulation: int = 1
    together: int = 1

    @property
    def rows_per_step(self) -> int:
        """Rows of a step on all ranks."""
        return self.num_ranks * self.size * self.accumulation

    def shares(self, costs: Sequence[float]) -> list[Share]:
        """This rank's part of a step whose rows have these costs, in the order of its micro-steps."""
        filler = [min(range(len(costs)), key=lambda i: (costs[i], i))]
        shares: list[Share] = []
        work = Work(0.0, 0.0, 0.0)
        number = self.num_ranks * self.size * self.together
        for first in range(0, len(costs), number):
            part = costs[first : first + number]
            cells = deal(part, self.num_ranks, self.size)
            for step in cells:
                rows = [first + row for row in step[self.rank]]
                shares.append(Share(rows) if rows else Share(filler, learns=False))
            work = Work(*map(sum, zip(work, self._work(part, cells), strict=True)))
        if self.num_ranks > 1:
            shares[0] = shares[0]._replace(work=work)
        return shares

    def _work(self, costs: Sequence[float], cells: Cells) -> Work:
        """That of rows which were dealt together."""
        dealt = [sum(_sum(costs, rows) for rows in own) for own in zip(*cells, strict=True)]
        undealt = _in_order(costs, self.num_ranks, self.size)
        return Work(max(dealt), sum(dealt) / self.num_ranks, _largest(costs, undealt))


class DealtBatches:
    """A batch sampler: this rank's `Share` of each micro-step of an epoch.

    The rows of an epoch are all there are, in an order drawn by `seed` and the epoch, the one that
    accelerate's `SeedableRandomSampler` gives a single process, or without a seed in their own order. A step
    takes the next ones. `drop_last` leaves out the rows of a last micro-step that is not full.
    """

    def __init__(self, dealer: Dealer, costs: np.ndarray, seed: int | None, drop_last: bool = False) -> None:
        self.dealer = dealer
        self.costs = costs
        self.seed = seed
        self.epoch = 0
        per_micro_step = dealer.num_ranks * dealer.size
        self.num_rows = len(costs) // per_micro_step * per_micro_step if drop_last else len(costs)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-steps of an epoch."""
        return -(-self.num_rows // (self.dealer.num_ranks * self.dealer.size))

    def __iter__(self) -> Iterator[Share]:
        order = self._order()[: self.num_rows]
        per_step = self.dealer.rows_per_step
        for first in range(0, len(order), per_step):
            rows = order[first : first + per_step]
            for share in self.dealer.shares(self.costs[rows].tolist()):
                yield share._replace(rows=rows[share.rows].tolist())

    def _order(self) -> np.ndarray:
        if self.seed is None:
            return np.arange(len(self.costs))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.costs), generator=generator).numpy()
