"""Models that see: their processor, the names of their parts, and what their forward takes of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prefkit.config.schema import DataConfig, ModelConfig, TuningConfig
from prefkit.data.template import ChatTemplate, make_template
from prefkit.data.vision import Pixels, Vision, join
from prefkit.model.errors import ModelError
from prefkit.model.load import is_seeing, load_model_config, load_tokenizer, model_source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


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
# Models that take the images of each prompt in a dimension of their own.
_NESTED = {"idefics3", "smolvlm"}
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
    return Vision(processor, model_config, data.image_min_pixels, data.image_max_pixels)


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
        kind = _without_video(getattr(transformers, str(name)))
        parts = {"image_processor": images, "tokenizer": tokenizer, "video_processor": None}
        return kind.from_args_and_dict([parts[part] for part in kind.get_attributes()], facts)
    except (OSError, ValueError, ImportError, AttributeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{config.model_name_or_path}: its image processor cannot be read: {reason}. To read images, "
            "pip install 'prefkit[vision]'"
        ) from error


@cache
def _without_video(kind: Any) -> Any:
    """The class of a processor, that takes None for its video processor."""

    class ImageProcessorOnly(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

        def __reduce__(self) -> Any:
            return _restore, (kind, vars(self))

    return ImageProcessorOnly


def _restore(kind: Any, state: dict[str, Any]) -> Any:
    """A processor in another process."""
    copied = object.__new__(_without_video(kind))
    vars(copied).update(state)
    return copied


def image_inputs(
    config: PretrainedConfig, pixels: Sequence[Mapping[str, Tensor]], input_ids: Tensor
) -> Pixels:
    """What the forward of a model takes of the images of a packed batch, whose tokens are `input_ids`."""
    if not pixels:
        return {}
    found = join(pixels, nested=config.model_type in _NESTED)
    if config.model_type in _TOLD_KINDS:
        found["token_type_ids"] = (input_ids == config.image_token_id).long()
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
