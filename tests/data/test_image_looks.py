"""How an image looks when it is opened: in RGB, upright, on white, and scaled."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import pytest
from PIL import Image, ImageOps, PngImagePlugin

from prefkit.data.images import scale
from tests.data.pictures import BLUE, RED, WHITE, encode, noise, part, plain, png, view


def test_grey_of_sixteen_bits_is_scaled() -> None:
    values = [0, 256, 32768, 65535]
    row = b"\0" + struct.pack(">4H", *values)
    content = png(4, 1, part(b"IDAT", zlib.compress(row)), depth=16, colour=0)
    assert [view(content).getpixel((x, 0)) for x in range(4)] == [(v,) * 3 for v in (0, 1, 128, 255)]
    keyed = png(
        4, 1, part(b"tRNS", struct.pack(">H", 256)), part(b"IDAT", zlib.compress(row)), depth=16, colour=0
    )
    assert [view(keyed).getpixel((x, 0))[0] for x in range(4)] == [0, 255, 128, 255]


def palette(**options: Any) -> bytes:
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, *BLUE])
    picture.putpixel((1, 0), 1)
    return encode(picture, **options)


def of_pixels(mode: str, *pixels: Any) -> bytes:
    picture = Image.new(mode, (len(pixels), 1))
    picture.putdata(pixels)
    return encode(picture)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (of_pixels("1", 0, 255), [(0, 0, 0), WHITE]),
        (of_pixels("L", 7, 200), [(7,) * 3, (200,) * 3]),
        (of_pixels("LA", (0, 255), (0, 0), (0, 128)), [(0, 0, 0), WHITE, (127,) * 3]),
        (of_pixels("RGBA", (*RED, 255), (*RED, 0), (*RED, 51)), [RED, WHITE, (255, 204, 204)]),
        (palette(), [RED, BLUE]),
        (palette(transparency=1), [RED, WHITE]),
        (palette(transparency=b"\x33\xff"), [(255, 204, 204), BLUE]),
        (encode(Image.new("RGB", (1, 1), RED), transparency=RED), [WHITE]),
        (encode(Image.new("RGB", (1, 1), RED), transparency=BLUE), [RED]),
        (encode(Image.new("RGBA", (1, 1), (*BLUE, 0)), "WEBP", lossless=True), [WHITE]),
        (encode(Image.new("RGBA", (1, 1), (*BLUE, 255)), "WEBP", lossless=True), [BLUE]),
    ],
)
def test_colours(content: bytes, expected: list[tuple[int, ...]]) -> None:
    picture = view(content)
    assert [picture.getpixel((x, 0)) for x in range(picture.width)] == expected


def test_inks_of_a_jpeg() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    content = encode(red, "JPEG")
    r, g, b = view(content).getpixel((8, 8))
    assert r > 245 and g < 10 and b < 10
    # The same in luma and chroma (YCCK), as the mark of Adobe says: those of what is left of white light.
    luma = Image.new("RGB", (16, 16), (0, 255, 255)).convert("YCbCr").split()
    bands = [*(band.point(lambda value: 255 - value) for band in luma), Image.new("L", (16, 16), 0)]
    ycck = bytearray(encode(Image.merge("CMYK", bands), "JPEG"))
    kind = ycck.index(b"Adobe") + 11
    assert ycck[kind] == 0
    ycck[kind] = 2
    r, g, b = view(bytes(ycck)).getpixel((8, 8))
    assert r > 240 and g < 15 and b < 15


CORNERS = [RED, (0, 255, 0), BLUE, (255, 255, 0)]  # upper left and right, lower left and right
# Where the corners of the file are when it is shown, by orientation.
SHOWN = {
    1: (0, 1, 2, 3),
    2: (1, 0, 3, 2),
    3: (3, 2, 1, 0),
    4: (2, 3, 0, 1),
    5: (0, 2, 1, 3),
    6: (2, 0, 3, 1),
    7: (3, 1, 2, 0),
    8: (1, 3, 0, 2),
}


def corners() -> Image.Image:
    picture = Image.new("RGB", (48, 32))
    for number, colour in enumerate(CORNERS):
        picture.paste(
            colour, (number % 2 * 24, number // 2 * 16, number % 2 * 24 + 24, number // 2 * 16 + 16)
        )
    return picture


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_pictures_are_upright(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = view(encode(corners(), form, exif=exif))
    assert picture.size == ((48, 32) if orientation < 5 else (32, 48))
    right, lower = picture.width - 3, picture.height - 3
    for at, number in zip([(2, 2), (right, 2), (2, lower), (right, lower)], SHOWN[orientation], strict=True):
        found = picture.getpixel(at)
        assert max(abs(a - b) for a, b in zip(found, CORNERS[number], strict=True)) < 60
    assert ImageOps.exif_transpose(picture).tobytes() == picture.tobytes()  # nobody turns it once more


def test_notes_that_turn_a_picture() -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    assert view(encode(corners(), pnginfo=notes)).size == (32, 48)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0junk", b"MM\0\x2a\0\0\xff\xff", b"II\x2a\0\x08\0\0\0\xff"]
)
def test_notes_that_tell_nothing(exif: bytes) -> None:
    assert view(encode(corners(), "JPEG", exif=exif)).size == (48, 32)
    assert view(png(1, 1, part(b"eXIf", exif), part(b"IDAT", zlib.compress(bytes(4))))).size == (1, 1)


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((100, 100), (1, 10_000), (100, 100)),
        ((1000, 1000), (1, 10_000), (100, 100)),
        ((101, 100), (1, 10_000), (100, 99)),
        ((640, 480), (1, 100_000), (365, 273)),
        ((200, 1), (1, 200), (200, 1)),
        ((2, 150), (1, 100), (1, 86)),
        ((200, 1), (1, 10), (10, 1)),
        ((50, 50), (10_000, 20_000), (100, 100)),
        ((10, 20), (3136, 20_000), (40, 80)),
        ((3, 7), (100, 20_000), (7, 16)),
        ((1, 1), (3136, 20_000), (56, 56)),
        ((99, 101), (9_999, 20_000), (99, 101)),
    ],
)
def test_sizes_after_scaling(
    size: tuple[int, int], limits: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert scale(*size, *limits) == expected
    assert view(plain(size=size), limits).size == expected


def test_sizes_keep_their_limits() -> None:
    for width in range(1, 70):
        for height in range(1, 70):
            w, h = scale(width, height, 300, 1000)
            assert 300 <= w * h <= 1000
            w, h = scale(width, height, 1, 7)
            assert w * h <= 7


def test_scaling_is_bicubic() -> None:
    content = noise("PNG")
    expected = Image.open(io.BytesIO(content)).convert("RGB").resize((20, 20), Image.Resampling.BICUBIC)
    assert view(content, (1, 400)).tobytes() == expected.tobytes()
