"""The images of a prompt as a model gets them: its processor's numbers, made pictures again."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefkit.data.examples import Clip, Medium, StoredImage
from prefkit.data.images import scale
from prefkit.data.vision import Pixels, Vision

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Picture:
    """An image as a model gets it, or a video, whose tiles are its frames.

    `stored` is its own size and `scaled` the one that it is given to the processor in; `tiles` are what the
    processor makes of it, one for most models, and `num_tokens` the places that the model has for them.
    """

    name: str
    stored: Size
    scaled: Size
    tiles: tuple[Image, ...]
    num_tokens: int


def read_pictures(vision: Vision, images: Sequence[Medium]) -> list[Picture]:
    """The images and videos of one prompt. Raises `DataError` for a file that is gone or has changed."""
    stills = [image for image in images if isinstance(image, StoredImage)]
    found = iter(_read_stills(vision, stills) if stills else ())
    return [_read_clip(vision, it) if isinstance(it, Clip) else next(found) for it in images]


def _read_stills(vision: Vision, images: Sequence[StoredImage]) -> list[Picture]:
    pixels, texts = vision.read(images)
    places = [_places(vision, text) for text in texts]
    num_runs = [sum(is_place for is_place, _ in groupby(own)) for own in places]
    processor, data = vision.processor.image_processor, vision.data
    tiles = _find_tiles(pixels, num_runs, processor)
    return [
        Picture(
            Path(image.path).name or "in the row itself",
            (image.width, image.height),
            scale(image.width, image.height, data.image_min_pixels, data.image_max_pixels),
            tuple(_paint(tile, processor) for tile in own_tiles),
            sum(own_places),
        )
        for image, own_tiles, own_places in zip(images, tiles, places, strict=True)
    ]


def _read_clip(vision: Vision, clip: Clip) -> Picture:
    pixels, (text,) = vision.read([clip])
    processor, data, first = vision.processor.image_processor, vision.data, clip.frames[0]
    number, *grid = pixels["video_grid_thw"][0].tolist()
    frames = [
        _join_patches(patches, [1, *grid], processor, moment)
        for patches in pixels["pixel_values_videos"].float().chunk(number)
        for moment in range(processor.temporal_patch_size)
    ]
    return Picture(
        f"video of {len(clip.frames)} frames",
        (first.width, first.height),
        scale(first.width, first.height, data.video_min_pixels, data.video_max_pixels),
        tuple(_paint(frame, processor) for frame in frames),
        sum(_places(vision, text)),
    )


def _places(vision: Vision, text: str) -> list[bool]:
    """Of each token of what stands for an image, whether it takes features."""
    ids = vision.processor.tokenizer.encode(text, add_special_tokens=False)
    return [number in vision.token_ids for number in ids]


def encode_png(picture: Image) -> bytes:
    """The bytes of a PNG."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _find_tiles(pixels: Pixels, num_runs: Sequence[int], processor: Any) -> list[list[Tensor]]:
    """The tiles (C, H, W) of each image, which has `num_runs` runs of places in the text."""
    values = pixels["pixel_values"].float()
    if "image_grid_thw" in pixels:
        grids = pixels["image_grid_thw"].tolist()
        lengths = [height * width for _, height, width in grids]
        parts = values.split(lengths)
        return [[_join_patches(part, grid, processor)] for part, grid in zip(parts, grids, strict=True)]
    if values.dim() == 4:  # one tile an image
        return [[tile] for tile in values]
    # Images of fewer tiles are filled up with zeros.
    tiles = [[tile for tile in row if tile.any()] for row in values]
    if len(tiles) == len(num_runs):
        return tiles
    # All images of a prompt are in one row, and each tile has a run of places of its own.
    flat = iter(tiles[0])
    return [list(islice(flat, number)) for number in num_runs]


def _join_patches(patches: Tensor, grid: Sequence[int], processor: Any, moment: int = 0) -> Tensor:
    """A picture (C, H, W) from its patches (N, C * T * P * P), which lie in squares of M x M; one of the T
    moments."""
    _, height, width = grid
    side, moments, merged = processor.patch_size, processor.temporal_patch_size, processor.merge_size
    whole = patches.view(*(height // merged, width // merged, merged, merged), -1, *(moments, side, side))[
        :, :, :, :, :, moment
    ]
    return whole.permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, height * side, width * side)


def _paint(tile: Tensor, processor: Any) -> Image:
    """A tile (C, H, W) as a picture, its numbers turned back."""
    from PIL import Image

    if processor.do_normalize:
        mean, std = (torch.tensor(it).view(-1, 1, 1) for it in (processor.image_mean, processor.image_std))
        tile = tile * std + mean
    if processor.do_rescale:
        tile = tile / processor.rescale_factor
    numbers = tile.round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(numbers.permute(1, 2, 0).contiguous().numpy())
