"""The images of a row in each way that it may have them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prefkit.data.formats import RowFormat, make_example
from prefkit.data.images import MediaSource
from prefkit.data.messages import RowError
from prefkit.data.readers import read_rows
from prefkit.data.sources import _with_encoded_images

PAIR = {"chosen": "Red.", "rejected": "Blue."}


@pytest.fixture
def media(tmp_path: Path) -> MediaSource:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 6), colour).save(tmp_path / name)
    return MediaSource(tmp_path)


def read(row: dict[str, Any], formatting: str, media: MediaSource | None, **columns: str) -> Any:
    return make_example(row, RowFormat(formatting, columns), "pairs", "f:1", media)  # type: ignore[arg-type]


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "PNG")
    return file.getvalue()


def uri(colour: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(colour)).decode()}"


def names(example: Any) -> list[str]:
    return [
        Path(image.path).name if image.path else f"{len(image.content)} bytes" for image in example.images
    ]


def test_a_column_of_paths_or_bytes_or_one_path(media: MediaSource) -> None:
    row = {"instruction": "<image> or <image>?", **PAIR}
    assert names(read({**row, "images": ["b.png", "a.png"]}, "alpaca", media)) == ["b.png", "a.png"]
    kept = read({**row, "images": [{"bytes": png("red"), "path": None}, png("blue")]}, "alpaca", media)
    assert names(kept) == [f"{len(png('red'))} bytes", f"{len(png('blue'))} bytes"]
    single = {"instruction": "<image>What?", **PAIR, "picture": "a.png"}
    assert names(read(single, "alpaca", media, images="picture")) == ["a.png"]


def test_parts_of_messages_bring_their_own(media: MediaSource) -> None:
    content = [
        {"type": "text", "text": "First "},
        {"type": "image_url", "image_url": {"url": uri("red")}},
        {"type": "text", "text": " then "},
        {"type": "image", "image": "b.png"},
    ]
    example = read({"prompt": [{"role": "user", "content": content}], **PAIR}, "trl", media)
    assert example.prompt[0].content == "First <image> then <image>"
    assert names(example) == [f"{len(png('red'))} bytes", "b.png"]


def test_parts_without_an_image_take_those_of_the_column(media: MediaSource) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    row = {"prompt": [{"role": "user", "content": content}], **PAIR, "images": ["a.png"]}
    assert names(read(row, "trl", media)) == ["a.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ["a.png", "b.png"]}, "column 'images': 2 images for 1 <image> in the prompt"),
        ({"instruction": "What?"}, "1 image for 0 <image>"),
        ({"images": ["c.png"]}, "column 'images', image 1: .*c.png is missing"),
        ({"images": ["../a.png"]}, "leaves a folder"),
        ({"images": [7]}, "an image is a path, a data URI, bytes"),
        ({"videos": ["a.mp4"]}, r"1 video for 0 <video> in the prompt: each video is a list of its frames"),
        ({"instruction": "<image><video>", "videos": ["a.mp4"]}, "video 1 is a list of images, its frames"),
        (
            {"instruction": "<image><video>", "videos": [["a.png", "c.png"]]},
            "video 1, frame 2: .*missing",
        ),
        ({"audios": ["a.wav"]}, "sound cannot be read"),
    ],
)
def test_what_is_wrong_is_named(media: MediaSource, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        read({"instruction": "<image>What?", **PAIR, "images": ["a.png"], **changes}, "alpaca", media)


def test_videos_are_lists_of_frames_and_keep_their_place(media: MediaSource) -> None:
    row = {"instruction": "<video> then <image> then <video>", **PAIR, "images": ["a.png"]}
    example = read({**row, "videos": [["a.png", "b.png"], ["b.png"]]}, "alpaca", media)
    first, image, last = example.images
    assert [Path(frame.path).name for frame in first.frames] == ["a.png", "b.png"]
    assert Path(image.path).name == "a.png" and len(last.frames) == 1
    assert first.digest != last.digest


def test_images_of_the_hub_s_features_come_as_bytes(tmp_path: Path, media: MediaSource) -> None:
    """A parquet file as `datasets` writes it, read as from the Hub and as a file."""
    import datasets

    rows = {"instruction": ["<image>What?"], "chosen": ["Red."], "rejected": ["Blue."]}
    features = datasets.Features(
        {**{name: datasets.Value("string") for name in rows}, "images": datasets.List(datasets.Image())}
    )
    table = datasets.Dataset.from_dict({**rows, "images": [[{"bytes": png("red"), "path": None}]]}, features)
    table.to_parquet(tmp_path / "rows.parquet")
    of_hub = datasets.load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    hub = _with_encoded_images(of_hub)
    ((_, of_file),) = read_rows(tmp_path / "rows.parquet")
    for row in (hub[0], of_file):
        (image,) = read(row, "alpaca", media).images
        assert image.content == png("red")


def test_prompts_of_trl_without_marks_begin_with_their_images(media: MediaSource) -> None:
    rows = (
        {"prompt": "What is it?", **PAIR, "images": ["a.png"]},
        {"prompt": "What is it?", **PAIR, "image": {"bytes": png("red"), "path": None}},
    )
    for row in rows:
        example = read(row, "trl", media)
        assert example.prompt[0].content == "<image>What is it?" and len(example.images) == 1


def test_images_in_both_places_are_refused(media: MediaSource) -> None:
    content = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "What?"}]
    row = {"prompt": [{"role": "user", "content": content}], **PAIR, "images": ["a.png"]}
    with pytest.raises(RowError, match="both have images"):
        read(row, "trl", media)
