"""One row of preference data as plain text: a prompt and the responses under it, no tokens yet."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
# A partner is no answer to its prompt: see `data.partners`.
Label = Literal["chosen", "rejected", "ranked", "desirable", "undesirable", "partner", "scored", "answer"]


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant asks for; `arguments` is what its JSON holds."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class StoredImage:
    """An image of a row that is known to be one that can be read.

    `path` is the absolute path of its file, or empty where `content` has its encoded bytes. `digest` is the
    sha256 of these bytes; `width` and `height` are as it is shown.
    """

    path: str
    content: bytes
    digest: str
    width: int
    height: int


@dataclass(frozen=True)
class Clip:
    """A video: its frames, in order."""

    frames: tuple[StoredImage, ...]

    @property
    def digest(self) -> str:
        """A hash of the content of all frames."""
        return hashlib.sha256("".join(frame.digest for frame in self.frames).encode()).hexdigest()


Medium = StoredImage | Clip


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    A thought stands at the head of an assistant's `content`, between `<think>` and `</think>`. `calls` are
    the functions that an assistant asks for; the turn of role `tool` has the result of one as its content.
    Each `<image>` in the content of a prompt stands for an image, each `<video>` for a video; `media` has,
    of each part that is an image, what it brings, as it is written, or None.
    """

    role: Role
    content: str
    calls: tuple[ToolCall, ...] = ()
    media: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Response:
    """One answer to a prompt; `label` says how it was judged."""

    content: str
    label: Label
    calls: tuple[ToolCall, ...] = ()

    @property
    def message(self) -> Message:
        """The response as a turn of the assistant."""
        return Message("assistant", self.content, self.calls)


@dataclass(frozen=True)
class Pair:
    """Two responses of an example by their index, the first one better.

    `margin` is by how much, in the unit of the loss's reward; `weight` multiplies the loss.
    """

    chosen: int
    rejected: int
    margin: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True)
class Example:
    """A prompt with its responses; `source` is `file:row`, to name the row in a message.

    The prompt ends with a turn of the user or of a tool; a system turn, if any, comes first. `tools`
    describes, as JSON schemas, the functions that the assistant may call. `pairs` are empty where
    responses are not compared. `images` are those of the prompt, and its videos, in order.
    """

    prompt: tuple[Message, ...]
    responses: tuple[Response, ...]
    source: str
    pairs: tuple[Pair, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    images: tuple[Medium, ...] = ()
