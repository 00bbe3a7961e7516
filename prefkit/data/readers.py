"""The rows of a file, one after the other: JSON, JSON lines, CSV, parquet, Arrow and text, also `.gz`.

No file is held in memory as a whole. A row that cannot be read comes as the `RowError` that says why.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from prefkit.config.errors import UserError
from prefkit.data.messages import RowError, TextRow

MAX_ROW_BYTES = 256 * 2**20  # of one row: a file without line ends is hardly a data set
_CHUNK = 2**20
_BLANK = " \t\n\r"


class DataError(UserError):
    """Data that cannot be used; the message names files, rows and reasons."""


Rows = Iterator[tuple[int, Any]]


def read_rows(file: Path) -> Rows:
    """Numbered rows of a file, from 1; of JSON lines, the number is that of the line.

    Raises `DataError` when the file as a whole cannot be read.
    """
    ending, is_packed = _ending(file)
    try:
        with cast("IO[bytes]", gzip.open(file) if is_packed else file.open("rb")) as stream:
            yield from READERS[ending](stream, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file} is not whole: {error}") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None


def is_readable(file: Path) -> bool:
    """Whether the name of a file ends in a way that `read_rows` knows."""
    return _ending(file)[0] in READERS


def file_type(file: Path) -> str:
    """How the name of a file ends, `.gz` left out: `.json`, say."""
    return _ending(file)[0]


def _ending(file: Path) -> tuple[str, bool]:
    is_packed = file.suffix.lower() == ".gz"
    return (file.with_suffix("") if is_packed else file).suffix.lower(), is_packed


def digest(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | RowError]]:
    """Numbered lines; one that is too long comes as an error, and nothing after it."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            yield number, RowError(f"a line of more than {MAX_ROW_BYTES >> 20} MB", "too long")
            return
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _read_jsonl(stream: IO[bytes], file: Path) -> Rows:
    for number, line in _read_lines(stream):
        if isinstance(line, RowError):
            yield number, line
        elif line.strip():
            yield number, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 text (byte {line[error.start]:#04x})", "not text")
    except RowError as error:
        return error
    except json.JSONDecodeError as error:
        return RowError(f"not valid JSON: {error.msg} (character {error.pos + 1})", "not valid JSON")
    except (ValueError, RecursionError) as error:
        return RowError(f"not valid JSON: {error}", "not valid JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(f"{twice!r} is given more than once", "a key twice")
    return row


def _no_number(name: str) -> Any:
    raise RowError(f"{name} is no JSON number", "not valid JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number)


def _read_json(stream: IO[bytes], file: Path) -> Rows:
    """The items of a JSON list, decoded as they come by; or objects, one a line, as some name them too."""
    head = cast("io.BufferedReader", stream).peek(_CHUNK).removeprefix(codecs.BOM_UTF8)
    if head.lstrip()[:1] == b"{":
        yield from _read_jsonl(stream, file)
        return
    text = _Window(stream, file)
    if text.skip_blank() != "[":
        raise DataError(f"{file} must hold a JSON list of rows; for one object a line, name it .jsonl")
    text.skip(1)
    number = 0
    if text.skip_blank() == "]":
        return
    while True:
        number += 1
        yield number, text.next_value(number)
        mark = text.skip_blank()
        if mark not in (",", "]"):
            raise DataError(f"{file} is not valid JSON: row {number} is followed by {mark or 'nothing'!r}, "
                            "not by a comma or the end of the list")  # fmt: skip
        text.skip(1)
        if mark == "]":
            return
        text.skip_blank()


class _Window:
    """The part of a text that is being decoded."""

    def __init__(self, stream: IO[bytes], file: Path) -> None:
        self.stream = stream
        self.file = file
        self.text = ""
        self.at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._is_at_end = False

    def _read_more(self, size: int = _CHUNK) -> None:
        """Read on; what is decoded already goes."""
        data = self.stream.read(size)
        self._is_at_end = not data
        try:
            more = self._decoder.decode(data, final=self._is_at_end)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.file}: not UTF-8 text (byte {error.object[error.start]:#04x})") from None
        self.text, self.at = self.text[self.at :] + more, 0

    def skip(self, number: int) -> None:
        self.at += number

    def skip_blank(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in _BLANK:
                    return self.text[self.at]
                self.at += 1
            if self._is_at_end:
                return ""
            self._read_more()

    def next_value(self, number: int) -> Any:
        """The next JSON value, or the `RowError` of an object that is JSON and no good row."""
        size = _CHUNK
        while True:
            problem: Exception = ValueError("it does not end")
            try:
                value, end = self._decode_here()
                # A number at the end of the window may go on beyond it.
                if end < len(self.text) or self._is_at_end:
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                problem = ValueError(error.msg)  # its position is that in the window
            except (ValueError, RecursionError) as error:
                problem = error
            if self._is_at_end or len(self.text) - self.at > MAX_ROW_BYTES:
                raise DataError(f"{self.file} is not valid JSON: row {number}: {problem}")
            self._read_more(size)
            size *= 2  # so that a long row is not tried at every megabyte

    def _decode_here(self) -> tuple[Any, int]:
        try:
            return _DECODER.raw_decode(self.text, self.at)
        except RowError as error:
            return error, json.JSONDecoder().raw_decode(self.text, self.at)[1]


def _read_csv(stream: IO[bytes], file: Path) -> Rows:
    csv.field_size_limit(MAX_ROW_BYTES)
    rows = csv.DictReader(_decode(stream, file), restkey="", strict=True)
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            if "" in row or None in row.values():
                found = sum(value is not None for value in row.values()) + len(row.get("", [])[1:])
                yield number, RowError(f"{found} cells, and the header has {len(rows.fieldnames or ())}")
            else:
                yield number, TextRow(row)
    except csv.Error as error:
        yield number + 1, RowError(f"not valid CSV: {error}", "not valid CSV")


def _read_text(stream: IO[bytes], file: Path) -> Rows:
    for number, line in enumerate(_decode(stream, file), 1):
        if line.strip():
            yield number, TextRow(text=line.rstrip("\r\n"))


def _decode(stream: IO[bytes], file: Path) -> Iterator[str]:
    for number, line in _read_lines(stream):
        if isinstance(line, RowError):
            raise DataError(f"{file}:{number}: {line}")
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{file}:{number}: not UTF-8 text (byte {line[error.start]:#04x})") from None


def _read_parquet(stream: IO[bytes], file: Path) -> Rows:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        yield from _number(parquet.ParquetFile(stream).iter_batches(batch_size=256))
    except pa.ArrowException as error:
        raise DataError(f"{file} is not a parquet file that can be read: {error}") from None


def _read_arrow(stream: IO[bytes], file: Path) -> Rows:
    """A stream of record batches, as `datasets` writes it, or a file of them."""
    import pyarrow as pa

    try:
        if stream.read(6) == b"ARROW1":
            stream.seek(0)
            opened = pa.ipc.open_file(stream)
            yield from _number(opened.get_batch(i) for i in range(opened.num_record_batches))
        else:
            stream.seek(0)
            yield from _number(pa.ipc.open_stream(stream))
    except pa.ArrowException as error:
        raise DataError(f"{file} is not an Arrow file that can be read: {error}") from None


def _number(batches: Iterable[Any]) -> Rows:
    return enumerate((row for batch in batches for row in batch.to_pylist()), 1)


READERS: dict[str, Callable[[IO[bytes], Path], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}
