"""A row of a data set, in the form that `dataset_info.json` declares, as an `Example`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from prefkit.data.examples import Example, Label, Message, Response, Role

Row = Mapping[str, Any]


class RowError(ValueError):
    """A malformed row: the message says which column is wrong and what was expected."""


class Degenerate(ValueError):
    """A well-formed row that cannot teach anything; the message is the reason it is counted under."""


COLUMNS = {
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "system",
        "history": "history",
        "chosen": "chosen",
        "rejected": "rejected",
    },
    "sharegpt": {
        "messages": "conversations",
        "system": "system",
        "chosen": "chosen",
        "rejected": "rejected",
    },
}
OPTIONAL = ("query", "system", "history")
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
    "observation_tag": "observation",
    "function_tag": "function_call",
}


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one data set are read: which column holds what, and how roles are spelled.

    Where `dataset_info.json` names no columns at all, each has its usual name. Where it names some, the
    others are still found by their usual name when a pair needs them, while optional ones are not read.
    """

    formatting: Literal["alpaca", "sharegpt"] = "alpaca"
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def column(self, name: str) -> str | None:
        """The name in the file of what we call `name`; None when that is not to be read."""
        if name in OPTIONAL and self.columns and name not in self.columns:
            return None
        return self.columns.get(name) or COLUMNS[self.formatting][name]

    def required(self, name: str) -> str:
        """The name in the file of a column that a pair cannot do without."""
        column = self.column(name)
        assert column is not None, name
        return column

    def tag(self, name: str) -> str:
        """How the file spells a role or the keys of a message."""
        return self.tags.get(name) or TAGS[name]


def make_example(row: object, layout: RowFormat, source: str) -> Example:
    """The preference pair in one row; `source` is `file:row`.

    Raises `RowError` when a column is missing or of the wrong type, `Degenerate` when a response is
    empty or both are equal.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"a row is an object with named columns, not {_kind(row)}")
    if row.get(layout.columns.get("tools", "")):
        raise RowError(f"column {layout.columns['tools']!r}: tools cannot be read by this version")
    prompt = _alpaca_prompt(row, layout) if layout.formatting == "alpaca" else _sharegpt_prompt(row, layout)
    chosen, rejected = (_response(row, layout, label) for label in ("chosen", "rejected"))
    if not chosen.strip() or not rejected.strip():
        raise Degenerate("empty response")
    if chosen == rejected:
        raise Degenerate("chosen equals rejected")
    return Example(prompt, (Response(chosen, "chosen"), Response(rejected, "rejected")), source)


def _alpaca_prompt(row: Row, layout: RowFormat) -> tuple[Message, ...]:
    messages = _system(row, layout)
    history = layout.column("history")
    for turn in _optional(row, history, list, []):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise RowError(f"column {history!r}: each turn is a [question, answer] pair of texts")
        messages += [Message("user", turn[0]), Message("assistant", turn[1])]
    instruction = _text(row, layout.required("prompt"))
    query = _optional(row, layout.column("query"), str, "")
    return (*messages, Message("user", "\n".join(part for part in (instruction, query) if part)))


def _sharegpt_prompt(row: Row, layout: RowFormat) -> tuple[Message, ...]:
    column = layout.required("messages")
    turns = row.get(column)
    if turns == []:
        raise RowError(f"column {column!r} is empty")
    if not isinstance(turns, list):
        raise RowError(f"column {column!r} is a list of messages, not {_kind(turns)}")
    parsed = [_message(turn, layout, f"column {column!r}, message {i}") for i, turn in enumerate(turns, 1)]
    messages = _system(row, layout)
    if parsed[0].role == "system":
        messages = [parsed.pop(0)]
    for i, message in enumerate(parsed):
        expected = "user" if i % 2 == 0 else "assistant"
        if message.role != expected:
            raise RowError(
                f"column {column!r}: user and assistant take turns, but a {message.role} message "
                f"stands where the {expected} speaks"
            )
    if len(parsed) % 2 == 0:
        raise RowError(f"column {column!r} ends with a user message; the answers are chosen and rejected")
    return (*messages, *parsed)


def _message(turn: object, layout: RowFormat, where: str) -> Message:
    """One `{"from": ..., "value": ...}` object."""
    role_key, content_key = layout.tag("role_tag"), layout.tag("content_tag")
    if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
        raise RowError(f"{where} is an object with {role_key!r} and {content_key!r}, not {_kind(turn)}")
    roles: dict[str, Role] = {
        layout.tag("user_tag"): "user",
        layout.tag("assistant_tag"): "assistant",
        layout.tag("system_tag"): "system",
    }
    role, content = turn[role_key], turn[content_key]
    if role in (layout.tag("observation_tag"), layout.tag("function_tag")):
        raise RowError(f"{where}: tool calls ({role!r}) cannot be read by this version")
    if role not in roles:
        raise RowError(f"{where}: unknown role {role!r}; known: {', '.join(roles)}")
    if not isinstance(content, str):
        raise RowError(f"{where}: {content_key!r} is a text, not {_kind(content)}")
    return Message(roles[role], content)


def _response(row: Row, layout: RowFormat, label: Label) -> str:
    """The text of a response: a plain text, or a message by the assistant."""
    column = layout.required(label)
    if column not in row:
        raise RowError(_missing(row, column))
    value = row[column]
    if value is None:
        raise Degenerate("empty response")
    if isinstance(value, str):
        return value
    if layout.formatting == "alpaca":
        raise RowError(f"column {column!r} is a text, not {_kind(value)}")
    message = _message(value, layout, f"column {column!r}")
    if message.role != "assistant":
        raise RowError(f"column {column!r} is a message by the assistant, not by the {message.role}")
    return message.content


def _system(row: Row, layout: RowFormat) -> list[Message]:
    text = _optional(row, layout.column("system"), str, "")
    return [Message("system", text)] if text else []


def _text(row: Row, column: str) -> str:
    if column not in row:
        raise RowError(_missing(row, column))
    if not isinstance(row[column], str):
        raise RowError(f"column {column!r} is a text, not {_kind(row[column])}")
    return row[column]


def _optional(row: Row, column: str | None, kind: type, default: Any) -> Any:
    value = None if column is None else row.get(column)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise RowError(f"column {column!r} is a {'text' if kind is str else 'list'}, not {_kind(value)}")
    return value


def _missing(row: Row, column: str) -> str:
    hint = ""
    if column == "instruction" and ("conversations" in row or "messages" in row):
        hint = "; for conversations dataset_info.json says `formatting: sharegpt`"
    return f"column {column!r} is missing; the row has {', '.join(map(repr, row)) or 'no columns'}{hint}"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true/false", type(None): "null"}
    return names.get(type(value), f"the number {value!r}" if isinstance(value, int | float) else "that")
