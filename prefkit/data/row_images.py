"""The images of a row: one for each `<image>` of its prompt."""

from __future__ import annotations

from collections.abc import Sequence

from prefkit.data.examples import Message, StoredImage
from prefkit.data.images import MediaSource
from prefkit.data.messages import PLACEHOLDER, RowError

_REASON = "wrong number of images"


def read_images(
    listed: object, column: str | None, prompt: Sequence[Message], media: MediaSource | None
) -> tuple[StoredImage, ...]:
    """Those that a column lists, or that the messages of the prompt bring themselves, looked for in `media`.

    Raises `RowError` unless there is one for each `<image>`, where there are any, and for what is no image.
    """
    given = [] if listed is None or listed == "" else listed if isinstance(listed, list) else [listed]
    where = f"column {column!r}"
    parts = [value for message in prompt for value in message.media]
    if brought := [value for value in parts if value is not None]:
        if given:
            raise RowError(f"{where} and the messages both have images: keep one of them", _REASON)
        given, where = brought, "the messages"
    elif parts and not given:
        raise RowError(f"an image part names no image, and {where} has none", _REASON)
    number = sum(message.content.count(PLACEHOLDER) for message in prompt)
    if given and number != len(given):
        images = "1 image" if len(given) == 1 else f"{len(given)} images"
        raise RowError(f"{where}: {images} for {number} {PLACEHOLDER} in the prompt", _REASON)
    if given and media is None:
        raise RowError(f"{where}: images are not read here", "images where none are read")
    return tuple(media.store(value, f"{where}, image {i}") for i, value in enumerate(given, 1) if media)
