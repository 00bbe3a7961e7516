"""A conversation written as one text, as the data of "helpful and harmless" has it."""

from __future__ import annotations

import re
from typing import Literal

from prefkit.data.examples import Message
from prefkit.data.messages import RowError, check_turns

_SPEAKERS: dict[str, Literal["user", "assistant"]] = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):[ \t]?")


def read_transcript(text: str, where: str) -> list[Message]:
    """The turns of a text, each after a blank line, `Human: ` or `Assistant: `; the assistant's is the last.

    Raises `RowError` for any other.
    """
    start, *parts = _TURN.split(text if text.startswith("\n") else f"\n\n{text}")
    if start.strip() or not parts:
        raise RowError(f"{where} starts with 'Human: ', each turn after a blank line", "no turns")
    messages = [
        Message(_SPEAKERS[speaker], content.strip())
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    check_turns(messages, where)
    if messages[-1].role != "assistant":
        raise RowError(f"{where} ends with the user, not with the assistant", "no response")
    return messages
