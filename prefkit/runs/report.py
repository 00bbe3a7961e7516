"""What a run tells the person at the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.table import Table

from prefkit.data.sources import Ledger


def make_console(file: IO[str] | None = None) -> Console:
    """A console that prints text as it is: neither paths nor answers are wrapped, coloured or parsed."""
    return Console(file=file, soft_wrap=True, highlight=False, markup=False)


def print_ledger(console: Console, ledgers: Sequence[Ledger], num_train: int, num_held_out: int) -> None:
    """What became of every row."""
    table = Table(title="Rows", title_justify="left", title_style="bold")
    table.add_column("data set")
    for name in ("rows", "not sampled", "rejected", "used", "of these truncated"):
        table.add_column(name, justify="right")
    for ledger in ledgers:
        counts = (ledger.num_rows, ledger.not_sampled, ledger.rejected.total(), ledger.used, ledger.truncated)
        table.add_row(ledger.name, *map(str, counts))
    console.print(table, soft_wrap=False)
    for ledger in ledgers:
        for reason, count in ledger.rejected.items():
            console.print(f"{ledger.name}: {count} rejected: {reason}.")
    console.print(f"{num_train} pairs to train on, {num_held_out} held out.")


def print_files(console: Console, folder: Path, files: dict[str, str]) -> None:
    """Where the results lie: file name -> what it is."""
    console.print(f"Written to {folder}")
    width = max(map(len, files), default=0)
    for name, what in files.items():
        console.print(f"  {name.ljust(width)}  {what}")
