"""The partner of a judged row: a response to another prompt, by which KTO estimates its KL.

It is drawn once for a run, over all of its rows, and travels with the row as a second response under the same
prompt. So it depends on neither batches, order, processes nor a resume, and whatever computes or keeps the
log-probs of a row's responses does so for the partner. Two prompts are the same if their token ids and images
are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from prefkit.data.encode import TokenizedExample
from prefkit.data.lengths import Lengths
from prefkit.data.readers import DataError
from prefkit.data.store import EncodedRows
from prefkit.data.view import RowView


class PartneredRows(RowView):
    """Judged rows, each with its partner: the response at the same place of `partners`.

    Of a partner as many tokens are kept as make `cutoff_len` with the prompt.
    """

    def __init__(self, rows: RowView, partners: RowView, cutoff_len: int) -> None:
        super().__init__(rows.tables, rows.places)
        self.partners = partners
        self.cutoff_len = cutoff_len

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> RowView: ...
    def __getitem__(self, index: int | slice | np.ndarray) -> TokenizedExample | RowView:
        if isinstance(index, slice | np.ndarray):
            return PartneredRows(super().__getitem__(index), self.partners[index], self.cutoff_len)
        return join_partner(super().__getitem__(index), self.partners[index], self.cutoff_len)

    def lengths(self) -> Lengths:
        """How long the rows are, their partners included."""
        own = super().lengths()
        return own.with_responses(np.minimum(self.partners.lengths().totals, self.cutoff_len - own.prompts))


def join_partner(example: TokenizedExample, other: TokenizedExample, cutoff_len: int) -> TokenizedExample:
    """A judged row with the response of another as its partner.

    >>> rows = [TokenizedExample([n], [[n, 8, 9]], (), f"f:{n}", labels=("desirable",)) for n in (1, 2)]
    >>> joined = join_partner(*rows, cutoff_len=3)
    >>> joined.prompt_ids, joined.response_ids, joined.labels
    ([1], [[1, 8, 9], [2, 8]], ('desirable', 'partner'))
    """
    partner = other.response_ids[0][: cutoff_len - len(example.prompt_ids)]
    return replace(
        example, response_ids=[*example.response_ids, partner], labels=(*example.labels, "partner")
    )


def without_partner(example: TokenizedExample) -> TokenizedExample:
    """A row with its own responses alone."""
    if "partner" not in example.labels:
        return example
    return replace(example, response_ids=example.response_ids[:-1], labels=example.labels[:-1])


def with_partners(rows: RowView, seed: int, cutoff_len: int, what: str) -> PartneredRows:
    """Judged rows with partners drawn among them by `seed`.

    Raises `DataError`, which calls the rows `what`, unless there are two prompts and both labels.
    """
    facts = [_prompts_and_labels(table) for table in rows.tables]
    starts = np.cumsum([0, *(len(prompts) for prompts, _ in facts)])
    flat = starts[rows.places[:, 0]] + rows.places[:, 1]
    prompts, labels = (np.concatenate(columns)[flat] for columns in zip(*facts, strict=True))
    _check_labels(set(labels.tolist()), what)
    if (prompts == prompts[0]).all():
        raise _one_prompt(what)
    partners = RowView(rows.tables, rows.places[draw_partners(prompts, seed)])
    return PartneredRows(rows, partners, cutoff_len)


def draw_partners(prompts: np.ndarray, seed: int) -> np.ndarray:
    """For each row the number of another, drawn evenly among those with another prompt, (n,).

    `prompts` (n,) has a number for the prompt of each row, at least two different ones.

    >>> prompts = np.array([5, 5, 7, 5])
    >>> partners = draw_partners(prompts, seed=0)
    >>> partners[[0, 1, 3]].tolist(), bool((prompts[partners] != prompts).all())
    ([2, 2, 2], True)
    """
    _, group, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")  # the rows of a prompt lie together
    first, size = (np.cumsum(sizes) - sizes)[group], sizes[group]
    drawn = np.random.default_rng(seed).integers(0, len(prompts) - size)
    partners: np.ndarray = order[np.where(drawn < first, drawn, drawn + size)]  # passes over its own prompt
    return partners


def stream_partners(
    rows: Iterator[tuple[int, TokenizedExample]], cutoff_len: int
) -> Iterator[tuple[int, TokenizedExample]]:
    """A pass over streamed rows, each with the response of the nearest earlier row that has another prompt.

    The first rows have none before them: they wait for the first row with another prompt, and take its
    response. Raises `DataError` at the end of a pass without two prompts and both labels.
    """
    waiting: list[tuple[int, TokenizedExample]] = []
    labels: set[str] = set()
    last: TokenizedExample | None = None
    other: TokenizedExample | None = None  # the nearest one before `last` that has another prompt
    for which, row in rows:
        labels.add(row.labels[0])
        if last is not None and row.prompt_key != last.prompt_key:
            other = last
        last = row
        if other is None:
            waiting.append((which, row))
            continue
        for early, first in waiting:
            yield early, join_partner(first, row, cutoff_len)
        waiting = []
        yield which, join_partner(row, other, cutoff_len)
    if last is None:
        return
    if other is None:
        raise _one_prompt("the rows of the stream")
    _check_labels(labels, "the rows of the stream")


def _prompts_and_labels(table: Sequence[TokenizedExample]) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of a file, a number for its prompt, and its label."""
    if isinstance(table, EncodedRows):
        return table.prompt_keys(), table.first_labels()
    keys = np.array([row.prompt_key for row in table], dtype=np.uint64)
    return keys, np.array([row.labels[0] for row in table], dtype=object)


def _check_labels(labels: set[str], what: str) -> None:
    if len(labels) == 1:
        raise DataError(
            f"{what} are all {labels.pop()}: stage kto needs desirable and undesirable responses, that is "
            "kto_tag true and false"
        )


def _one_prompt(what: str) -> DataError:
    return DataError(
        f"{what} have one prompt only: stage kto estimates the KL by responses to other prompts, so that it "
        "needs two prompts at least"
    )
