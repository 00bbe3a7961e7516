"""Make the demo sets with pictures from the hand-written data/source/mllm_*.tsv, and draw their pictures.

Each line of a source is the name of a group, the pictures of a row, its turns (of user and assistant, `|`
between them) and the answer to prefer. The rejected answer is that of the next line of the group; the last
line has that of the first one. So every sentence is right for one picture and wrong for another.

    python tools/make_demo_pictures.py
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

DATA = Path(__file__).parents[1] / "data"
SETS = ("mllm_dpo_demo", "mllm_dpo_demo_heldout")
FOLDER = "mllm_dpo_demo"
FINE = 4  # a picture is drawn so many times larger, for edges that are smooth

Point = tuple[float, float]
RED, GREEN, BLUE, YELLOW = "#d62f2f", "#2f9e44", "#2b6cd4", "#f2c418"
ORANGE, PURPLE, PINK, BROWN = "#f08a24", "#7b3fb5", "#ee6fa0", "#8a5a2b"
INK, GREY, PALE, WHITE = "#22252b", "#8d949e", "#eef1f5", "#ffffff"
SKY, SEA, GRASS, NIGHT = "#bfe3f7", "#2f7fb8", "#7cb85c", "#1f2a52"


class Scene:
    """A picture that is drawn in its own pixels, from the upper left corner."""

    def __init__(self, width: int, height: int, ground: str = WHITE) -> None:
        self._image = Image.new("RGB", (width * FINE, height * FINE), ground)
        self._draw = ImageDraw.Draw(self._image)

    def disc(self, x: float, y: float, radius: float, colour: str, high: float | None = None) -> None:
        """A disc around a point, or an ellipse `high` up and down."""
        high = radius if high is None else high
        self._draw.ellipse(_fine([(x - radius, y - high), (x + radius, y + high)]), fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        """A rectangle."""
        start, end = _fine([(left, top), (right, bottom)])
        self._draw.rectangle([start, (end[0] - 1, end[1] - 1)], fill=colour)

    def area(self, points: Sequence[Point], colour: str) -> None:
        """A polygon."""
        self._draw.polygon(_fine(points), fill=colour)

    def line(self, points: Sequence[Point], width: float, colour: str) -> None:
        """A line with round corners and ends."""
        self._draw.line(_fine(points), fill=colour, width=round(width * FINE), joint="curve")
        for x, y in points:
            self.disc(x, y, width / 2, colour)

    def arc(self, x: float, y: float, radius: float, start: float, end: float, colour: str) -> None:
        """A part of a circle, in degrees clockwise from the right."""
        turns = [math.radians(start + (end - start) * step / 24) for step in range(25)]
        self.line([(x + radius * math.cos(it), y + radius * math.sin(it)) for it in turns], 4, colour)

    def done(self) -> Image.Image:
        """The picture."""
        return self._image.reduce(FINE)


def _fine(points: Sequence[Point]) -> list[Point]:
    return [(round(x * FINE), round(y * FINE)) for x, y in points]


def _around(x: float, y: float, radii: Sequence[float], number: int, start: float = -90) -> list[Point]:
    """Corners around a point, their distances from it by turns."""
    turns = [math.radians(start + 360 * i / number) for i in range(number)]
    return [
        (x + radii[i % len(radii)] * math.cos(turn), y + radii[i % len(radii)] * math.sin(turn))
        for i, turn in enumerate(turns)
    ]


def draw_shape(kind: str, colour: str, ground: str = WHITE) -> Image.Image:
    scene = Scene(128, 128, ground)
    corners = {"triangle": ([56], 3), "diamond": ([54, 38], 4), "star": ([56, 23], 10)}
    if kind == "circle":
        scene.disc(64, 64, 44, colour)
    elif kind == "square":
        scene.box(24, 24, 104, 104, colour)
    elif kind == "cross":
        scene.box(50, 16, 78, 112, colour)
        scene.box(16, 50, 112, 78, colour)
    else:
        radii, number = corners[kind]
        scene.area(_around(64, 72 if kind == "triangle" else 64, radii, number), colour)
    return scene.done()


def draw_apple() -> Image.Image:
    scene = Scene(128, 128)
    scene.disc(48, 74, 30, RED, 36)
    scene.disc(80, 74, 30, RED, 36)
    scene.line([(64, 46), (68, 20)], 5, BROWN)
    scene.disc(84, 28, 15, GREEN, 7)
    return scene.done()


def draw_banana() -> Image.Image:
    scene = Scene(144, 112)
    scene.disc(72, 36, 62, YELLOW, 62)
    scene.disc(72, 8, 68, WHITE, 60)
    scene.disc(12, 36, 4, BROWN, 6)
    scene.disc(132, 36, 4, BROWN, 6)
    return scene.done()


def draw_pear() -> Image.Image:
    scene = Scene(112, 144)
    scene.disc(56, 96, 38, "#9cc63b")
    scene.area([(38, 48), (74, 48), (90, 80), (22, 80)], "#9cc63b")
    scene.disc(56, 50, 20, "#9cc63b", 22)
    scene.line([(56, 32), (62, 10)], 5, BROWN)
    return scene.done()


def draw_cherries() -> Image.Image:
    scene = Scene(128, 128)
    scene.line([(40, 90), (52, 50), (78, 18)], 4, GREEN)
    scene.line([(90, 92), (86, 52), (78, 18)], 4, GREEN)
    scene.disc(38, 92, 24, "#b3122c")
    scene.disc(92, 96, 24, "#b3122c")
    return scene.done()


def draw_grapes() -> Image.Image:
    scene = Scene(128, 144)
    scene.line([(64, 36), (64, 10)], 6, BROWN)
    scene.disc(86, 22, 18, GREEN, 9)
    for row, number in enumerate((4, 3, 2, 1)):
        for i in range(number):
            scene.disc(64 + 25 * (i - (number - 1) / 2), 48 + 24 * row, 14, PURPLE)
    return scene.done()


def draw_lemon() -> Image.Image:
    scene = Scene(144, 112)
    scene.disc(22, 56, 9, YELLOW)
    scene.disc(122, 56, 9, YELLOW)
    scene.disc(72, 56, 50, YELLOW, 36)
    scene.disc(100, 18, 16, GREEN, 7)
    return scene.done()


def draw_melon() -> Image.Image:
    scene = Scene(144, 112)
    scene.disc(72, 22, 64, GREEN, 76)
    scene.disc(72, 22, 57, "#e9f5d0", 68)
    scene.disc(72, 22, 52, RED, 62)
    scene.box(0, 0, 144, 22, WHITE)
    for x, y in ((44, 40), (72, 36), (100, 40), (58, 60), (86, 60)):
        scene.disc(x, y, 3, INK, 5)
    return scene.done()


def draw_clock(hour: int, minute: int, ring: str = INK) -> Image.Image:
    scene = Scene(128, 128, PALE)
    scene.disc(64, 64, 56, ring)
    scene.disc(64, 64, 50, WHITE)
    for x, y in _around(64, 64, [43], 12):
        scene.disc(x, y, 2.5, INK)
    for length, width, turn in ((24, 6, hour % 12 / 12 + minute / 720), (38, 4, minute / 60)):
        angle = 2 * math.pi * turn
        scene.line([(64, 64), (64 + length * math.sin(angle), 64 - length * math.cos(angle))], width, INK)
    return scene.done()


def draw_bars(*bars: tuple[str, int]) -> Image.Image:
    scene = Scene(144, 112)
    for i, (colour, height) in enumerate(bars):
        left = 24 + i * 104 / len(bars)
        scene.box(left + 4, 98 - height, left + 104 / len(bars) - 4, 98, colour)
    scene.line([(16, 10), (16, 98), (132, 98)], 3, INK)
    return scene.done()


def draw_light(lit: str) -> Image.Image:
    scene = Scene(96, 144, SKY)
    scene.box(42, 112, 54, 144, GREY)
    scene.box(26, 8, 70, 116, INK)
    for i, colour in enumerate((RED, YELLOW, GREEN)):
        scene.disc(48, 28 + 34 * i, 14, colour if colour == lit else "#4a4f58")
    return scene.done()


def draw_dots(colour: str, *places: Point) -> Image.Image:
    scene = Scene(112, 112, PALE)
    for x, y in places:
        scene.disc(x, y, 11, colour)
    return scene.done()


def draw_stripes(upright: bool, *colours: str) -> Image.Image:
    scene = Scene(150, 100)
    for i, colour in enumerate(colours):
        start, end = i / len(colours), (i + 1) / len(colours)
        scene.box(
            *((150 * start, 0, 150 * end, 100) if upright else (0, 100 * start, 150, 100 * end)), colour
        )
    return scene.done()


def draw_cross_flag(ground: str, cross: str) -> Image.Image:
    scene = Scene(150, 100, ground)
    scene.box(44, 0, 64, 100, cross)
    scene.box(0, 40, 150, 60, cross)
    return scene.done()


def draw_disc_flag() -> Image.Image:
    scene = Scene(150, 100, PALE)
    scene.box(3, 3, 147, 97, WHITE)
    scene.disc(75, 50, 28, RED)
    return scene.done()


def draw_house(tree: float, house: float, roof: str) -> Image.Image:
    scene = Scene(160, 120, SKY)
    scene.box(0, 96, 160, 120, GRASS)
    scene.box(tree - 5, 64, tree + 5, 102, BROWN)
    scene.disc(tree, 50, 24, GREEN)
    scene.box(house - 28, 58, house + 28, 104, "#f4e3c1")
    scene.area([(house - 36, 60), (house + 36, 60), (house, 26)], roof)
    scene.box(house - 8, 78, house + 8, 104, BROWN)
    scene.box(house + 12, 68, house + 24, 80, "#6fb7e0")
    return scene.done()


def draw_boat() -> Image.Image:
    scene = Scene(160, 120, SKY)
    scene.box(0, 82, 160, 120, SEA)
    scene.line([(80, 20), (80, 76)], 4, BROWN)
    scene.area([(85, 20), (85, 70), (124, 70)], WHITE)
    scene.area([(75, 28), (75, 70), (46, 70)], RED)
    scene.area([(36, 76), (128, 76), (112, 98), (52, 98)], BROWN)
    return scene.done()


def draw_mountains() -> Image.Image:
    scene = Scene(160, 120, SKY)
    scene.area([(-20, 120), (56, 24), (120, 120)], "#6b7f94")
    scene.area([(60, 120), (116, 48), (180, 120)], "#54687d")
    scene.area([(37, 48), (56, 24), (72, 48), (62, 43), (54, 52), (46, 44)], WHITE)
    scene.disc(136, 22, 13, YELLOW)
    return scene.done()


def draw_sun() -> Image.Image:
    scene = Scene(128, 128, SKY)
    for near, far in zip(_around(64, 64, [38], 12), _around(64, 64, [54], 12), strict=True):
        scene.line([near, far], 5, ORANGE)
    scene.disc(64, 64, 30, YELLOW)
    return scene.done()


def draw_rain() -> Image.Image:
    scene = Scene(144, 128, PALE)
    for x, y in ((44, 82), (64, 92), (84, 82), (104, 92)):
        scene.line([(x, y), (x - 8, y + 22)], 5, BLUE)
    for x, y, radius in ((46, 54, 22), (74, 42, 28), (102, 54, 22)):
        scene.disc(x, y, radius, GREY)
    scene.box(46, 54, 102, 76, GREY)
    return scene.done()


def draw_moon() -> Image.Image:
    scene = Scene(128, 128, NIGHT)
    scene.disc(58, 64, 38, YELLOW)
    scene.disc(76, 54, 34, NIGHT)
    for x, y in ((98, 28), (106, 92), (22, 20)):
        scene.area(_around(x, y, [9, 3.5], 10), WHITE)
    return scene.done()


def draw_fish() -> Image.Image:
    scene = Scene(144, 104, "#cfeaf5")
    scene.area([(96, 52), (132, 24), (132, 80)], ORANGE)
    scene.disc(64, 52, 48, ORANGE, 30)
    scene.disc(36, 44, 6, WHITE)
    scene.disc(35, 44, 3, INK)
    return scene.done()


def draw_cat() -> Image.Image:
    scene = Scene(128, 128, "#dff0e2")
    for side in (-1, 1):
        scene.area([(64 + side * 42, 16), (64 + side * 46, 66), (64 + side * 8, 40)], GREY)
    scene.disc(64, 74, 44, GREY, 40)
    for side in (-1, 1):
        scene.disc(64 + side * 17, 66, 7, GREEN, 9)
        scene.disc(64 + side * 17, 66, 3, INK, 7)
        for y in (80, 88):
            scene.line([(64 + side * 18, 84), (64 + side * 52, y)], 1.5, WHITE)
    scene.area([(57, 80), (71, 80), (64, 88)], PINK)
    return scene.done()


def draw_car(colour: str) -> Image.Image:
    scene = Scene(160, 104, SKY)
    scene.box(0, 84, 160, 104, GREY)
    scene.area([(46, 50), (60, 26), (102, 26), (120, 50)], colour)
    scene.area([(55, 48), (64, 32), (98, 32), (109, 48)], WHITE)
    scene.box(20, 48, 142, 80, colour)
    for x in (48, 114):
        scene.disc(x, 80, 15, INK)
        scene.disc(x, 80, 6, GREY)
    return scene.done()


def draw_bus() -> Image.Image:
    scene = Scene(160, 112, SKY)
    scene.box(0, 94, 160, 112, GREY)
    scene.box(14, 22, 146, 90, YELLOW)
    for i in range(4):
        scene.box(22 + 31 * i, 32, 46 + 31 * i, 56, WHITE)
    for x in (44, 116):
        scene.disc(x, 90, 14, INK)
        scene.disc(x, 90, 5, GREY)
    return scene.done()


def draw_face(smiles: bool) -> Image.Image:
    scene = Scene(112, 112)
    scene.disc(56, 56, 48, YELLOW)
    scene.disc(39, 44, 6, INK)
    scene.disc(73, 44, 6, INK)
    scene.arc(*((56, 58, 26, 25, 155) if smiles else (56, 94, 24, 215, 325)), INK)
    return scene.done()


def draw_arrow(colour: str, turn: int) -> Image.Image:
    scene = Scene(112, 112)
    scene.area([(20, 44), (58, 44), (58, 22), (98, 56), (58, 90), (58, 68), (20, 68)], colour)
    return scene.done().rotate(turn)


def draw_mug(colour: str) -> Image.Image:
    scene = Scene(128, 112, PALE)
    scene.disc(88, 58, 24, colour)
    scene.disc(88, 58, 14, PALE)
    scene.box(30, 26, 88, 94, colour)
    return scene.done()


def draw_key() -> Image.Image:
    scene = Scene(144, 96, PALE)
    scene.box(56, 42, 128, 54, "#c9962c")
    scene.box(106, 52, 114, 72, "#c9962c")
    scene.box(120, 52, 128, 68, "#c9962c")
    scene.disc(38, 48, 28, "#c9962c")
    scene.disc(34, 48, 12, PALE)
    return scene.done()


_DOTS: list[Point] = [(32, 32), (80, 80), (56, 56), (80, 32), (32, 80), (32, 56), (80, 56)]
PICTURES: dict[str, Callable[[], Image.Image]] = {
    "circle": partial(draw_shape, "circle", RED),
    "square": partial(draw_shape, "square", BLUE),
    "triangle": partial(draw_shape, "triangle", GREEN),
    "star": partial(draw_shape, "star", YELLOW, NIGHT),
    "diamond": partial(draw_shape, "diamond", PURPLE),
    "cross": partial(draw_shape, "cross", RED, PALE),
    "apple": draw_apple,
    "banana": draw_banana,
    "pear": draw_pear,
    "cherries": draw_cherries,
    "grapes": draw_grapes,
    "lemon": draw_lemon,
    "melon": draw_melon,
    "clock_0300": partial(draw_clock, 3, 0),
    "clock_0630": partial(draw_clock, 6, 30, BLUE),
    "clock_0900": partial(draw_clock, 9, 0, RED),
    "clock_1215": partial(draw_clock, 12, 15),
    "clock_0430": partial(draw_clock, 4, 30, GREEN),
    "clock_0800": partial(draw_clock, 8, 0),
    "bars_red": partial(draw_bars, (BLUE, 40), (RED, 84), (GREEN, 22)),
    "bars_blue": partial(draw_bars, (BLUE, 80), (RED, 30), (GREEN, 56)),
    "bars_green": partial(draw_bars, (BLUE, 20), (RED, 48), (GREEN, 82)),
    "bars_rising": partial(draw_bars, (PURPLE, 18), (PURPLE, 38), (PURPLE, 60), (PURPLE, 84)),
    "bars_falling": partial(draw_bars, (PURPLE, 84), (PURPLE, 60), (PURPLE, 38), (PURPLE, 18)),
    "light_red": partial(draw_light, RED),
    "light_amber": partial(draw_light, YELLOW),
    "light_green": partial(draw_light, GREEN),
    "dots_3": partial(draw_dots, RED, *_DOTS[:3]),
    "dots_5": partial(draw_dots, INK, *_DOTS[:5]),
    "dots_6": partial(draw_dots, GREEN, *_DOTS[:2], *_DOTS[3:7]),
    "dots_1": partial(draw_dots, PURPLE, _DOTS[2]),
    "dots_4": partial(draw_dots, ORANGE, *_DOTS[:2], *_DOTS[3:5]),
    "flag_france": partial(draw_stripes, True, "#1f3a93", WHITE, RED),
    "flag_sweden": partial(draw_cross_flag, "#1d63a8", "#f7c600"),
    "flag_japan": draw_disc_flag,
    "flag_italy": partial(draw_stripes, True, "#128a45", WHITE, RED),
    "flag_ukraine": partial(draw_stripes, False, "#1f6fd1", "#f9d423"),
    "house_left": partial(draw_house, 122, 56, RED),
    "house_right": partial(draw_house, 38, 104, BLUE),
    "boat": draw_boat,
    "mountains": draw_mountains,
    "sun": draw_sun,
    "rain": draw_rain,
    "moon": draw_moon,
    "fish": draw_fish,
    "cat": draw_cat,
    "car": partial(draw_car, RED),
    "bus": draw_bus,
    "face_glad": partial(draw_face, True),
    "face_sad": partial(draw_face, False),
    "arrow_left": partial(draw_arrow, BLUE, 180),
    "arrow_up": partial(draw_arrow, RED, 90),
    "plain": lambda: Scene(112, 96, GREY).done(),
    "mug": partial(draw_mug, GREEN),
    "key": draw_key,
}


def read_rows(name: str) -> list[dict[str, Any]]:
    """The rows of a set, from its source."""
    text = (DATA / "source" / f"{name}.tsv").read_text(encoding="utf-8")
    lines = [line.split("\t") for line in text.splitlines()]
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for i, (group, *_) in enumerate(lines):
        groups[group].append(i)
    following = {i: rows[(at + 1) % len(rows)] for rows in groups.values() for at, i in enumerate(rows)}
    return [
        {
            "conversations": [
                {"from": ("human", "gpt")[at % 2], "value": turn.strip()}
                for at, turn in enumerate(turns.replace("\\n", "\n").split("|"))
            ],
            "chosen": {"from": "gpt", "value": answer},
            "rejected": {"from": "gpt", "value": lines[following[i]][3]},
            "images": [f"{FOLDER}/{picture}.png" for picture in pictures.split()],
        }
        for i, (_, pictures, turns, answer) in enumerate(lines)
    ]


def main() -> None:
    """Write the sets and their pictures."""
    (DATA / FOLDER).mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        draw().save(DATA / FOLDER / f"{name}.png", optimize=True)
    for name in SETS:
        text = json.dumps(read_rows(name), indent=1, ensure_ascii=False) + "\n"
        (DATA / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
