"""A conversation as text that is kept beside its token ids, and as other programs write it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prefkit.data.examples import Message, ToolCall

Tools = tuple[Mapping[str, Any], ...]


def as_chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in the form of OpenAI's chat: `role`, `content`, and `tool_calls` where there are calls.

    >>> as_chat([Message("user", "Hi")])
    [{'role': 'user', 'content': 'Hi'}]
    """
    return [
        {"role": message.role, "content": message.content}
        | ({"tool_calls": [_call(call) for call in message.calls]} if message.calls else {})
        for message in messages
    ]


def _call(call: ToolCall) -> dict[str, Any]:
    return {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}


def write_conversation(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """Messages and tools as JSON, for `read_conversation`."""
    return json.dumps({"messages": as_chat(messages), "tools": list(tools)}, ensure_ascii=False)


def read_conversation(text: str) -> tuple[tuple[Message, ...], Tools]:
    """The messages and tools of which `write_conversation` has made the text.

    >>> read_conversation(write_conversation([Message("user", "Hi")]))
    ((Message(role='user', content='Hi', calls=(), media=()),), ())
    """
    written = json.loads(text)
    messages = tuple(
        Message(
            turn["role"],
            turn["content"],
            tuple(ToolCall(**call["function"]) for call in turn.get("tool_calls", ())),
        )
        for turn in written["messages"]
    )
    return messages, tuple(written["tools"])
