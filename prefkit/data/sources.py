"""Find the files of a data set through `dataset_info.json` and read their rows as examples."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefkit.config.errors import UserError
from prefkit.data.examples import Example
from prefkit.data.formats import COLUMNS, TAGS, Degenerate, RowError, RowFormat, make_example

MAX_REPORTED = 20
_ENTRY_KEYS = ("file_name", "ranking", "formatting", "columns", "tags")


class DataError(UserError):
    """Data that cannot be used; the message names files, rows and reasons."""


@dataclass
class Ledger:
    """What became of the rows of one data set: each is used, not sampled, or rejected by a reason."""

    name: str
    file: str
    sha256: str
    num_rows: int = 0
    not_sampled: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    used: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The ledger as JSON."""
        return {
            "name": self.name,
            "file": self.file,
            "sha256": self.sha256,
            "rows": self.num_rows,
            "not_sampled": self.not_sampled,
            "rejected": dict(self.rejected),
            "used": self.used,
            "truncated": self.truncated,
        }


@dataclass(frozen=True)
class DatasetEntry:
    """One entry of `dataset_info.json`: a file and how its rows are read."""

    name: str
    file: Path
    layout: RowFormat


def load_entries(dataset_dir: Path, names: Sequence[str]) -> list[DatasetEntry]:
    """The entries of `dataset_dir/dataset_info.json` that are asked for.

    Raises `DataError` for a missing or broken `dataset_info.json`, a name that it does not list, an
    entry without rankings, a key that it does not know, or a file that is not there.
    """
    info_file = dataset_dir / "dataset_info.json"
    if not info_file.is_file():
        raise DataError(f"{info_file} is missing: it lists the data sets. Set dataset_dir to its folder.")
    try:
        info = json.loads(info_file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{info_file} is not valid JSON: {error}") from None
    if not isinstance(info, dict):
        raise DataError(f"{info_file} must hold an object: data set name -> how to read it")
    entries, problems = [], []
    for name in names:
        if name not in info:
            problems.append(f"{info_file} has no data set {name!r}{_hint(name, info)}")
            continue
        try:
            entries.append(_make_entry(dataset_dir, name, info[name]))
        except DataError as error:
            problems.append(f"{info_file}, {name!r}: {error}")
    if problems:
        raise DataError("\n".join(problems))
    return entries


def _make_entry(dataset_dir: Path, name: str, entry: Any) -> DatasetEntry:
    if not isinstance(entry, dict):
        raise DataError("an entry is an object")
    for key in entry:
        if key not in _ENTRY_KEYS:
            raise DataError(f"unknown or unsupported key {key!r}{_hint(key, _ENTRY_KEYS)}")
    if not isinstance(entry.get("file_name"), str):
        raise DataError("`file_name` is missing: the .json or .jsonl file, relative to dataset_dir")
    if entry.get("ranking") is not True:
        raise DataError("not a preference set: stage dpo needs `ranking: true` with chosen and rejected")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in COLUMNS:
        raise DataError(f"`formatting` is one of {', '.join(COLUMNS)}, not {formatting!r}")
    columns = _named(entry, "columns", {**COLUMNS[formatting], "tools": "tools"})
    tags = _named(entry, "tags", TAGS)
    file = dataset_dir / entry["file_name"]
    if not file.resolve().is_relative_to(dataset_dir.resolve()):
        raise DataError(f"`file_name` {entry['file_name']!r} leads out of {dataset_dir}")
    if not file.is_file():
        raise DataError(f"file {file} does not exist")
    if file.suffix not in (".json", ".jsonl"):
        raise DataError(f"file {file} is neither .json nor .jsonl")
    return DatasetEntry(name, file, RowFormat(formatting, columns, tags))


def _named(entry: dict[str, Any], key: str, known: dict[str, str]) -> dict[str, str]:
    """The `columns` or `tags` object of an entry, its keys checked."""
    given = entry.get(key, {})
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise DataError(f"`{key}` is an object that maps names to texts")
    for name in given:
        if name not in known:
            raise DataError(f"`{key}` has no {name!r}{_hint(name, known)}")
    return given


def _hint(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return f"{meant} (it has: {', '.join(known)})"


def load_examples(entry: DatasetEntry, max_samples: int | None = None) -> tuple[list[Example], Ledger]:
    """The pairs of one data set and the ledger of its rows; rows beyond `max_samples` are not sampled.

    Raises `DataError` with up to 20 `file:row: reason` lines when rows are malformed.
    """
    data = entry.file.read_bytes()
    ledger = Ledger(entry.name, str(entry.file), hashlib.sha256(data).hexdigest())
    examples, problems = [], []
    for number, row in _rows(entry.file, data):
        ledger.num_rows += 1
        if max_samples is not None and ledger.num_rows > max_samples:
            ledger.not_sampled += 1
            continue
        source = f"{entry.file}:{number}"
        try:
            if isinstance(row, RowError):
                raise row
            examples.append(make_example(row, entry.layout, source))
        except Degenerate as reason:
            ledger.rejected[str(reason)] += 1
        except RowError as error:
            problems.append(f"{source}: {error}")
    if problems:
        raise DataError(_report(entry.name, problems))
    if not ledger.num_rows:
        raise DataError(f"data set {entry.name!r}: {entry.file} has no rows")
    return examples, ledger


def _report(name: str, problems: list[str]) -> str:
    more = len(problems) - MAX_REPORTED
    lines = [f"data set {name!r} has {len(problems)} malformed rows:", *problems[:MAX_REPORTED]]
    if more > 0:
        lines.append(f"... and {more} more")
    return "\n".join(lines)


def _rows(file: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    """Numbered rows, from 1: items of a JSON list, or lines of a JSONL file.

    A line that is no JSON comes as the `RowError` that says so. Raises `DataError` when the file as a
    whole cannot be read.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: not UTF-8 text (byte {data[error.start]:#04x})") from None
    if file.suffix == ".jsonl":
        for number, line_text in enumerate(text.split("\n"), 1):
            if line_text.strip():
                yield number, _json_line(line_text)
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{file} must hold a JSON list of rows; for one object a line, name it .jsonl")
    yield from enumerate(rows, 1)


def _json_line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowError(f"not valid JSON: {error}")
