"""Rows to examples, and what is said of a row that is none."""

from __future__ import annotations

import pytest

from prefkit.data.examples import Example, Message, Pair, Response
from prefkit.data.formats import Degenerate, RowError, RowFormat, make_example

ALPACA = RowFormat("alpaca")
SHAREGPT = RowFormat("sharegpt")
PAIR = {"chosen": "good", "rejected": "bad"}


def prompt_of(row: dict, layout: RowFormat) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in make_example(row, layout, "pairs", "f:1").prompt]


def test_alpaca() -> None:
    row = {"instruction": "Q", "input": "", **PAIR}
    assert make_example(row, ALPACA, "pairs", "f:7") == Example(
        (Message("user", "Q"),),
        (Response("good", "chosen"), Response("bad", "rejected")),
        "f:7",
        (Pair(0, 1),),
    )


@pytest.mark.parametrize("row", [{"instruction": "Q"}, {"instruction": "Q", "input": None}])
def test_alpaca_without_input(row: dict) -> None:
    assert prompt_of({**row, **PAIR}, ALPACA) == [("user", "Q")]


def test_alpaca_with_everything() -> None:
    row = {"instruction": "Q", "input": "I", "system": "S", "history": [["a", "b"], ["c", "d"]], **PAIR}
    turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert prompt_of(row, ALPACA) == [*turns, ("user", "Q\nI")]


def test_named_columns_leave_out_optional_ones() -> None:
    row = {"question": "Q", "input": "not asked for", "good": "g", "bad": "b"}
    layout = RowFormat("alpaca", {"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert prompt_of(row, layout) == [("user", "Q")]


def test_sharegpt() -> None:
    turns = [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}]
    row = {
        "conversations": turns,
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    example = make_example(row, SHAREGPT, "pairs", "f:1")
    assert example.prompt == (Message("system", "S"), Message("user", "Q"))
    assert [(r.label, r.content) for r in example.responses] == [("chosen", "good"), ("rejected", "bad")]


def test_sharegpt_with_other_tags() -> None:
    layout = RowFormat(
        "sharegpt",
        {"messages": "messages"},
        {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    )
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    row = {"messages": [{"role": r, "content": c} for r, c in turns], **PAIR}
    assert prompt_of(row, layout) == turns


def sharegpt(*turns: tuple[str, object], **columns: object) -> dict:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **PAIR, **columns}


@pytest.mark.parametrize(
    ("row", "layout", "message"),
    [
        ([1], ALPACA, "a row is an object with named columns, not a list"),
        ({**PAIR}, ALPACA, "column 'instruction' is missing; the row has 'chosen', 'rejected'"),
        ({"instruction": 3, **PAIR}, ALPACA, "column 'instruction' is a text, not the number 3"),
        ({"instruction": "Q", "input": ["x"], **PAIR}, ALPACA, "column 'input' is a text, not a list"),
        ({"instruction": "Q", "rejected": "b"}, ALPACA, "column 'chosen' is missing"),
        (
            {"instruction": "Q", **PAIR, "chosen": {"a": 1}},
            ALPACA,
            "column 'chosen' is a text, not an object",
        ),
        ({"instruction": "Q", **PAIR, "history": [["a"]]}, ALPACA, "column 'history': each turn"),
        ({**PAIR}, SHAREGPT, "column 'conversations' is missing; the row has 'chosen'"),
        (sharegpt(), SHAREGPT, "column 'conversations' is empty"),
        (sharegpt(("human", "Q")), ALPACA, "'instruction' is missing.*formatting: sharegpt"),
        (sharegpt(("human", 1)), SHAREGPT, "message 1: 'value' is a text, not the number 1"),
        (sharegpt(("bot", "x")), SHAREGPT, "message 1: unknown role 'bot'; known: human, gpt, system"),
        (sharegpt(("observation", "x")), SHAREGPT, "take turns"),
        (sharegpt(("human", "a"), ("human", "b")), SHAREGPT, "take turns"),
        (sharegpt(("human", "a"), ("gpt", "b")), SHAREGPT, "ends with a user message"),
        (sharegpt(("human", "a"), chosen=5), SHAREGPT, "column 'chosen' is an object with 'from'"),
        (sharegpt(("human", "a"), chosen={"from": "human", "value": "x"}), SHAREGPT, "by the assistant"),
    ],
)
def test_malformed(row: object, layout: RowFormat, message: str) -> None:
    with pytest.raises(RowError, match=message):
        make_example(row, layout, "pairs", "f:1")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": ""}, "empty response"),
        ({"rejected": " \n"}, "empty response"),
        ({"chosen": None}, "empty response"),
        ({"chosen": "bad"}, "chosen equals rejected"),
    ],
)
def test_degenerate(changes: dict, reason: str) -> None:
    with pytest.raises(Degenerate, match=reason):
        make_example({"instruction": "Q", **PAIR, **changes}, ALPACA, "pairs", "f:1")


def test_tools_are_not_dropped_silently() -> None:
    layout = RowFormat("alpaca", {"prompt": "instruction", "tools": "tools"})
    with pytest.raises(RowError, match="tools"):
        make_example({"instruction": "Q", "tools": "[...]", **PAIR}, layout, "pairs", "f:1")
