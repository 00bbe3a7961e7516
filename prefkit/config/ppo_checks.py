"""Rules of ppo across keys, one row each: what judges, what is learnt from besides, what draws."""

from __future__ import annotations

import re
from types import SimpleNamespace

from .rules import Check, Needs, adds_tokens, is_lora, is_quantized

_FUNCTION = re.compile(r".*\.py:[^\W\d]\w*")  # a file, and a name in it


def _has_reward_model(v: SimpleNamespace, *types: str) -> bool:
    """Whether a reward model of one of these types judges."""
    return v.stage == "ppo" and bool(v.reward_model) and v.reward_model_type in types


def _draws_by_vllm(v: SimpleNamespace) -> bool:
    return v.stage == "ppo" and v.rollout_engine == "vllm"


PPO_ERRORS = (
    Check("reward_model_missing", ("reward_model", "reward_function", "stage"),
          lambda v: v.stage == "ppo" and not v.reward_model and not v.reward_function,
          "missing; ppo needs what judges its responses: write reward_model: saves/my-reward-model, or "
          "reward_function: path/to/file.py:name"),
    Check("reward_model_tuning", ("reward_model_type", "reward_model", "finetuning_type", "stage"),
          lambda v: _has_reward_model(v, "lora") and not is_lora(v),
          "an adapter needs finetuning_type: lora, not {finetuning_type}: write reward_model_type: full"),
    Check("reward_model_pissa", ("reward_model_type", "reward_model", "pissa_init", "stage"),
          lambda v: _has_reward_model(v, "lora") and v.pissa_init,
          "pissa_init changes the weights that the adapter of the reward model stands on: write "
          "reward_model_type: full, or remove pissa_init"),
    Check("reward_model_address", ("reward_model", "reward_model_type", "stage"),
          lambda v: _has_reward_model(v, "api") and not v.reward_model.startswith(("http://", "https://")),
          "with reward_model_type: api it is an address: write http://HOST:PORT/PATH"),
    Check("reward_model_folder", ("reward_model", "reward_model_type", "stage"),
          lambda v: _has_reward_model(v, "lora", "full") and "://" in v.reward_model,
          "is an address: write reward_model_type: api"),
    Check("reward_adapters_type", ("reward_model_adapters", "reward_model_type", "stage"),
          lambda v: v.stage == "ppo" and v.reward_model_adapters and v.reward_model_type != "full",
          "are put upon a whole model, and reward_model_type is {reward_model_type}: write "
          "reward_model_type: full, or remove them"),
    Check("reward_adapters_alone", ("reward_model_adapters", "reward_model", "reward_model_type", "stage"),
          lambda v: v.stage == "ppo" and v.reward_model_adapters and v.reward_model_type == "full"
          and v.reward_function and not v.reward_model,
          "needs reward_model, the model that these adapters belong to"),
    Check("reward_function_form", ("reward_function",),
          lambda v: v.reward_function and not _FUNCTION.fullmatch(v.reward_function),
          "names a file and a function in it: write path/to/file.py:name"),
    Check("reward_weights_number", ("reward_weights", "reward_model", "reward_function", "stage"),
          lambda v: v.stage == "ppo" and v.reward_weights and (v.reward_model or v.reward_function)
          and len(v.reward_weights) != bool(v.reward_model) + bool(v.reward_function),
          "needs one number for each of reward_model and reward_function that is given, in this order"),
    Check("reward_weights_zero", ("reward_weights", "stage"),
          lambda v: v.stage == "ppo" and v.reward_weights and not any(v.reward_weights),
          "with no weight but 0 nothing is learnt: write another number"),
    Check("reward_model_bits", ("reward_model_quantization_bit",),
          lambda v: v.reward_model_quantization_bit not in (None, 4, 8), "must be 4 or 8"),
    Check("reward_model_merge", ("reward_model_quantization_bit", "reward_model_adapters"),
          lambda v: v.reward_model_quantization_bit is not None and v.reward_model_adapters,
          "adapters cannot be merged into quantised weights: merge them first with prefkit export"),
    Check("ppo_group_greedy", ("ppo_group_size", "do_sample", "temperature", "stage"),
          lambda v: v.stage == "ppo" and v.ppo_group_size > 1 and not (v.do_sample and v.temperature > 0),
          "greedy responses to a prompt are all the same: write do_sample: true and a temperature above 0, "
          "or ppo_group_size: 1"),
    Check("ppo_streaming", ("streaming", "stage"),
          lambda v: v.stage == "ppo" and v.streaming,
          "a rollout takes its prompts by number, so that a resumed run finds them again: remove it"),
    Check("scheduler_ppo", ("lr_scheduler_type", "stage"),
          lambda v: v.stage == "ppo" and v.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
          "{lr_scheduler_type} follows the evaluation loss, and ppo has none: write linear or cosine"),
    Check("ppo_ptx_dataset", ("ppo_ptx_dataset", "ppo_ptx", "stage"),
          lambda v: v.stage == "ppo" and v.ppo_ptx > 0 and not v.ppo_ptx_dataset,
          "missing; ppo_ptx needs prompts with answers to learn from: write the name of a data set"),
    Check("ppo_ptx_weight", ("ppo_ptx", "ppo_ptx_dataset", "stage"),
          lambda v: v.stage == "ppo" and v.ppo_ptx_dataset and not v.ppo_ptx,
          "with a weight of 0 ppo_ptx_dataset would not be learnt from: write one above 0, or remove the "
          "data set"),
    Check("vllm_base", ("rollout_engine", "stage", "quantization_bit", "rope_scaling", "resize_vocab",
                        "add_tokens", "add_special_tokens", "adapter_name_or_path", "create_new_adapter"),
          lambda v: _draws_by_vllm(v) and (is_quantized(v) or v.rope_scaling or adds_tokens(v)
                                           or len(v.adapter_name_or_path) > 1 or v.create_new_adapter),
          "vllm reads the model from its folder, as it is there: write rollout_engine: transformers, or "
          "remove quantization_bit, rope_scaling, resize_vocab, add_tokens, add_special_tokens and merged "
          "adapters"),
    Check("vllm_adapter", ("rollout_engine", "stage", "finetuning_type", "use_dora", "pissa_init",
                           "additional_target"),
          lambda v: _draws_by_vllm(v) and is_lora(v)
          and (v.use_dora or v.pissa_init or v.additional_target),
          "vllm takes plain LoRA alone: write rollout_engine: transformers, or remove use_dora, pissa_init "
          "and additional_target"),
)  # fmt: skip

PPO_NEEDS = (
    Needs("reward_model_type", lambda v: v.reward_model, "reward_model"),
    Needs("reward_model_quantization_bit", lambda v: _has_reward_model(v, "full"),
          "a reward_model with reward_model_type: full"),
    *(Needs(key, lambda v: _has_reward_model(v, "api"), "a reward_model with reward_model_type: api")
      for key in ("reward_timeout", "reward_retries")),
    *(Needs(key, lambda v: v.ppo_init_kl > 0, "ppo_init_kl above 0")
      for key in ("ppo_target", "ppo_kl_horizon")),
    Needs("ppo_value_clip", lambda v: v.ppo_value_coefficient > 0, "ppo_value_coefficient above 0"),
    Needs("logging_first_step", lambda v: v.stage != "ppo", "another stage than ppo"),
    *(Needs(key, lambda v: v.do_sample, "do_sample") for key in ("temperature", "top_p", "top_k")),
)  # fmt: skip
