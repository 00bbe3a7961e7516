"""Rules of what several processes share: DeepSpeed and FSDP, one row each."""

from __future__ import annotations

from types import SimpleNamespace

from .engines import (
    OPTIMIZERS,
    find_deepspeed_problem,
    find_fsdp_problem,
    has_own_optimizer,
    splits_weights,
    zero_stage,
)
from .rules import Check, adds_tokens, is_quantized


def _merges(v: SimpleNamespace) -> bool:
    """Whether adapters are merged into the model, or into the reference."""
    merged = len(v.adapter_name_or_path) > 1 or (v.adapter_name_or_path and v.create_new_adapter)
    return bool(merged or v.ref_model_adapters)


def _format_of_forward(v: SimpleNamespace) -> str:
    return "bfloat16" if v.bf16 else "float16" if v.fp16 else "float32"


ENGINE_ERRORS = (
    Check("deepspeed", ("deepspeed", "per_device_train_batch_size", "gradient_accumulation_steps",
                        "max_grad_norm", "bf16", "fp16", "learning_rate", "weight_decay", "adam_epsilon"),
          find_deepspeed_problem, find_deepspeed_problem),
    Check("fsdp", ("fsdp", "fsdp_config"), find_fsdp_problem, find_fsdp_problem),
    Check("two_engines", ("deepspeed", "fsdp"), lambda v: v.deepspeed and v.fsdp,
          "DeepSpeed and FSDP are two ways of the same: keep one"),
    Check("deepspeed_untrained", ("deepspeed", "do_train"),
          lambda v: not v.do_train and zero_stage(v) in (0, 1, 2),
          "without do_train there is nothing that this ZeRO stage splits: remove it, or take stage 3"),
    Check("deepspeed_bf16", ("pure_bf16", "deepspeed"), lambda v: v.pure_bf16 and v.deepspeed,
          "DeepSpeed trains in bfloat16 upon fp32 of its own: write bf16: true instead"),
    Check("deepspeed_dtype", ("dtype", "deepspeed", "bf16", "fp16"),
          lambda v: zero_stage(v) and v.dtype not in ("auto", _format_of_forward(v)),
          "DeepSpeed holds weights in the format of the forward, which bf16 and fp16 say: remove it"),
    Check("engine_optimizer", ("optim", "deepspeed", "fsdp"),
          lambda v: (v.deepspeed or v.fsdp) and v.optim not in OPTIMIZERS,
          f"{{optim}} cannot be resumed where its states are split: write one of {', '.join(OPTIMIZERS)}"),
    Check("engine_loraplus", ("loraplus_lr_ratio", "deepspeed"),
          lambda v: v.loraplus_lr_ratio and has_own_optimizer(v),
          "the optimizer of the DeepSpeed settings knows one rate: remove it there"),
    Check("split_quantized", ("quantization_bit", "deepspeed", "fsdp"),
          lambda v: is_quantized(v) and splits_weights(v),
          "quantised weights are not split among processes in this version: take ZeRO stage 2 or below, or "
          "remove fsdp"),
    Check("split_ref_quantized", ("ref_model_quantization_bit", "deepspeed", "fsdp"),
          lambda v: v.ref_model_quantization_bit is not None and splits_weights(v),
          "quantised weights are not split among processes in this version: take ZeRO stage 2 or below, or "
          "remove fsdp"),
    Check("split_pissa", ("pissa_init", "deepspeed", "fsdp"),
          lambda v: v.pissa_init and splits_weights(v),
          "decomposes weights that no process holds whole: take ZeRO stage 2 or below"),
    Check("split_merges", ("adapter_name_or_path", "deepspeed", "create_new_adapter", "ref_model_adapters"),
          lambda v: _merges(v) and zero_stage(v) == 3,
          "adapters are merged into weights that no process holds whole: merge them with prefkit export"),
    Check("split_tokens", ("resize_vocab", "add_tokens", "add_special_tokens", "deepspeed"),
          lambda v: adds_tokens(v) and zero_stage(v) == 3,
          "the vocabulary is resized in weights that no process holds whole: take ZeRO stage 2 or below"),
    Check("split_reward_adapter", ("reward_model_type", "reward_model", "fsdp"),
          lambda v: v.stage == "ppo" and v.reward_model and v.reward_model_type == "lora" and v.fsdp,
          "it scores by the decoder of the policy, which FSDP2 gathers for the policy alone: write "
          "reward_model_type: full or api, or take ZeRO stage 3"),
    Check("split_vllm", ("rollout_engine", "deepspeed", "fsdp"),
          lambda v: v.stage == "ppo" and v.rollout_engine == "vllm" and splits_weights(v),
          "vllm wants weights that no process holds whole: take ZeRO stage 2 or below, or remove it"),
)  # fmt: skip
