"""Read a model and its tokenizer from a folder or the hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefkit.config.errors import UserError
from prefkit.config.schema import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


logger = logging.getLogger(__name__)


class ModelError(UserError):
    """A model that cannot be read; the message says which and what to do."""


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model. Raises `ModelError` when it is not there."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, config)
    return tokenizer


def load_causal_lm(config: ModelConfig) -> PreTrainedModel:
    """The model, in the dtype of its checkpoint unless `dtype` says otherwise, its own dropout off.

    Log-ratios of policy and reference are to differ by training alone, so nothing in the base model may
    be random. Raises `ModelError` when it is not there, or has only pickled weights.
    """
    from transformers import AutoModelForCausalLM

    dtype = DTYPES.get(config.dtype, "auto")
    model: PreTrainedModel = _from_pretrained(AutoModelForCausalLM, config, dtype=dtype, use_safetensors=True)
    if config.trust_remote_code and type(model).__module__.startswith("transformers_modules"):
        logger.warning("trust_remote_code: the model runs code of its own, %s", type(model).__module__)
    turn_off_dropout(model)
    return model


def _from_pretrained(auto_class: Any, config: ModelConfig, **kwargs: Any) -> Any:
    path = config.model_name_or_path
    folder = Path(path).expanduser()
    looks_local = (
        path.startswith((".", "/", "~")) or folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path)
    )
    if looks_local and not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise ModelError(f"model_name_or_path: the folder {path} {what}.")
    try:
        return auto_class.from_pretrained(
            folder if looks_local else path,
            revision=config.model_revision,
            cache_dir=config.cache_dir,
            trust_remote_code=config.trust_remote_code,
            **kwargs,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        where = "" if looks_local else " (not a folder here, so looked for on the Hugging Face hub)"
        raise ModelError(f"model_name_or_path: cannot read {path}{where}: {reason}") from error


def turn_off_dropout(model: nn.Module) -> None:
    """Set every dropout rate in the model to zero: modules and the rates that attention layers keep."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
