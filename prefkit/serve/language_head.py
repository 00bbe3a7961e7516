"""The decoder of a reward model under the head of the language model that it was trained from."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from prefkit.config.schema import ModelConfig, UseConfig
from prefkit.model.errors import ModelError
from prefkit.model.load import is_seeing, load_model_config, load_pretrained, num_rows
from prefkit.model.reward import without_load_report
from prefkit.runs.record import read_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def under_language_head(reward: PreTrainedModel, config: UseConfig) -> PreTrainedModel:
    """A language model that shares the decoder of a merged reward model.

    Its head is that of the model without adapters, or, where that is a reward model with no such head, of the
    one that its record says it was trained from. Raises `ModelError` where there is none.
    """
    language = _read_language_model(config.model, config.data.cutoff_len)
    if type(language.base_model) is not type(reward.base_model):
        raise ModelError(
            f"export_value_head: the decoder of {type(language).__name__} is not that of "
            f"{type(reward).__name__}: export without the key"
        )
    if num_rows(language) != num_rows(reward):
        language.resize_token_embeddings(num_rows(reward))
    setattr(language, language.base_model_prefix, reward.base_model)
    labels = {name: getattr(language.config, name) for name in ("id2label", "label2id")}
    language.config = copy.deepcopy(reward.config)
    language.config.update(labels)
    language.tie_weights()
    return language.to(reward.dtype)  # type: ignore[arg-type]


def _read_language_model(model: ModelConfig, cutoff_len: int) -> PreTrainedModel:
    """The model, or the one that it was trained from and so on, whose files have all weights of a language
    model. A reward model's have them where the head is the embedding."""
    seen = []
    while model.model_name_or_path not in seen:
        seen.append(model.model_name_or_path)
        sees = is_seeing(load_model_config(model))
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        with without_load_report():
            language, missing = load_pretrained(kind, model, cutoff_len)
        if not missing:
            return language
        record = read_record(Path(model.model_name_or_path).expanduser()) or {}
        if base := record.get("base_model"):
            model = replace(model, model_name_or_path=base, rope_scaling=None, model_revision="main")
    raise ModelError(
        "export_value_head: full is a language model with its own head, and there is none in "
        f"{' nor in '.join(seen)}: export without the key"
    )
