"""Rules of a run across keys, one row each.

Those of ppo stand in `ppo_checks`, those of other uses in `uses`; which keys a stage reads says
`Key.stages`.
"""

from __future__ import annotations

from types import SimpleNamespace

from .engine_checks import ENGINE_ERRORS
from .key import STAGES
from .ppo_checks import PPO_ERRORS, PPO_NEEDS
from .rules import Check, Needs, Rule, Rules, adds_tokens, is_lora, is_quantized
from .schema import KEYS, KTO_METRICS, METRICS, PART_METRICS, PPO_METRICS, REWARD_METRICS, RunConfig, keys_of

# Names that transformers' report_to knows; a test compares them.
_TRACKERS = {
    *(
        "all",
        "none",
        "azure_ml",
        "clearml",
        "codecarbon",
        "comet_ml",
        "dagshub",
        "dvclive",
        "flyte",
        "mlflow",
    ),
    *("kubeflow", "mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"),
}


def _is_reference_free(v: SimpleNamespace) -> bool:
    return v.stage == "dpo" and v.pref_loss in ("orpo", "simpo")


def _is_evaluating(v: SimpleNamespace) -> bool:
    return v.do_eval or v.do_predict or v.eval_on_start or v.eval_strategy != "no"


def _metric(v: SimpleNamespace) -> str:
    """`metric_for_best_model` without its prefix, which names a data set with `eval_on_each_dataset`."""
    metric = str(v.metric_for_best_model or "loss").removeprefix("eval_")
    if not v.eval_on_each_dataset:
        return metric
    names = sorted(v.eval_dataset, key=len, reverse=True)
    return next((metric.removeprefix(f"{name}_") for name in names if metric.startswith(f"{name}_")), "")


def _is_no_metric_of_kto(v: SimpleNamespace) -> bool:
    if v.eval_on_each_dataset and not v.metric_for_best_model:
        return False
    return _metric(v) not in KTO_METRICS


def _follows_metric(v: SimpleNamespace) -> bool:
    """Whether evaluations decide about training or saving."""
    return bool(
        v.load_best_model_at_end
        or v.early_stopping_steps
        or v.save_strategy == "best"
        or v.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    )


def _starts_adapter(v: SimpleNamespace) -> bool:
    """Whether the adapter that is trained is a new one, of the shape that the YAML gives it."""
    return is_lora(v) and bool(v.create_new_adapter or not v.adapter_name_or_path)


def _is_lost_on(key: str) -> Rule:
    """A rule: the key is given, and only LoRA knows it."""
    return lambda v: getattr(v, key) and not is_lora(v)


def _has_held_out(v: SimpleNamespace) -> bool:
    return bool(v.val_size > 0 or v.eval_dataset)


def _is_uneven(v: SimpleNamespace) -> bool:
    """Whether a checkpoint may be saved that was not evaluated."""
    if not v.load_best_model_at_end or (v.eval_strategy, v.save_strategy) != ("steps", "steps"):
        return False
    eval_steps = v.eval_steps or v.logging_steps
    if not eval_steps or not v.save_steps or (eval_steps < 1) != (v.save_steps < 1):
        return True
    ratio = v.save_steps / eval_steps
    return abs(ratio - round(ratio)) > 1e-9 or ratio < 1


ERRORS = (
    Check("report_to", ("report_to",),
          lambda v: not _TRACKERS.issuperset(
              [v.report_to] if isinstance(v.report_to, str) else v.report_to or ()),
          f"one or more of {', '.join(sorted(_TRACKERS))} is wanted"),
    Check("no_training", ("do_train", "adapter_name_or_path", "ref_model", "stage"),
          lambda v: v.stage in ("dpo", "kto") and not v.do_train
          and not v.adapter_name_or_path and not v.ref_model,
          "write do_train: true; to evaluate without training, name the adapter_name_or_path to measure "
          "against the model without it, or a ref_model"),
    Check("nothing_to_do", ("do_train", "do_eval", "do_predict", "eval_dataset"),
          lambda v: not v.do_train and not ((v.do_eval or v.do_predict) and v.eval_dataset),
          "without training an eval_dataset is measured: write one, with do_eval: true or do_predict: true"),
    Check("dataset_missing", ("dataset", "do_train"),
          lambda v: v.do_train and not v.dataset,
          "missing; training needs the names of data sets, such as dataset: dpo_en_demo"),
    Check("length_grouping", ("train_sampling_strategy",),
          lambda v: v.train_sampling_strategy in ("group_by_length", "batch_rebalance"),
          "not in this version: shared batches have no padding that grouping by length would save"),
    Check("neftune", ("neftune_noise_alpha",),
          lambda v: v.neftune_noise_alpha,
          "noise would make policy and reference differ by chance: remove it"),
    Check("val_size_one", ("val_size",),
          lambda v: v.val_size == 1,
          "1 may mean all rows or one row: write a fraction below 1 or a count above 1"),
    Check("val_size_count", ("val_size",),
          lambda v: v.val_size > 1 and v.val_size != int(v.val_size),
          "above 1 it counts rows: write a whole number, not {val_size}"),
    Check("held_out_twice", ("val_size", "eval_dataset"),
          lambda v: v.val_size > 0 and v.eval_dataset,
          "eval_dataset already says what is held out: keep one of the two"),
    Check("held_out_missing", ("eval_dataset", "val_size", "eval_strategy", "do_eval", "do_predict"),
          lambda v: (_is_evaluating(v) or v.load_best_model_at_end) and not _has_held_out(v),
          "missing; do_eval, do_predict, eval_strategy, eval_on_start and load_best_model_at_end need it, "
          "or val_size"),
    Check("sample_prompts_held_out", ("sample_prompts", "val_size", "eval_dataset"),
          lambda v: v.sample_prompts > 0 and not _has_held_out(v),
          "the prompts come from held-out rows: write val_size or eval_dataset"),
    Check("eval_on_each", ("eval_on_each_dataset", "eval_dataset"),
          lambda v: v.eval_on_each_dataset and len(v.eval_dataset) < 2,
          "needs several: write eval_dataset: NAME,NAME, or remove it"),
    Check("interleave_probs_concat", ("interleave_probs", "mix_strategy"),
          lambda v: v.interleave_probs and v.mix_strategy == "concat",
          "needs data sets that are mixed in turn: write mix_strategy: interleave_under, or remove it"),
    Check("interleave_probs_length", ("interleave_probs", "mix_strategy", "dataset"),
          lambda v: v.interleave_probs and v.mix_strategy != "concat"
          and len(v.interleave_probs) != len(v.dataset),
          "needs one number for each data set of dataset"),
    Check("interleave_probs_sum", ("interleave_probs",),
          lambda v: v.interleave_probs and abs(sum(v.interleave_probs) - 1) > 0.01,
          "are probabilities: write numbers whose sum is 1"),
    Check("streaming_steps", ("streaming", "max_steps", "do_train"),
          lambda v: v.streaming and v.do_train and v.max_steps <= 0,
          "needs the number of steps, since that of the rows is not known: write max_steps: 1000"),
    Check("streaming_val_size", ("val_size", "streaming"),
          lambda v: v.streaming and 0 < v.val_size < 1,
          "a share of the rows is not known while streaming: write a count, such as 100, or eval_dataset"),
    Check("streaming_max_samples", ("max_samples", "streaming"),
          lambda v: v.streaming and v.max_samples is not None,
          "streaming ends with max_steps, however many rows there are: remove it"),
    Check("streaming_ref_cache", ("ref_cache", "streaming"),
          lambda v: v.streaming and v.ref_cache,
          "rows are seen once while streaming: remove it, or streaming"),
    Check("kto_weights", ("kto_chosen_weight", "kto_rejected_weight", "stage"),
          lambda v: v.stage == "kto" and v.kto_chosen_weight == v.kto_rejected_weight == 0,
          "with kto_rejected_weight: 0 nothing is learnt: write a weight above 0"),
    *PPO_ERRORS,
    Check("label_smoothing_loss", ("dpo_label_smoothing", "pref_loss", "stage"),
          lambda v: v.stage == "dpo" and v.dpo_label_smoothing > 0 and v.pref_loss != "sigmoid",
          "is defined for pref_loss: sigmoid only, not for {pref_loss}: remove it"),
    Check("label_smoothing_factor", ("label_smoothing_factor",),
          lambda v: v.label_smoothing_factor > 0,
          "smooths the next token, which a preference loss does not predict: write dpo_label_smoothing"),
    Check("ref_model_reference_free", ("ref_model", "pref_loss", "stage"),
          lambda v: v.ref_model and _is_reference_free(v),
          "{pref_loss} is reference-free, so that a reference model would not be read: remove it"),
    Check("ref_adapters_alone", ("ref_model_adapters", "ref_model"),
          lambda v: v.ref_model_adapters and not v.ref_model,
          "needs ref_model, the model that these adapters belong to"),
    Check("ref_quantization_alone", ("ref_model_quantization_bit", "ref_model"),
          lambda v: v.ref_model_quantization_bit is not None and not v.ref_model,
          "needs ref_model: the reference is the model that is trained, in the format that it has"),
    Check("ref_quantization_adapters", ("ref_model_quantization_bit", "ref_model_adapters"),
          lambda v: v.ref_model_quantization_bit is not None and v.ref_model_adapters,
          "adapters cannot be merged into quantised weights: merge them first with prefkit export"),
    Check("ref_quantization_bits", ("ref_model_quantization_bit",),
          lambda v: v.ref_model_quantization_bit not in (None, 4, 8), "must be 4 or 8"),
    Check("quantization_bits", ("quantization_bit",),
          lambda v: v.quantization_bit not in (None, 4, 8), "must be 4 or 8"),
    Check("quantization_tuning", ("quantization_bit", "finetuning_type"),
          lambda v: is_quantized(v) and not is_lora(v),
          "quantised weights cannot be trained: write finetuning_type: lora"),
    Check("quantization_adapters", ("quantization_bit", "adapter_name_or_path", "create_new_adapter"),
          lambda v: is_quantized(v) and (len(v.adapter_name_or_path) > 1 or
                                          (v.adapter_name_or_path and v.create_new_adapter)),
          "adapters cannot be merged into quantised weights: merge them first with prefkit export"),
    Check("quantization_tokens", ("quantization_bit", "resize_vocab", "add_tokens", "add_special_tokens"),
          lambda v: is_quantized(v) and adds_tokens(v),
          "the vocabulary of a quantised model cannot be resized: remove it, or resize_vocab, add_tokens and "
          "add_special_tokens"),
    Check("quantization_pissa", ("quantization_bit", "pissa_init"),
          lambda v: is_quantized(v) and v.pissa_init,
          "pissa_init decomposes the weights, and these are quantised: remove one of the two"),
    Check("pure_bf16", ("pure_bf16", "fp16", "dtype"),
          lambda v: v.pure_bf16 and (v.fp16 or v.dtype not in ("auto", "bfloat16")),
          "holds every weight in bfloat16: remove it, or fp16 and dtype: {dtype}"),
    Check("adapter_tuning", ("adapter_name_or_path", "finetuning_type"),
          lambda v: v.adapter_name_or_path and not is_lora(v),
          "an adapter is trained on with finetuning_type: lora only; for {finetuning_type}, merge it first "
          "with prefkit export"),
    Check("create_new_adapter", ("create_new_adapter", "adapter_name_or_path"),
          lambda v: v.create_new_adapter and not v.adapter_name_or_path,
          "needs the adapter_name_or_path to merge; without one a new adapter is trained anyway"),
    Check("create_new_adapter_untrained",
          ("create_new_adapter", "do_train", "adapter_name_or_path", "ref_model"),
          lambda v: v.create_new_adapter and not v.do_train and v.adapter_name_or_path and not v.ref_model,
          "without do_train the model would be measured against itself: remove it, or name a ref_model"),
    Check("lora_target",
          ("lora_target", "finetuning_type", "create_new_adapter", "adapter_name_or_path"),
          lambda v: _starts_adapter(v) and not v.lora_target,
          "names no module: write all, or remove it"),
    *(
        Check(f"{key}_tuning", (key, "finetuning_type"), _is_lost_on(key),
              "needs finetuning_type: lora, not {finetuning_type}: remove it")
        for key in ("use_rslora", "use_dora", "pissa_init", "loraplus_lr_ratio")
    ),
    Check("pissa_adapter", ("pissa_init", "adapter_name_or_path", "create_new_adapter"),
          lambda v: v.pissa_init and v.adapter_name_or_path and not v.create_new_adapter,
          "starts a new adapter: write create_new_adapter: true, or remove it"),
    Check("pissa_dora", ("pissa_init", "use_dora"),
          lambda v: v.pissa_init and v.use_dora,
          "the result could not be written as plain LoRA: keep one of pissa_init and use_dora"),
    Check("pissa_iter", ("pissa_iter",), lambda v: v.pissa_iter == 0,
          "must be -1, for an exact decomposition, or above 0"),
    Check("freeze_layers", ("freeze_trainable_layers", "freeze_extra_modules", "finetuning_type"),
          lambda v: v.finetuning_type == "freeze" and not v.freeze_trainable_layers
          and not v.freeze_extra_modules,
          "0 trains nothing: write how many layers, or freeze_extra_modules"),
    Check("freeze_modules", ("freeze_trainable_modules", "finetuning_type"),
          lambda v: v.finetuning_type == "freeze" and not v.freeze_trainable_modules,
          "names no module: write all, or remove it"),
    Check("image_pixels", ("image_max_pixels", "image_min_pixels"),
          lambda v: v.image_min_pixels > v.image_max_pixels,
          "is below image_min_pixels, 1024 unless it is set: write a smaller image_min_pixels too"),
    Check("video_pixels", ("video_max_pixels", "video_min_pixels"),
          lambda v: v.video_min_pixels > v.video_max_pixels,
          "is below video_min_pixels, 256 unless it is set: write a smaller video_min_pixels too"),
    Check("freeze_all", ("freeze_language_model", "freeze_vision_tower", "freeze_multi_modal_projector"),
          lambda v: v.freeze_language_model and v.freeze_vision_tower and v.freeze_multi_modal_projector,
          "nothing is left that is trained: write freeze_vision_tower: false or "
          "freeze_multi_modal_projector: false"),
    Check("freeze_language", ("freeze_language_model", "finetuning_type"),
          lambda v: v.freeze_language_model and v.finetuning_type == "freeze",
          "finetuning_type: freeze trains layers of the language model: write lora or full"),
    Check("early_stopping_eval", ("early_stopping_steps", "eval_strategy"),
          lambda v: v.early_stopping_steps and v.eval_strategy == "no",
          "watches the evaluations: write eval_strategy: steps or epoch"),
    Check("best_metric", ("metric_for_best_model", "stage", "eval_on_each_dataset"),
          lambda v: v.stage == "dpo" and not v.eval_on_each_dataset and _metric(v) not in METRICS,
          f"is none of the metrics of an evaluation: write one of {', '.join(METRICS)}"),
    Check("best_metric_kto", ("metric_for_best_model", "stage"),
          lambda v: v.stage == "kto" and _is_no_metric_of_kto(v),
          "is none of the metrics of an evaluation (after eval_NAME_ with eval_on_each_dataset): write one "
          f"of {', '.join(KTO_METRICS)}"),
    Check("best_metric_each", ("metric_for_best_model", "stage", "eval_on_each_dataset", "eval_dataset"),
          lambda v: v.stage == "dpo" and v.eval_on_each_dataset and v.metric_for_best_model
          and _metric(v) not in METRICS,
          "with eval_on_each_dataset it is eval_NAME_METRIC: a NAME of eval_dataset, and for METRIC one of "
          f"{', '.join(METRICS)}"),
    Check("best_metric_missing", ("metric_for_best_model", "eval_on_each_dataset", "eval_dataset"),
          lambda v: v.eval_on_each_dataset and _follows_metric(v) and not v.metric_for_best_model,
          "missing; with eval_on_each_dataset it says which data set counts, as eval_NAME_loss with a NAME "
          "of eval_dataset"),
    Check("best_metric_loss", ("metric_for_best_model", "pref_loss", "stage", "eval_on_each_dataset"),
          lambda v: v.stage == "dpo" and _metric(v) in PART_METRICS
          and v.pref_loss not in PART_METRICS[_metric(v)],
          "is not measured with pref_loss: {pref_loss}; the loss is"),
    Check("best_metric_rm", ("metric_for_best_model", "stage", "eval_on_each_dataset"),
          lambda v: v.stage == "rm" and (v.metric_for_best_model or not v.eval_on_each_dataset)
          and _metric(v) not in REWARD_METRICS,
          f"with stage: rm it is one of {', '.join(REWARD_METRICS)}, of a data set eval_NAME_METRIC"),
    Check("best_metric_ppo", ("metric_for_best_model", "stage", "eval_on_each_dataset"),
          lambda v: v.stage == "ppo" and v.metric_for_best_model and _metric(v) not in PPO_METRICS,
          f"with stage: ppo it is one of {', '.join(PPO_METRICS)}, of a data set eval_NAME_METRIC"),
    Check("router_loss_rm", ("moe_aux_loss_coef", "stage"),
          lambda v: v.stage == "rm" and v.moe_aux_loss_coef,
          "a reward model is trained without the load-balancing loss: remove it"),
    Check("bco_reference_free", ("pref_bco_weight", "pref_loss", "stage"),
          lambda v: v.pref_bco_weight > 0 and _is_reference_free(v),
          "BCO needs a reference, and {pref_loss} is reference-free: write pref_bco_weight: 0"),
    Check("ld_alpha_reference_free", ("ld_alpha", "pref_loss", "stage"),
          lambda v: v.ld_alpha is not None and _is_reference_free(v),
          "is defined for summed log-probs, and {pref_loss} uses their mean per token: remove it"),
    Check("ld_alpha_ipo", ("ld_alpha", "pref_loss", "ipo_average", "stage"),
          lambda v: v.stage == "dpo" and v.ld_alpha is not None and v.pref_loss == "ipo" and v.ipo_average,
          "is defined for summed log-probs, and ipo uses their mean per token: remove it, or write "
          "ipo_average: false"),
    Check("half_precision", ("fp16", "bf16"),
          lambda v: v.fp16 and v.bf16, "keep one of fp16 and bf16"),
    Check("half_precision_eval", ("fp16_full_eval", "bf16_full_eval"),
          lambda v: v.fp16_full_eval and v.bf16_full_eval,
          "keep one of fp16_full_eval and bf16_full_eval"),
    Check("no_steps", ("num_train_epochs", "max_steps"),
          lambda v: v.num_train_epochs == 0 and v.max_steps <= 0,
          "training needs num_train_epochs or max_steps above 0"),
    Check("warmup_twice", ("warmup_ratio", "warmup_steps"),
          lambda v: v.warmup_ratio > 0 and v.warmup_steps > 0,
          "keep one of warmup_ratio and warmup_steps"),
    Check("logging_steps_zero", ("logging_steps", "logging_strategy"),
          lambda v: v.logging_strategy == "steps" and v.logging_steps == 0,
          'must be above 0; write logging_strategy: "no" to log nothing'),
    Check("save_steps_zero", ("save_steps", "save_strategy"),
          lambda v: v.save_strategy == "steps" and v.save_steps == 0,
          'must be above 0; write save_strategy: "no" to save nothing on the way'),
    Check("best_model_strategy", ("load_best_model_at_end", "save_strategy", "eval_strategy"),
          lambda v: v.load_best_model_at_end and v.save_strategy not in ("best", v.eval_strategy),
          "needs every checkpoint evaluated: write eval_strategy: {save_strategy}, as save_strategy has "
          "it, or save_strategy: best"),
    Check("best_model_steps", ("load_best_model_at_end", "save_steps", "eval_steps", "logging_steps"),
          _is_uneven,
          "needs every checkpoint evaluated: make save_steps a multiple of eval_steps (which is "
          "logging_steps where absent)"),
    Check("scheduler_without_eval", ("lr_scheduler_type", "eval_strategy"),
          lambda v: v.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") and v.eval_strategy == "no",
          "{lr_scheduler_type} follows the evaluation loss: write eval_strategy: epoch"),
    Check("checkpointing", ("disable_gradient_checkpointing", "activation_checkpointing",
                            "gradient_checkpointing"),
          lambda v: v.disable_gradient_checkpointing
          and (v.gradient_checkpointing or v.activation_checkpointing),
          "contradicts activation_checkpointing (or gradient_checkpointing): keep one"),
    Check("checkpointing_alias", ("gradient_checkpointing", "activation_checkpointing"),
          lambda v: None not in (v.gradient_checkpointing, v.activation_checkpointing)
          and v.gradient_checkpointing != v.activation_checkpointing,
          "is the old name of activation_checkpointing, which says the opposite: keep one"),
    *ENGINE_ERRORS,
    Check("prefetch_without_workers", ("dataloader_prefetch_factor", "dataloader_num_workers"),
          lambda v: v.dataloader_prefetch_factor is not None and v.dataloader_num_workers == 0,
          "needs dataloader_num_workers above 0"),
)  # fmt: skip

WARNINGS = (
    Check("simpo_beta", ("pref_beta", "pref_loss", "stage"),
          lambda v: v.stage == "dpo" and v.pref_loss == "simpo" and v.pref_beta < 1,
          "{pref_beta} is small for simpo: its authors use 2 to 10"),
    Check("simpo_margin", ("simpo_gamma", "pref_beta", "pref_loss", "stage"),
          lambda v: v.stage == "dpo" and v.pref_loss == "simpo" and v.simpo_gamma / v.pref_beta > 2,
          "asks for a margin of gamma / beta > 2 nats per token: simpo's authors use 0.3 to 1.6"),
    Check("lora_dropout", ("lora_dropout", "finetuning_type", "stage"),
          lambda v: v.stage != "rm" and v.lora_dropout > 0 and _starts_adapter(v),
          "makes the log-ratio of policy and reference noisy: preference training does better with 0"),
    Check("early_stopping_last", ("early_stopping_steps", "load_best_model_at_end"),
          lambda v: v.early_stopping_steps and not v.load_best_model_at_end,
          "the last model is saved, not the best: load_best_model_at_end: true saves that"),
    Check("jit_checkpoint", ("enable_jit_checkpoint",), lambda v: v.enable_jit_checkpoint,
          "has no effect: a run saves a checkpoint on SIGTERM anyway, see docs/reliability.md"),
    Check("auto_batch_size", ("auto_find_batch_size",), lambda v: v.auto_find_batch_size,
          "has no effect: what does not fit into memory is halved anyway, and the batch stays the same"),
    Check("data_skip", ("ignore_data_skip",), lambda v: v.ignore_data_skip,
          "a run that is resumed sees rows again, and ends otherwise than one that was never stopped"),
)  # fmt: skip


def _needs_stage(key: str) -> Needs:
    stages = KEYS[key].stages
    return Needs(key, lambda v: v.stage in stages, f"stage: {' or '.join(stages)}")


OF_STAGES = tuple(_needs_stage(key) for key in keys_of(RunConfig) if KEYS[key].stages != STAGES)
NEEDS = (
    Needs("simpo_gamma", lambda v: v.pref_loss == "simpo", "pref_loss: simpo"),
    Needs("ipo_average", lambda v: v.pref_loss == "ipo", "pref_loss: ipo"),
    Needs("ld_alpha_reference", lambda v: v.ld_alpha is not None, "ld_alpha"),
    Needs("mix_strategy", lambda v: len(v.dataset) > 1, "several data sets"),
    Needs("buffer_size", lambda v: v.streaming and not v.disable_shuffling,
          "streaming, and disable_shuffling to be absent"),
    *(Needs(key, lambda v: not v.streaming, "streaming to be absent")
      for key in ("tokenized_path", "overwrite_cache", "preprocessing_num_workers")),
    *PPO_NEEDS,
    Needs("dataset", lambda v: v.do_train, "do_train"),
    Needs("sample_prompts", lambda v: v.do_train, "do_train"),
    Needs("sample_max_new_tokens", lambda v: v.sample_prompts > 0, "sample_prompts"),
    Needs("num_train_epochs", lambda v: v.max_steps <= 0, "max_steps to be absent"),
    Needs("eval_steps", lambda v: v.eval_strategy == "steps", "eval_strategy: steps"),
    Needs("eval_delay", lambda v: v.eval_strategy != "no", "eval_strategy"),
    Needs("save_steps", lambda v: v.save_strategy == "steps", "save_strategy: steps"),
    Needs("logging_steps", lambda v: v.logging_strategy == "steps" or v.eval_strategy == "steps",
          "logging_strategy: steps"),
    Needs("fsdp_config", lambda v: v.fsdp, "fsdp"),
    Needs("ref_cache", lambda v: not _is_reference_free(v), "a pref_loss with a reference"),
    *(Needs(key, lambda v: 4 in (v.quantization_bit, v.ref_model_quantization_bit), "quantization_bit: 4")
      for key in ("quantization_type", "double_quantization")),
    *(Needs(key, _starts_adapter, "finetuning_type: lora and a new adapter")
      for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target",
                  "use_rslora", "use_dora")),
    *(Needs(key, lambda v: v.finetuning_type == "freeze", "finetuning_type: freeze")
      for key in ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")),
    Needs("pissa_iter", lambda v: v.pissa_init, "pissa_init"),
    Needs("loraplus_lr_embedding", lambda v: v.loraplus_lr_ratio, "loraplus_lr_ratio"),
)  # fmt: skip

TRAINING = Rules(ERRORS, WARNINGS, (*OF_STAGES, *NEEDS))
