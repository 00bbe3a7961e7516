"""One row of preference data as plain text: a prompt and the responses under it, no tokens yet."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]
Label = Literal["chosen", "rejected"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Response:
    """One answer to a prompt; `label` says how it was judged."""

    content: str
    label: Label


@dataclass(frozen=True)
class Example:
    """A prompt with its responses; `source` is `file:row`, to name the row in a message.

    The prompt ends with a user turn; a system turn, if any, comes first.
    """

    prompt: tuple[Message, ...]
    responses: tuple[Response, ...]
    source: str
