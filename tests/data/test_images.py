"""Images of rows: which are taken, which are refused for which reason, and when they are opened again."""

from __future__ import annotations

import base64
import hashlib
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prefkit.data import images
from prefkit.data.images import MediaSource, StoredImage, open_image
from prefkit.data.messages import RowError
from prefkit.data.readers import DataError
from tests.data.pictures import (
    ANY,
    BLUE,
    RED,
    WHERE,
    encode,
    make_source,
    noise,
    part,
    plain,
    png,
    refuse,
    view,
)


@pytest.fixture
def source(tmp_path: Path) -> MediaSource:
    return make_source(tmp_path)


def bomb(width: int, height: int) -> bytes:
    """A bilevel PNG of zero rows, packed row by row."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return png(width, height, part(b"IDAT", zlib.compress(packed, 9)), depth=1, colour=0)


# What may be written


def test_each_way_of_writing_an_image(source: MediaSource) -> None:
    content = plain()
    digest = hashlib.sha256(content).hexdigest()
    file = source.folder / "a.png"
    in_file = StoredImage(str(file), b"", digest, 8, 6)
    kept = StoredImage("", content, digest, 8, 6)
    data = "data:image/png;base64," + base64.b64encode(content).decode()
    for value, expected in {
        "a.png": in_file,
        "./a.png": in_file,
        str(file): in_file,
        data: kept,
        data.replace("data", "DATA"): kept,
        data + "\n": kept,
        content: kept,
    }.items():
        assert source.store(value, WHERE) == expected
    for mapping, expected in (
        ({"bytes": content, "path": "../elsewhere.png"}, kept),
        ({"bytes": None, "path": "a.png"}, in_file),
        ({"path": str(file)}, in_file),
        ({"url": "a.png", "detail": "high"}, in_file),
        ({"url": data}, kept),
    ):
        assert source.store(mapping, WHERE) == expected
    for stored in (in_file, kept):
        assert open_image(stored, *ANY).getpixel((7, 5)) == RED


@pytest.mark.parametrize(
    ("value", "reason", "text"),
    [
        (None, "wrong type", "an image is a path.*not null"),
        (3, "wrong type", "not the number 3"),
        (["a.png"], "wrong type", "not a list"),
        ({}, "wrong type", "not with nothing"),
        ({"image": "a.png"}, "wrong type", "not with 'image'"),
        ({"bytes": None, "path": None}, "image missing", "null"),
        ({"bytes": "a.png"}, "wrong type", "'bytes' of an image are bytes, not a text"),
        ({"bytes": [1, 2]}, "wrong type", "are bytes, not a list"),
        ({"url": {"url": "a.png"}}, "wrong type", "'url' of an image is a text, not an object"),
        ("data:image/png,abc", "malformed data URI", "data:image/png;base64,"),
        ("data:image/png;base64,@@@@", "malformed data URI", "not valid base64"),
        ("data:image/png;base64,ä", "malformed data URI", "not valid base64"),
        ("data:image/png;base64,", "image damaged", "empty"),
        ("data:image/svg+xml;base64,PHN2Zz4=", "image of another format", "SVG"),
        ("https://pictures.example/a.png", "image by URL", r"set media_hosts: \[pictures.example\]"),
        ("HTTPS://pictures.example/a.png", "image by URL", r"set media_hosts: \[pictures.example\]"),
        ("http://pictures.example/a.png", "image by URL", "https:// alone"),
        ("ftp://pictures.example/a.png", "image by URL", r"ftp:// is not read.*media_dir"),
        ({"path": "file:///etc/passwd"}, "image by URL", r"file:// is not read.*media_dir"),
    ],
)
def test_what_is_no_image_is_refused(source: MediaSource, value: object, reason: str, text: str) -> None:
    error = refuse(source, value)
    assert error.reason == reason
    with pytest.raises(RowError, match=text):
        source.store(value, "x")


def test_what_was_fetched_is_kept(source: MediaSource, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(url: str, hosts: tuple[str, ...]) -> bytes:
        asked.append((url, hosts))
        return plain()

    monkeypatch.setattr("prefkit.data.fetching.fetch", fetch)
    stored = MediaSource(source.folder, ("h.example",)).store({"url": "https://h.example/a"}, WHERE)
    assert asked == [("https://h.example/a", ("h.example",))]
    assert (stored.path, stored.content) == ("", plain())


# Which bytes are taken


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_name_says_nothing(source: MediaSource, form: str) -> None:
    (source.folder / "x.gif").write_bytes(plain(form, (70, 60)))
    stored = source.store("x.gif", WHERE)
    assert (stored.width, stored.height) == (70, 60)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        *((plain(form), form) for form in ("GIF", "TIFF", "BMP", "PPM", "ICO", "PCX", "JPEG2000")),
        (b"SIMPLE  =                    T".ljust(2880), "FITS"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "EPS"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<!DOCTYPE html><HTML>404", "HTML"),
        (b"Not Found", "of no known format"),
        (b"\x89PNG\r\n", "of no known format"),
        (b"x", "of no known format"),
    ],
)
def test_other_formats_are_named_and_no_decoder_runs(
    source: MediaSource, content: bytes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", None)
    error = refuse(source, content)
    assert error.reason == "image of another format"
    assert f"the image is {name}, not PNG, JPEG or WebP" in str(error)


def test_one_decoder_may_run(source: MediaSource, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real_open = Image.open

    def open_noted(stream: Any, *, formats: Any) -> Any:
        asked.append(formats)
        return real_open(stream, formats=formats)

    monkeypatch.setattr(Image, "open", open_noted)
    for form in ("PNG", "JPEG", "WEBP"):
        source.store(plain(form), WHERE)
    assert asked == [("PNG",), ("PNG",), ("JPEG",), ("WEBP",)]


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9, 0.99])
def test_truncated_images_are_damaged(source: MediaSource, form: str, share: float) -> None:
    content = noise(form)
    (source.folder / "cut").write_bytes(content[: max(16, int(len(content) * share))])
    error = refuse(source, "cut")
    assert error.reason == "image damaged"
    assert f"{source.folder}/cut is damaged ({form})" in str(error) and "0x" not in str(error)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"\xff\xd8\xff" + bytes(100), "header is not whole"),
        (b"\xff\xd8\xff\xe0" + b"\xff" * 100, "header is not whole"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 100, "header is not whole"),
        (b"RIFF\0\0\0\0WEBPVP8X" + b"\0" * 100, "WEBP"),
        (b"RIFF\0\0\0\0WEBPjunk" + b"\0" * 100, "header is not whole"),
        (png(0, 5), "0 x 5 pixels"),
        (png(8, 8), "PNG"),
        (png(1, 1, part(b"IDAT", zlib.compress(b"\0\0")), colour=3), "PNG"),  # a palette that is not there
        (png(8, 8, part(b"IDAT", zlib.compress(b"\0"))), "PNG"),
        (png(8, 8, part(b"IDAT", b"not packed")), "PNG"),
        (flip(noise("PNG"), 3000), "PNG"),
        (flip(plain(), 30), "PNG"),
        (png(8, 8, part(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**22)))), "PNG"),
    ],
)
def test_damaged_images(source: MediaSource, content: bytes, text: str) -> None:
    error = refuse(source, content)
    assert error.reason == "image damaged" and text in str(error)


def test_an_empty_file_and_a_large_one(source: MediaSource) -> None:
    (source.folder / "empty.png").touch()
    assert refuse(source, "empty.png").reason == "image damaged"
    with (source.folder / "large.png").open("wb") as stream:
        stream.truncate(images.MAX_BYTES + 1)
    error = refuse(source, "large.png")
    assert error.reason == "image too large" and "large.png has more than 64 MB" in str(error)
    assert refuse(source, bytes(images.MAX_BYTES + 1)).reason == "image too large"
    assert refuse(source, "data:image/png;base64," + "A" * 2 * images.MAX_BYTES).reason == "image too large"


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_animated_images_are_refused(source: MediaSource, form: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    error = refuse(source, encode(frames[0], form, save_all=True, append_images=frames[1:]))
    assert error.reason == "image animated" and "write the wanted frames as images of their own" in str(error)
    assert view(encode(frames[0], form, save_all=True)).getpixel((0, 0))[0] > 250


def test_the_first_picture_of_a_jpeg_of_several(source: MediaSource) -> None:
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (8, 8), BLUE)
    content = encode(first, "MPO", save_all=True, append_images=[second])
    assert view(content).getpixel((3, 3)) == (254, 0, 0)


@pytest.mark.parametrize(
    ("size", "reason", "text"),
    [
        ((2001, 10), "image too narrow", "2001 x 10 pixels, one side more than 200 times"),
        ((1, 201), "image too narrow", "1 x 201"),
        ((64_000, 1_001), "image too large", "64000 x 1001 pixels, more than 64 million"),
    ],
)
def test_sizes_that_are_refused(source: MediaSource, size: tuple[int, int], reason: str, text: str) -> None:
    error = refuse(source, png(*size))
    assert error.reason == reason and text in str(error)


def test_the_longest_side_that_is_taken(source: MediaSource) -> None:
    assert source.store(plain(size=(2000, 10)), WHERE).width == 2000


def test_a_size_that_the_header_hides(source: MediaSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the decoder sees another size than the header, its own is checked too, and PIL's errors count."""
    small = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    for side, text in (
        (9_000, "9000 x 9000 pixels"),
        (9_900, "too many pixels"),
        (20_000, "too many pixels"),
    ):
        large = png(side, side, part(b"IDAT", zlib.compress(b"\0")))
        twice = large[:8] + part(b"IHDR", small) + large[8:]
        error = refuse(source, twice)
        assert error.reason == "image too large" and text in str(error)


def webp_of_canvas(side: int) -> bytes:
    canvas = bytes(4) + 2 * (side - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas + plain("WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of_size(side: int) -> bytes:
    content = plain("JPEG")
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", side, side) + content[at + 4 :]


MEASURED = """
import os, resource, sys
from pathlib import Path
from prefkit.data.images import MediaSource
from prefkit.data.messages import RowError
folder = Path(sys.argv[1])
source = MediaSource(folder)
source.store("a.png", "x")
for name in os.listdir(folder):
    if name.startswith("first_"): # the modules of Pillow
        source.store(name, "x")
if child := os.fork():  # a process that was started keeps the peak of the one that started it
    sys.exit(os.waitpid(child, 0)[1])
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sorted(os.listdir(folder / "bombs")):
    try:
        print(name, source.store(f"bombs/{name}", "x"))
    except RowError as error:
        print(name, error.reason)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024)
"""


def test_bombs_cost_no_memory(source: MediaSource) -> None:
    folder = source.folder / "bombs"
    folder.mkdir()
    for form in ("JPEG", "WEBP"):
        (source.folder / f"first_{form}").write_bytes(plain(form))
    packed = zlib.compress(bytes(2**20 - 1), 9)
    bombs = {
        "jpeg": jpeg_of_size(65_000),
        "png": bomb(50_000, 50_000),
        "png_64": bomb(8_001, 8_000),
        "text": png(8, 8, *(part(b"zTXt", b"%d\0\0" % number + packed) for number in range(5000))),
        "webp": webp_of_canvas(16_384),
        "webp_widest": webp_of_canvas(2**16 - 1),
    }
    assert len(bombs["png"]) < 100_000
    for name, content in bombs.items():
        (folder / name).write_bytes(content)
    (folder / "sparse").touch()
    os.truncate(folder / "sparse", 2**40)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source.folder)], capture_output=True, text=True, check=True
    )
    *lines, growth = done.stdout.splitlines()
    large = [name for name in (*bombs, "sparse") if name != "text"]
    assert sorted(lines) == sorted([*(f"{name} image too large" for name in large), "text image damaged"])
    assert 0 <= int(growth) < 100


# Opening again


def replace_by(content: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(content) and None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (Path.unlink, "was there when its row was read.*No such file"),
        (replace_by(plain(size=(9, 6))), "has other bytes than when its row was read"),
        (replace_by(b""), "has other bytes"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "no regular file"),
        (lambda file: (file.unlink(), file.symlink_to("sub/b.png")), "no regular file"),
        (lambda file: os.truncate(file, 2**40), "more than 64 MB"),
    ],
)
def test_a_file_that_changed_is_told(
    source: MediaSource, change: Callable[[Path], object], text: str
) -> None:
    stored = source.store("a.png", WHERE)
    change(Path(stored.path))
    with pytest.raises(DataError, match=f"{stored.path}.* ?{text}"):
        open_image(stored, *ANY)


def test_bytes_that_are_not_those_of_their_digest() -> None:
    stored = StoredImage("", plain(), "0" * 64, 8, 6)
    with pytest.raises(DataError, match="an image has other bytes"):
        open_image(stored, *ANY)


def test_pillow_may_be_missing(source: MediaSource, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = source.store("a.png", WHERE)
    monkeypatch.setitem(sys.modules, "PIL", None)
    for call in (lambda: source.store("a.png", WHERE), lambda: open_image(stored, *ANY)):
        with pytest.raises(DataError, match=r"pip install 'prefkit\[vision\]'"):
            call()


def test_neither_pillow_nor_torch_is_loaded_with_the_module() -> None:
    code = "import sys, prefkit.data.images; print(sorted({'PIL', 'torch', 'httpx2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
