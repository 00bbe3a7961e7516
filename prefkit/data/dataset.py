"""The data of a run: which examples are trained on, which are held out, and the ledgers of all rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, overload

import numpy as np

from prefkit.config.schema import RunConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.formats import Use
from prefkit.data.ledger import Ledger
from prefkit.data.mixing import hold_out, mix
from prefkit.data.readers import DataError
from prefkit.data.rows import Encoder, Say, Track, describe_layout, load_rows
from prefkit.data.sources import DatasetEntry, find_datasets
from prefkit.data.store import EncodedRows, store_root
from prefkit.data.streaming import StreamedRows
from prefkit.data.template import ChatTemplate

USES: dict[str, Use] = {"dpo": "pairs", "rm": "pairs", "kto": "judged", "ppo": "prompts"}
WHOLE = -1  # in the place of a pair: the example with all its pairs


class RowView(Sequence[TokenizedExample]):
    """Rows of several files in some order; `index` (n, 3) has the table, the row in it and the pair of each,
    or `WHOLE`."""

    def __init__(self, tables: Sequence[EncodedRows], index: np.ndarray) -> None:
        self.tables = tables
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> RowView: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | RowView:
        if isinstance(index, slice):
            return RowView(self.tables, self.index[index])
        table, row, pair = self.index[index].tolist()
        example = self.tables[table][row]
        return example if pair == WHOLE else next(islice(example.split(), pair, None))

    @property
    def num_pairs(self) -> int:
        """Pairs that are compared, in all."""
        counts = [table.num_pairs() for table in self.tables]
        return sum(1 if pair != WHOLE else int(counts[table][row]) for table, row, pair in self.index.tolist())


@dataclass(frozen=True)
class RunData:
    """What a run trains on and measures itself by, and the ledgers of all data sets.

    `train` are rows, or an endless stream; `held_out_parts` is `held_out` by the name of its data set,
    where each is to be evaluated by itself.
    """

    train: RowView | StreamedRows
    held_out: RowView
    ledgers: list[Ledger]
    held_out_parts: dict[str, RowView] = field(default_factory=dict)

    def first(self, number: int) -> list[TokenizedExample]:
        """The first examples that are held out, or else trained on."""
        rows: Any = self.held_out if len(self.held_out) else self.train
        return list(islice(iter(rows), number))


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
    if data.streaming and training:
        stream, first = loader.open_stream(training)
        return RunData(stream, held_out if first is None else first, [*stream.ledgers, *ledgers], parts)
    train, own_held_out, own_ledgers = loader.load_training(training)
    return RunData(train, own_held_out if data.val_size else held_out, [*own_ledgers, *ledgers], parts)


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
        return self.config.data.ranked_responses == "pairs" or self.config.method.ld_alpha is not None

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
        loaded = [self._load(entry) for entry in entries]
        tables = [rows for rows, _ in loaded]
        ledgers = []
        for rows, ledger in loaded:
            cut = int(rows.column("truncated").sum())
            pairs = int(rows.num_pairs().sum())
            ledgers.append(replace(ledger, held_out=len(rows), held_out_truncated=cut, pairs=pairs))
        views = [_view(tables, k, np.arange(len(rows)), split=True) for k, rows in enumerate(tables)]
        empty = RowView(tables, np.zeros((0, 3), dtype=np.int64))
        whole = RowView(tables, np.concatenate([view.index for view in [*views, empty]]))
        names = [entry.name for entry in entries] if self.config.data.eval_on_each_dataset else []
        return whole, dict(zip(names, views, strict=False)), ledgers

    def load_training(self, entries: Sequence[DatasetEntry]) -> tuple[RowView, RowView, list[Ledger]]:
        """What is trained on, what of it is held out, and the ledgers."""
        data = self.config.data
        loaded = [self._load(entry) for entry in entries]
        tables = [rows for rows, _ in loaded]
        sizes = [len(rows) for rows in tables]
        if entries and not sum(sizes):
            why = "; ".join(ledger.explain() for _, ledger in loaded)
            raise DataError(f"no row is left to train on; {why}")
        is_held_out = np.zeros(sum(sizes), dtype=bool)
        if data.val_size:
            try:
                is_held_out = hold_out(sum(sizes), data.val_size, self.seed)
            except ValueError as error:
                raise DataError(f"val_size: {error}") from None
        flags = np.split(is_held_out, np.cumsum(sizes)[:-1]) if sizes else []
        held = [_view(tables, k, np.flatnonzero(out), split=True).index for k, out in enumerate(flags)]
        order = self._mix([np.flatnonzero(~out) for out in flags], tables)
        train = [_view(tables, k, np.array([row]), self.splits).index for k, row in order]
        nothing = np.zeros((0, 3), dtype=np.int64)
        train_view = RowView(tables, np.concatenate([*train, nothing]))
        ledgers = [
            self._settle(ledger, rows, flags[k], [row for table, row in order if table == k])
            for k, (rows, ledger) in enumerate(loaded)
        ]
        return train_view, RowView(tables, np.concatenate([*held, nothing])), ledgers

    def _mix(self, rows: Sequence[np.ndarray], tables: Sequence[EncodedRows]) -> list[tuple[int, int]]:
        """(table, row) in the order of an epoch, rows that were drawn more than once repeated."""

        def start(k: int) -> Any:
            times = tables[k].column("times")
            return lambda: ((k, int(row)) for row in rows[k] for _ in range(times[row]))

        data = self.config.data
        probs = [float(p) for p in data.interleave_probs]
        starts = [start(k) for k in range(len(tables))]
        return list(mix(starts, data.mix_strategy, probs, self.seed))

    @staticmethod
    def _settle(ledger: Ledger, rows: EncodedRows, held_out: np.ndarray, used: list[int]) -> Ledger:
        """The ledger of a data set whose rows `used` are trained on, some perhaps more than once."""
        trained = np.unique(np.array(used, dtype=np.int64))
        cut, pairs = rows.column("truncated"), rows.num_pairs()
        settled = replace(
            ledger,
            not_sampled=ledger.not_sampled.copy(),
            trained=len(trained),
            held_out=int(held_out.sum()),
            truncated=int(cut[trained].sum()),
            held_out_truncated=int(cut[held_out].sum()),
            pairs=int(pairs[trained].sum() + pairs[held_out].sum()),
            repeats=len(used) - len(trained),
        )
        if left := len(rows) - settled.trained - settled.held_out:
            settled.not_sampled["mix_strategy"] += left
        return settled

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
        view = RowView([first], np.zeros((0, 3), dtype=np.int64))  # type: ignore[list-item]
        index = [(0, row, pair) for row, one in enumerate(first) for pair in range(len(one.pairs) or 1)]
        view.index = np.array(index, dtype=np.int64)
        return stream, view


def _view(tables: Sequence[EncodedRows], table: int, rows: np.ndarray, split: bool) -> RowView:
    """Rows of one table, whole or pair by pair."""
    counts = tables[table].num_pairs()[rows] if split else np.ones(len(rows), dtype=np.int64)
    counts = np.maximum(counts, 1)
    pair = np.concatenate([np.arange(count) for count in counts]) if len(rows) else np.zeros(0, np.int64)
    whole = np.repeat(counts == 1, counts)
    index = np.stack([np.full(len(pair), table), np.repeat(rows, counts), np.where(whole, WHOLE, pair)], 1)
    return RowView(tables, index)


def iterate(rows: RowView) -> Iterator[TokenizedExample]:
    """The examples one after the other, one in memory at a time."""
    return (rows[i] for i in range(len(rows)))
