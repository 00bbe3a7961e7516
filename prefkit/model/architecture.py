"""What is known of a model from its config alone: how it makes logits, whether it can share a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefkit.config.errors import UserError
from prefkit.data.packing import Layout
from prefkit.objectives.head import LogitTransform

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Models whose decoder and `lm_head` can be called apart, and the config key of what happens to the logits.
_PLAIN_HEADS = {"llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo2", "smollm3", "qwen3_moe"}
_SOFTCAPPED_HEADS = {"gemma2": "final_logit_softcapping", "gemma3_text": "final_logit_softcapping"}
_MULTIPLIED_HEADS = {"cohere": "logit_scale", "cohere2": "logit_scale"}
_DIVIDED_HEADS = {"granite": "logits_scaling"}
# Models in which tokens meet only in attention, and each sees all that its segments allow.
_SHARING = {"llama", "mistral", "qwen3", "gemma"}


@dataclass(frozen=True)
class Architecture:
    """`logits` is None where the way from hidden states to logits is not known: then the model's own
    forward makes them, which holds logits of the whole vocabulary for every position.

    `sharing_obstacle` says why a prompt cannot be shared by its responses; None means that it can.
    """

    name: str
    logits: LogitTransform | None
    sharing_obstacle: str | None

    def choose_layout(self, wanted: str) -> Layout:
        """`shared` where the model can, unless `repeat` is wanted.

        Raises `UserError` when `shared` is asked for by name and cannot be had.
        """
        if wanted == "shared" and self.sharing_obstacle:
            raise UserError(f"batch_layout: shared is not possible: {self.sharing_obstacle}")
        return "repeat" if wanted == "repeat" or self.sharing_obstacle else "shared"


def read_architecture(config: PretrainedConfig) -> Architecture:
    """What is known of the architecture that `config` describes."""
    name = config.model_type
    return Architecture(name, _read_logits(config), _find_obstacle(config))


def _read_logits(config: PretrainedConfig) -> LogitTransform | None:
    name = config.model_type
    if name in _PLAIN_HEADS:
        return LogitTransform()
    if name in _SOFTCAPPED_HEADS:
        return LogitTransform(softcap=getattr(config, _SOFTCAPPED_HEADS[name]))
    if name in _MULTIPLIED_HEADS:
        return LogitTransform(scale=getattr(config, _MULTIPLIED_HEADS[name]))
    if name in _DIVIDED_HEADS:
        return LogitTransform(scale=1 / getattr(config, _DIVIDED_HEADS[name]))
    return None


def _find_obstacle(config: PretrainedConfig) -> str | None:
    name = config.model_type
    if name not in _SHARING:
        return f"sharing is not known to be exact for the architecture {name!r}"
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention"} or (window is not None and name == "mistral"):
        return f"its attention looks back through a window of {window} tokens"
    return None
