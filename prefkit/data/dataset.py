"""The data of a run: which examples are trained on, which are held out, and the ledgers of all rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from prefkit.config.schema import RunConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.formats import Use
from prefkit.data.ledger import Ledger
from prefkit.data.lengths import WHOLE
from prefkit.data.mixing import hold_out, mix
from prefkit.data.partners import with_partners
from prefkit.data.readers import DataError
from prefkit.data.rows import Encoder, Say, Track, describe_layout, load_rows
from prefkit.data.sources import DatasetEntry, find_datasets
from prefkit.data.store import EncodedRows, store_root
from prefkit.data.streaming import StreamedRows
from prefkit.data.template import ChatTemplate
from prefkit.data.view import RowView

USES: dict[str, Use] = {"dpo": "pairs", "rm": "pairs", "kto": "judged", "ppo": "prompts"}
_HELD_OUT = "the held-out rows"
_NO_ROWS = np.zeros((0, 2), dtype=np.int64)


@dataclass(frozen=True)
class RunData:
    """What a run trains on and measures itself by, and the ledgers of all data sets.

    `train` are rows, or an endless stream; `held_out_parts` is `held_out` by the name of its data set,
    where each is to be evaluated by itself; `has_margins` says that pairs have a margin of their own;
    `answers` are learnt as they are beside responses that are drawn.
    """

    train: RowView | StreamedRows
    held_out: RowView
    ledgers: list[Ledger]
    held_out_parts: dict[str, RowView] = field(default_factory=dict)
    has_margins: bool = False
    answers: RowView = field(default_factory=lambda: RowView([], np.zeros((0, 3), dtype=np.int64)))

    @property
    def has_images(self) -> bool:
        """Whether rows have images; those of a stream may."""
        if isinstance(self.train, StreamedRows):
            return self.train.encoder.template.vision is not None
        return any(view.has_images for view in (self.train, self.held_out, self.answers))

    def image_digest(self) -> str | None:
        """A hash of the content of all images; None where there are none, or rows are streamed."""
        if isinstance(self.train, StreamedRows) or not self.has_images:
            return None
        whole = hashlib.sha256()
        for view in (self.train, self.held_out, self.answers):
            for digest in view.image_digests():
                whole.update(digest.encode())
        return whole.hexdigest()

    def first(self, number: int) -> list[TokenizedExample]:
        """The first examples that are held out, or else trained on."""
        if not self.held_out and isinstance(self.train, StreamedRows):
            return self.train.first(number)
        rows: Any = self.held_out or self.train
        return list(islice(rows, number))


def load_data(config: RunConfig, template: ChatTemplate, seed: int, say: Say, track: Track) -> RunData:
    """Read, encode, split and mix the data sets of a run.

    `track(rows, title)` may show progress. Encoded rows are kept on disk and found again. `eval_dataset` is
    held out; otherwise `val_size` of the training rows are, drawn by `seed`. Raises `DataError` for data
    that cannot be used.
    """
    data = config.data
    encoder = Encoder(template, data, USES[config.method.stage])
    loader = _Loader(config, encoder, seed, say, track)
    names = [*data.dataset, *data.eval_dataset]
    entries = find_datasets(data.dataset_dir, names, encoder.use, config.model.cache_dir)
    training, evaluation = entries[: len(data.dataset)], entries[len(data.dataset) :]
    held_out, parts, ledgers = loader.load_held_out(evaluation)
    has_margins = any(entry.layout and "margin" in entry.layout.columns for entry in entries)
    train: RowView | StreamedRows
    if data.streaming and training:
        train, first = loader.open_stream(training)
        held_out, own_ledgers = held_out if first is None else first, train.ledgers
    else:
        train, first, own_ledgers = loader.load_training(training)
        held_out = first if data.val_size else held_out
    found = RunData(train, held_out, [*own_ledgers, *ledgers], parts, has_margins)
    if not config.ppo.ppo_ptx_dataset:
        return found
    answering = replace(loader, encoder=replace(encoder, use="answer"))
    entries = find_datasets(data.dataset_dir, config.ppo.ppo_ptx_dataset, "answer", config.model.cache_dir)
    answers, more = answering.load_answers(entries)
    return replace(found, answers=answers, ledgers=[*found.ledgers, *more])


@dataclass(frozen=True)
class _Loader:
    config: RunConfig
    encoder: Encoder
    seed: int
    say: Say
    track: Track

    @property
    def splits(self) -> bool:
        """Whether a list of ranked responses is trained on pair by pair. LD-DPO weighs a response by the
        length of its partner, so that it needs one."""
        by_pairs = self.config.data.ranked_responses == "pairs" or self.config.method.ld_alpha is not None
        return by_pairs and self.encoder.use == "pairs"

    def _finish(self, rows: RowView, what: str) -> RowView:
        """Rows as a stage takes them: judged ones with partners, drawn among themselves."""
        if self.encoder.use != "judged" or not len(rows):
            return rows
        return with_partners(rows, self.seed, self.config.data.cutoff_len, what)

    def _load(self, entry: DatasetEntry) -> tuple[EncodedRows, Ledger]:
        data = self.config.data
        root = store_root(data.tokenized_path, self.config.model.cache_dir)
        return load_rows(
            entry,
            self.encoder,
            self.seed,
            root,
            self.say,
            self.track,
            must_fit=data.tokenized_path is not None,
            overwrite=data.overwrite_cache,
        )

    def load_held_out(
        self, entries: Sequence[DatasetEntry]
    ) -> tuple[RowView, dict[str, RowView], list[Ledger]]:
        """The data sets that are held out: all, each by itself where that is asked for, and their ledgers."""
        tables = _Tables([self._load(entry) for entry in entries])
        ledgers = [tables.settle(k, _NO_ROWS, tables.all_of(k)) for k in range(len(entries))]
        held_out = self._finish(tables.view(tables.all_rows, split=True), _HELD_OUT)
        parts: dict[str, RowView] = {}
        for k, entry in enumerate(entries if self.config.data.eval_on_each_dataset else ()):
            if entry.label in parts:
                raise DataError(f"eval_on_each_dataset: two data sets would both be called {entry.label}")
            parts[entry.label] = held_out.of_table(k)
        return held_out, parts, ledgers

    def load_answers(self, entries: Sequence[DatasetEntry]) -> tuple[RowView, list[Ledger]]:
        """All rows, each with an answer to learn as it is, and the ledgers, which say what for."""
        tables = _Tables([self._load(entry) for entry in entries])
        rows = tables.all_rows
        tables.check_rows("ppo_ptx_dataset: ")
        ledgers = [tables.settle(k, rows, _NO_ROWS) for k in range(len(entries))]
        return tables.view(rows, split=False), [
            replace(ledger, name=f"{ledger.name} (ppo_ptx)") for ledger in ledgers
        ]

    def load_training(self, entries: Sequence[DatasetEntry]) -> tuple[RowView, RowView, list[Ledger]]:
        """What is trained on, what of it is held out, and the ledgers."""
        val_size = self.config.data.val_size
        tables = _Tables([self._load(entry) for entry in entries])
        rows = tables.all_rows
        if entries:
            tables.check_rows()
        is_held_out = np.zeros(len(rows), dtype=bool)
        if val_size:
            try:
                is_held_out = hold_out(len(rows), val_size, self.seed)
            except ValueError as error:
                raise DataError(f"val_size: {error}") from None
        held_out = rows[is_held_out]
        order = self._mix(rows[~is_held_out], tables)
        ledgers = [tables.settle(k, order, held_out) for k in range(len(entries))]
        trained = self._finish(tables.view(order, self.splits), "the rows to train on")
        return trained, self._finish(tables.view(held_out, split=True), _HELD_OUT), ledgers

    def _mix(self, rows: np.ndarray, tables: _Tables) -> np.ndarray:
        """(table, row) in the order of an epoch, (n, 2); rows that were drawn more than once are repeated."""
        data = self.config.data
        times = tables.flat("times")[tables.place(rows)] if len(rows) else np.zeros(0, int)
        repeated = np.repeat(rows, times, axis=0)
        parts = [np.flatnonzero(repeated[:, 0] == k).tolist() for k in range(len(tables.rows))]
        starts = [partial(iter, part) for part in parts]
        order = mix(starts, data.mix_strategy, data.interleave_probs, self.seed)
        mixed: np.ndarray = repeated[np.fromiter(order, dtype=np.int64)]
        return mixed

    def open_stream(self, entries: Sequence[DatasetEntry]) -> tuple[StreamedRows, RowView | None]:
        """The stream of what is trained on, and of it the rows that `val_size` holds out, the first ones."""
        entries = [entry.recognised() for entry in entries]
        for entry in entries:
            self.say(f"Data set {entry.name}: streamed as {describe_layout(entry)}.")
        stream = StreamedRows(entries, self.encoder, self.config.data, self.seed, splits=self.splits)
        number = int(self.config.data.val_size)
        if not number:
            return stream, None
        first = [example for _, example in islice(stream.read(stream.ledgers), number)]
        if len(first) < number:
            raise DataError(f"val_size: {number} rows are to be held out, and the stream has {len(first)}")
        stream.held_out = frozenset(example.source for example in first)
        index = [
            (0, row, pair if one.pairs else WHOLE)
            for row, one in enumerate(first)
            for pair in range(len(one.pairs) or 1)
        ]
        return stream, self._finish(RowView([first], np.array(index, dtype=np.int64)), _HELD_OUT)


class _Tables:
    """Encoded data sets beside each other; a row is named by (table, row)."""

    def __init__(self, loaded: Sequence[tuple[EncodedRows, Ledger]]) -> None:
        self.rows = [rows for rows, _ in loaded]
        self.ledgers = [ledger for _, ledger in loaded]
        self._starts = np.cumsum([0, *map(len, self.rows)])
        self._num_pairs = np.concatenate([np.zeros(0, int), *(rows.num_pairs() for rows in self.rows)])

    @property
    def all_rows(self) -> np.ndarray:
        """Every row of every table, (n, 2)."""
        return np.concatenate([_NO_ROWS, *map(self.all_of, range(len(self.rows)))])

    def check_rows(self, where: str = "") -> None:
        """Raises `DataError`, with what became of all rows, when none is left; `where` begins its message."""
        if not sum(map(len, self.rows)):
            why = "; ".join(ledger.explain() for ledger in self.ledgers)
            raise DataError(f"{where}no row is left to train on; {why}")

    def all_of(self, table: int) -> np.ndarray:
        """Every row of a table, (n, 2)."""
        number = len(self.rows[table])
        return np.stack([np.full(number, table), np.arange(number)], 1)

    def place(self, rows: np.ndarray) -> np.ndarray:
        """Where rows (n, 2) stand if the tables are put one after the other, (n,)."""
        return self._starts[rows[:, 0]] + rows[:, 1]

    def flat(self, column: str) -> np.ndarray:
        """A column of all tables, one after the other."""
        return np.concatenate([rows.column(column) for rows in self.rows])

    def view(self, rows: np.ndarray, split: bool) -> RowView:
        """Rows (n, 2) in this order, each as it is or pair by pair."""
        counts = np.maximum(self._num_pairs[self.place(rows)], 1) if split else np.ones(len(rows), int)
        ends = np.cumsum(counts)
        pair = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
        pair = np.where(np.repeat(counts == 1, counts), WHOLE, pair)
        index = np.column_stack([np.repeat(rows, counts, axis=0), pair]).astype(np.int64)
        return RowView(self.rows, index.reshape(-1, 3))

    def settle(self, table: int, order: np.ndarray, held_out: np.ndarray) -> Ledger:
        """The ledger of a table when rows `order` (n, 2) are trained on and not rows `held_out` (n, 2)."""
        rows, ledger = self.rows[table], self.ledgers[table]
        used = order[order[:, 0] == table, 1]
        trained = np.unique(used)
        held = held_out[held_out[:, 0] == table, 1]
        cut, pairs = rows.column("truncated"), rows.num_pairs()
        settled = replace(
            ledger,
            not_sampled=ledger.not_sampled.copy(),
            trained=len(trained),
            held_out=len(held),
            truncated=int(cut[trained].sum()),
            held_out_truncated=int(cut[held].sum()),
            pairs=int(pairs[trained].sum()),
            held_out_pairs=int(pairs[held].sum()),
            repeats=len(used) - len(trained),
        )
        if left := len(rows) - settled.trained - settled.held_out:
            settled.not_sampled["mix_strategy"] += left
        return settled
