"""What is known of a model from its config alone: how it makes logits, whether it can share a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefkit.config.errors import UserError
from prefkit.data.packing import Layout
from prefkit.objectives.head import LogitTransform

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Models whose decoder, `model`, and `lm_head` can be called apart, and the config key of what happens to
# the logits. `gemma3` is the one with images, whose forward reads no soft-cap.
_PLAIN_HEADS = {
    *("llama", "llama4_text", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "gemma"),
    *("gemma3", "phi3", "glm", "glm4", "deepseek_v3", "gpt_oss", "smollm3", "olmo2", "olmo3", "starcoder2"),
    *("ernie4_5", "jamba", "bamba", "nemotron_h", "lfm2"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava_onevision", "idefics3", "smolvlm"),
}
_SOFTCAPPED_HEADS = {"gemma2": "final_logit_softcapping", "gemma3_text": "final_logit_softcapping"}
_MULTIPLIED_HEADS = {"cohere": "logit_scale", "cohere2": "logit_scale", "falcon_h1": "lm_head_multiplier"}
_DIVIDED_HEADS = {"granite": "logits_scaling", "granitemoehybrid": "logits_scaling"}

# Models in which tokens meet in attention alone, told apart by position ids alone, and each sees all that
# its segments allow; windows are read apart.
_SHARING = {
    *("llama", "llama4_text", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2"),
    *("gemma3", "gemma3_text", "phi3", "glm", "glm4", "deepseek_v3", "smollm3", "olmo2", "olmo3", "cohere"),
    *("cohere2", "granite", "starcoder2", "ernie4_5"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava_onevision", "idefics3", "smolvlm"),
}
# Models that see whose language model may be one of several.
_ANY_LANGUAGE_MODEL = {"llava_onevision", "idefics3", "smolvlm"}
# Models in which the tokens of an image attend to each other in both directions.
_IMAGES_BOTH_WAYS = {"gemma3"}
_RECURRENT = {"jamba", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "qwen3_next", "lfm2"}
# Models that give `sliding_window` to every layer, whatever `layer_types` says.
_WINDOW_IN_EVERY_LAYER = {"mistral", "mixtral", "phi3", "starcoder2", "qwen3_moe"}


@dataclass(frozen=True)
class Architecture:
    """`logits` is None where the way from hidden states to logits is not known: then the model's own
    forward makes them, which holds logits of the whole vocabulary for every position.

    `sharing_obstacle` says why a prompt can never be shared by its responses. `window` is the length up to
    which every token of a sequence sees all before it, None without limit. `images_both_ways` says that the
    tokens of an image also see those after them.
    """

    name: str
    logits: LogitTransform | None
    sharing_obstacle: str | None
    window: int | None = None
    images_both_ways: bool = False

    def find_obstacle(self, cutoff_len: int, has_images: bool = False) -> str | None:
        """Why sequences of `cutoff_len` tokens cannot share a prompt; None means that they can.

        A row of the shared layout may be longer than the window. What counts is the longest sequence, a
        prompt with one response, since a response sees no other.

        >>> Architecture("mistral", None, None, window=512).find_obstacle(1024)
        'its attention looks back through a window of 512 tokens, and cutoff_len is 1024'
        """
        if self.sharing_obstacle is None and self.images_both_ways and has_images:
            return "the tokens of an image attend to each other in both directions"
        if self.sharing_obstacle is None and self.window is not None and cutoff_len > self.window:
            return (
                f"its attention looks back through a window of {self.window} tokens, "
                f"and cutoff_len is {cutoff_len}"
            )
        return self.sharing_obstacle

    def choose_layout(self, wanted: str, cutoff_len: int, has_images: bool = False) -> Layout:
        """`shared` where sequences of `cutoff_len` tokens can, unless `repeat` is wanted.

        Raises `UserError` when `shared` is asked for by name and cannot be had.
        """
        obstacle = self.find_obstacle(cutoff_len, has_images)
        if wanted == "shared" and obstacle:
            raise UserError(f"batch_layout: shared is not possible: {obstacle}")
        return "repeat" if wanted == "repeat" or obstacle else "shared"


def read_architecture(config: PretrainedConfig) -> Architecture:
    """What is known of the architecture that `config` describes."""
    text = config.get_text_config()
    return Architecture(
        config.model_type,
        _read_logits(config.model_type, text),
        _find_obstacle(config.model_type, text),
        _read_window(config.model_type, text),
        config.model_type in _IMAGES_BOTH_WAYS,
    )


def _read_logits(name: str, config: PretrainedConfig) -> LogitTransform | None:
    if name in _PLAIN_HEADS:
        return LogitTransform()
    if name in _SOFTCAPPED_HEADS:
        return LogitTransform(softcap=getattr(config, _SOFTCAPPED_HEADS[name]))
    if name in _MULTIPLIED_HEADS:
        return LogitTransform(scale=getattr(config, _MULTIPLIED_HEADS[name]))
    if name in _DIVIDED_HEADS:
        return LogitTransform(scale=1 / getattr(config, _DIVIDED_HEADS[name]))
    return None


def _find_obstacle(name: str, config: PretrainedConfig) -> str | None:
    if name in _RECURRENT:
        return "its recurrent or convolution layers read the row as one sequence"
    if name == "gpt_oss":
        return "its attention has sinks"
    if name not in _SHARING or (name in _ANY_LANGUAGE_MODEL and config.model_type not in _SHARING):
        return f"sharing is not known to be exact for the architecture {name!r}"
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        return "its attention is not causal"
    # Layers without rotary angles scale queries by the place in the row, not by `position_ids`.
    if name == "llama4_text" and config.attn_temperature_tuning and 0 in config.no_rope_layers:
        return "its attn_temperature_tuning goes by the place in the row"
    return None


def _read_window(name: str, config: PretrainedConfig) -> int | None:
    """A window of W shows a token itself and the W - 1 before it: up to W tokens nothing is hidden. Nor is
    it within the first chunk of attention that is cut into chunks."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window: int | None = None
    if name in _WINDOW_IN_EVERY_LAYER or "sliding_attention" in kinds:
        window = config.sliding_window
    elif "chunked_attention" in kinds:
        window = config.attention_chunk_size
    return window


def batch_dependence(config: PretrainedConfig, cutoff_len: int) -> str | None:
    """Why the log-probs of a row may depend on the other rows of its batch; None where they do not.

    Some rotary angles follow the longest row: `dynamic` ones at any length that is longer than those
    before, `longrope` where a row may exceed the length that the model was first trained for.
    """
    text = config.get_text_config()
    parameters: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    # Of models with several kinds of layers, one entry for each.
    for rope in [entry for entry in parameters.values() if isinstance(entry, dict)] or [parameters]:
        kind = rope.get("rope_type", "default")
        if "dynamic" in kind:
            return f"its rotary angles ({kind}) follow the longest row of a batch"
        if kind == "longrope" and cutoff_len > (trained := rope["original_max_position_embeddings"]):
            return (
                f"its rotary angles (longrope) change for a batch with a row of more than {trained} tokens, "
                f"and cutoff_len is {cutoff_len}"
            )
    return None
