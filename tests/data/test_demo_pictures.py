"""The demo sets with pictures: those of their script; nothing but a picture tells which answer is right."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from prefkit.check.data import summarize
from prefkit.data.encode import encode_example
from prefkit.data.formats import RowFormat, make_example
from prefkit.data.images import MediaSource
from prefkit.data.template import ChatTemplate
from tests.conftest import make_tokenizer
from tools.make_demo_pictures import DATA, FOLDER, PICTURES, SETS, read_rows

FILES = sorted((DATA / FOLDER).iterdir())


def rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    return found


def answers(name: str, kind: str) -> Counter[str]:
    return Counter(row[kind]["value"] for row in rows(name))


@pytest.mark.parametrize(("name", "number"), [(SETS[0], 48), (SETS[1], 16)])
def test_the_rows_are_those_of_the_source(name: str, number: int) -> None:
    assert rows(name) == read_rows(name) and len(rows(name)) == number


def test_the_pictures_are_those_of_the_script_and_each_is_used() -> None:
    used = {path for name in SETS for row in rows(name) for path in row["images"]}
    assert {f"{FOLDER}/{file.name}" for file in FILES} == used == {f"{FOLDER}/{it}.png" for it in PICTURES}
    for file in FILES:
        with Image.open(file) as picture:
            drawn = PICTURES[file.stem]()
            assert picture.size == drawn.size and all(96 <= side <= 160 for side in drawn.size), file
            # Edges may be a little other in another version of Pillow; another scene would be far from it.
            off = ImageChops.difference(picture.convert("RGB"), drawn).convert("L").histogram()
            assert sum(off[40:]) <= drawn.width * drawn.height / 500, file


def test_the_pictures_are_small_and_differ() -> None:
    assert sum(file.stat().st_size for file in FILES) < 400_000
    assert len({file.read_bytes() for file in FILES}) == len(FILES)


@pytest.mark.parametrize("name", SETS)
def test_text_does_not_tell_the_chosen_answer(name: str) -> None:
    chosen, rejected = answers(name, "chosen"), answers(name, "rejected")
    assert chosen == rejected and max(chosen.values()) <= 2
    assert all(row["chosen"] != row["rejected"] for row in rows(name))


@pytest.mark.parametrize("name", SETS)
def test_answers_are_one_plain_sentence(name: str) -> None:
    for text in answers(name, "chosen"):
        assert text[-1] == "." and ". " not in text and 4 <= len(text.split()) <= 14, text


def test_length_is_no_cue() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    blind = [dict(row, images=[]) for row in rows(SETS[0])]
    examples = [make_example(row, RowFormat("sharegpt"), "pairs", "f:1") for row in blind]
    bias = summarize("", [encode_example(it, ChatTemplate(tokenizer), 999) for it in examples], 999).bias
    assert bias is not None and bias.pairs == 48 and bias.difference == 0 and 0.4 <= bias.longer <= 0.6


def test_every_layout_of_images_is_there() -> None:
    kinds = Counter(
        "none" if not row["images"]
        else "earlier" if "<image>" not in row["conversations"][-1]["value"]
        else f"{row['conversations'][-1]['value'].count('<image>')} in the last turn"
        for row in rows(SETS[0])
    )  # fmt: skip
    assert kinds.keys() == {"none", "earlier", "1 in the last turn", "2 in the last turn"}
    assert min(kinds.values()) >= 3, kinds


@pytest.mark.parametrize("name", SETS)
def test_the_rows_read_as_pairs_with_their_pictures(name: str) -> None:
    media = MediaSource(Path(DATA))
    for i, row in enumerate(rows(name)):
        example = make_example(row, RowFormat("sharegpt"), "pairs", f"f:{i}", media)
        marks = sum(message.content.count("<image>") for message in example.prompt)
        assert len(example.images) == marks == len(row["images"])


def test_what_is_held_out_is_new() -> None:
    trained, held = ({path for row in rows(name) for path in row["images"]} for name in SETS)
    assert not trained & held
    assert not answers(SETS[0], "chosen").keys() & answers(SETS[1], "chosen").keys()
    questions = [{row["conversations"][-1]["value"] for row in rows(name)} for name in SETS]
    assert not questions[0] & questions[1]
