"""Models that see: their processor, the names of their parts, and what their forward takes of images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefkit.config.schema import DataConfig, ModelConfig, TuningConfig
from prefkit.data.template import ChatTemplate, make_template
from prefkit.data.vision import Pixels, Vision, join
from prefkit.files import replace_text
from prefkit.model.errors import ModelError
from prefkit.model.load import is_seeing, load_model_config, load_tokenizer, model_source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Parts:
    """Where the modules of a model that sees are: each is the start of their names.

    What is named as `projector` is none of the `tower`, even where it lies within.
    """

    tower: tuple[str, ...]
    projector: tuple[str, ...]
    language: tuple[str, ...]


_QWEN = Parts(
    ("model.visual.",),
    ("model.visual.merger.", "model.visual.deepstack_merger_list."),
    ("model.language_model.", "lm_head."),
)
_LLAVA = Parts(
    ("model.vision_tower.",), ("model.multi_modal_projector.",), ("model.language_model.", "lm_head.")
)
_IDEFICS = Parts(("model.vision_model.",), ("model.connector.",), ("model.text_model.", "lm_head."))
PARTS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _QWEN),
    **dict.fromkeys(("llava_onevision", "gemma3"), _LLAVA),
    **dict.fromkeys(("idefics3", "smolvlm"), _IDEFICS),
}
_VIDEO_FILE = "video_preprocessor_config.json"
# Models that take the images of each prompt in a dimension of their own.
_NESTED = {"idefics3", "smolvlm"}
_MROPE = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"}
# Models that are told which tokens are those of images, to let these see each other both ways.
_TOLD_KINDS = {"gemma3"}


def load_vision(config: ModelConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Vision | None:
    """How the model sees; None for one that reads text alone.

    Raises `ModelError` where its processor cannot be had.
    """
    model_config = load_model_config(config)
    if not is_seeing(model_config):
        return None
    if model_config.model_type not in PARTS:
        raise ModelError(
            f"{config.model_name_or_path}: it is not known how {model_config.model_type} sees; known are "
            f"{', '.join(PARTS)}"
        )
    processor = _load_processor(config, model_config, tokenizer)
    return Vision(processor, model_config, data)


def load_template(config: ModelConfig, data: DataConfig) -> ChatTemplate:
    """Tokenizer, images and chat template of a model, as `data` says. Raises `UserError` for what is wrong
    with any of them."""
    tokenizer = load_tokenizer(config)
    return make_template(tokenizer, data, load_vision(config, data, tokenizer))


def _load_processor(
    config: ModelConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Any:
    """transformers' processor of text and images. That of video, which needs torchvision, is left out."""
    import transformers
    from transformers import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    source, options = model_source(config)
    name = PROCESSOR_MAPPING_NAMES[model_config.model_type]
    try:
        images = AutoImageProcessor.from_pretrained(source, **options)
        facts, _ = transformers.ProcessorMixin.get_processor_dict(source, **options)
        kind = getattr(transformers, str(name))
        parts = {"image_processor": images, "tokenizer": tokenizer, "video_processor": None}
        taken = [parts[part] for part in kind.get_attributes()]
        processor = _without_video(kind).from_args_and_dict(taken, facts)
        processor.chat_template = None  # the tokenizer has it
        processor.video_facts = facts.get("video_processor") or _read_video_facts(source, options)
        return processor
    except (OSError, ValueError, ImportError, AttributeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{config.model_name_or_path}: its image processor cannot be read: {reason}. To read images, "
            "pip install 'prefkit[vision]'"
        ) from error


@cache
def _without_video(kind: Any) -> Any:
    """The class of a processor, that has no processor of video; its files are those of the whole class."""

    class ImageProcessorOnly(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != "video_processor"]

        def save_pretrained(self, folder: Any, push_to_hub: bool = False, **options: Any) -> Any:
            written = super().save_pretrained(folder, push_to_hub, **options)
            if self.video_facts:
                replace_text(Path(folder) / _VIDEO_FILE, json.dumps(self.video_facts, indent=2) + "\n")
            elif "video_processor" in kind.get_attributes():
                # Without a file of its own transformers reads that processor from this one.
                self.image_processor.save_pretrained(folder)
            return written

        def to_dict(self) -> dict[str, Any]:
            facts: dict[str, Any] = super().to_dict()
            facts.pop("video_facts", None)
            return facts

        def __reduce__(self) -> Any:
            return _restore, (kind, vars(self))

    ImageProcessorOnly.__name__ = kind.__name__
    return ImageProcessorOnly


def _read_video_facts(source: str | Path, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a model says of its processor of video in a file of its own, to be passed on."""
    from transformers.utils import cached_file

    file = cached_file(
        str(source),
        _VIDEO_FILE,
        revision=options["revision"],
        cache_dir=options["cache_dir"],
        _raise_exceptions_for_missing_entries=False,
    )
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else None


def _restore(kind: Any, state: dict[str, Any]) -> Any:
    """A processor in another process."""
    copied = object.__new__(_without_video(kind))
    vars(copied).update(state)
    return copied


def idle_weights(model: PreTrainedModel, pixels: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    """Zero, made of the trained weights that a batch without images leaves idle; None where there are none.

    Added to what a forward returns, it gives them a gradient of zero: all processes then have the same
    weights to average, whichever of them has images in its batch.
    """
    parts = PARTS.get(model.config.model_type)
    if parts is None or any(pixels) or not (model.training and torch.is_grad_enabled()):
        return None
    idle = [
        weights.flatten()[0]
        for name, weights in model.named_parameters()
        if weights.requires_grad and name.startswith("model.") and not name.startswith(parts.language)
    ]
    return 0.0 * torch.stack([it.float() for it in idle]).sum() if idle else None


def media_tokens(config: PretrainedConfig) -> list[int]:
    """Tokens that stand for something shown: no model may write them."""
    if not is_seeing(config):
        return []
    found = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return [token for token in found if token is not None and token < config.get_text_config().vocab_size]


def image_inputs(
    config: PretrainedConfig, pixels: Sequence[Mapping[str, Tensor]], input_ids: Tensor
) -> Pixels:
    """What the forward of a model takes of the images of a packed batch, whose tokens are `input_ids`."""
    if not any(pixels):
        return {}
    found = join(pixels, nested=config.model_type in _NESTED)
    if config.model_type in _TOLD_KINDS:
        found["token_type_ids"] = (input_ids == config.image_token_id).long()
    return found


def generation_inputs(
    config: PretrainedConfig, pixels: Sequence[Mapping[str, Tensor]], input_ids: Tensor
) -> Pixels:
    """What `generate` takes of the images of prompts, whose tokens are `input_ids`; it finds positions by
    itself."""
    found = image_inputs(config, pixels, input_ids)
    if found and config.model_type in _MROPE:
        kinds = (input_ids == config.image_token_id).int() + 2 * (input_ids == config.video_token_id).int()
        found["mm_token_type_ids"] = kinds
    return found


def is_frozen(name: str, config: PretrainedConfig, tuning: TuningConfig) -> bool:
    """Whether a module or weight of this name stays as it is."""
    parts = PARTS.get(config.model_type)
    if parts is None:
        return False
    if name.startswith(parts.projector):
        return tuning.freeze_multi_modal_projector
    if name.startswith(parts.tower):
        return tuning.freeze_vision_tower
    return tuning.freeze_language_model and name.startswith(parts.language)
