"""The data of a run: each row is trained on, held out, not sampled or rejected, and the ledger says which."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefkit.config import load_config
from prefkit.data.conversation import read_conversation
from prefkit.data.dataset import RowView, RunData, load_data
from prefkit.data.examples import Message, ToolCall
from prefkit.data.ledger import Ledger
from prefkit.data.readers import DataError
from prefkit.data.streaming import StreamedRows
from prefkit.data.template import ChatTemplate
from tests.conftest import make_tokenizer

Load = Callable[..., RunData]


def pair(i: object, **columns: Any) -> dict[str, Any]:
    return {"instruction": f"Q{i}", "chosen": f"good {i}", "rejected": f"bad {i}", **columns}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`a` of 6 pairs, `b` of 4 and `c` of 2, and their dataset_info.json."""
    for name, number in (("a", 6), ("b", 4), ("c", 2)):
        register(tmp_path, name, [pair(f"{name}{i}") for i in range(number)])
    return tmp_path


def register(folder: Path, name: str, rows: list[Any], **entry: Any) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "dataset_info.json"
    info = json.loads(file.read_text()) if file.exists() else {}
    info[name] = {"file_name": f"{name}.jsonl", "ranking": True, **entry}
    file.write_text(json.dumps(info))


@pytest.fixture
def load(folder: Path, tokenizer, write_config, monkeypatch: pytest.MonkeyPatch) -> Load:
    """The data of a run with these keys; what was said is in `load.said`."""

    def read(seed: int = 0, **keys: Any) -> RunData:
        given = {"dataset_dir": str(folder), "dataset": "a", "max_steps": 2, **keys}
        config = load_config(write_config(**given), []).config
        said.clear()
        return load_data(
            config, ChatTemplate(tokenizer, "chatml"), seed, said.append, lambda rows, title: rows
        )

    said: list[str] = []
    read.said = said  # type: ignore[attr-defined]
    return read


def names(rows: Any, folder: Path) -> list[str]:
    """`a1` for the first row of `a.jsonl`."""
    return [example.source.removeprefix(f"{folder}/").replace(".jsonl:", "") for example in rows]


def check(data: RunData) -> None:
    """The ledgers agree with the rows, recounted one by one."""
    for ledger in data.ledgers:
        assert ledger.is_balanced, ledger
    assert isinstance(data.train, RowView)
    trained = [example.source for example in data.train]
    held_out = {example.source for example in data.held_out}
    assert len(set(trained)) == sum(ledger.trained for ledger in data.ledgers)
    assert len(held_out) == sum(ledger.held_out for ledger in data.ledgers)
    assert not held_out & set(trained)
    cut = {example.source for example in data.train if example.truncated}
    assert len(cut) == sum(ledger.truncated for ledger in data.ledgers)


def test_val_size(load: Load, folder: Path) -> None:
    data = load(dataset="a,b", val_size=3)
    check(data)
    assert len(data.train) == 7 and len(data.held_out) == 3  # type: ignore[arg-type]
    assert names(data.held_out, folder) == names(load(dataset="a,b", val_size=0.3).held_out, folder)
    assert names(data.held_out, folder) != names(load(dataset="a,b", val_size=3, seed=1).held_out, folder)
    with pytest.raises(DataError, match="holds out 6 of 6 rows"):
        load(val_size=6)


def test_eval_dataset(load: Load, folder: Path) -> None:
    data = load(eval_dataset="b,c")
    check(data)
    assert names(data.held_out, folder) == ["b1", "b2", "b3", "b4", "c1", "c2"]
    assert data.held_out_parts == {}
    parts = load(eval_dataset="b,c", eval_on_each_dataset=True, metric_for_best_model=...).held_out_parts
    assert {name: names(rows, folder) for name, rows in parts.items()} == {
        "b": ["b1", "b2", "b3", "b4"],
        "c": ["c1", "c2"],
    }


def test_max_samples(load: Load, folder: Path) -> None:
    data = load(dataset="a,c", max_samples=3)
    check(data)
    assert names(data.train, folder) == ["a1", "a2", "a3", "c1", "c2"]
    assert [ledger.not_sampled for ledger in data.ledgers] == [{"max_samples": 3}, {}]


def test_num_samples(load: Load, folder: Path) -> None:
    rows = [pair(i) for i in range(10)]
    register(folder, "few", rows, num_samples=4)
    register(folder, "many", rows, num_samples=23)
    data = load(dataset="few,many", val_size=2)
    check(data)
    few, many = data.ledgers
    assert few.not_sampled == {"num_samples": 6} and few.repeats == 0
    assert many.trained + many.held_out == 10
    assert 9 <= many.repeats <= 13, "what is held out is not repeated"


def test_mix_strategy(load: Load, folder: Path) -> None:
    keys = {"dataset": "a,b,c"}
    assert names(load(**keys).train, folder)[:7] == ["a1", "a2", "a3", "a4", "a5", "a6", "b1"]
    under = load(**keys, mix_strategy="interleave_under")
    check(under)
    assert names(under.train, folder) == ["a1", "b1", "c1", "a2", "b2", "c2"]
    assert [ledger.not_sampled["mix_strategy"] for ledger in under.ledgers] == [4, 2, 0]
    over = load(**keys, mix_strategy="interleave_over")
    check(over)
    assert len(over.train) == 18  # type: ignore[arg-type]
    assert [ledger.repeats for ledger in over.ledgers] == [0, 2, 4]
    once = load(**keys, mix_strategy="interleave_once")
    check(once)
    assert names(once.train, folder)[5:] == ["c2", "a3", "b3", "a4", "b4", "a5", "a6"]


def test_interleave_probs(load: Load, folder: Path) -> None:
    data = load(dataset="a,b", mix_strategy="interleave_once", interleave_probs="0.99,0.01")
    check(data)
    assert names(data.train, folder)[:3] == ["a1", "a2", "a3"]


def test_on_bad_row(load: Load, folder: Path) -> None:
    rows = [pair(0), {"instruction": 1}, pair(1, chosen=""), "x", pair(2)]
    register(folder, "bad", rows)
    with pytest.raises(DataError) as caught:
        load(dataset="bad")
    assert str(caught.value).splitlines()[:3] == [
        "data set 'bad' has 2 malformed rows:",
        f"{folder}/bad.jsonl:2: column 'chosen' is missing; the row has 'instruction'",
        f"{folder}/bad.jsonl:4: a row is an object with named columns, not a text",
    ]
    data = load(dataset="bad", on_bad_row="skip")
    check(data)
    (ledger,) = data.ledgers
    assert ledger.rejected == {"missing column": 1, "empty response": 1, "wrong type": 1}
    assert ledger.examples[1] == f"{folder}/bad.jsonl:3: empty response"
    register(folder, "empty", [pair(0), pair(1, chosen="")])
    assert load(dataset="empty").ledgers[0].rejected == {"empty response": 1}
    with pytest.raises(DataError, match=r"empty.jsonl:2: empty response"):
        load(dataset="empty", on_bad_row="stop")


def test_duplicate_prompts(load: Load, folder: Path) -> None:
    register(folder, "twice", [pair(0), pair(1), pair(0, chosen="better"), pair(0, chosen="best")])
    assert load(dataset="twice").ledgers[0].trained == 4
    data = load(dataset="twice", duplicate_prompts="skip")
    check(data)
    assert data.ledgers[0].rejected == {"duplicated prompt": 2}


def test_ranked_responses(load: Load, folder: Path) -> None:
    rows = [{"instruction": "Q", "responses": ["a", "b", "c"], "scores": [1, 3, 2]}, pair(1)]
    register(folder, "ranked", rows)
    data = load(dataset="ranked", eval_dataset="ranked")
    assert [len(example.pairs) for example in data.train] == [3, 1]  # type: ignore[arg-type]
    assert (data.ledgers[0].trained, data.ledgers[0].pairs) == (2, 4)
    assert data.ledgers[1].held_out_pairs == 4
    held_out = list(data.held_out)
    assert [len(example.pairs) for example in held_out] == [1, 1, 1, 1], "measured pair by pair"
    b, c = data.train[0].response_ids[1:]  # type: ignore[index]
    assert held_out[1].response_ids == [b, c] and held_out[1].labels == ("ranked", "ranked")
    pairs = load(dataset="ranked", ranked_responses="pairs")
    assert len(pairs.train) == 4 and pairs.ledgers[0].trained == 2  # type: ignore[arg-type]
    assert len(load(dataset="ranked", ld_alpha=0.5).train) == 4  # type: ignore[arg-type]


def test_encoded_rows_are_found_again(load: Load, folder: Path) -> None:
    first = load()
    assert not load.said  # type: ignore[attr-defined]
    again = load()
    assert "encoded rows read from" in load.said[0]  # type: ignore[attr-defined]
    assert list(first.train) == list(again.train)  # type: ignore[arg-type]
    assert [ledger.to_dict() for ledger in first.ledgers] == [ledger.to_dict() for ledger in again.ledgers]
    for keys in ({"cutoff_len": 64}, {"max_samples": 3}, {"truncation": "llamafactory"}):
        load(**keys)
        assert not load.said, keys  # type: ignore[attr-defined]
    (folder / "a.jsonl").write_text(json.dumps(pair("new")) + "\n")
    assert load().ledgers[0].num_rows == 1


def test_overwrite_cache(load: Load) -> None:
    load()
    load(overwrite_cache=True)
    assert not load.said  # type: ignore[attr-defined]


def test_a_damaged_store_is_encoded_again(load: Load, tmp_path: Path) -> None:
    load()
    (file,) = (tmp_path / "cache" / "prefkit" / "encoded").glob("a-*/rows.arrow")
    file.write_bytes(file.read_bytes()[:50])
    assert len(load().train) == 6 and not load.said  # type: ignore[arg-type, attr-defined]


def test_tokenized_path(load: Load, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    load(tokenized_path=str(path))
    assert len(list(path.glob("a-*/rows.arrow"))) == 1
    load(tokenized_path=str(path))
    assert f"read from {path}" in load.said[0]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"encoded otherwise \(cutoff_len: 128 -> 64\)"):
        load(tokenized_path=str(path), cutoff_len=64)
    load(tokenized_path=str(path), cutoff_len=64, overwrite_cache=True)
    load(tokenized_path=str(path), dataset="b")
    (path / "dataset_dict.json").touch()
    with pytest.raises(DataError, match="encoded by another tool"):
        load(tokenized_path=str(path))


def test_preprocessing_num_workers(load: Load, folder: Path) -> None:
    register(folder, "many", [pair(i, chosen="" if i % 7 == 0 else "yes") for i in range(300)])
    one = load(dataset="many")
    two = load(dataset="many", preprocessing_num_workers=2, overwrite_cache=True)
    assert list(one.train) == list(two.train)  # type: ignore[arg-type]
    assert one.ledgers[0].to_dict() == two.ledgers[0].to_dict()
    check(two)


def test_no_row_is_left(load: Load, folder: Path) -> None:
    register(folder, "none", [pair(0, chosen="")])
    with pytest.raises(
        DataError, match="no row is left to train on; none: 1 rows, 1 rejected: empty response"
    ):
        load(dataset="none")


def test_rows_without_room_or_tokens_are_rejected(load: Load, folder: Path) -> None:
    register(folder, "long", [pair(0, system="S" * 500), pair(1, chosen="c" * 900 + "x", rejected="c" * 900)])
    with pytest.raises(DataError, match=r"no room for the prompt.*chosen equals rejected after truncation"):
        load(dataset="long")


def test_columns_of_a_path_are_recognised(load: Load, folder: Path) -> None:
    load(dataset=str(folder / "a.jsonl"))
    assert load.said == [f"Data set {folder / 'a.jsonl'}: read as alpaca rows."]  # type: ignore[attr-defined]


def test_other_stages_read_what_they_need(load: Load, folder: Path, tokenizer, write_config) -> None:
    """Judged responses, with a partner for each, and bare prompts."""
    from dataclasses import replace

    register(folder, "kto", [{"instruction": f"Q{i}", "output": "A", "kto_tag": i > 0} for i in range(3)])
    info = json.loads((folder / "dataset_info.json").read_text())
    info["kto"]["ranking"] = False
    (folder / "dataset_info.json").write_text(json.dumps(info))
    config = load_config(write_config(dataset_dir=str(folder), dataset="kto"), []).config
    template = ChatTemplate(tokenizer, "chatml")
    found = {}
    for stage in ("kto", "ppo"):
        changed = replace(config, method=replace(config.method, stage=stage))
        data = load_data(changed, template, 0, lambda text: None, lambda rows, title: rows)
        check(data)
        found[stage] = data.train[0]  # type: ignore[index]
    assert found["kto"].labels == ("undesirable", "partner") and len(found["kto"].response_ids) == 2
    assert found["ppo"].response_ids == [] and found["ppo"].prompt_ids == found["kto"].prompt_ids


def test_ppo_keeps_the_whole_conversation_of_a_prompt(load: Load, folder: Path) -> None:
    """Whatever answer the row has, and where its ids are cut too; read and then from the disk."""
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    tools = [{"name": "weather", "description": "d", "parameters": {"type": "object"}}]
    turns = [("human", "Rome?"), ("function_call", json.dumps(call)), ("observation", "sunny"), ("gpt", "A")]
    register(folder, "plain", [
        {"instruction": "Q", "output": "A"}, {"instruction": "Q", "output": ""}, {"instruction": "Q"},
        {"instruction": "Q", "output": None}, {"instruction": "word " * 150, "system": "S"},
    ], ranking=False)  # fmt: skip
    rows = [
        {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": json.dumps(tools)}
    ]
    register(folder, "chat", rows, ranking=False, formatting="sharegpt")
    keys: dict[str, Any] = {
        "stage": "ppo",
        "dataset": "plain,chat",
        "reward_function": "r.py:score",
        "cutoff_len": 600,
    }
    for _ in range(2):
        data = load(**keys, disable_shuffling=True)
        found = [example for example, _ in zip(data.train, range(6), strict=False)]
        read = [read_conversation(example.conversation) for example in found]
        assert read[:4] == [((Message("user", "Q"),), ())] * 4
        assert len({tuple(example.prompt_ids) for example in found[:4]}) == 1
        assert not any(example.response_ids for example in found)
        assert read[4][0] == (Message("system", "S"), Message("user", "word " * 150))
        assert found[4].truncated and len(found[4].prompt_ids) == 600
        messages, described = read[5]
        assert messages == (
            Message("user", "Rome?"),
            Message("assistant", "", (ToolCall("weather", {"city": "Rome"}),)),
            Message("tool", "sunny"),
        )
        assert described == tuple(tools)
    assert load(dataset="a").train[0].conversation == ""  # type: ignore[index]


@pytest.mark.parametrize("seed", range(6))
def test_the_ledger_is_exact_whatever_the_rows_are(load: Load, folder: Path, seed: int) -> None:
    """A random mixture of good, long, degenerate and malformed rows, under random keys."""
    rng = random.Random(seed)
    kinds = (
        lambda i: pair(i),
        lambda i: pair(i, chosen="long " * 60),
        lambda i: pair(i % 3, chosen="another"),
        lambda i: pair(i, chosen=""),
        lambda i: pair(i, chosen=f"bad {i}"),
        lambda i: {"instruction": i},
        lambda i: [i],
        lambda i: {"instruction": "Q", "responses": ["a", "b", "c"], "scores": [i, 2, 2]},
    )
    for name in ("x", "y"):
        register(folder, name, [pair("first"), *(rng.choice(kinds)(i) for i in range(rng.randrange(5, 60)))])
    keys: dict[str, Any] = {"dataset": "x,y", "on_bad_row": "skip"}
    keys["duplicate_prompts"] = rng.choice(["keep", "skip"])
    keys["mix_strategy"] = rng.choice(["concat", "interleave_under", "interleave_over", "interleave_once"])
    keys["val_size"] = rng.choice([0, 2])
    keys["max_samples"] = rng.choice([None, 20])
    data = load(seed, **keys)
    check(data)
    files = {name: len((folder / f"{name}.jsonl").read_text().splitlines()) for name in ("x", "y")}
    assert {ledger.name: ledger.num_rows for ledger in data.ledgers} == files


# Streams


def stream(data: RunData) -> StreamedRows:
    assert isinstance(data.train, StreamedRows)
    return data.train


def take(rows: StreamedRows, number: int, folder: Path) -> list[str]:
    items = iter(rows)
    return names([next(items) for _ in range(number)], folder)


def test_streaming(load: Load, folder: Path) -> None:
    data = load(dataset="a,b", streaming=True, disable_shuffling=True)
    assert take(stream(data), 12, folder)[8:] == ["b3", "b4", "a1", "a2"], "pass after pass"
    ledgers = stream(data).settle(11)
    assert [(ledger.trained, ledger.repeats) for ledger in ledgers] == [(6, 1), (4, 0)]
    assert all(ledger.is_balanced for ledger in ledgers)
    mixed = load(dataset="a,b", streaming=True, disable_shuffling=True, mix_strategy="interleave_under")
    assert take(stream(mixed), 3, folder) == ["a1", "b1", "a2"]


def test_buffer_size(load: Load, folder: Path) -> None:
    rows = stream(load(dataset="a,b", streaming=True, buffer_size=3))
    first = take(rows, 20, folder)
    assert first == take(rows, 20, folder), "begun again, it is the same stream"
    assert sorted(first[:10]) == sorted(first[10:]) and first[:10] != first[10:]
    assert first[0] in ("a1", "a2", "a3", "a4"), "the first of the rows that waited"
    other = stream(load(1, dataset="a,b", streaming=True, buffer_size=3))
    assert take(other, 10, folder) != first[:10]


def test_a_stream_counts_rows_that_wait_as_not_sampled(load: Load, folder: Path) -> None:
    data = load(dataset="a", streaming=True, buffer_size=2)
    take(stream(data), 3, folder)
    (ledger,) = stream(data).settle(2)
    assert (ledger.num_rows, ledger.trained, ledger.not_sampled) == (5, 2, {"max_steps": 3})
    assert ledger.is_balanced


def test_a_stream_holds_out_its_first_rows(load: Load, folder: Path) -> None:
    data = load(dataset="a", streaming=True, val_size=2, disable_shuffling=True)
    assert names(data.held_out, folder) == ["a1", "a2"]
    assert take(stream(data), 5, folder) == ["a3", "a4", "a5", "a6", "a3"]
    (ledger,) = stream(data).settle(5)
    assert (ledger.num_rows, ledger.trained, ledger.held_out, ledger.repeats) == (6, 4, 2, 1)
    with pytest.raises(DataError, match="the stream has 6"):
        load(dataset="a", streaming=True, val_size=7)


def test_the_first_rows_of_a_stream_leave_its_ledger_alone(load: Load, folder: Path) -> None:
    data = load(dataset="a", streaming=True, buffer_size=4)
    take(stream(data), 2, folder)
    assert names(data.first(3), folder) == ["a1", "a2", "a3"]
    assert stream(data).settle(2)[0].trained == 2


def test_a_stream_stops_at_bad_rows_and_never_turns_in_circles(load: Load, folder: Path) -> None:
    register(folder, "bad", [pair(0), [1]])
    rows = iter(stream(load(dataset="bad", streaming=True, disable_shuffling=True)))
    next(rows)
    with pytest.raises(DataError, match=r"bad.jsonl:2: a row is an object"):
        next(rows)
    register(folder, "none", [pair(0, chosen="")])
    with pytest.raises(DataError, match="no row of the stream can be trained on; none: 1 rows"):
        next(iter(stream(load(dataset="none", streaming=True))))


def test_a_ledger_explains_itself() -> None:
    ledger = Ledger("d", num_rows=3)
    ledger.reject("f:1", "empty response")
    ledger.not_sampled["max_samples"] += 2
    assert ledger.explain() == "d: 3 rows, 1 rejected: empty response, 2 not sampled: max_samples"


def test_a_row_that_the_models_own_template_refuses_is_named(folder: Path, write_config) -> None:
    """One that writes no system message would train without it."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    register(folder, "systems", [pair(0), pair(1, system="Be kind.")])
    for keys, expected in (({}, None), ({"on_bad_row": "skip"}, {"refused by the chat template": 1})):
        file = write_config(dataset_dir=str(folder), dataset="systems", **keys)
        config = load_config(file, []).config

        def read(config: Any = config) -> RunData:
            return load_data(config, ChatTemplate(tokenizer), 0, lambda text: None, lambda rows, title: rows)

        if expected is None:
            with pytest.raises(DataError, match=r"systems.jsonl:2: .*system"):
                read()
        else:
            assert read().ledgers[0].rejected == expected
