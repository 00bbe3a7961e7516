"""What a run tells the person at the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from pathlib import Path
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from prefkit.data.ledger import Ledger

Tracked = Callable[[Iterable[Any], str], Iterable[Any]]


def make_console(file: IO[str] | None = None) -> Console:
    """A console that prints text as it is: neither paths nor answers are wrapped, coloured or parsed."""
    return Console(file=file, soft_wrap=True, highlight=False, markup=False)


def make_tracker(console: Console) -> Tracked:
    """Shows how far a pass over some items is: `tracker(items, title)` gives them back as they go by."""

    def tracked(items: Iterable[Any], title: str) -> Iterable[Any]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        total = len(items) if isinstance(items, Sized) else None
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            yield from bar.track(items, total, description=title)

    return tracked


# What to do about a reason to reject rows.
_HINTS = {
    "no room for the images of the prompt": "a larger cutoff_len or a smaller image_max_pixels makes some"
}


def print_ledger(console: Console, ledgers: Sequence[Ledger]) -> None:
    """What became of every row."""
    shape: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1), "pad_edge": False}
    table = Table(title="Rows", title_justify="left", title_style="bold", **shape)
    table.add_column("data set", overflow="fold")
    for name in ("rows", "trained", "held\nout", "not\nsampled", "rejected", "cut", "pairs"):
        table.add_column(name, justify="right", no_wrap=True)
    for ledger in ledgers:
        left_out = (ledger.not_sampled.total(), ledger.rejected.total())
        used = (ledger.truncated + ledger.held_out_truncated, ledger.pairs + ledger.held_out_pairs)
        counts = (ledger.num_rows, ledger.trained, ledger.held_out, *left_out, *used)
        table.add_row(Path(ledger.name).name, *map(str, counts))
    console.print(table, soft_wrap=False)
    for ledger in ledgers:
        for key, count in ledger.not_sampled.items():
            console.print(f"{ledger.name}: {count} not sampled: {key}.")
        for reason, count in ledger.rejected.items():
            hint = f" ({_HINTS[reason]})" if reason in _HINTS else ""
            console.print(f"{ledger.name}: {count} rejected: {reason}{hint}.")
        if ledger.repeats:
            console.print(f"{ledger.name}: {count_of(ledger.repeats, 'further use')} of rows in an epoch.")
    trained, held_out = (sum(getattr(it, name) for it in ledgers) for name in ("pairs", "held_out_pairs"))
    word = "pair"
    if not (trained or held_out):
        trained, held_out = (sum(getattr(it, name) for it in ledgers) for name in ("trained", "held_out"))
        word = "row"
    console.print(f"{count_of(trained, word)} to train on, {held_out:,} held out.")


def count_of(number: int, word: str) -> str:
    """A number of things in words.

    >>> count_of(1, "row"), count_of(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def print_files(console: Console, folder: Path, files: dict[str, str]) -> None:
    """Where the results lie: file name -> what it is."""
    console.print(f"Written to {folder}")
    width = max(map(len, files), default=0)
    for name, what in files.items():
        console.print(f"  {name.ljust(width)}  {what}")
