"""Reward models that see, where transformers has no class with a head for scores for the architecture.

The class that is made here is made as transformers makes its own: the decoder, which sees, under `model`, and
a linear head `score` beside it. Weights have the names that they have in the language model. transformers
knows no such class: what is saved can be read through here alone, or as a decoder and a head apart.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, cast

from prefkit.model.load import is_seeing

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LANGUAGE, _SCORING = "ForConditionalGeneration", "ForSequenceClassification"


def has_classifier(config: PretrainedConfig) -> bool:
    """Whether the model for scores of an architecture is transformers' own, if there is any."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    kind: Any = type(config)
    is_known = kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    return is_known or not is_seeing(config) or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def choose_classifier(config: PretrainedConfig) -> Any:
    """What reads and makes the model for scores of an architecture: transformers' auto class, or the class of
    ours where that knows none."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForSequenceClassification

    if has_classifier(config):
        return AutoModelForSequenceClassification
    language: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return _make_class(language, config.model_type)


def is_ours(model: PreTrainedModel) -> bool:
    """Whether a model is of a class that transformers does not know."""
    return type(model).__module__ == __name__


@cache
def _make_class(language: type[PreTrainedModel], model_type: str) -> type[PreTrainedModel]:
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.modeling_layers import GenericForSequenceClassification

    base = next(kind for kind in language.__mro__ if PreTrainedModel in kind.__bases__)
    name = language.__name__.removesuffix(_LANGUAGE) + _SCORING
    made = type(
        name, (GenericForSequenceClassification, base), {"__module__": __name__, "from_config": _from_config}
    )
    # Where files name weights otherwise than memory does, transformers knows it by the name of the class.
    named = get_checkpoint_conversion_mapping(language.__name__)
    if named := named or get_checkpoint_conversion_mapping(model_type):
        register_checkpoint_conversion_mapping(name, named, overwrite=True)
    return cast("type[PreTrainedModel]", made)


@classmethod  # type: ignore[misc]
def _from_config(cls: Any, config: PretrainedConfig, trust_remote_code: bool = False, **options: Any) -> Any:
    """As an auto class has it."""
    return cls._from_config(config, **options)
