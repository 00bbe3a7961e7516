"""Rows to examples, and what is said of a row that is none."""

from __future__ import annotations

import json

import pytest

from prefkit.data.examples import Example, Message, Pair, Response, ToolCall
from prefkit.data.formats import Degenerate, RowError, RowFormat, TextRow, Use, make_example

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
        (sharegpt(("human", "a"), chosen=5), SHAREGPT, "column 'chosen' is a text, a message or a list"),
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


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def texts(example: Example) -> tuple[list[tuple[str, str]], list[str]]:
    return [(m.role, m.content) for m in example.prompt], [r.content for r in example.responses]


USER_Q = [("user", "Q")]
OPENAI, TRL, HH = RowFormat("openai"), RowFormat("trl"), RowFormat("hh")
HH_ROW = {
    "chosen": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: Why?\n\nAssistant: good",
    "rejected": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: Why?\n\nAssistant: bad",
}
HH_PROMPT = [("user", "Q"), ("assistant", "A"), ("user", "Why?")]


@pytest.mark.parametrize(
    ("row", "layout", "prompt"),
    [
        ({"messages": messages(("user", "Q")), **PAIR}, OPENAI, USER_Q),
        ({"conversations": messages(("user", "Q")), **PAIR}, OPENAI, USER_Q),
        (
            {
                "messages": messages(("developer", "S"), ("user", "Q")),
                "chosen": messages(("assistant", "good"))[0],
                "rejected": messages(("assistant", "bad")),
            },
            OPENAI,
            [("system", "S"), *USER_Q],
        ),
        ({"prompt": "Q", **PAIR}, TRL, USER_Q),
        ({"prompt": messages(*USER_Q), **PAIR}, TRL, USER_Q),
        (
            {
                "prompt": messages(*USER_Q),
                "chosen": messages(("assistant", "good")),
                "rejected": messages(("assistant", "bad")),
            },
            TRL,
            USER_Q,
        ),
        # The prompt is what both conversations start with.
        (
            {
                "chosen": messages(("system", "S"), *USER_Q, ("assistant", "good")),
                "rejected": messages(("system", "S"), *USER_Q, ("assistant", "bad")),
            },
            TRL,
            [("system", "S"), *USER_Q],
        ),
        # As UltraFeedback has it: a prompt, and the conversations with it.
        (
            {
                "prompt": "Q",
                "chosen": messages(*USER_Q, ("assistant", "good")),
                "rejected": messages(*USER_Q, ("assistant", "bad")),
            },
            TRL,
            USER_Q,
        ),
        (HH_ROW, HH, HH_PROMPT),
    ],
)
def test_pairs_of_each_format(row: dict, layout: RowFormat, prompt: list[tuple[str, str]]) -> None:
    example = make_example(row, layout, "pairs", "f:1")
    assert texts(example) == (prompt, ["good", "bad"])
    assert example.pairs == (Pair(0, 1),)


@pytest.mark.parametrize(
    ("row", "layout", "prompt"),
    [
        ({"instruction": "Q", "input": "", "output": "A", "kto_tag": True}, ALPACA, USER_Q),
        (
            {**sharegpt(("human", "Q"), ("gpt", "A")), "kto_tag": True},
            SHAREGPT,
            USER_Q,
        ),
        ({"messages": messages(*USER_Q, ("assistant", "A")), "kto_tag": True}, OPENAI, USER_Q),
        ({"prompt": "Q", "completion": "A", "label": True}, TRL, USER_Q),
        (
            {"prompt": messages(*USER_Q), "completion": messages(("assistant", "A")), "label": True},
            TRL,
            USER_Q,
        ),
        (TextRow(instruction="Q", output="A", kto_tag="TRUE"), ALPACA, USER_Q),
    ],
)
def test_judged_responses_of_each_format(row: dict, layout: RowFormat, prompt: list) -> None:
    example = make_example(row, layout, "judged", "f:1")
    assert texts(example) == (prompt, ["A"])
    assert (example.responses[0].label, example.pairs) == ("desirable", ())


@pytest.mark.parametrize(
    ("row", "layout", "prompt"),
    [
        ({"instruction": "Q", "input": "", "output": ""}, ALPACA, USER_Q),
        ({"instruction": "Q"}, ALPACA, USER_Q),
        (sharegpt(("human", "Q"), ("gpt", "A")), SHAREGPT, USER_Q),
        (sharegpt(("human", "Q")), SHAREGPT, USER_Q),
        ({"messages": messages(*USER_Q)}, OPENAI, USER_Q),
        ({"prompt": "Q"}, TRL, USER_Q),
        (HH_ROW, HH, HH_PROMPT),
        (TextRow(text="Q"), RowFormat("alpaca", {"prompt": "text"}), USER_Q),
    ],
)
def test_prompts_of_each_format(row: dict, layout: RowFormat, prompt: list) -> None:
    assert texts(make_example(row, layout, "prompts", "f:1")) == (prompt, [])


CALL = {"name": "weather", "arguments": {"city": "Rome"}}
WEATHER = ToolCall("weather", {"city": "Rome"})
TOOLS = [{"name": "weather", "description": "d", "parameters": {"type": "object"}}]


def test_tool_calls_of_sharegpt() -> None:
    row = sharegpt(
        ("human", "Q"),
        ("function_call", f"<think>\nhm\n</think>\n\n{json.dumps(CALL)}"),
        ("observation", "21"),
    )
    row |= {"tools": json.dumps(TOOLS), "chosen": {"from": "gpt", "value": "good"}}
    row |= {"rejected": {"from": "function_call", "value": json.dumps([CALL, CALL])}}
    example = make_example(row, SHAREGPT, "pairs", "f:1")
    assert example.prompt[1:] == (
        Message("assistant", "<think>\nhm\n</think>\n\n", (WEATHER,)),
        Message("tool", "21"),
    )
    assert example.responses[1] == Response("", "rejected", (WEATHER, WEATHER))
    assert example.tools == tuple(TOOLS)


def test_tool_calls_of_openai() -> None:
    calls = [
        {"type": "function", "id": "1", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}
    ]
    turns = [
        *messages(("user", "Q")),
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "21", "tool_call_id": "1"},
        {"role": "tool", "content": "22", "tool_call_id": "2"},
    ]
    row = {"messages": turns, "tools": [{"type": "function", "function": TOOLS[0]}], **PAIR}
    example = make_example(row, OPENAI, "pairs", "f:1")
    assert example.prompt[1:] == (
        Message("assistant", "", (WEATHER,)),
        Message("tool", "21"),
        Message("tool", "22"),
    )
    assert example.tools[0]["function"]["name"] == "weather"


def test_thoughts_and_parts() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "good"}]
    reasoned = {"role": "assistant", "content": "bad", "reasoning_content": "hm"}
    row = {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}],
        "chosen": [{"role": "assistant", "content": parts}],
        "rejected": [reasoned],
    }
    assert texts(make_example(row, TRL, "pairs", "f:1")) == (
        USER_Q,
        ["<think>\nhm\n</think>\n\ngood", "<think>\nhm\n</think>\n\nbad"],
    )


@pytest.mark.parametrize("numbers", [{"scores": [0.5, 2, 2, 1]}, {"ranks": [4, 1, 1, 2]}])
def test_ranked_lists_become_all_pairs_of_unequal_rank(numbers: dict) -> None:
    row = {"instruction": "Q", "responses": ["d", "a", "b", "c"], **numbers}
    example = make_example(row, ALPACA, "pairs", "f:1")
    assert [(pair.chosen, pair.rejected) for pair in example.pairs] == [
        (1, 0),
        (1, 3),
        (2, 0),
        (2, 3),
        (3, 0),
    ]
    assert {response.label for response in example.responses} == {"ranked"}


def test_margins_and_weights_are_read_where_columns_name_them() -> None:
    row = {"instruction": "Q", **PAIR, "margin": 0.5, "weight": 2}
    assert make_example(row, ALPACA, "pairs", "f:1").pairs == (Pair(0, 1),)
    layout = RowFormat("alpaca", {"margin": "margin", "weight": "weight"})
    assert make_example(row, layout, "pairs", "f:1").pairs == (Pair(0, 1, 0.5, 2.0),)
    cells = TextRow({**row, "margin": "0.5", "weight": "2"})
    assert make_example(cells, layout, "pairs", "f:1").pairs == (Pair(0, 1, 0.5, 2.0),)


RANKED = {"instruction": "Q", "responses": ["a", "b"]}
WEIGHED = RowFormat("alpaca", {"weight": "w"})


@pytest.mark.parametrize(
    ("row", "layout", "use", "message"),
    [
        ({"instruction": "Q", "output": "A"}, ALPACA, "judged", "column 'kto_tag' is missing"),
        (
            {"instruction": "Q", "output": "A", "kto_tag": 1},
            ALPACA,
            "judged",
            "true or false, not the number 1",
        ),
        (
            {"instruction": "Q", "output": "A", "kto_tag": "true"},
            ALPACA,
            "judged",
            "true or false, not a text",
        ),
        ({**sharegpt(("human", "Q")), "kto_tag": True}, SHAREGPT, "judged", "ends without a response"),
        (HH_ROW, HH, "judged", "formatting hh has pairs only"),
        (sharegpt(("system", "S")), SHAREGPT, "prompts", "no user message"),
        (RANKED, ALPACA, "pairs", "needs column 'scores' or 'ranks'"),
        ({**RANKED, "scores": [1]}, ALPACA, "pairs", "has 1 numbers for 2 responses"),
        ({**RANKED, "scores": [1, "2"]}, ALPACA, "pairs", "number 2 is a finite number, not a text"),
        ({**RANKED, "scores": [1, float("nan")]}, ALPACA, "pairs", "number 2 is a finite number"),
        ({"instruction": "Q", **PAIR, "w": -1}, WEIGHED, "pairs", "is at least 0, not -1"),
        ({"instruction": "Q", **PAIR}, WEIGHED, "pairs", "column 'w' is missing"),
        ({"instruction": "\ud800", **PAIR}, ALPACA, "pairs", "half a surrogate pair"),
        (
            {"instruction": "Q", **PAIR, "images": ["a.png"]},
            ALPACA,
            "pairs",
            "1 image for 0 <image> in the",
        ),
        ({"chosen": "A", "rejected": "B"}, HH, "pairs", "starts with 'Human: '"),
        ({"chosen": "\n\nHuman: Q", "rejected": ""}, HH, "pairs", "ends with the user"),
        ({"prompt": "Q", "chosen": messages(*USER_Q), "rejected": "b"}, TRL, "pairs", "not by the user"),
        ({"chosen": "a", "rejected": "b"}, TRL, "pairs", "share no prompt"),
        (sharegpt(("human", "Q"), ("function_call", "{")), SHAREGPT, "prompts", "is not valid JSON"),
        (sharegpt(("human", "Q"), ("function_call", "[]")), SHAREGPT, "prompts", "no function call"),
        (
            sharegpt(("human", "Q"), ("function_call", '{"n": 1}')),
            SHAREGPT,
            "prompts",
            "'name' and 'arguments'",
        ),
        ({**sharegpt(("human", "Q")), "tools": "[{}]"}, SHAREGPT, "prompts", "lists objects with 'name'"),
        ({"messages": [{"role": "user"}]}, OPENAI, "prompts", "has no 'content'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            OPENAI,
            "prompts",
            "an image part names no image",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "new"}]}]},
            OPENAI,
            "prompts",
            "unknown type 'new'",
        ),
    ],
)
def test_what_is_malformed_in_other_formats(row: dict, layout: RowFormat, use: Use, message: str) -> None:
    with pytest.raises(RowError, match=message):
        make_example(row, layout, use, "f:1")


@pytest.mark.parametrize(
    ("row", "layout", "reason"),
    [
        ({**RANKED, "scores": [1, 1]}, ALPACA, "no two responses differ in rank"),
        ({**RANKED, "responses": ["a", "a"], "scores": [1, 2]}, ALPACA, "no two responses differ in rank"),
        ({**RANKED, "responses": ["a", " "], "scores": [1, 2]}, ALPACA, "empty response"),
        ({**HH_ROW, "rejected": "\n\nHuman: other\n\nAssistant: bad"}, HH, "part before the last turn"),
    ],
)
def test_what_is_degenerate_in_other_formats(row: dict, layout: RowFormat, reason: str) -> None:
    with pytest.raises(Degenerate, match=reason):
        make_example(row, layout, "pairs", "f:1")


@pytest.mark.parametrize(
    ("row", "layout", "answer"),
    [
        ({"instruction": "Q", "output": "A"}, RowFormat(), "A"),
        ({"instruction": "Q", "chosen": "A", "rejected": "B"}, RowFormat(), "A"),
        ({"instruction": "Q", "responses": ["B", "A"], "scores": [1, 2]}, RowFormat(), "A"),
        ({"instruction": "Q", "responses": ["A", "B"], "ranks": [1, 2]}, RowFormat(), "A"),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
         RowFormat("hh"), "A"),
    ],
)  # fmt: skip
def test_the_answer_to_learn(row: dict, layout: RowFormat, answer: str) -> None:
    example = make_example(row, layout, "answer", "f:1")
    (response,) = example.responses
    assert (response.content, response.label, example.pairs) == (answer, "answer", ())


@pytest.mark.parametrize("row", [{"output": ""}, {"responses": [], "scores": []}])
def test_no_answer_to_learn(row: dict) -> None:
    with pytest.raises(Degenerate, match="empty response"):
        make_example({"instruction": "Q", **row}, RowFormat(), "answer", "f:1")
