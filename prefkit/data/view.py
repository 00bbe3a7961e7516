"""Rows of several files in the order of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import overload

import numpy as np

from prefkit.data.encode import TokenizedExample
from prefkit.data.lengths import WHOLE, Lengths, lengths_of
from prefkit.data.store import EncodedRows


class RowView(Sequence[TokenizedExample]):
    """Rows of several files in some order; `places` (n, 3) has the table, the row in it and the pair of each,
    or `WHOLE`."""

    def __init__(self, tables: Sequence[Sequence[TokenizedExample]], places: np.ndarray) -> None:
        self.tables = tables
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    @property
    def has_images(self) -> bool:
        """Whether one of the files has a row with images."""
        return any(
            bool(table.num_images().any())
            if isinstance(table, EncodedRows)
            else any(row.images for row in table)
            for table in self.tables
        )

    def image_digests(self) -> Iterator[str]:
        """The hash of the content of each image of the files."""
        for table in self.tables:
            if isinstance(table, EncodedRows):
                yield from table.image_digests()
            else:
                yield from (digest for row in table for digest in row.digests)

    def lengths(self) -> Lengths:
        """How long the rows are."""
        return lengths_of(self.tables, self.places)

    def of_table(self, table: int) -> RowView:
        """The rows that come from one of the files."""
        return self[np.flatnonzero(self.places[:, 0] == table)]

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> RowView: ...
    def __getitem__(self, index: int | slice | np.ndarray) -> TokenizedExample | RowView:
        if isinstance(index, slice | np.ndarray):
            return RowView(self.tables, self.places[index])
        table, row, pair = self.places[index].tolist()
        example = self.tables[table][row]
        return example if pair == WHOLE else next(islice(example.split(), pair, None))
