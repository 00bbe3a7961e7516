"""The images and videos of a prompt as a model gets them: its processor's numbers, made pictures again."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
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
    """An image, or a video, as a model gets it.

    `stored` is its own size and `scaled` the one that it is given to the processor in; `tiles` are what the
    processor makes of it: of an image one for most models, of a video its frames. `num_tokens` are the places
    that the model has for them.
    """

    name: str
    is_video: bool
    stored: Size
    scaled: Size
    tiles: tuple[Image, ...]
    num_tokens: int


def read_pictures(vision: Vision, media: Sequence[Medium]) -> list[Picture]:
    """The images and videos of one prompt. Raises `DataError` for a file that is gone or has changed."""
    if not media:
        return []
    pixels, texts = vision.read(media)
    places = []
    for text in texts:
        ids = vision.processor.tokenizer.encode(text, add_special_tokens=False)
        places.append([number in vision.token_ids for number in ids])
    runs = [sum(is_place for is_place, _ in groupby(own)) for own in places]
    processor = vision.processor.image_processor
    of_images = [number for number, it in zip(runs, media, strict=True) if isinstance(it, StoredImage)]
    images = iter(_find_tiles(pixels, of_images, processor) if of_images else ())
    clips = iter(_find_frames(pixels, processor))
    return [
        _make_picture(vision, it, next(clips if isinstance(it, Clip) else images), sum(own))
        for it, own in zip(media, places, strict=True)
    ]


def _make_picture(vision: Vision, medium: Medium, tiles: Sequence[Tensor], num_tokens: int) -> Picture:
    data, processor = vision.data, vision.processor.image_processor
    if isinstance(medium, Clip):
        first, limits = medium.frames[0], (data.video_min_pixels, data.video_max_pixels)
    else:
        first, limits = medium, (data.image_min_pixels, data.image_max_pixels)
    return Picture(
        Path(first.path).name or "in the row itself",
        isinstance(medium, Clip),
        (first.width, first.height),
        scale(first.width, first.height, *limits),
        tuple(_paint(tile, processor) for tile in tiles),
        num_tokens,
    )


def encode_png(picture: Image) -> bytes:
    """The bytes of a PNG."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _find_tiles(pixels: Pixels, num_runs: Sequence[int], processor: Any) -> list[list[Tensor]]:
    """The tiles (C, H, W) of each image, which has `num_runs` runs of places in the text."""
    values = pixels["pixel_values"].float()
    if "image_grid_thw" in pixels:  # each image fills the dimension of time
        return [[frames[0]] for frames in _join_patches(values, pixels["image_grid_thw"], processor)]
    if values.dim() == 4:  # one tile an image
        return [[tile] for tile in values]
    # Images of fewer tiles are filled up with zeros.
    tiles = [[tile for tile in row if tile.any()] for row in values]
    if len(tiles) == len(num_runs):
        return tiles
    # All images of a prompt are in one row, and each tile has a run of places of its own.
    flat = iter(tiles[0])
    return [list(islice(flat, number)) for number in num_runs]


def _find_frames(pixels: Pixels, processor: Any) -> list[list[Tensor]]:
    """The frames (C, H, W) of each video."""
    if "video_grid_thw" not in pixels:
        return []
    values = pixels["pixel_values_videos"].float()
    return [list(frames) for frames in _join_patches(values, pixels["video_grid_thw"], processor)]


def _join_patches(patches: Tensor, grids: Tensor, processor: Any) -> Iterator[Tensor]:
    """The frames (T, C, H, W) of each grid of patches (N, C * D * P * P), which lie in squares of M x M with
    D moments in each."""
    side, depth, merged = processor.patch_size, processor.temporal_patch_size, processor.merge_size
    sizes = grids.prod(1).tolist()
    for own, (time, height, width) in zip(patches.split(sizes), grids.tolist(), strict=True):
        squares = (height // merged, width // merged, merged, merged)
        whole = own.view(time, *squares, -1, depth, side, side).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
        yield whole.reshape(time * depth, -1, height * side, width * side)


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
