"""dataset_info.json, paths and the Hub to data sets, or an error that names file and entry."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefkit.config.schema import DataConfig
from prefkit.data.examples import Example
from prefkit.data.formats import make_example
from prefkit.data.ledger import Ledger
from prefkit.data.messages import RowError
from prefkit.data.readers import DataError
from prefkit.data.recognise import recognise
from prefkit.data.rows import Encoder, RowReader
from prefkit.data.sources import DatasetEntry, find_datasets
from prefkit.data.template import ChatTemplate

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


def find(folder: Path, *names: str) -> list[DatasetEntry]:
    return find_datasets(str(folder), names, "pairs", None)


@pytest.fixture
def load(folder: Path, tokenizer) -> Any:
    """The examples of data set `d`, and their ledger."""

    def read(name: str = "d", **keys: Any) -> tuple[list[Example], Ledger]:
        (entry,) = find(folder, name)
        ledger = Ledger("d")
        encoder = Encoder(ChatTemplate(tokenizer, "chatml"), DataConfig(**keys), "pairs")
        reader = RowReader(entry.recognised(), encoder, ledger, seed=0)
        examples = list(reader.examples(lambda rows, title: rows))
        reader.finish()
        return examples, ledger

    return read


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_json(folder: Path, load, bom: bytes) -> None:
    register(folder, bom + json.dumps([ROW, ROW]).encode())
    examples, ledger = load()
    assert [example.source for example in examples] == [f"{folder}/d.json:1", f"{folder}/d.json:2"]
    assert (ledger.num_rows, ledger.not_sampled.total()) == (2, 0)


def test_jsonl_numbers_lines(folder: Path, load) -> None:
    register(folder, f"{json.dumps(ROW)}\r\n\n{json.dumps(ROW)}\n", "d.jsonl")
    assert [example.source.rpartition(":")[2] for example in load()[0]] == ["1", "3"]


def test_max_samples_takes_the_first_and_counts_the_rest(folder: Path, load) -> None:
    register(folder, json.dumps([{**ROW, "instruction": str(i)} for i in range(5)]))
    examples, ledger = load(max_samples=2)
    assert [example.prompt[0].content for example in examples] == ["0", "1"]
    assert (ledger.num_rows, ledger.not_sampled) == (5, {"max_samples": 3})


def test_degenerate_rows_are_counted_by_reason(folder: Path, load) -> None:
    register(
        folder, json.dumps([ROW, {**ROW, "chosen": ""}, {**ROW, "chosen": "bad"}, {**ROW, "chosen": ""}])
    )
    examples, ledger = load()
    assert len(examples) == 1
    assert ledger.rejected == {"empty response": 2, "chosen equals rejected": 1}
    assert ledger.examples[0] == f"{folder}/d.json:2: empty response"


def test_malformed_rows_are_listed_up_to_twenty(folder: Path, load) -> None:
    register(folder, "\n".join(['{"a": 1', json.dumps(ROW), *(['{"instruction": 1}'] * 25)]), "d.jsonl")
    with pytest.raises(DataError) as caught:
        load()
    lines = str(caught.value).splitlines()
    assert lines[0] == "data set 'd' has 26 malformed rows:"
    assert lines[1].startswith(f"{folder}/d.jsonl:1: not valid JSON")
    assert lines[2].startswith(f"{folder}/d.jsonl:3: column 'chosen' is missing")
    assert len(lines) == 23 and lines[-2] == "... and 6 more"
    assert "on_bad_row: skip" in lines[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[", "is not valid JSON"),
        (b'"a"', "must hold a JSON list"),
        (b"[]", "has no rows"),
        (b'["\n\xff"]', r"d.json: not UTF-8 text \(byte 0xff\)"),
        (b"[" * 100_000, "is not valid JSON"),
    ],
)
def test_unreadable_files(folder: Path, load, text: bytes, message: str) -> None:
    register(folder, text)
    with pytest.raises(DataError, match=message):
        load()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"ranking": False}, "`ranking: true`"),
        ({"ranking": "yes"}, "`ranking` is true or false"),
        ({"formatting": "aplaca"}, "one of alpaca, sharegpt.*did you mean 'alpaca'"),
        ({"file_name": "../d.json"}, "leads out of"),
        ({"file_name": "/etc/passwd"}, "leads out of"),
        ({"file_name": "no.json"}, "does not exist"),
        ({"file_name": "dd.json"}, "does not exist; did you mean 'd.json'"),
        ({"file_name": "a\0b"}, "no name of a file"),
        ({"file_name": "/dev/zero"}, "leads out of"),
        ({"file_name": 3}, "`file_name` is missing"),
        ({"columns": {"prompt": "a", "choosen": "b"}}, "'choosen'; did you mean 'chosen'"),
        ({"columns": {"instruction": "question"}}, "`columns` has no 'instruction'; write 'prompt' for it"),
        ({"tags": {"role": "r"}}, "`tags` has no 'role'; did you mean 'role_tag'"),
        ({"columns": {"prompt": 1}}, "maps names to texts"),
        ({"rankng": True}, "unknown or unsupported key 'rankng'; did you mean 'ranking'"),
        ({"num_samples": 0}, "whole number above 0"),
        ({"hf_hub_url": "../elsewhere"}, "is an id such as owner/name"),
        ({"hf_hub_url": "a/b", "subset": 1}, "`subset` is a text"),
        ({"script_url": "x"}, "no code that comes with data is run"),
        ({"ms_hub_url": "x"}, "download it and write file_name"),
        ({"cloud_file_name": "s3://x"}, "download it and write file_name"),
    ],
)
def test_wrong_entries(folder: Path, entry: dict, message: str) -> None:
    register(folder, json.dumps([ROW]), **entry)
    with pytest.raises(DataError, match=message):
        find(folder, "d")


def test_a_stage_refuses_the_data_of_another(folder: Path) -> None:
    register(folder, json.dumps([ROW]))
    with pytest.raises(DataError, match="stage kto reads single responses"):
        find_datasets(str(folder), ["d"], "judged", None)
    assert len(find_datasets(str(folder), ["d"], "prompts", None)) == 1


def test_a_link_that_leads_out_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.json"
    outside.write_text(json.dumps([ROW]))
    register(folder, "[]")
    (folder / "d.json").unlink()
    (folder / "d.json").symlink_to(outside)
    with pytest.raises(DataError, match="leads out of"):
        find(folder, "d")
    (folder / "sub").mkdir()
    (folder / "sub" / "a.json").symlink_to(outside)
    register(folder, "[]", "sub")
    with pytest.raises(DataError, match="leads out of"):
        find(folder, "d")


def test_missing_data_sets_are_all_named_with_those_that_exist(folder: Path) -> None:
    register(folder, json.dumps([ROW]))
    with pytest.raises(DataError) as caught:
        find(folder, "dd", "x")
    first, second = str(caught.value).splitlines()
    assert "no data set 'dd'; did you mean 'd'? (it has: d)" in first
    assert "no data set 'x' (it has: d), and no file is named so" in second


def test_missing_dataset_info(folder: Path) -> None:
    with pytest.raises(DataError, match=r"d: there is no such file, and .* set dataset_dir to the folder"):
        find(folder, "d")
    (folder / "mine.json").write_text("[]")
    with pytest.raises(DataError, match=r"no such file \(there is .*/mine.json\)"):
        find(folder, str(folder / "mien.json"))


def test_a_folder_of_files_of_one_type(folder: Path, load) -> None:
    register(folder, "[]", "sub")
    (folder / "sub").mkdir()
    for name in ("b.json", "a.json"):
        (folder / "sub" / name).write_text(json.dumps([{**ROW, "instruction": name}]))
    (folder / "sub" / "README.md").write_text("not data")
    assert [example.prompt[0].content for example in load()[0]] == ["a.json", "b.json"]
    (folder / "sub" / "c.csv").write_text("x")
    with pytest.raises(DataError, match="several types"):
        find(folder, "d")


def test_a_path_instead_of_a_name(folder: Path, load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file needs no dataset_info.json, wherever it is named from."""
    (folder / "mine.jsonl").write_text(json.dumps(ROW) + "\n")
    monkeypatch.chdir(folder.parent)
    for name in (str(folder / "mine.jsonl"), f"{folder.name}/mine.jsonl", "mine.jsonl"):
        examples, _ = load(name)
        assert examples[0].prompt[0].content == "Q"
    register(folder, json.dumps([ROW]))
    assert [entry.name for entry in find(folder, "mine.jsonl", "d")] == ["mine.jsonl", "d"]
    with pytest.raises(DataError, match="none of json, jsonl"):
        (folder / "x.doc").touch()
        find(folder, "x.doc")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "d.csv",
            b"prompt;chosen;rejected\n1;2;3\n",
            "separated by commas, not as in 'prompt;chosen;rejected'",
        ),
        ("d.jsonl", b'{"q": 1}\n', "the columns 'q' are those of no format"),
        ("d.jsonl", b"\xff\n", r"no rows that can be read; .*d.jsonl:1: not UTF-8 text"),
        ("d.jsonl", b"", "has no rows$"),
        ("d.jsonl", b"1\n", "its first row is no object"),
    ],
)
def test_a_path_whose_format_is_not_recognised(
    folder: Path, load, name: str, content: bytes, message: str
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(str(folder / name))


def test_num_samples_draws_rows_and_counts_the_rest(folder: Path, load) -> None:
    rows = [{**ROW, "instruction": str(i)} for i in range(10)]
    register(folder, json.dumps(rows), num_samples=4)
    examples, ledger = load()
    drawn = [example.prompt[0].content for example in examples]
    assert len(set(drawn)) == 4 and drawn != ["0", "1", "2", "3"]
    assert ledger.not_sampled == {"num_samples": 6}
    assert [e.prompt[0].content for e in load()[0]] == drawn


def test_the_hub_through_a_local_stand_in(folder: Path, load, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a folder of the name of a hub id where one is: nothing else is replaced."""
    for split, word in (("train", "seen"), ("test", "held")):
        path = folder / "someone" / "pairs" / "part" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**ROW, "instruction": word}) + "\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    hub = {"hf_hub_url": "someone/pairs", "folder": "part", "ranking": True}
    info = {"d": {**hub, "split": "test"}, "e": hub}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    examples, _ = load()
    assert [example.prompt[0].content for example in examples] == ["held"]
    assert examples[0].source == "someone/pairs:1"
    assert load("e")[0][0].prompt[0].content == "seen"
    (entry,) = find(folder, "d")
    assert len(entry.digest()) == 64 and entry.digest() != find(folder, "e")[0].digest()
    streamed = replace(entry, hub=replace(entry.hub, streams=True))
    assert list(streamed.rows()) == list(entry.rows())
    (online,) = find_datasets("ONLINE", ["someone/pairs"], "pairs", None)
    assert online.hub is not None and online.hub.url == "someone/pairs"
    with pytest.raises(DataError, match="hf_hub_url 'someone/none' cannot be read"):
        list(find_datasets("ONLINE", ["someone/none"], "pairs", None)[0].rows())


def test_messages_with_a_label_are_judged_responses(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    layout = recognise({"messages": messages, "label": True, "system": "s"}, "f")
    assert layout.columns == {"kto_tag": "label", "system": "system"}
    assert make_example({"messages": messages, "label": True}, layout, "judged", "f:1").responses[
        0
    ].label == ("desirable")


def test_pairs_are_told_from_judged_responses() -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(RowError, match="these are pairs, which stages dpo and rm train on"):
        make_example(row, recognise(row, "f"), "judged", "f:1")
