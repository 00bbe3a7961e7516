"""Pictures that tests of images are made of."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prefkit.data.images import MediaSource, open_image
from prefkit.data.messages import RowError

WHERE = "column 'images', image 2"
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
ANY = (1, 10**9)  # pixels


def encode(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def plain(form: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    return encode(Image.new("RGB", size, RED), form)


def part(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *parts: bytes, depth: int = 8, colour: int = 2) -> bytes:
    header = part(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(parts) + part(b"IEND", b"")


def refuse(source: MediaSource, value: object) -> RowError:
    with pytest.raises(RowError) as caught:
        source.store(value, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")
    return caught.value


def view(content: bytes, limits: tuple[int, int] = ANY) -> Image.Image:
    source = MediaSource(Path("/nowhere"))
    stored = source.store(content, WHERE)
    picture = open_image(stored, *limits)
    assert picture.mode == "RGB"
    if limits == ANY:
        assert picture.size == (stored.width, stored.height)
    return picture


def noise(form: str) -> bytes:
    return encode(Image.effect_noise((64, 64), 80).convert("RGB"), form)


def make_source(tmp_path: Path) -> MediaSource:
    """A folder of two images, and one beside it."""
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    for file in (folder / "a.png", folder / "sub" / "b.png", tmp_path / "out.png"):
        file.write_bytes(plain())
    return MediaSource(folder)
