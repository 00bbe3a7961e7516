"""A conversation comes back from its text as it was, and other programs can read it."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prefkit.data.conversation import as_chat, read_conversation, write_conversation
from prefkit.data.examples import Message, ToolCall
from prefkit.data.messages import TAGS, read_messages, read_tools

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.builds(ToolCall, st.text(), st.dictionaries(st.text(), JSON, max_size=3)), max_size=2)
MESSAGES = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), st.text())
    | st.builds(Message, st.just("assistant"), st.text(), CALLS.map(tuple)),
    max_size=4,
)


@given(MESSAGES, st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=2))
def test_what_is_written_comes_back(messages: list[Message], tools: list[dict[str, Any]]) -> None:
    assert read_conversation(write_conversation(messages, tools)) == (tuple(messages), tuple(tools))


def test_the_form_is_that_of_openais_chat() -> None:
    conversation = [
        Message("system", "Be short."),
        Message("user", "Rome?"),
        Message("assistant", "", (ToolCall("weather", {"city": "Rome"}),)),
        Message("tool", "sunny"),
        Message("assistant", "<think>\nwell\n</think>\n\nIt is sunny."),
    ]
    written = as_chat(conversation)
    assert written[2]["tool_calls"] == [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    ]
    assert read_messages(json.loads(json.dumps(written)), TAGS["openai"], "it") == conversation
    tools = ({"name": "weather", "parameters": {}},)
    assert read_tools(json.loads(write_conversation([], tools))["tools"], "it") == tools
