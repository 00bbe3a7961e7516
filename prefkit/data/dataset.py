"""The data of a run: which rows are trained on, which are held out, and the ledger of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefkit.config.schema import DataConfig
from prefkit.data.encode import TokenizedExample, encode_example
from prefkit.data.examples import Example
from prefkit.data.formats import Degenerate
from prefkit.data.sources import DataError, Ledger, load_entries, load_examples
from prefkit.data.template import ChatTemplate

Track = Callable[[Sequence[Any], str], Iterable[Any]]  # (items, title) -> the items, shown as they go by


@dataclass(frozen=True)
class Pairs:
    """Encoded examples with the last user turn of each, to show it, and the ledgers of their files."""

    train: list[TokenizedExample]
    held_out: list[TokenizedExample]
    held_out_questions: list[str]
    ledgers: list[Ledger]


def load_pairs(config: DataConfig, template: ChatTemplate, seed: int, track: Track) -> Pairs:
    """Read, encode and split the data sets of a run; `track(examples, title)` may show progress.

    `eval_dataset` is held out; otherwise `val_size` of the training rows are, drawn by `seed`: a share
    of them if below 1, else their number. Raises `DataError` for data that cannot be used.
    """
    folder = Path(config.dataset_dir)
    named = load_entries(folder, [*config.dataset, *config.eval_dataset])
    loaded = [load_examples(entry, config.max_samples) for entry in named]
    rows: list[list[tuple[TokenizedExample, str]]] = []
    for examples, ledger in loaded:
        title = f"encode {ledger.name}"
        rows.append(_encode(track(examples, title), template, config.cutoff_len, ledger))
    num_train = len(config.dataset)
    train = [row for part in rows[:num_train] for row in part]
    held_out = [row for part in rows[num_train:] for row in part]
    if config.val_size:
        train, held_out = _split(train, config.val_size, seed)
    if config.dataset and not train:
        raise DataError("no row is left to train on; " + "; ".join(_explain(ledger) for _, ledger in loaded))
    return Pairs(
        [example for example, _ in train],
        [example for example, _ in held_out],
        [question for _, question in held_out],
        [ledger for _, ledger in loaded],
    )


def _encode(
    examples: Iterable[Example], template: ChatTemplate, cutoff_len: int, ledger: Ledger
) -> list[tuple[TokenizedExample, str]]:
    rows = []
    for example in examples:
        try:
            encoded = encode_example(example, template, cutoff_len)
        except Degenerate as reason:
            ledger.rejected[str(reason)] += 1
            continue
        ledger.used += 1
        ledger.truncated += encoded.truncated
        rows.append((encoded, example.prompt[-1].content))
    return rows


def _split(rows: list, val_size: float, seed: int) -> tuple[list, list]:
    """(training rows, held-out rows), each in the order of the files."""
    number = int(val_size) if val_size >= 1 else max(1, round(len(rows) * val_size))
    if number >= len(rows):
        raise DataError(
            f"val_size: {val_size:g} holds out {number} of {len(rows)} rows; none is left to train on"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = set(order[:number])
    return (
        [row for i, row in enumerate(rows) if i not in held_out],
        [row for i, row in enumerate(rows) if i in held_out],
    )


def _explain(ledger: Ledger) -> str:
    reasons = ", ".join(f"{count} x {reason}" for reason, count in ledger.rejected.items())
    return f"{ledger.name}: {ledger.num_rows} rows, {reasons or 'none sampled'}"
