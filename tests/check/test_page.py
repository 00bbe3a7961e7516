"""The page of rows: what is in it, and that nothing of a row can be more than text."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prefkit.check.data import Images
from prefkit.check.material import Material, read_material
from prefkit.check.page import check_target, make_page, write_page
from prefkit.check.pictures import read_pictures
from prefkit.check.run import report_on
from prefkit.check.uncut import Cut, find_cuts
from prefkit.config import load_config
from prefkit.config.errors import UserError
from prefkit.config.schema import DataConfig, ModelConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Clip, Pair
from prefkit.data.images import MediaSource
from prefkit.model.vision import load_template
from tests.seeing import KINDS, draw, save_seeing_model
from tests.train.forks import call, forks

Write = Callable[..., Path]
STYLE = Path(__file__).parents[2] / "prefkit" / "check" / "page.css"
VOID = {"meta", "img", "wbr"}


class Page(HTMLParser):
    """The elements of a page and the text in them; all that is opened must be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.html = html
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in dict.fromkeys(self.open):
            self.texts[tag][-1] += data

    def all_of(self, tag: str) -> list[dict[str, str]]:
        """The attributes of each element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]


def material_of(file: Path, *overrides: str) -> Material:
    return read_material(load_config(file, overrides), lambda text: None)


def page_of(file: Path, *overrides: str, number: int = 5) -> Page:
    return Page(make_page(material_of(file, *overrides), number))


def text_row(question: str, chosen: str, rejected: str, *images: str) -> dict[str, Any]:
    return {
        "conversations": [{"from": "human", "value": question}],
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
        "images": list(images),
    }


def test_a_row_is_there_with_its_pictures_and_tokens(write_seeing: Write, tmp_path: Path) -> None:
    image = draw(tmp_path / "seen", "dot.png", (64, 48))
    page = page_of(write_seeing([text_row("<image>Which?", "A red dot.", "A cat.", image)]))
    assert page.texts["h1"] == ["Rows as the model sees them"] and page.all_of("html") == [{"lang": "en"}]
    assert page.texts["h2"] == [f"{tmp_path / 'seen' / 'rows.json'}:1"]
    assert page.texts["figcaption"] == ["Image 1, dot.png: 64 × 48 → 64 × 48, 48 tokens"]
    assert [text.split(",")[0] for text in page.texts["h3"]] == [
        "Prompt 75 tokens", "Chosen 12 tokens", "Rejected 8 tokens",
    ]  # fmt: skip
    assert page.texts["b"] == ["<|image_pad|> × 48"]
    prompt, chosen, rejected = (text.replace("↵", "") for text in page.texts["div"][-3:])
    assert prompt == (
        "<|im_start|>user\n<|vision_start|><|image_pad|> × 48<|vision_end|>Which?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert (chosen, rejected) == ("A red dot.<|im_end|>\n", "A cat.<|im_end|>\n")
    assert "".join(page.texts["mark"]) == "A red dot.<|im_end|>↵\nA cat.<|im_end|>↵\n"
    assert [it.get("class") for it in page.all_of("section")] == [None, "chosen", "rejected"]
    (shown,) = page.all_of("img")
    assert (shown["width"], shown["height"]) == ("128", "96") and shown["alt"]
    head, _, data = shown["src"].partition(",")
    assert head == "data:image/png;base64"
    picture, original = (
        np.asarray(Image.open(source).convert("RGB")).astype(int)
        for source in (io.BytesIO(base64.b64decode(data)), tmp_path / "seen" / "dot.png")
    )
    assert np.abs(picture - original).max() <= 1, "what the processor gives, turned back"


EVIL = "</div></main><script>alert(1)</script><img src=x onerror='alert(1)'>&amp;\u202e\x07\"'"


def test_hostile_rows_are_text(write_seeing: Write, tmp_path: Path) -> None:
    names = ["<img src=x onerror=alert(1)>.png", "'\" onload=.png"]
    for name in names:
        draw(tmp_path / "seen", name)
    rows = [text_row(f"<image>{EVIL}", EVIL, f"no {EVIL}", name) for name in names]
    tame = [text_row("<image>Why?", "So.", "no", draw(tmp_path / "seen", "a.png")) for _ in names]
    page, plain = (page_of(write_seeing(it)) for it in (rows, tame))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    assert len(page.all_of("img")) == 2 and len(page.all_of("main")) == 1
    attributes = {name for _, found in page.elements for name in found}
    assert attributes == {name for _, found in plain.elements for name in found}
    assert all(it["src"].startswith("data:image/png;base64,") for it in page.all_of("img"))
    shown = EVIL.replace("\u202e", "\\u202e").replace("\x07", "\\x07")
    assert sum(text.count(shown) for text in page.texts["section"]) == 6
    assert not re.search("[\u202e\x07]", page.html) and names[0] in page.texts["figcaption"][0]


def test_nothing_comes_from_elsewhere_and_nothing_runs(write_seeing: Write) -> None:
    page = page_of(write_seeing())
    assert (
        not page.all_of("script") and not page.all_of("link") and "http" not in page.html.split("<main>")[1]
    )
    policy = next(it["content"] for it in page.all_of("meta") if "content" in it and "src" in it["content"])
    assert re.fullmatch(r"default-src 'none'; img-src data:; style-src 'sha256-[\w+/]{43}='", policy)
    assert "url(" not in STYLE.read_text() and "@import" not in STYLE.read_text()


def test_rows_are_taken_evenly_and_no_more_than_there_are(write_seeing: Write, seeing_model: Path) -> None:
    file = write_seeing()
    assert [text.rpartition(":")[2] for text in page_of(file, number=4).texts["h2"]] == ["1", "3", "5", "7"]
    assert len(page_of(file, number=99).texts["h2"]) == 8
    evaluation = {"do_train": False, "dataset": ..., "do_eval": True, "eval_dataset": "rows"}
    held_out = page_of(write_seeing(**evaluation, ref_model=str(seeing_model)), number=1)
    assert "1 of 8 rows that are held out" in held_out.texts["p"][0]
    stream = page_of(write_seeing(streaming=True, buffer_size=2, shuffle=...), number=2)
    assert "at the start of the stream" in stream.texts["p"][0] and len(stream.texts["h2"]) == 2


def test_kto_shows_labels_and_partners(write_seeing: Write) -> None:
    page = page_of(write_seeing(stage="kto"), number=2)
    names = [text.split()[0] for text in page.texts["h3"]]
    assert names == ["Prompt", "Desirable", "Partner", "Prompt", "Desirable", "Partner"]
    assert "the response to another prompt" in page.texts["h3"][2]
    both = page_of(write_seeing(stage="kto"))
    assert {it.get("class") for it in both.all_of("section")} == {None, "chosen", "rejected"}


def test_ppo_shows_prompts_alone(write_seeing: Write) -> None:
    page = page_of(write_seeing(stage="ppo", reward_model="rm"), number=3)
    assert [text.split()[0] for text in page.texts["h3"]] == ["Prompt"] * 3 and "mark" not in page.texts
    assert sum("The model draws the responses" in text for text in page.texts["p"]) == 3


def test_text_rows_of_a_model_that_does_not_see(write_config: Write) -> None:
    page = page_of(write_config(), number=2)
    assert not page.all_of("figure") and len(page.texts["h2"]) == 2 and page.texts["mark"]


def test_the_score_of_a_reward_model_is_at_the_last_token(write_config: Write) -> None:
    page = page_of(write_config(stage="rm"), number=3)
    assert len(page.texts["mark"]) == 6 and "scored at its last token" in page.texts["h3"][1]


def test_ranked_responses_are_numbered(write_config: Write, dataset_dir: Path) -> None:
    rows = [{"instruction": "Q", "responses": ["a", "b", "c"], "scores": [3, 2, 1]}]
    (dataset_dir / "pairs.json").write_text(json.dumps(rows))
    page = page_of(write_config())
    assert page.texts["h3"][1:] == [
        "Ranked 1 3 tokens, scored; better than 2, 3",
        "Ranked 2 3 tokens, scored; better than 3",
        "Ranked 3 3 tokens, scored",
    ]


def test_margins_are_told(write_config: Write, dataset_dir: Path) -> None:
    rows = [{"instruction": "Q", "chosen": "a", "rejected": "b", "margin": 0.5}]
    (dataset_dir / "pairs.json").write_text(json.dumps(rows))
    entry = {
        "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected", "margin": "margin"}
    }
    (dataset_dir / "dataset_info.json").write_text(
        json.dumps({"pairs": {"file_name": "pairs.json", "ranking": True, **entry}})
    )
    assert page_of(write_config()).texts["h3"][1].endswith("scored; margin 0.5")


@pytest.mark.parametrize("truncation", ["prefkit", "llamafactory"])
def test_what_was_cut_is_shown_in_its_place(write_seeing: Write, tmp_path: Path, truncation: str) -> None:
    image = draw(tmp_path / "seen", "a.png", (32, 32))
    old = [{"from": "human", "value": "Old. " * 9}, {"from": "gpt", "value": "Yes."}]
    row = text_row("<image>" + "0123456789" * 10, "chosen " * 20, "no", image)
    file = write_seeing([{**row, "conversations": [*old, *row["conversations"]]}], truncation=truncation)
    material = material_of(file, "cutoff_len=160", "template=null")
    html = make_page(material, 1)
    page = Page(html)
    example = material.shown[0]
    assert example.truncated and page.texts["del"]
    template = material.template
    turns = [
        *({"role": "user" if it["from"] == "human" else "assistant", "content": it["value"]} for it in old),
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "0123456789" * 10}]},
    ]
    asked = template.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    asked = asked.replace("<|image_pad|>", "<|image_pad|> × 16")
    assert page.texts["div"][-3].replace("↵", "") == asked
    assert page.texts["div"][-2].replace("↵", "") == "chosen " * 20 + "<|im_end|>\n"
    cut = [int(number) for number in re.findall(r"(\d+) more were cut", " ".join(page.texts["h3"]))]
    assert len(template.tokenizer.encode("".join(page.texts["del"]).replace("↵", ""))) == sum(cut)


def test_cuts_are_put_together_from_what_is_left() -> None:
    whole = TokenizedExample([1, 2, 3, 4, 5], [[7, 8, 9]], (), "f:1")

    def cuts(prompt: list[int], *responses: list[int]) -> list[list[Cut]]:
        return find_cuts(TokenizedExample(prompt, list(responses), (), "f:1", truncated=True), whole)

    assert cuts([1, 3, 5], [7, 8]) == [[Cut(1, [2]), Cut(2, [4])], [Cut(2, [9])]]
    assert cuts([4, 5], [7]) == [[Cut(0, [1, 2, 3])], [Cut(1, [8, 9])]]
    assert cuts([1, 2, 3, 4, 5], [7, 8, 9]) == [[], []]
    assert cuts([1, 6, 5], [8]) == [[], []], "tokens that were not there before: it cannot be told"
    assert find_cuts(whole, None) == [[], []]
    # The response of a pair of three that were ranked, and a partner, which is of another row.
    ranked = TokenizedExample([1], [[4, 4], [5, 5], [6, 6]], (Pair(0, 1), Pair(1, 2)), "f:1")
    ranked = replace(ranked, labels=("ranked",) * 3)
    second = replace(ranked, response_ids=[[5], [6, 6]], pairs=(Pair(0, 1),))
    assert find_cuts(second, ranked) == [[], [Cut(1, [5])], []]
    judged = TokenizedExample([1], [[7], [9]], (), "f:1", labels=("desirable", "partner"))
    assert find_cuts(judged, replace(judged, response_ids=[[7, 8]], labels=("desirable",)))[1:] == [
        [Cut(1, [8])],
        [],
    ]


def test_a_long_part_is_left_out_in_the_middle(write_config: Write, dataset_dir: Path) -> None:
    rows = [{"instruction": "Q", "chosen": "x" * 9000, "rejected": "no"}]
    (dataset_dir / "pairs.json").write_text(json.dumps(rows))
    page = page_of(write_config(cutoff_len=10_000))
    assert page.texts["em"] == [" … 5,002 tokens more … "] and "9,002 tokens" in page.texts["h3"][1]


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_what_the_processor_makes(kind: str, tmp_path: Path) -> None:
    folder = save_seeing_model(tmp_path / "model", kind)
    template = load_template(ModelConfig(model_name_or_path=str(folder)), DataConfig(image_max_pixels=784))
    draw(folder, "wide.png", (56, 28), "red")
    draw(folder, "blue.png", (32, 32), "blue")
    media = MediaSource(folder)
    vision = template.vision
    assert vision is not None
    pictures = read_pictures(vision, [media.store(name, "") for name in ("wide.png", "blue.png")])
    assert [it.name for it in pictures] == ["wide.png", "blue.png"]
    assert [it.stored for it in pictures] == [(56, 28), (32, 32)]
    assert [it.scaled for it in pictures] == [(39, 19), (28, 28)]
    text = "".join(vision.read([media.store(name, "") for name in ("wide.png", "blue.png")])[1])
    ids = template.tokenizer.encode(text, add_special_tokens=False)
    assert sum(it.num_tokens for it in pictures) == template.count_places(ids)
    for picture, other in zip(pictures, (2, 0), strict=True):
        for tile in picture.tiles:
            pixels = np.asarray(tile).reshape(-1, 3).astype(int)
            assert (pixels.max(0) - pixels.min(0)).max() > 0 or pixels.min() > 240
        whole = np.asarray(picture.tiles[-1 if kind in ("smolvlm", "idefics3") else 0]).astype(int)
        height, width = whole.shape[:2]
        dot = whole[height // 2, width // 4 + width // 16]
        assert dot[other] < 60 < 180 < dot[2 - other], (dot, "the disc is left of the middle")


def colours(style: str) -> dict[str, tuple[float, ...]]:
    found = re.findall(r"--([\w-]+): (#[0-9a-f]{6});", style)
    return {name: tuple(int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)) for name, code in found}


def luminance(colour: tuple[float, ...]) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    parts = [it / 12.92 if it <= 0.04045 else ((it + 0.055) / 1.055) ** 2.4 for it in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_text_can_be_read_in_light_and_dark() -> None:
    style = STYLE.read_text()
    light, dark = style.split("@media", 1)
    assert "prefers-color-scheme: dark" in dark and "color-scheme: light dark" in light
    pairs = [("text", "page"), ("text", "card"), ("muted", "page"), ("muted", "card"), ("on-cut", "cut")]
    for kind in ("chosen", "rejected", "other"):
        pairs += [(f"on-{kind}", kind), (f"muted-{kind}", kind)]
    for palette in (colours(light), colours(dark)):
        for front, back in pairs:
            low, high = sorted((luminance(palette[front]), luminance(palette[back])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)


def test_where_no_page_can_be_is_said_before_anything_is_read(tmp_path: Path, write_config: Write) -> None:
    (tmp_path / "folder.html").mkdir()
    for name, problem in (
        ("run.yaml", "ends in .html"),
        ("folder.html", "is a folder"),
        ("absent/page.html", "there is no folder"),
    ):
        with pytest.raises(UserError, match=problem):
            check_target(tmp_path / name)
    material = material_of(write_config())
    with pytest.raises(UserError, match="cannot be written"):
        write_page(material, tmp_path / "absent" / "page.html", 1)


@forks
def test_the_command_writes_it_beside_the_report(write_seeing: Write, tmp_path: Path) -> None:
    file = write_seeing()
    page = tmp_path / "page.html"
    done = call("check", file, "--page", page, "--rows", "2")
    assert done.returncode == 0, done.stderr
    assert "Peak memory" in done.stdout and f"The page of rows is {page}" in done.stderr
    assert len(Page(page.read_text(encoding="utf-8")).texts["h2"]) == 2
    wrong = call("check", file, "--page", tmp_path / "page.yaml")
    assert wrong.returncode == 1 and "ends in .html" in wrong.stderr and "Reading" not in wrong.stderr


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl"])
def test_frames_of_videos_are_shown_among_images(kind: str, tmp_path: Path) -> None:
    folder = save_seeing_model(tmp_path / "model", kind)
    data = DataConfig(video_max_pixels=784, video_min_pixels=1, image_min_pixels=1, video_maxlen=3)
    vision = load_template(ModelConfig(model_name_or_path=str(folder)), data).vision
    assert vision is not None
    media = MediaSource(folder)
    colours = ("red", "green", "blue", "black", "white")
    frames = [media.store(draw(folder, f"{it}.png", (64, 32), it), "") for it in colours]
    still = media.store(draw(folder, "still.png", (24, 32), "blue"), "")
    video, picture = read_pictures(vision, [Clip(tuple(frames)), still])
    assert video.is_video and not picture.is_video
    assert (video.name, video.stored, video.scaled) == ("red.png", (64, 32), (39, 19))
    assert (picture.name, picture.stored, picture.num_tokens) == ("still.png", (24, 32), 12)
    # Of five frames three are taken, and the last of them fills up the second step in time.
    assert len(video.tiles) == 4 and video.num_tokens == 2 * 5 * 2 and picture.tiles[0].size == (24, 32)
    discs = [np.asarray(tile)[tile.height // 2, tile.width // 4].astype(int) for tile in video.tiles]
    assert [np.abs(disc - wanted).max() < 40 for disc, wanted in zip(
        discs, [(255, 0, 0), (0, 0, 255), (255, 255, 255), (255, 255, 255)], strict=True
    )] == [True] * 4  # fmt: skip


def test_a_video_has_a_figure_of_some_of_its_frames(write_seeing: Write, tmp_path: Path) -> None:
    frames = [draw(tmp_path / "seen", f"{i}.png", (16, 16)) for i in range(24)]
    row = {**text_row("<video>What?", "A dot.", "A cat."), "videos": [frames]}
    file = write_seeing([row], video_min_pixels=1, cutoff_len=1024)
    material = material_of(file)
    page = Page(make_page(material, 1))
    assert page.texts["figcaption"] == [
        "Video 1, 0.png: 16 × 16 → 24 frames of 16 × 16, of which 16 are here, 48 tokens"
    ]
    assert len(page.all_of("img")) == 16 and page.texts["b"] == ["<|video_pad|> × 4"] * 12
    report = report_on(material, None, lambda text: None)
    assert report.images is not None and report.images == Images(images=0, videos=1, rows=1, tokens=48)
