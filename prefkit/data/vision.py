"""Images as a model takes them: how many tokens each has, its pixels, and where its tokens are placed.

The work is done by transformers' processor of the model; what a template writes for an image is replaced by
as many tokens as the model has places for its features.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from prefkit.data.examples import StoredImage
from prefkit.data.images import open_image

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin

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
    """How a model sees: its processor, and the number of pixels that images are scaled to beforehand."""

    def __init__(
        self, processor: ProcessorMixin, config: PretrainedConfig, min_pixels: int, max_pixels: int
    ) -> None:
        self.processor: Any = processor
        self.config = config
        self.min_pixels, self.max_pixels = min_pixels, max_pixels

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
        return {"pixels": (self.min_pixels, self.max_pixels), "processor": processor, **lengths}

    def read(self, images: Sequence[StoredImage]) -> tuple[Pixels, list[str]]:
        """What the model takes of the images of one prompt, and the text that each stands for.

        Raises `DataError` for a file that is gone or has changed.
        """
        pictures = [open_image(image, self.min_pixels, self.max_pixels) for image in images]
        arranged, *_ = self.processor.prepare_inputs_layout(
            images=[pictures], text=[self.written * len(pictures)]
        )
        options = self.processor._merge_kwargs(
            tokenizer_init_kwargs=self.processor.tokenizer.init_kwargs, return_tensors="pt"
        )
        found, texts = self.processor._process_images(arranged, **options["images_kwargs"])
        unread = {*_UNREAD, *self.processor.unused_input_names}
        return {name: torch.as_tensor(it) for name, it in found.items() if name not in unread}, texts

    def see(self, ids: Sequence[int], images: Sequence[StoredImage]) -> Seen:
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
        kinds = (tokens == self.token_id).int()
        found: Tensor = owner.get_rope_index(shell, tokens, kinds, pixels["image_grid_thw"])[0]
        return found[:, 0]

    @cached_property
    def _decoder(self) -> type:
        """transformers' class of the model without its head."""
        from transformers import MODEL_MAPPING

        found: Any = MODEL_MAPPING[type(self.config)]
        return cast("type", found)


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
    given = [entry for entry in pixels if entry]
    return {name: _cat([entry[name] for entry in given], int(nested)) for name in (given[0] if given else ())}


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
