"""Files of each type to rows, in bounded memory, and what is said of a file that cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from prefkit.data import readers
from prefkit.data.messages import RowError, TextRow
from prefkit.data.readers import DataError, read_rows

ROWS = [{"a": "x", "n": [1, 2]}, {"a": "é\n", "n": []}]


def write(folder: Path, ending: str) -> Path:
    """`ROWS` as a file of a type."""
    file = folder / f"d{ending}"
    text = {".json": json.dumps(ROWS), ".jsonl": "\n".join(map(json.dumps, ROWS))}
    table = pa.Table.from_pylist(ROWS)
    if ending == ".parquet":
        parquet.write_table(table, file)
    elif ending == ".arrow":
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    elif ending == ".file.arrow":
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    elif ending.endswith(".gz"):
        file.write_bytes(gzip.compress(text[ending.removesuffix(".gz")].encode()))
    else:
        file.write_text(text[ending])
    return file


@pytest.mark.parametrize(
    "ending", [".json", ".jsonl", ".parquet", ".arrow", ".file.arrow", ".json.gz", ".jsonl.gz"]
)
def test_every_type_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    file = write(tmp_path, ending)
    assert readers.is_readable(file)
    assert list(read_rows(file)) == [(1, ROWS[0]), (2, ROWS[1])]


def test_csv_and_text_have_cells_of_text(tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    file.write_text('a,b\n"x, ""y""\nz",1\r\n')
    ((number, row),) = read_rows(file)
    assert (number, row, type(row)) == (1, {"a": 'x, "y"\nz', "b": "1"}, TextRow)
    file = tmp_path / "d.txt"
    file.write_text("one\n\ntwo\r\n")
    assert list(read_rows(file)) == [(1, {"text": "one"}), (3, {"text": "two"})]


def test_objects_one_a_line_are_read_from_a_json_file_too(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    file.write_text('{"a": 1}\n{"a": 2}\n')
    assert [row for _, row in read_rows(file)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_a_json_list_is_decoded_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    rows: list[Any] = [{"a": "é" * 30, "b": [1, {"c": None}]}, 12345, -1.5e3, 'x"]}', [], {}, True]
    file = tmp_path / "d.json"
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), " [ ] "):
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert [row for _, row in read_rows(file)] == json.loads(text)


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        ("{", "not valid JSON", "not valid JSON"),
        ('{"a": 1, "a": 2}', "a key twice", "'a' is given more than once"),
        ('{"a": {"b": 1, "b": 1}}', "a key twice", "'b' is given more than once"),
        ('{"a": NaN}', "not valid JSON", "NaN is no JSON number"),
        ("[" * 100_000, "not valid JSON", "not valid JSON"),
        ('"\udcff"', "not text", "not UTF-8 text (byte 0xff)"),
    ],
)
def test_a_bad_line_is_an_error_of_its_row(tmp_path: Path, line: str, reason: str, message: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(f'{line}\n{{"a": 3}}\n'.encode("utf-8", "surrogateescape"))
    (_, error), (number, row) = read_rows(file)
    assert isinstance(error, RowError) and error.reason == reason and message in str(error)
    assert (number, row) == (2, {"a": 3})


def test_a_repeated_key_in_a_json_list_is_an_error_of_its_row(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    file.write_text('[{"a": 1, "a": 2}, {"a": 3}]')
    (_, error), (_, row) = read_rows(file)
    assert isinstance(error, RowError) and row == {"a": 3}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", b"", "must hold a JSON list"),
        ("d.json", b"[1 2]", "row 1 is followed by '2'"),
        ("d.json", b"[1,", "row 2"),
        ("d.json", b"[{]", "row 1"),
        ("d.json", b'["\xff"]', "not UTF-8"),
        ("d.csv", b"a\n\xff\n", r"d.csv:2: not UTF-8"),
        ("d.parquet", b"PAR1 and no more", "not a parquet file"),
        ("d.arrow", b"nothing of the kind", "not an Arrow file"),
        ("d.jsonl.gz", b"not packed", "is not whole"),
        ("d.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-12], "is not whole"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(file))


def test_csv_rows_of_another_width(tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    file.write_text("a,b\n1\n1,2,3\n1,2\n")
    rows = [row for _, row in read_rows(file)]
    assert [str(row) for row in rows[:2]] == [
        "1 cells, and the header has 2",
        "3 cells, and the header has 2",
    ]
    assert rows[2] == {"a": "1", "b": "2"}


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 2**20)
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'{"a": "' + b"x" * 3 * 2**20 + b'"}\n')
    ((_, error),) = read_rows(file)
    assert isinstance(error, RowError) and error.reason == "too long"
    (tmp_path / "d.json").write_bytes(b"[" + file.read_bytes() + b"]")
    with pytest.raises(DataError, match="row 1"):
        list(read_rows(tmp_path / "d.json"))


def test_a_row_of_ten_megabytes(tmp_path: Path) -> None:
    text = "word " * 2_000_000
    for name, content in (("d.jsonl", json.dumps({"a": text})), ("d.json", json.dumps([{"a": text}]))):
        file = tmp_path / name
        file.write_text(content)
        ((_, row),) = read_rows(file)
        assert row == {"a": text}
