"""Rows that are read and encoded while a run trains, for data that is too large to be encoded beforehand."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from prefkit.config.schema import DataConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.ledger import Ledger
from prefkit.data.mixing import mix
from prefkit.data.partners import stream_partners
from prefkit.data.readers import DataError
from prefkit.data.rows import Encoder, RowReader
from prefkit.data.sources import DatasetEntry

Streamed = tuple[int, TokenizedExample]  # the number of its data set, and the row


class StreamedRows(IterableDataset[TokenizedExample]):
    """An endless stream of examples: pass after pass over the data sets, mixed and shuffled.

    Shuffling draws the next row from `buffer_size` waiting ones, another for each pass, by `seed` alone: a
    stream that is begun again gives the same rows in the same order, which is how a run resumes. Rows of
    `held_out`, by their source, are left out.
    """

    def __init__(
        self,
        entries: Sequence[DatasetEntry],
        encoder: Encoder,
        config: DataConfig,
        seed: int,
        held_out: Collection[str] = (),
        splits: bool = False,
    ) -> None:
        self.entries = [
            replace(entry, hub=replace(entry.hub, streams=True)) if entry.hub else entry for entry in entries
        ]
        self.encoder = replace(encoder, config=replace(config, preprocessing_num_workers=None))
        self.config = config
        self.seed = seed
        self.held_out = frozenset(held_out)
        self.splits = splits
        self.ledgers = self._new_ledgers()
        # What the newest examples added to the ledgers: the data set, and what to take back from which field.
        self._given: deque[tuple[int, dict[str, int]]] = deque(maxlen=65_536)
        self._num_given = 0

    def _new_ledgers(self) -> list[Ledger]:
        return [Ledger(entry.name, entry.places) for entry in self.entries]

    def __iter__(self) -> Iterator[TokenizedExample]:
        self.ledgers = self._new_ledgers()
        self._given.clear()
        self._num_given = 0
        number = 0
        while True:
            before = self._num_given
            yield from self._one_pass(number)
            if self._num_given == before:
                raise DataError(
                    "no row of the stream can be trained on; "
                    + "; ".join(ledger.explain() for ledger in self.ledgers)
                )
            number += 1

    def first(self, number: int) -> list[TokenizedExample]:
        """The first examples in the order of the files, as they are; no ledger knows of it."""
        return [example for _, example in islice(self.read(self._new_ledgers()), number)]

    def _one_pass(self, number: int) -> Iterator[TokenizedExample]:
        # Rows are counted in the first pass; the passes after it meet the same ones.
        ledgers = self.ledgers if number == 0 else self._new_ledgers()
        rows = self.read(ledgers, number)
        if self.encoder.use == "judged":
            rows = stream_partners(rows, self.config.cutoff_len)
        for which, example in self._shuffled(rows, number):
            parts = example.split() if self.splits else (example,)
            for place, part in enumerate(parts):
                self._count(which, part, is_new_row=place == 0, repeats=number > 0)
                yield part

    def read(self, ledgers: Sequence[Ledger], number: int = 0) -> Iterator[Streamed]:
        """The usable rows of pass `number`, mixed and in order, without those that are held out."""

        def start(which: int, entry: DatasetEntry) -> Any:
            def rows() -> Iterator[Streamed]:
                reader = RowReader(entry, self.encoder, ledgers[which], self.seed)
                for example in reader.encoded(_untracked):
                    if example.source in self.held_out:
                        ledgers[which].held_out += 1
                        ledgers[which].held_out_truncated += example.truncated
                        ledgers[which].held_out_pairs += len(example.pairs)
                    else:
                        yield which, example

            return rows

        starts = [start(which, entry) for which, entry in enumerate(self.entries)]
        yield from mix(starts, self.config.mix_strategy, self.config.interleave_probs, self.seed + number)

    def _shuffled(self, rows: Iterator[Streamed], number: int) -> Iterator[Streamed]:
        if self.config.disable_shuffling:
            yield from rows
            return
        generator = np.random.default_rng([self.seed, number])
        waiting: list[Streamed] = []
        for row in rows:
            waiting.append(row)
            if len(waiting) > self.config.buffer_size:
                place = int(generator.integers(len(waiting)))
                waiting[place], waiting[-1] = waiting[-1], waiting[place]
                yield waiting.pop()
        order = generator.permutation(len(waiting))
        yield from (waiting[i] for i in order)

    def _count(self, which: int, example: TokenizedExample, is_new_row: bool, repeats: bool) -> None:
        added = {"repeats": int(is_new_row)}
        if not repeats:
            truncated = is_new_row and example.truncated
            added = {"trained": int(is_new_row), "truncated": int(truncated), "pairs": len(example.pairs)}
        self._num_given += 1
        self._given.append((which, added))
        for name, number in added.items():
            setattr(self.ledgers[which], name, getattr(self.ledgers[which], name) + number)

    def settle(self, num_trained: int) -> list[Ledger]:
        """The ledgers of a stream of which `num_trained` examples were trained on.

        Rows that were read and not trained on, waiting to be shuffled or fetched ahead, are not sampled
        by `max_steps`; rows that were never read are in no ledger.
        """
        for _ in range(max(self._num_given - num_trained, 0)):
            if not self._given:
                break
            which, added = self._given.pop()
            for name, number in added.items():
                setattr(self.ledgers[which], name, getattr(self.ledgers[which], name) - number)
        for ledger in self.ledgers:
            counted = ledger.trained + ledger.held_out + ledger.rejected.total() + ledger.not_sampled.total()
            if waiting := ledger.num_rows - counted:
                ledger.not_sampled["max_steps"] += waiting
        return self.ledgers


def _untracked(rows: Iterable[Any], title: str) -> Iterable[Any]:
    return rows
