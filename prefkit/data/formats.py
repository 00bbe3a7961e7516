"""A row of a data set, in the form that `dataset_info.json` declares, as an `Example`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

from prefkit.data.examples import Example, Label, Message, Pair, Response
from prefkit.data.images import MediaSource
from prefkit.data.messages import (
    TAGS,
    Degenerate,
    RowError,
    TextRow,
    check_turns,
    kind,
    read_message,
    read_messages,
    read_text,
    read_tools,
)
from prefkit.data.row_images import in_order, read_clips, read_images, with_marks
from prefkit.data.transcript import read_transcript

Row = Mapping[str, Any]
Formatting = Literal["alpaca", "sharegpt", "openai", "trl", "hh"]
# What is read of a row: responses that are compared, one that is judged, the prompt alone, any responses, or
# the answer to learn as it is.
Use = Literal["pairs", "judged", "prompts", "scored", "answer"]

_COMMON = {
    "system": "system",
    "tools": "tools",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "kto_tag",
    "responses": "responses",
    "ranks": "ranks",
    "scores": "scores",
    "margin": "margin",
    "weight": "weight",
    "images": "images",
    "videos": "videos",
    "audios": "audios",
}
COLUMNS = {
    "alpaca": {
        **{"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
        **_COMMON,
    },
    "sharegpt": {"messages": "conversations", **_COMMON},
    "openai": {"messages": "messages", **_COMMON},
    "trl": {"prompt": "prompt", "response": "completion", **_COMMON, "kto_tag": "label"},
    "hh": {"chosen": "chosen", "rejected": "rejected"},
}
# Not read where `columns` names others and not them: they may be there for another purpose.
_OPTIONAL = ("query", "system", "history", "tools")
# Read only where `columns` names them: columns of these names often mean something else.
_ON_DEMAND = ("margin", "weight")


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one data set are read: which column holds what, and how roles are spelled.

    Where `dataset_info.json` names no columns at all, each has its usual name. Where it names some, the
    others are still found by their usual name when the row needs them, while optional ones are not read.
    """

    formatting: Formatting = "alpaca"
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def column(self, name: str) -> str | None:
        """The name in the file of what we call `name`; None when that is not to be read."""
        if name not in self.columns and (name in _ON_DEMAND or (name in _OPTIONAL and self.columns)):
            return None
        return self.columns.get(name) or COLUMNS[self.formatting].get(name)

    def required(self, name: str) -> str:
        """The name in the file of a column that the row cannot do without."""
        column = self.column(name)
        assert column is not None, name
        return column

    @property
    def all_tags(self) -> dict[str, str]:
        """How the file spells each role and the keys of a message."""
        usual = TAGS["sharegpt" if self.formatting == "sharegpt" else "openai"]
        return {**usual, **self.tags}


def make_example(
    row: object, layout: RowFormat, use: Use, source: str, media: MediaSource | None = None
) -> Example:
    """What `use` reads of one row; `source` is `file:row`, `media` where its images may be.

    Raises `RowError` when a column is missing or of the wrong type, `Degenerate` when the row can teach
    nothing: a response is empty, or responses are equal.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"a row is an object with named columns, not {kind(row)}", "wrong type")
    sounds = layout.column("audios")
    if sounds and row.get(sounds):
        raise RowError(f"column {sounds!r}: sound cannot be read by this version", "video or sound")
    readers = {
        "pairs": _read_ranked,
        "judged": _read_judged,
        "prompts": _read_prompt,
        "scored": _read_scored,
        "answer": _read_answer,
    }
    prompt, responses, pairs = readers[use](row, layout)
    column = layout.column("tools")
    tools = read_tools(row.get(column), f"column {column!r}") if column else ()
    listing, clip_listing = layout.column("images"), layout.column("videos")
    if listing == "images" and listing not in row and row.get("image"):
        listing = "image"
    listed = row.get(listing) if listing else None
    if layout.formatting == "trl":
        prompt = with_marks(prompt, listed)
    images = read_images(listed, listing, prompt, media)
    clips = read_clips(row.get(clip_listing) if clip_listing else None, clip_listing, prompt, media)
    shown = in_order(prompt, images, clips)
    return Example(tuple(prompt), tuple(responses), source, tuple(pairs), tools, shown)


Parts = tuple[list[Message], list[Response], list[Pair]]


def _read_prompt(row: Row, layout: RowFormat) -> Parts:
    """The prompt alone: a response that the row may have is not read."""
    if layout.formatting == "hh":
        return _hh_turns(row, layout, "chosen")[:-1], [], []
    messages = _PROMPTS[layout.formatting](row, layout)
    if messages[-1].role == "assistant":
        messages.pop()
    if not messages or messages[-1].role not in ("user", "tool"):
        raise RowError("the conversation has no user message to answer", "no prompt")
    return messages, [], []


def _read_judged(row: Row, layout: RowFormat) -> Parts:
    """A prompt, one response, and whether it is desirable."""
    column = layout.column("kto_tag")
    if layout.formatting == "hh" or column is None:
        raise RowError(f"formatting {layout.formatting} has pairs only; stage kto reads judged responses")
    label: Label = "desirable" if _flag(row, column) else "undesirable"
    messages, answer = _answered(row, layout)
    if _is_empty(answer):
        raise Degenerate("empty response")
    return messages, [Response(answer.content, label, answer.calls)], []


def _answered(row: Row, layout: RowFormat) -> tuple[list[Message], Message]:
    """A prompt and the one response to it."""
    messages = _PROMPTS[layout.formatting](row, layout)
    response = layout.column("response")
    if response is not None:
        return messages, _after(messages, _answer_turns(row, response, layout), response)
    if messages[-1].role != "assistant":
        raise RowError("the conversation ends without a response by the assistant", "no response")
    return messages[:-1], messages[-1]


def _read_scored(row: Row, layout: RowFormat) -> Parts:
    """A prompt and whatever responses the row has: a list, chosen and rejected, or one. They may be equal."""
    answers: dict[Label, list[Message]]
    if _has_list(row, layout):
        prompt, turns = _listed(row, layout)
        answers = {"ranked": turns}
    elif layout.formatting == "hh" or layout.required("chosen") in row:
        prompt, chosen, rejected = _compared(row, layout)
        answers = {"chosen": [chosen], "rejected": [rejected]}
    else:
        prompt, answer = _answered(row, layout)
        answers = {"scored": [answer]}
    if any(_is_empty(turn) for turns in answers.values() for turn in turns):
        raise Degenerate("empty response")
    responses = [
        Response(turn.content, label, turn.calls) for label, turns in answers.items() for turn in turns
    ]
    return prompt, responses, []


def _read_answer(row: Row, layout: RowFormat) -> Parts:
    """A prompt and the answer to it: the one there is, the chosen one, or the best of a list."""
    if _has_list(row, layout):
        prompt, turns = _listed(row, layout)
        scores = _scores(row, layout, len(turns))
        answer = turns[scores.index(max(scores))] if turns else None
    elif layout.formatting == "hh" or layout.required("chosen") in row:
        prompt, answer, _ = _compared(row, layout)
    else:
        prompt, answer = _answered(row, layout)
    if answer is None or _is_empty(answer):
        raise Degenerate("empty response")
    return prompt, [Response(answer.content, "answer", answer.calls)], []


def _read_ranked(row: Row, layout: RowFormat) -> Parts:
    """A prompt with a better and a worse response, or with a list of ranked ones."""
    if _has_list(row, layout):
        return _read_list(row, layout)
    prompt, chosen, rejected = _compared(row, layout)
    return prompt, *_make_pair(chosen, rejected, row, layout)


def _has_list(row: Row, layout: RowFormat) -> bool:
    """Whether a row has a list of responses instead of two."""
    if layout.formatting == "hh":
        return False
    return "responses" in layout.columns or ("responses" in row and "chosen" not in row)


def _compared(row: Row, layout: RowFormat) -> tuple[list[Message], Message, Message]:
    """A prompt, the chosen response and the rejected one."""
    if layout.formatting == "hh":
        return _compared_hh(row, layout)
    columns = [layout.required(name) for name in ("chosen", "rejected")]
    answers = [_answer_turns(row, column, layout) for column in columns]
    implicit = layout.formatting == "trl" and row.get(layout.required("prompt")) is None
    prompt = _shared_turns(answers) if implicit else _open_prompt(row, layout)
    chosen, rejected = (_after(prompt, turns, column) for turns, column in zip(answers, columns, strict=True))
    return prompt, chosen, rejected


def _compared_hh(row: Row, layout: RowFormat) -> tuple[list[Message], Message, Message]:
    """The same from two whole conversations that part at the last turn."""
    chosen, rejected = (_hh_turns(row, layout, name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Degenerate("chosen and rejected part before the last turn")
    return chosen[:-1], chosen[-1], rejected[-1]


def _read_list(row: Row, layout: RowFormat) -> Parts:
    """Any number of responses with ranks, 1 the best, or scores, the highest the best: each pair of
    unequal rank, the better response first."""
    prompt, turns = _listed(row, layout)
    if any(map(_is_empty, turns)):
        raise Degenerate("empty response")
    scores = _scores(row, layout, len(turns))
    weight = _number(row, layout.column("weight"), 1.0, minimum=0.0)
    better = [
        Pair(i, j, weight=weight)
        for i, a in enumerate(turns)
        for j, b in enumerate(turns)
        if scores[i] > scores[j] and a != b
    ]
    if not better:
        raise Degenerate("no two responses differ in rank")
    return prompt, [Response(turn.content, "ranked", turn.calls) for turn in turns], better


def _listed(row: Row, layout: RowFormat) -> tuple[list[Message], list[Message]]:
    """A prompt and a list of responses to it."""
    column = layout.required("responses")
    values = _list(row, column)
    prompt = _open_prompt(row, layout)
    return prompt, [
        _after(prompt, _as_turns(value, f"column {column!r}, response {i}", layout), column)
        for i, value in enumerate(values, 1)
    ]


def _scores(row: Row, layout: RowFormat, number: int) -> list[float]:
    """One number for each response, higher is better."""
    ranks, scores = layout.required("ranks"), layout.required("scores")
    by_rank = row.get(scores) is None
    column = ranks if by_rank else scores
    if row.get(column) is None:
        raise RowError(f"a list of responses needs column {scores!r} or {ranks!r}", "missing column")
    values = _list(row, column)
    if len(values) != number:
        raise RowError(f"column {column!r} has {len(values)} numbers for {number} responses", "wrong length")
    numbers = [_as_number(value, f"column {column!r}, number {i}") for i, value in enumerate(values, 1)]
    return [-value for value in numbers] if by_rank else numbers


def _make_pair(
    chosen: Message, rejected: Message, row: Row, layout: RowFormat
) -> tuple[list[Response], list[Pair]]:
    if _is_empty(chosen) or _is_empty(rejected):
        raise Degenerate("empty response")
    if chosen == rejected:
        raise Degenerate("chosen equals rejected")
    margin = _number(row, layout.column("margin"), 0.0)
    weight = _number(row, layout.column("weight"), 1.0, minimum=0.0)
    responses = [
        Response(chosen.content, "chosen", chosen.calls),
        Response(rejected.content, "rejected", rejected.calls),
    ]
    return responses, [Pair(0, 1, margin, weight)]


def _is_empty(message: Message) -> bool:
    return not message.content.strip() and not message.calls


def _answer_turns(row: Row, column: str, layout: RowFormat) -> list[Message]:
    """A response, or the conversation that ends with it."""
    if column not in row:
        raise RowError(_missing(row, column), "missing column")
    if row[column] is None:
        raise Degenerate("empty response")
    return _as_turns(row[column], f"column {column!r}", layout)


def _as_turns(value: object, where: str, layout: RowFormat) -> list[Message]:
    if isinstance(value, str):
        return [Message("assistant", read_text(value, where))]
    if layout.formatting == "alpaca":
        keys = list(value) if isinstance(value, Mapping) else []
        form = next((form for form, tags in TAGS.items() if tags["role_tag"] in keys), "")
        hint = f"; for messages dataset_info.json says `formatting: {form}`" if form else ""
        raise RowError(f"{where} is a text, not {kind(value)}{hint}", "wrong type")
    if not isinstance(value, list | Mapping):
        raise RowError(f"{where} is a text, a message or a list of messages, not {kind(value)}", "wrong type")
    several = isinstance(value, list)
    turns = value if isinstance(value, list) else [value]
    return [
        read_message(turn, layout.all_tags, f"{where}, message {i}" if several else where)
        for i, turn in enumerate(turns, 1)
    ]


def _shared_turns(answers: list[list[Message]]) -> list[Message]:
    """The turns with which both conversations start, their last turns left out."""
    shortest = min(map(len, answers)) - 1
    alike = takewhile(lambda turns: turns[0] == turns[1], zip(*answers, strict=False))
    prompt = [turn for turn, _ in alike][:shortest]
    if not prompt:
        raise RowError("chosen and rejected share no prompt, and column 'prompt' is missing", "no prompt")
    check_turns(prompt, "the prompt")
    return prompt


def _after(prompt: list[Message], turns: list[Message], column: str) -> Message:
    """The response at the end of `turns`, which may repeat the prompt before it."""
    rest = turns[len(prompt) :] if len(turns) > 1 and turns[: len(prompt)] == prompt else turns
    if len(rest) != 1:
        raise RowError(f"column {column!r} has {len(rest)} messages after the prompt instead of one response",
                       "wrong order of turns")  # fmt: skip
    if rest[0].role != "assistant":
        raise RowError(
            f"column {column!r} is a message by the assistant, not by the {rest[0].role}",
            "wrong order of turns",
        )
    return rest[0]


def _open_prompt(row: Row, layout: RowFormat) -> list[Message]:
    """The prompt of responses that stand in columns of their own: it waits for the assistant."""
    messages = _PROMPTS[layout.formatting](row, layout)
    if messages[-1].role not in ("user", "tool"):
        column = layout.column("messages") or layout.column("prompt")
        raise RowError(
            f"column {column!r} ends with a user message; the answers are chosen and rejected",
            "wrong order of turns",
        )
    return messages


def _alpaca_prompt(row: Row, layout: RowFormat) -> list[Message]:
    messages = _system(row, layout)
    history = layout.column("history")
    for turn in _list(row, history) if history and row.get(history) is not None else []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise RowError(
                f"column {history!r}: each turn is a [question, answer] pair of texts", "wrong type"
            )
        question, answer = (read_text(text, f"column {history!r}") for text in turn)
        messages += [Message("user", question), Message("assistant", answer)]
    instruction = _text(row, layout.required("prompt"))
    query = _optional_text(row, layout.column("query"))
    return [*messages, Message("user", "\n".join(part for part in (instruction, query) if part))]


def _conversation(row: Row, layout: RowFormat) -> list[Message]:
    """A list of messages, and the system column where it has no system message."""
    column = layout.required("messages")
    if column not in row and "messages" not in layout.columns:
        column = next((name for name in ("messages", "conversations") if name in row), column)
    if column not in row:
        raise RowError(_missing(row, column), "missing column")
    parsed = read_messages(row[column], layout.all_tags, f"column {column!r}")
    return parsed if parsed[0].role == "system" else [*_system(row, layout), *parsed]


def _trl_prompt(row: Row, layout: RowFormat) -> list[Message]:
    """A text that the user says, or a list of messages."""
    column = layout.required("prompt")
    if not isinstance(row.get(column), list):
        return [*_system(row, layout), Message("user", _text(row, column))]
    parsed = read_messages(row[column], layout.all_tags, f"column {column!r}")
    return parsed if parsed[0].role == "system" else [*_system(row, layout), *parsed]


_PROMPTS: dict[str, Callable[[Row, RowFormat], list[Message]]] = {
    "alpaca": _alpaca_prompt,
    "sharegpt": _conversation,
    "openai": _conversation,
    "trl": _trl_prompt,
}


def _hh_turns(row: Row, layout: RowFormat, name: str) -> list[Message]:
    column = layout.required(name)
    return read_transcript(_text(row, column), f"column {column!r}")


def _system(row: Row, layout: RowFormat) -> list[Message]:
    text = _optional_text(row, layout.column("system"))
    return [Message("system", text)] if text else []


def _text(row: Row, column: str) -> str:
    if column not in row:
        raise RowError(_missing(row, column), "missing column")
    return read_text(row[column], f"column {column!r}")


def _optional_text(row: Row, column: str | None) -> str:
    value = None if column is None else row.get(column)
    return "" if value is None else read_text(value, f"column {column!r}")


def _list(row: Row, column: str) -> list[Any]:
    value = row.get(column)
    if isinstance(row, TextRow) and isinstance(value, str):
        value = _parse_cell(value, column)
    if not isinstance(value, list):
        raise RowError(f"column {column!r} is a list, not {kind(value)}", "wrong type")
    return value


def _parse_cell(text: str, column: str) -> Any:
    try:
        return json.loads(text) if text else []
    except (ValueError, RecursionError) as error:
        raise RowError(f"column {column!r} holds a list as JSON: {error}", "wrong type") from None


def _flag(row: Row, column: str) -> bool:
    if column not in row:
        raise RowError(_missing(row, column), "missing column")
    value = row[column]
    if isinstance(row, TextRow) and str(value).lower() in ("true", "false"):
        value = value.lower() == "true"
    if not isinstance(value, bool):
        raise RowError(f"column {column!r} is true or false, not {kind(value)}", "wrong type")
    return value


def _number(row: Row, column: str | None, default: float, minimum: float = -math.inf) -> float:
    if column is None:
        return default
    if column not in row:
        raise RowError(_missing(row, column), "missing column")
    value = row[column]
    if isinstance(row, TextRow):
        try:
            value = float(value)
        except ValueError:
            raise RowError(f"column {column!r} is a number, not {value!r}", "wrong type") from None
    number = _as_number(value, f"column {column!r}")
    if number < minimum:
        raise RowError(f"column {column!r} is at least {minimum:g}, not {number:g}", "out of range")
    return number


def _as_number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"{where} is a finite number, not {kind(value)}", "wrong type")
    return float(value)


def _missing(row: Row, column: str) -> str:
    hint = ""
    if column == "instruction" and ("conversations" in row or "messages" in row):
        form = "sharegpt" if "conversations" in row else "openai"
        hint = f"; for conversations dataset_info.json says `formatting: {form}`"
    if column in ("label", "kto_tag") and row.keys() >= {"chosen", "rejected"}:
        hint = "; these are pairs, which stages dpo and rm train on"
    return f"column {column!r} is missing; the row has {', '.join(map(repr, row)) or 'no columns'}{hint}"
