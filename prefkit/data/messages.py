"""Turns of a conversation as data sets spell them, as `Message`s: roles, tool calls, parts and thoughts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefkit.data.examples import Message, Role, ToolCall

# How each way of writing a conversation spells roles and the keys of a message.
TAGS = {
    "sharegpt": {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "system_tag": "system",
        "observation_tag": "observation",
        "function_tag": "function_call",
    },
    "openai": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
        "observation_tag": "tool",
        "function_tag": "function_call",
    },
}
# Other spellings of a role that mean the same wherever they occur.
_SYNONYMS = {"developer": "system_tag", "function": "observation_tag"}
_PARTS = ("thinking", "reasoning")
_IMAGES = ("image", "image_url", "input_image")
_MEDIA = ("video", "video_url", "audio", "input_audio")
# What stands for an image, and for a video, in a text.
PLACEHOLDER, CLIP_PLACEHOLDER = "<image>", "<video>"
PLACEHOLDERS = re.compile(f"({PLACEHOLDER}|{CLIP_PLACEHOLDER})")


class RowError(ValueError):
    """A malformed row: the message says which column is wrong and what was expected.

    `reason` is the short name that such rows are counted under.
    """

    def __init__(self, message: str, reason: str = "malformed row") -> None:
        super().__init__(message)
        self.reason = reason


class TextRow(dict[str, Any]):
    """A row whose cells are all text, as those of a CSV file: numbers and truth values are spelt out."""


class Degenerate(ValueError):
    """A well-formed row that cannot teach anything; the message is the reason it is counted under."""


def interleave(pieces: Sequence[str], between: Sequence[str]) -> str:
    """One text of pieces with something between each two: of one more than of these.

    >>> interleave(["a", "b", "c"], ["1", "2"])
    'a1b2c'
    """
    return "".join(it for pair in zip(pieces, [*between, ""], strict=True) for it in pair)


def kind(value: object) -> str:
    """What a value is, in words for a message."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true/false", type(None): "null"}
    return names.get(type(value), f"the number {value!r}" if isinstance(value, int | float) else "that")


def read_text(value: object, where: str) -> str:
    """A text that a tokenizer can encode. Raises `RowError` for anything else."""
    if not isinstance(value, str):
        raise RowError(f"{where} is a text, not {kind(value)}", "wrong type")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{where} has half a surrogate pair, which is no text", "not text") from None
    return value


def with_thought(thought: str, content: str) -> str:
    """A thought before a response, as templates look for it."""
    return f"<think>\n{thought.strip()}\n</think>\n\n{content}" if thought.strip() else content


def read_message(turn: object, tags: Mapping[str, str], where: str) -> Message:
    """One message object; `tags` are keys and roles, each as the file spells it.

    Raises `RowError` for a message without role or content, with a role of none of the tags, or with video
    or sound.
    """
    role_key, content_key = tags["role_tag"], tags["content_tag"]
    if not isinstance(turn, Mapping) or role_key not in turn:
        raise RowError(
            f"{where} is an object with {role_key!r} and {content_key!r}, not {_shape(turn)}", "wrong type"
        )
    role = _read_role(turn[role_key], tags, where)
    if content_key not in turn and not (role == "assistant" and turn.get("tool_calls")):
        raise RowError(f"{where} has no {content_key!r}, but {_shape(turn)}", "missing content")
    content = turn.get(content_key)
    if turn[role_key] == tags["function_tag"]:
        return _read_function_turn(content, f"{where}: {content_key!r}")
    calls = _read_calls(turn.get("tool_calls"), f"{where}: 'tool_calls'")
    media: tuple[Any, ...] = ()
    text = ""
    if content is not None or not calls:
        text, media = _read_content(content, f"{where}: {content_key!r}")
    thought = turn.get("reasoning_content") or turn.get("thinking") or ""
    if role == "assistant" and thought:
        text = with_thought(read_text(thought, f"{where}: its thought"), text)
    return Message(role, text, calls, media)


def _shape(turn: object) -> str:
    if isinstance(turn, Mapping):
        return f"an object with {', '.join(map(repr, turn)) or 'nothing'}"
    return kind(turn)


def _read_role(written: object, tags: Mapping[str, str], where: str) -> Role:
    roles: dict[str, Role] = {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["system_tag"]: "system",
        tags["observation_tag"]: "tool",
        tags["function_tag"]: "assistant",
    }
    role = None
    if isinstance(written, str):
        role = roles.get(written) or roles.get(tags.get(_SYNONYMS.get(written, ""), ""))
    if role is None:
        raise RowError(f"{where}: unknown role {written!r}; known: {', '.join(roles)}", "unknown role")
    return role


def _read_content(content: object, where: str) -> tuple[str, tuple[Any, ...]]:
    """A text, or the texts and thoughts of a list of parts; and the images among these, as they are
    written."""
    if not isinstance(content, list):
        return read_text(content, where), ()
    texts: list[str] = []
    thoughts: list[str] = []
    media: list[Any] = []
    for number, part in enumerate(content, 1):
        place = f"{where}, part {number}"
        if isinstance(part, str):
            texts.append(read_text(part, place))
            continue
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise RowError(f"{place} is an object with 'type', not {_shape(part)}", "wrong type")
        if part["type"] in _MEDIA:
            raise RowError(f"{place}: {part['type']} parts cannot be read by this version", "video or sound")
        if part["type"] in _IMAGES:
            texts.append(PLACEHOLDER)
            media.append(_image_of(part))
        elif part["type"] in _PARTS:
            thoughts.append(read_text(part.get(part["type"], part.get("text")), place))
        elif part["type"] in ("text", "output_text", "input_text"):
            texts.append(read_text(part.get("text"), place))
        else:
            raise RowError(f"{place}: unknown type {part['type']!r}; text, thinking and image are known")
    return with_thought("\n".join(thoughts), "".join(texts)), tuple(media)


def _image_of(part: Mapping[str, Any]) -> Any:
    """The image that a part brings; None where it says only that there is one, which a column then has."""
    names = (part["type"], "image", "image_url", "url", "path", "bytes", "base64")
    return next((part[name] for name in names if part.get(name) is not None), None)


def _read_function_turn(content: object, where: str) -> Message:
    """A turn that is nothing but calls: JSON of one or a list of them, a thought perhaps before it."""
    thought = ""
    if isinstance(content, str):
        head, mark, rest = content.rpartition("</think>")
        thought = f"{head}{mark}\n\n" if mark else ""
        content = rest if mark else content
    calls = _read_calls(_parse_json(content, where), where)
    if not calls:
        raise RowError(f"{where} holds no function call", "malformed tool call")
    return Message("assistant", thought, calls)


def _read_calls(value: object, where: str) -> tuple[ToolCall, ...]:
    """Function calls: `{"name": ..., "arguments": ...}` objects, or OpenAI's with `function` around it."""
    if value is None:
        return ()
    calls = []
    for item in value if isinstance(value, list) else [value]:
        call = item.get("function", item) if isinstance(item, Mapping) else item
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise RowError(f"{where} is an object with 'name' and 'arguments', not {_shape(call)}",
                           "malformed tool call")  # fmt: skip
        arguments = call.get("arguments", {})
        arguments = _parse_json(arguments, f"{where}: 'arguments'") if arguments != "" else {}
        if not isinstance(arguments, Mapping):
            raise RowError(f"{where}: 'arguments' is an object, not {kind(arguments)}", "malformed tool call")
        calls.append(ToolCall(call["name"], arguments))
    return tuple(calls)


def _parse_json(value: object, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(read_text(value, where))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RowError):
            raise
        raise RowError(f"{where} is not valid JSON: {error}", "malformed tool call") from None


def read_tools(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """Descriptions of functions: a list of JSON schemas, or its JSON text.

    Raises `RowError` where an entry is no object with a name.
    """
    parsed = _parse_json(value, where) if value else None
    if not parsed:
        return ()
    tools = parsed if isinstance(parsed, list) else [parsed]
    for tool in tools:
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else tool
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise RowError(f"{where} lists objects with 'name', not {_shape(inner)}", "malformed tools")
    return tuple(tools)


def read_messages(turns: object, tags: Mapping[str, str], where: str) -> list[Message]:
    """A list of messages in which user (or tools) and assistant take turns, a system message first.

    Raises `RowError` for anything else.
    """
    if not isinstance(turns, list):
        raise RowError(f"{where} is a list of messages, not {kind(turns)}", "wrong type")
    if not turns:
        raise RowError(f"{where} is empty", "no messages")
    messages = [read_message(turn, tags, f"{where}, message {i}") for i, turn in enumerate(turns, 1)]
    check_turns(messages, where)
    return messages


def check_turns(messages: Sequence[Message], where: str) -> None:
    """Raises `RowError` unless an assistant answers each user or tool, and system stands at the start."""
    speaker = ""
    for message in messages[1:] if messages and messages[0].role == "system" else messages:
        expected = "assistant" if speaker in ("user", "tool") else "user"
        fits = message.role == expected or (message.role == "tool" and speaker in ("assistant", "tool"))
        if not fits:
            raise RowError(
                f"{where}: user and assistant take turns, but a {message.role} message stands where the "
                f"{expected} speaks",
                "wrong order of turns",
            )
        speaker = message.role
