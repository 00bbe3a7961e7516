"""Images of rows: where they may come from, which are taken, and how they are opened again.

An image is taken only when it was decoded whole once. What is read of a file is read once, from a descriptor
that was found without following a link, so that neither a swapped file nor a device is ever read.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import re
import stat
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from prefkit.data.examples import StoredImage
from prefkit.data.messages import RowError, kind

if TYPE_CHECKING:
    from PIL.Image import Image

    from prefkit.data.readers import DataError

MAX_BYTES = 64 * 2**20  # of the file
MAX_PIXELS = 64_000_000
MAX_RATIO = 200  # of the longer side to the shorter one
_MAX_PATH = 4096
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_FRAME_STARTS = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of JPEG that give a size
_BARE_MARKERS = {0x00, 0x01, *range(0xD0, 0xD9)}  # those that no length follows
_SEARCH = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_ORIENTATION = 0x0112  # the tag of EXIF
_OTHERS = {b"<svg": "SVG", b"<html": "HTML"}  # what PIL does not know


@dataclass(frozen=True)
class MediaSource:
    """Where the images of rows may come from."""

    folder: Path  # media_dir, or the data set's folder
    hosts: tuple[str, ...] = ()  # hosts that images may be fetched from over https; none: no URL is fetched

    def store(self, value: object, where: str) -> StoredImage:
        """An image as a row has it: a path, a data URI, an address, bytes, or a mapping of one of these.

        Raises `RowError` for what is no such image, `where` before its message.
        """
        try:
            return self._store(value)
        except RowError as error:
            raise RowError(f"{where}: {error}", error.reason) from None

    def _store(self, value: object) -> StoredImage:
        if isinstance(value, Mapping):
            value = _choose(value)
        if isinstance(value, bytes):
            return _check("", value)
        if not isinstance(value, str):
            raise RowError(
                f"an image is a path, a data URI, bytes, or an object with 'bytes', 'path' or 'url', "
                f"not {kind(value)}",
                "wrong type",
            )
        if value[:5].lower() == "data:":
            return _check("", _read_data_uri(value))
        if _URL.match(value):
            return _check("", self._fetch(value))
        path = self._locate(value)
        return _check(str(path), self._read(path))

    def _fetch(self, url: str) -> bytes:
        if url[:5].lower() != "http:" and url[:6].lower() != "https:":
            raise RowError(
                f"{url.partition(':')[0]}:// is not read: write a path from {self._name()} down",
                "image by URL",
            )
        from prefkit.data.fetching import fetch

        return fetch(url, self.hosts)

    def _locate(self, text: str) -> Path:
        """Where a path leads, links followed: in the folder, without links of its own."""
        shown = _shorten(text)
        hint = f"write the path of an image file from {self._name()} down"
        if not text or "\0" in text or "\\" in text or len(text) > _MAX_PATH or not _is_unicode(text):
            raise RowError(f"{shown} is no path: {hint}, with / between folders", "malformed path")
        if ".." in text.split("/"):
            raise RowError(f"{shown} leaves a folder by '..': {hint}", "image outside of media_dir")
        folder = Path(os.path.realpath(self.folder))
        path = Path(os.path.realpath(folder / text))
        if path.is_relative_to(folder):
            return path
        outside = f"{shown} is outside of {self._name()}"
        if text.startswith("/"):
            raise RowError(f"{outside}: set media_dir to a folder above it", "image outside of media_dir")
        raise RowError(
            f"{outside}, where a link leads: put the file itself there", "image outside of media_dir"
        )

    def _read(self, path: Path) -> bytes:
        folder = Path(os.path.realpath(self.folder))
        try:
            return _read_file(folder, path.relative_to(folder).parts)
        except (FileNotFoundError, NotADirectoryError):
            raise RowError(f"{path} is missing: is {self._name()} the right one?", "image missing") from None
        except OSError as error:
            raise RowError(f"{path} cannot be read: {error.strerror}", "image unreadable") from None
        except RowError as error:
            raise RowError(f"{path} {error}", error.reason) from None

    def _name(self) -> str:
        return f"media_dir ({self.folder})"


def open_image(image: StoredImage, min_pixels: int, max_pixels: int) -> Image:
    """The picture in RGB, upright, scaled to have at most `max_pixels` and at least `min_pixels`.

    Raises `DataError` when its file is gone, or has other bytes than when its row was read.
    """
    modes = _import_pillow().Resampling
    content = read_content(image)
    try:
        picture = _decode(content)
    except RowError as error:
        raise _data_error(f"{image.path or 'an image'} {error}") from None
    size = scale(*picture.size, min_pixels, max_pixels)
    return picture if size == picture.size else picture.resize(size, modes.BICUBIC)


def read_content(image: StoredImage) -> bytes:
    """The encoded bytes of an image. Raises `DataError` as `open_image` does."""
    name = image.path or "an image"
    try:
        content = image.content or _read_file(Path(image.path).parent, (Path(image.path).name,))
    except OSError as error:
        raise _data_error(
            f"{name} was there when its row was read, and now it cannot be: {error.strerror}"
        ) from None
    except RowError as error:
        raise _data_error(f"{name} {error}") from None
    if hashlib.sha256(content).hexdigest() != image.digest:
        raise _data_error(f"{name} has other bytes than when its row was read: put the image back as it was")
    return content


def data_uri(image: StoredImage) -> str:
    """An image as the text that `MediaSource` reads. Raises `DataError` as `open_image` does."""
    content = read_content(image)
    known, *_ = _read_header(content)
    return f"data:image/{known.lower()};base64,{base64.b64encode(content).decode()}"


def scale(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size at which an image is used: both sides times the same number, no more than needed.

    Rounded down where it becomes smaller, and up where it becomes larger.

    >>> scale(640, 480, 3136, 100_000), scale(10, 20, 3136, 100_000), scale(100, 100, 3136, 100_000)
    ((365, 273), (40, 80), (100, 100))
    """
    if width * height > max_pixels:
        sides = math.isqrt(width * max_pixels // height), math.isqrt(height * max_pixels // width)
        return min(max(1, sides[0]), max_pixels), min(max(1, sides[1]), max_pixels)
    if width * height < min_pixels:
        return _root_up(width * min_pixels, height), _root_up(height * min_pixels, width)
    return width, height


def _root_up(number: int, divisor: int) -> int:
    """The square root of a fraction, rounded up."""
    return math.isqrt(-(-number // divisor) - 1) + 1


def _import_pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError:
        raise _data_error(
            "images are read by Pillow, which is missing: pip install 'prefkit[vision]'"
        ) from None
    return Image


def _data_error(message: str) -> DataError:
    from prefkit.data.readers import DataError  # which imports formats, where images may be known

    return DataError(message)


def _choose(value: Mapping[object, object]) -> object:
    """What an object has of an image: its bytes, else its path or address."""
    for key in ("bytes", "path", "url"):
        if value.get(key) is not None:
            if key == "bytes" and not isinstance(value[key], bytes):
                raise RowError(f"'bytes' of an image are bytes, not {kind(value[key])}", "wrong type")
            if key != "bytes" and not isinstance(value[key], str):
                raise RowError(f"{key!r} of an image is a text, not {kind(value[key])}", "wrong type")
            return value[key]
    if value.keys() & {"bytes", "path", "url"}:
        raise RowError("the image is null: neither bytes nor a path", "image missing")
    keys = ", ".join(map(repr, value)) or "nothing"
    raise RowError(f"an image is an object with 'bytes', 'path' or 'url', not with {keys}", "wrong type")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:100]}...{text[-97:]}")


def _read_data_uri(text: str) -> bytes:
    head, _, data = text.partition(",")
    if not head.lower().endswith(";base64"):
        raise RowError("a data URI of an image is written data:image/png;base64,...", "malformed data URI")
    if len(data) > MAX_BYTES * 3 // 2:
        raise _too_many_bytes()
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:  # binascii.Error, too
        raise RowError(f"the data URI is not valid base64: {error}", "malformed data URI") from None


def _read_file(folder: Path, parts: tuple[str, ...]) -> bytes:
    """The bytes of a file, found from a folder down, no link followed. Raises OSError and `RowError`."""
    at = os.open(folder, _SEARCH)
    try:
        for part in parts[:-1]:
            below = os.open(part, _SEARCH | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        if not parts or not stat.S_ISREG(os.stat(parts[-1], dir_fd=at, follow_symlinks=False).st_mode):
            raise _no_file()
        descriptor = os.open(parts[-1], _READ, dir_fd=at)
    finally:
        os.close(at)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _no_file()
        if status.st_size > MAX_BYTES:
            raise _too_many_bytes()
        return stream.read(status.st_size)


def _no_file() -> RowError:
    return RowError("is no regular file: write the path of an image file in media_dir", "image not a file")


def _too_many_bytes() -> RowError:
    return RowError(f"has more than {MAX_BYTES >> 20} MB", "image too large")


def _check(path: str, content: bytes) -> StoredImage:
    """An image that was decoded once; it is kept where it has no file."""
    try:
        if len(content) > MAX_BYTES:
            raise _too_many_bytes()
        picture = _decode(content)
    except RowError as error:
        raise RowError(f"{path or 'the image'} {error}", error.reason) from None
    return StoredImage(path, b"" if path else content, hashlib.sha256(content).hexdigest(), *picture.size)


def _decode(content: bytes) -> Image:
    """The picture in RGB, upright. Raises `RowError`, its message without a subject."""
    pillow = _import_pillow()
    known, width, height = _read_header(content)
    _check_size(width, height)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of harmless slips, such as EXIF of no use
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        try:
            picture = pillow.open(io.BytesIO(content), formats=(known,))
            _check_size(*picture.size)
            # A JPEG may hold others, such as a map of depth: the first is the picture.
            if known != "JPEG" and getattr(picture, "n_frames", 1) > 1:
                raise RowError(
                    "is animated: write the wanted frames as images of their own", "image animated"
                )
            if known == "PNG":  # the sums of its parts, which decoding does not look at
                pillow.open(io.BytesIO(content), formats=(known,)).verify()
            picture.load()
            return _make_plain(picture)
        except (RowError, MemoryError):
            raise
        except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
            raise RowError(f"has too many pixels: {error}", "image too large") from None
        except Exception as error:  # decoders raise many kinds for bytes that are wrong
            is_unknown = type(error).__name__ == "UnidentifiedImageError"
            problem = "its header cannot be read" if is_unknown else str(error) or type(error).__name__
            raise RowError(f"is damaged ({known}): {problem}", "image damaged") from error


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise RowError(f"is damaged: {width} x {height} pixels", "image damaged")
    if width * height > MAX_PIXELS:
        raise RowError(
            f"has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} million", "image too large"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise RowError(
            f"has {width} x {height} pixels, one side more than {MAX_RATIO} times the other",
            "image too narrow",
        )


def _read_header(content: bytes) -> tuple[str, int, int]:
    """Format, width and height by the first bytes, before any decoder reserves memory for them."""
    if not content:
        raise RowError("is empty", "image damaged")
    size = None
    if content.startswith(_PNG):
        known = "PNG"
        if content[12:16] == b"IHDR" and len(content) >= 24:
            size = struct.unpack_from(">II", content, 16)
    elif content.startswith(_JPEG):
        known, size = "JPEG", _read_jpeg_size(content)
    elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        known, size = "WEBP", _read_webp_size(content)
    else:
        raise RowError(f"is {_name_format(content)}, not PNG, JPEG or WebP", "image of another format")
    if size is None:
        raise RowError(f"is damaged ({known}): its header is not whole", "image damaged")
    return known, size[0], size[1]


def _read_jpeg_size(content: bytes) -> tuple[int, int] | None:
    at = 2
    while (at := content.find(b"\xff", at)) >= 0 and at + 9 <= len(content):
        marker = content[at + 1]
        if marker in _FRAME_STARTS:
            height, width = struct.unpack_from(">HH", content, at + 5)
            return width, height
        if marker == 0xFF:
            at += 1
        elif marker in _BARE_MARKERS:
            at += 2
        else:
            at += 2 + struct.unpack_from(">H", content, at + 2)[0]
    return None


def _read_webp_size(content: bytes) -> tuple[int, int] | None:
    part = content[12:16]
    if len(content) < 30:
        return None
    if part == b"VP8X":
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    if part == b"VP8L" and content[20] == 0x2F:
        bits = int.from_bytes(content[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if part == b"VP8 " and content[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _name_format(content: bytes) -> str:
    """What else bytes are, as far as their first ones tell: no decoder runs."""
    pillow = _import_pillow()
    head = content[:1000].lower()
    for mark, name in _OTHERS.items():
        if mark in head:
            return name
    pillow.init()
    start = content[:16].ljust(16, b"\0")
    for name in pillow.ID:
        accepts = pillow.OPEN[name][1]
        if accepts and accepts(start):
            return str(name)
    return "of no known format"


def _read_orientation(picture: Image) -> int:
    """How a picture was turned by its camera, from 1 (not at all) to 8; 1 where its EXIF tells nothing."""
    try:
        found = picture.getexif().get(_ORIENTATION)
    except (ValueError, LookupError, TypeError, SyntaxError, OSError, EOFError, struct.error):
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _make_plain(picture: Image) -> Image:
    """A picture in RGB, upright, what is transparent on white, without notes that would turn it once more."""
    turn = _import_pillow().Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    orientation = _read_orientation(picture)
    plain = _make_rgb(picture)
    plain = plain.transpose(turns[orientation]) if orientation > 1 else plain
    plain.info.clear()
    return plain


def _make_rgb(picture: Image) -> Image:
    pillow = _import_pillow()
    if picture.mode.startswith("I"):  # grey of 16 bits, which PIL would clip
        grey = np.asarray(picture).astype(np.uint32)
        key = picture.info.get("transparency")
        light = (grey * 255 + 32767) // 65535
        if key is not None:
            light[grey == key] = 255
        return pillow.fromarray(light.astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    ground = pillow.new("RGB", layer.size, "white")
    ground.paste(layer, mask=layer.getchannel("A"))
    return ground
