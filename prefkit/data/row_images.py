"""The images and videos of a row: one for each `<image>` and `<video>` of its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from prefkit.data.examples import Clip, Medium, Message, StoredImage
from prefkit.data.images import MediaSource
from prefkit.data.messages import CLIP_PLACEHOLDER, PLACEHOLDER, PLACEHOLDERS, RowError, kind

_REASON = "wrong number of images"


def read_images(
    listed: object, column: str | None, prompt: Sequence[Message], media: MediaSource | None
) -> list[StoredImage]:
    """Those that a column lists, or that the messages of the prompt bring themselves, looked for in `media`.

    Raises `RowError` unless there is one for each `<image>`, where there are any, and for what is no image.
    """
    given = _listed(listed)
    where = f"column {column!r}"
    parts = [value for message in prompt for value in message.media]
    if brought := [value for value in parts if value is not None]:
        if given:
            raise RowError(f"{where} and the messages both have images: keep one of them", _REASON)
        given, where = brought, "the messages"
    elif parts and not given:
        raise RowError(f"an image part names no image, and {where} has none", _REASON)
    _check_number(given, PLACEHOLDER, prompt, where)
    return [_source(media, where).store(value, f"{where}, image {i}") for i, value in enumerate(given, 1)]


def with_marks(prompt: list[Message], listed: object) -> list[Message]:
    """A prompt that shows its images nowhere with a mark for each at the start of the user's first turn,
    which is where TRL puts them."""
    is_marked = any(PLACEHOLDERS.search(message.content) for message in prompt)
    first = next((i for i, message in enumerate(prompt) if message.role == "user"), None)
    if is_marked or first is None or not (given := _listed(listed)):
        return prompt
    turn = replace(prompt[first], content=PLACEHOLDER * len(given) + prompt[first].content)
    return [*prompt[:first], turn, *prompt[first + 1 :]]


def read_clips(
    listed: object, column: str | None, prompt: Sequence[Message], media: MediaSource | None
) -> list[Clip]:
    """The videos that a column lists, each a list of its frames. Raises `RowError` as `read_images`."""
    where, given = f"column {column!r}", _listed(listed)
    _check_number(given, CLIP_PLACEHOLDER, prompt, where)
    clips = []
    for number, frames in enumerate(given, 1):
        place = f"{where}, video {number}"
        if not isinstance(frames, list) or not frames:
            raise RowError(
                f"{place} is a list of images, its frames, not {kind(frames)}", "video not of frames"
            )
        source = _source(media, where)
        clips.append(Clip(tuple(source.store(it, f"{place}, frame {i}") for i, it in enumerate(frames, 1))))
    return clips


def in_order(
    prompt: Sequence[Message], images: Sequence[StoredImage], clips: Sequence[Clip]
) -> tuple[Medium, ...]:
    """Images and videos as the prompt names them."""
    if not clips:
        return tuple(images)
    waiting: dict[str, Iterator[Medium]] = {PLACEHOLDER: iter(images), CLIP_PLACEHOLDER: iter(clips)}
    marks = (mark for message in prompt for mark in PLACEHOLDERS.findall(message.content))
    return tuple(medium for mark in marks for medium in [next(waiting[mark], None)] if medium is not None)


def _listed(value: object) -> list[Any]:
    return [] if value is None or value == "" else value if isinstance(value, list) else [value]


def _check_number(given: Sequence[Any], mark: str, prompt: Sequence[Message], where: str) -> None:
    number = sum(message.content.count(mark) for message in prompt)
    if given and number != len(given):
        what = mark.strip("<>") + ("" if len(given) == 1 else "s")
        hint = f": write {mark} where each stands"
        if mark == CLIP_PLACEHOLDER and not any(isinstance(value, list) for value in given):
            hint = ": each video is a list of its frames, [[frame, frame], ...]"
        raise RowError(f"{where}: {len(given)} {what} for {number} {mark} in the prompt{hint}", _REASON)


def _source(media: MediaSource | None, where: str) -> MediaSource:
    if media is None:
        raise RowError(f"{where}: images are not read here", "images where none are read")
    return media
