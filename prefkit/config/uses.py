"""Rules of using a model: talking to it, scoring with it, and exporting it."""

from __future__ import annotations

from .errors import is_secret
from .foreign import FOREIGN
from .rules import Check, Needs, Rule, Rules, adds_tokens, is_quantized
from .schema import KEYS


def _is_written(key: str) -> Rule:
    """A rule: a key of `FOREIGN` asks for something."""
    return lambda v: not FOREIGN[key].is_off(getattr(v, key))


# Which model this is, or a secret: as wrong in a use as in training.
_REFUSED = tuple(
    Check(key, (key,), _is_written(key), FOREIGN[key].hint)
    for key in (
        *filter(is_secret, FOREIGN),
        *("adapter_folder", "new_special_tokens_config", "quantization_method"),
    )
)
_ANSWERED_OTHERWISE = tuple(
    Check(key, (key,), _is_written(key), FOREIGN[key].hint)
    for key in ("infer_backend", "infer_dtype", "num_beams", "max_length", "skip_special_tokens")
)


def _keys_of(group: str, *but: str) -> tuple[str, ...]:
    return tuple(name for name, key in KEYS.items() if key.group == group and name not in but)


_TRAINED_WITH = (
    *_keys_of("data", "template", "cutoff_len", "default_system", "enable_thinking", "preserve_thinking",
              "tool_format", "image_max_pixels", "image_min_pixels"),
    *("batch_layout", "disable_gradient_checkpointing", "moe_aux_loss_coef"),
)  # fmt: skip

_QUANTIZED = (
    Check("using_bits", ("quantization_bit",),
          lambda v: v.quantization_bit not in (None, 4, 8), "must be 4 or 8"),
    Check("using_adapters", ("quantization_bit", "adapter_name_or_path"),
          lambda v: is_quantized(v) and len(v.adapter_name_or_path) > 1,
          "adapters cannot be merged into quantised weights: merge them first with prefkit export"),
    Check("using_tokens", ("quantization_bit", "resize_vocab", "add_tokens", "add_special_tokens"),
          lambda v: is_quantized(v) and adds_tokens(v),
          "the vocabulary of a quantised model cannot be resized, and that of this one was: remove it"),
)  # fmt: skip
TALKING = Rules(
    (
        *_QUANTIZED,
        *_REFUSED,
        *_ANSWERED_OTHERWISE,
    ),
    (),
    (
        *(Needs(key, lambda v: v.quantization_bit == 4, "quantization_bit: 4")
          for key in ("quantization_type", "double_quantization")),
        *(Needs(key, lambda v: v.do_sample, "do_sample") for key in ("temperature", "top_p", "top_k")),
    ),
    (*_TRAINED_WITH, *_keys_of("export")),
)  # fmt: skip
SCORING = Rules(
    (
        *_QUANTIZED,
        *_REFUSED,
    ),
    (),
    (Needs("double_quantization", lambda v: v.quantization_bit == 4, "quantization_bit: 4"),),
    (
        *_keys_of("generation"), *_keys_of("export"), "disable_gradient_checkpointing", "moe_aux_loss_coef",
        *_keys_of("data", "template", "cutoff_len", "default_system", "enable_thinking", "preserve_thinking",
                  "tool_format", "truncation", "dataset_dir", "media_dir", "media_hosts", "image_max_pixels",
                  "image_min_pixels"),
    ),
)  # fmt: skip
EXPORT = Rules(
    (
        Check("export_dir", ("export_dir",), lambda v: not v.export_dir,
              "missing; write export_dir: models/my-model"),
        Check("export_quantized", ("quantization_bit",), is_quantized,
              "an exported model keeps the numbers of its base: remove it"),
        Check("export_quantization", ("export_quantization_bit",), lambda v: v.export_quantization_bit,
              "an exported model keeps the numbers of its base: remove it"),
        Check("export_hub", ("export_hub_model_id",), lambda v: v.export_hub_model_id,
              "the model is not uploaded: remove it, and run `hf upload` on export_dir"),
        Check("export_legacy", ("export_legacy_format",), lambda v: v.export_legacy_format,
              "weights are always written as safetensors: remove it"),
        *_REFUSED,
    ),
    (),
    (Needs("export_size", lambda v: v.export_value_head != "lora", "a merged model"),),
    (*_TRAINED_WITH, *_keys_of("generation"), "quantization_type", "double_quantization"),
)  # fmt: skip
