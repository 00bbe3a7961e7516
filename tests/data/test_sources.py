"""dataset_info.json and files to examples with a ledger, or an error that names file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefkit.data.sources import DataError, load_entries, load_examples

ROW = {"instruction": "Q", "chosen": "good", "rejected": "bad"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def register(folder: Path, text: str | bytes, file_name: str = "d.json", **entry: Any) -> None:
    (folder / "d.json" if file_name != "d.jsonl" else folder / file_name).write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )
    info = {"d": {"file_name": file_name, "ranking": True, **entry}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def load(folder: Path, **options: Any) -> Any:
    (entry,) = load_entries(folder, ["d"])
    return load_examples(entry, **options)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_json(folder: Path, bom: bytes) -> None:
    register(folder, bom + json.dumps([ROW, ROW]).encode())
    examples, ledger = load(folder)
    assert [example.source for example in examples] == [f"{folder}/d.json:1", f"{folder}/d.json:2"]
    assert (ledger.num_rows, ledger.not_sampled) == (2, 0)
    assert len(ledger.sha256) == 64


def test_jsonl_numbers_lines(folder: Path) -> None:
    register(folder, f"{json.dumps(ROW)}\r\n\n{json.dumps(ROW)}\n", "d.jsonl")
    assert [example.source.rpartition(":")[2] for example in load(folder)[0]] == ["1", "3"]


def test_max_samples_takes_the_first_and_counts_the_rest(folder: Path) -> None:
    register(folder, json.dumps([{**ROW, "instruction": str(i)} for i in range(5)]))
    examples, ledger = load(folder, max_samples=2)
    assert [example.prompt[0].content for example in examples] == ["0", "1"]
    assert (ledger.num_rows, ledger.not_sampled) == (5, 3)


def test_degenerate_rows_are_counted_by_reason(folder: Path) -> None:
    register(
        folder, json.dumps([ROW, {**ROW, "chosen": ""}, {**ROW, "chosen": "bad"}, {**ROW, "chosen": ""}])
    )
    examples, ledger = load(folder)
    assert len(examples) == 1
    assert ledger.rejected == {"empty response": 2, "chosen equals rejected": 1}


def test_malformed_rows_are_listed_up_to_twenty(folder: Path) -> None:
    register(folder, "\n".join(['{"a": 1', json.dumps(ROW), *(['{"instruction": 1}'] * 25)]), "d.jsonl")
    with pytest.raises(DataError) as caught:
        load(folder)
    lines = str(caught.value).splitlines()
    assert lines[0] == "data set 'd' has 26 malformed rows:"
    assert lines[1].startswith(f"{folder}/d.jsonl:1: not valid JSON")
    assert lines[2].startswith(f"{folder}/d.jsonl:3: column 'instruction' is a text")
    assert len(lines) == 22 and lines[-1] == "... and 6 more"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[", "is not valid JSON"),
        (b'{"a": 1}', "must hold a JSON list"),
        (b"[]", "has no rows"),
        (b'["\n\xff"]', r"d.json:2: not UTF-8 text \(byte 0xff\)"),
        (b"[" * 100_000, "is not valid JSON"),
    ],
)
def test_unreadable_files(folder: Path, text: bytes, message: str) -> None:
    register(folder, text)
    with pytest.raises(DataError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"ranking": False}, "`ranking: true`"),
        ({"formatting": "aplaca"}, "one of alpaca, sharegpt"),
        ({"file_name": "../d.json"}, "leads out of"),
        ({"file_name": "/etc/passwd"}, "leads out of"),
        ({"file_name": "no.json"}, "does not exist"),
        ({"file_name": 3}, "`file_name` is missing"),
        ({"columns": {"prompt": "a", "choosen": "b"}}, "'choosen'; did you mean 'chosen'"),
        ({"tags": {"role": "r"}}, "`tags` has no 'role'; did you mean 'role_tag'"),
        ({"columns": {"prompt": 1}}, "maps names to texts"),
        ({"subset": "x"}, "unknown or unsupported key 'subset'"),
    ],
)
def test_wrong_entries(folder: Path, entry: dict, message: str) -> None:
    register(folder, json.dumps([ROW]), **entry)
    with pytest.raises(DataError, match=message):
        load(folder)


def test_a_link_that_leads_out_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.json"
    outside.write_text(json.dumps([ROW]))
    register(folder, "[]")
    (folder / "d.json").unlink()
    (folder / "d.json").symlink_to(outside)
    with pytest.raises(DataError, match="leads out of"):
        load(folder)


def test_missing_data_sets_are_all_named_with_those_that_exist(folder: Path) -> None:
    register(folder, json.dumps([ROW]))
    with pytest.raises(DataError) as caught:
        load_entries(folder, ["dd", "x"])
    first, second = str(caught.value).splitlines()
    assert "no data set 'dd'; did you mean 'd'? (it has: d)" in first
    assert "no data set 'x' (it has: d)" in second


def test_missing_dataset_info(folder: Path) -> None:
    with pytest.raises(DataError, match="Set dataset_dir to its folder"):
        load_entries(folder, ["d"])
