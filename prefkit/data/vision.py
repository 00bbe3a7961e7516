"""Images as a model takes them: how many tokens each has, its pixels, and where its tokens are placed.

The work is done by transformers' processor of the model; what a template writes for an image is replaced by
as many tokens as the model has places for its features.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prefkit.config.schema import DataConfig
from prefkit.data.examples import Clip, Medium, StoredImage
from prefkit.data.images import open_image

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin

_SECONDS = "second_per_grid_ts"  # of a step in time, for models that place it by that
_TIMED = "qwen3_vl"  # models whose frames have their time before them
# Of what a processor returns, what no model reads.
_UNREAD = ("rows", "cols", "num_crops")
Pixels = dict[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """What a model takes of the images of a prompt; `places` (3, P) are the positions of its tokens, where
    the model counts them in more than one dimension."""

    pixels: Pixels = field(default_factory=dict)
    places: Tensor | None = None

    def positions(self, length: int) -> Tensor:
        """Of the tokens of the prompt, which has so many, (3, P)."""
        return torch.arange(length).expand(3, -1) if self.places is None else self.places

    def end(self, length: int) -> int:
        """The position after the prompt, where each response starts."""
        return length if self.places is None else int(self.places.max()) + 1


class Vision:
    """How a model sees: its processor, and what `data` says of images and videos."""

    def __init__(self, processor: ProcessorMixin, config: PretrainedConfig, data: DataConfig) -> None:
        self.processor: Any = processor
        self.config = config
        self.data = data

    @property
    def unscaled(self) -> Vision:
        """The same with images in the sizes of the keys' defaults, whatever a run says."""
        return Vision(self.processor, self.config, DataConfig())

    @property
    def reads_clips(self) -> bool:
        """Whether the model takes videos: those whose patches have a dimension of time."""
        return hasattr(self.processor.image_processor, "temporal_patch_size")

    @cached_property
    def token_ids(self) -> set[int]:
        """The tokens whose places take features: of images, and of videos."""
        return {self.token_id, self.config.video_token_id} if self.reads_clips else {self.token_id}

    def leave_out(self, ids: Iterable[int]) -> list[int]:
        """Token ids without the places of images and videos."""
        return [token for token in ids if token not in self.token_ids]

    def split(self, text: str) -> list[str]:
        """A text that a template has written, cut at each image and video."""
        if not self.reads_clips:
            return text.split(self.written)
        image, video = self.written, self.processor.video_token
        if _TIMED in self.config.model_type:  # the marks around a video are written for each frame instead
            start, end = self.processor.vision_start_token, self.processor.vision_end_token
            text = text.replace(f"{start}{video}{end}", video)
        return re.split(f"{re.escape(image)}|{re.escape(video)}", text)

    @property
    def written(self) -> str:
        """The token that a template writes where an image stands."""
        return str(self.processor.image_token)

    @property
    def token_id(self) -> int:
        """The token whose places take the features of an image."""
        return int(self.config.image_token_id)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All that pixels and tokens of an image depend on besides its content."""
        processor = json.loads(self.processor.image_processor.to_json_string())
        lengths = {
            name: getattr(self.processor, name, None) for name in ("image_seq_len", "num_image_tokens")
        }
        sizes = ("image_min_pixels", "image_max_pixels", "video_min_pixels", "video_max_pixels")
        keys = (*sizes, "video_fps", "video_maxlen")
        return {"keys": {key: getattr(self.data, key) for key in keys}, "processor": processor, **lengths}

    def read(self, images: Sequence[Medium]) -> tuple[Pixels, list[str]]:
        """What the model takes of the images and videos of one prompt, and the text that each stands for.

        Raises `DataError` for a file that is gone or has changed.
        """
        pictures = [image for image in images if isinstance(image, StoredImage)]
        pixels, texts = self._read_images(pictures) if pictures else ({}, [])
        clips = [self._read_clip(it) for it in images if isinstance(it, Clip)]
        if not clips:
            return pixels, texts
        for name in clips[0][0]:
            pixels[name] = torch.cat([found[name] for found, _ in clips])
        of_images, of_clips = iter(texts), iter([text for _, text in clips])
        return pixels, [next(of_clips if isinstance(it, Clip) else of_images) for it in images]

    def _read_images(self, images: Sequence[StoredImage]) -> tuple[Pixels, list[str]]:
        pictures = [open_image(it, self.data.image_min_pixels, self.data.image_max_pixels) for it in images]
        arranged, *_ = self.processor.prepare_inputs_layout(
            images=[pictures], text=[self.written * len(pictures)]
        )
        options = self.processor._merge_kwargs(
            tokenizer_init_kwargs=self.processor.tokenizer.init_kwargs, return_tensors="pt"
        )
        found, texts = self.processor._process_images(arranged, **options["images_kwargs"])
        unread = {*_UNREAD, *self.processor.unused_input_names}
        return {name: torch.as_tensor(it) for name, it in found.items() if name not in unread}, texts

    def _read_clip(self, clip: Clip) -> tuple[Pixels, str]:
        """What the model takes of a video, `video_maxlen` of its frames at most, and its text.

        transformers has processors of video only with torchvision. That of images fills the dimension of time
        with the one image that it has: its patches of several frames, put together, are those of a video.
        """
        number = min(len(clip.frames), self.data.video_maxlen)
        numbers = np.linspace(0, len(clip.frames) - 1, number).round().astype(int).tolist()
        pictures = [
            open_image(clip.frames[i], self.data.video_min_pixels, self.data.video_max_pixels)
            for i in numbers
        ]
        images: Any = self.processor.image_processor
        depth = images.temporal_patch_size
        pictures += [pictures[-1]] * (-len(pictures) % depth)
        same = [picture.resize(pictures[0].size) for picture in pictures]
        found = images(same, return_tensors="pt")
        _, height, width = found["image_grid_thw"][0].tolist()
        frames = found["pixel_values"].view(len(same), height * width, -1, depth, images.patch_size**2)
        joined = frames[::depth].clone()
        for place in range(depth):
            joined[..., place, :] = frames[place::depth, ..., place, :]
        grid = torch.tensor([[len(joined), height, width]])
        given = {"pixel_values_videos": joined.flatten(0, 1).flatten(1), "video_grid_thw": grid}
        if _SECONDS in inspect.signature(self._decoder.get_rope_index).parameters:
            given[_SECONDS] = torch.tensor([depth / self.data.video_fps])
        return given, self._text_of_clip(grid, numbers)

    def _text_of_clip(self, grid: Tensor, numbers: list[int]) -> str:
        """What stands for a video of which these frames are taken."""
        images, own = self.processor.image_processor, self.processor
        shell = SimpleNamespace(
            video_processor=SimpleNamespace(
                merge_size=images.merge_size, temporal_patch_size=images.temporal_patch_size
            ),
            video_token=own.video_token,
            vision_start_token=getattr(own, "vision_start_token", None),
            vision_end_token=getattr(own, "vision_end_token", None),
            _calculate_timestamps=getattr(own, "_calculate_timestamps", None),
        )
        taken = SimpleNamespace(fps=self.data.video_fps, frames_indices=list(numbers))
        return str(
            type(own).replace_video_token(shell, {"video_grid_thw": grid, "video_metadata": [taken]}, 0)
        )

    def see(self, ids: Sequence[int], images: Sequence[Medium]) -> Seen:
        """The images of a prompt with these token ids. Raises `DataError` as `read` does."""
        if not images:
            return Seen()
        pixels, _ = self.read(images)
        return Seen(pixels, self.places(ids, pixels))

    def places(self, ids: Sequence[int], pixels: Mapping[str, Tensor]) -> Tensor | None:
        """Positions (3, P) of the tokens of a prompt in time, height and width, for a model that counts so
        (M-RoPE, https://arxiv.org/abs/2409.12191, section 2.1); None for any other."""
        owner: Any = self._decoder
        if not hasattr(owner, "get_rope_index"):
            return None
        # The method reads the config alone: no model is needed for it.
        shell = SimpleNamespace(
            config=self.config, get_vision_position_ids=partial(owner.get_vision_position_ids, None)
        )
        tokens = torch.tensor([ids])
        kinds = (tokens == self.token_id).int() + 2 * (tokens == self.config.video_token_id).int()
        names = ("image_grid_thw", "video_grid_thw", _SECONDS)
        grids = {name: pixels[name] for name in names if name in pixels}
        found: Tensor = owner.get_rope_index(shell, tokens, kinds, **grids)[0]
        return found[:, 0]

    @cached_property
    def _decoder(self) -> Any:
        """transformers' class of the model without its head."""
        from transformers import MODEL_MAPPING

        return MODEL_MAPPING[type(self.config)]


@cache
def probe_picture() -> StoredImage:
    """A picture by which a model that sees is known again: shades of all colours, the same everywhere."""
    from PIL import Image

    size = width, height = 64, 48
    shades = bytes(
        (x * 4 * (c == 0) + y * 5 * (c == 1) + (x * y) % 256 * (c == 2)) % 256
        for y in range(height)
        for x in range(width)
        for c in range(3)
    )
    file = io.BytesIO()
    Image.frombytes("RGB", size, shades).save(file, "PNG")
    content = file.getvalue()
    return StoredImage("", content, hashlib.sha256(content).hexdigest(), width, height)


def join(pixels: Sequence[Mapping[str, Tensor]], nested: bool) -> Pixels:
    """What the model takes of several prompts, from what each has, in order.

    Images of fewer tiles, or smaller ones, are padded with zeros. With `nested` the images of a prompt lie
    in the second dimension.

    >>> one, two = torch.ones(1, 1, 2), torch.ones(2, 3, 2)
    >>> join([{"pixel_values": one}, {}, {"pixel_values": two}], nested=False)["pixel_values"].shape
    torch.Size([3, 3, 2])
    """
    names = dict.fromkeys(name for entry in pixels for name in entry)
    return {name: _cat([entry[name] for entry in pixels if name in entry], int(nested)) for name in names}


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [
            0 if i == dim else wide - own
            for i, (wide, own) in enumerate(zip(shape, tensor.shape, strict=True))
        ]
        amounts = [amount for size in reversed(missing) for amount in (0, size)]
        padded.append(torch.nn.functional.pad(tensor, amounts) if any(missing) else tensor)
    return torch.cat(padded, dim)
