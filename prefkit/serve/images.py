"""Images in requests: data URIs, and addresses of hosts that the server was told; never a file of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefkit.data.examples import Message, StoredImage
from prefkit.data.images import MediaSource
from prefkit.data.messages import RowError
from prefkit.serve.http import ApiError

MOST_IMAGES = 64  # of one request: each may be many times larger decoded than it was sent
_HINT = "send it as data:image/png;base64,..., or let the server be told of its host by media_hosts"


@dataclass(frozen=True)
class RequestImages(MediaSource):
    """Where the images of requests may come from: `hosts` over https, no folder."""

    folder: Path = Path("/nowhere")

    def _locate(self, text: str) -> Path:
        raise RowError(f"a path is not read by this server: {_HINT}", "image by path")

    def _fetch(self, url: str) -> bytes:
        if not self.hosts or not url[:8].lower().startswith(("http:", "https://")):
            scheme = url.partition(":")[0][:20]
            raise RowError(f"{scheme}:// is not read by this server: {_HINT}", "image by URL")
        return super()._fetch(url)


def check_images(conversations: Iterable[Sequence[Message]], sees: bool) -> None:
    """Raises `ApiError` for a request with too many images, or with any for a model that does not see."""
    number = sum(len(message.media) for messages in conversations for message in messages)
    if number and not sees:
        raise ApiError(400, "There are images, and this model does not see.", "messages", "no_vision")
    if number > MOST_IMAGES:
        raise ApiError(400, f"There are {number} images; {MOST_IMAGES} are allowed in a request.", "messages")


def read_images(messages: Sequence[Message], hosts: Sequence[str] = ()) -> tuple[StoredImage, ...]:
    """The images that messages bring (`Message.media`), in order; each stands where their text has `<image>`.

    They are decoded, and `hosts` may be asked: not for an event loop. Raises `RowError` for what is no image
    or may not be read.
    """
    brought = [value for message in messages for value in message.media]
    source = RequestImages(hosts=tuple(hosts))
    return tuple(source.store(value, f"image {number}") for number, value in enumerate(brought, 1))
