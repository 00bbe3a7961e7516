"""From the config of a use to a model that is ready for it, as it was trained."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefkit.config.errors import UserError
from prefkit.config.schema import UseConfig
from prefkit.model.vision import load_template

if TYPE_CHECKING:
    from prefkit.data.template import ChatTemplate
    from prefkit.model.scorer import Scorer
    from prefkit.serve.assistant import Assistant

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its adapters merged but for the last, which stays one; `proof` says in nats per token
    how far it is from the probe of its training, None where there is nothing to compare."""

    model: Any
    template: ChatTemplate
    proof: float | None


def load_model(config: UseConfig) -> LoadedModel:
    """Read what a `UseConfig` names and check it against the probe rows of its training.

    Raises `UserError` for a reward model, and `ModelError` when something is missing or is not what was
    trained.
    """
    from prefkit.model.adapter import start_from_adapters
    from prefkit.model.generate import stop_ids
    from prefkit.model.load import fit_vocabulary, load_causal_lm
    from prefkit.model.probe import verify
    from prefkit.runs.reward_model import names_reward_model

    name = config.model.trained_last
    if names_reward_model(config.model):
        raise UserError(
            f"{name} is a reward model, which gives scores and writes no text: `prefkit score {name} "
            f"data.jsonl -o scores.jsonl` scores a file, `prefkit serve {name}` answers requests"
        )
    template = load_template(config.model, config.data)
    tokenizer = template.tokenizer
    base = load_causal_lm(config.model, config.data.cutoff_len)
    fit_vocabulary(base, tokenizer, config.model)
    base.generation_config.eos_token_id = stop_ids(base, template)
    model: Any = start_from_adapters(base, config.model, create_new=False)
    model.requires_grad_(False)
    model.eval()
    return LoadedModel(model, template, verify(model, Path(name), name, template.vision))


def load_scorer(config: UseConfig) -> Scorer:
    """A reward model to score with. Raises `UserError` for a language model."""
    from prefkit.model.scorer import open_scorer
    from prefkit.runs.reward_model import has_value_head, names_reward_model

    model, name = config.model, config.model.trained_last
    gives_scores = names_reward_model(model) or has_value_head(model)
    if Path(name).expanduser().is_dir() and not gives_scores:
        raise UserError(
            f"{name} is a language model, which writes text and has no head for scores: `prefkit chat "
            f"{name}` talks to it. A reward model is trained with stage: rm, as in examples/reward.yaml."
        )
    return open_scorer(config.model, config.data)


def load_assistant(config: UseConfig) -> Assistant:
    """A model to talk to."""
    import torch

    from prefkit.model.reward import VALUE_HEAD
    from prefkit.runs.reward_model import has_value_head
    from prefkit.serve.assistant import Assistant

    loaded = load_model(config)
    model = config.model
    if Path(model.trained_last).is_dir() and has_value_head(model):
        logger.warning(
            "%s: %s beside it is not used; if this is a reward model, `prefkit score` scores with it",
            model.trained_last,
            VALUE_HEAD,
        )
    if model.quantization_bit is None:
        loaded.model.to(torch.accelerator.current_accelerator() or "cpu")
    name = Path(model.trained_last).name
    return Assistant(loaded.model, loaded.template, name, bool(model.adapter_name_or_path))
