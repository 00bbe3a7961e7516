"""Rules across keys, one row each: the only place that rejects a combination."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import NamedTuple

from .errors import Problem

Rule = Callable[[SimpleNamespace], object]


class Check(NamedTuple):
    """A row: which keys it reads, when it is broken, what to say; a message may name any value."""

    name: str
    keys: tuple[str, ...]
    is_broken: Rule
    message: str


class Needs(NamedTuple):
    """A key that says something only where `holds`."""

    key: str
    holds: Rule
    condition: str


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
    return v.pref_loss in ("orpo", "simpo")


def _is_evaluating(v: SimpleNamespace) -> bool:
    return v.do_eval or v.do_predict or v.eval_on_start or v.eval_strategy != "no"


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
    Check("no_training", ("do_train",),
          lambda v: not v.do_train,
          "write do_train: true: this version evaluates only what it has just trained"),
    Check("dataset_missing", ("dataset",),
          lambda v: not v.dataset,
          "missing; training needs the names of data sets, such as dataset: dpo_en_demo"),
    Check("length_grouping", ("train_sampling_strategy",),
          lambda v: v.train_sampling_strategy in ("group_by_length", "batch_rebalance"),
          "not in this version: shared batches have no padding that grouping by length would save"),
    Check("neftune", ("neftune_noise_alpha",),
          lambda v: v.neftune_noise_alpha,
          "noise would make policy and reference differ by chance: remove it"),
    Check("dataset_dir_remote", ("dataset_dir",),
          lambda v: v.dataset_dir == "ONLINE" or v.dataset_dir.startswith("REMOTE:"),
          "data sets are read from a folder in this version: download them into one"),
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
    Check("label_smoothing_loss", ("dpo_label_smoothing", "pref_loss"),
          lambda v: v.dpo_label_smoothing > 0 and v.pref_loss != "sigmoid",
          "is defined for pref_loss: sigmoid only, not for {pref_loss}: remove it"),
    Check("label_smoothing_factor", ("label_smoothing_factor",),
          lambda v: v.label_smoothing_factor > 0,
          "smooths the next token, which a preference loss does not predict: write dpo_label_smoothing"),
    Check("ref_model_reference_free", ("ref_model", "pref_loss"),
          lambda v: v.ref_model and _is_reference_free(v),
          "{pref_loss} is reference-free, so that a reference model would not be read: remove it"),
    Check("bco_reference_free", ("pref_bco_weight", "pref_loss"),
          lambda v: v.pref_bco_weight > 0 and _is_reference_free(v),
          "BCO needs a reference, and {pref_loss} is reference-free: write pref_bco_weight: 0"),
    Check("ld_alpha_reference_free", ("ld_alpha", "pref_loss"),
          lambda v: v.ld_alpha is not None and _is_reference_free(v),
          "is defined for summed log-probs, and {pref_loss} uses their mean per token: remove it"),
    Check("ld_alpha_ipo", ("ld_alpha", "pref_loss", "ipo_average"),
          lambda v: v.ld_alpha is not None and v.pref_loss == "ipo" and v.ipo_average,
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
    Check("deepspeed", ("deepspeed",),
          lambda v: v.deepspeed,
          "not in this version: remove it (deepspeed=null); torchrun trains on several processes with DDP"),
    Check("fsdp", ("fsdp",),
          lambda v: v.fsdp,
          "not in this version: remove it (fsdp=null); torchrun trains on several processes with DDP"),
    Check("prefetch_without_workers", ("dataloader_prefetch_factor", "dataloader_num_workers"),
          lambda v: v.dataloader_prefetch_factor is not None and v.dataloader_num_workers == 0,
          "needs dataloader_num_workers above 0"),
)  # fmt: skip

WARNINGS = (
    Check("simpo_beta", ("pref_beta", "pref_loss"),
          lambda v: v.pref_loss == "simpo" and v.pref_beta < 1,
          "{pref_beta} is small for simpo: its authors use 2 to 10"),
    Check("simpo_margin", ("simpo_gamma", "pref_beta", "pref_loss"),
          lambda v: v.pref_loss == "simpo" and v.simpo_gamma / v.pref_beta > 2,
          "asks for a margin of gamma / beta > 2 nats per token: simpo's authors use 0.3 to 1.6"),
    Check("lora_dropout", ("lora_dropout",),
          lambda v: v.lora_dropout > 0,
          "makes the log-ratio of policy and reference noisy: preference training does better with 0"),
)  # fmt: skip

NEEDS = (
    Needs("simpo_gamma", lambda v: v.pref_loss == "simpo", "pref_loss: simpo"),
    Needs("ipo_average", lambda v: v.pref_loss == "ipo", "pref_loss: ipo"),
    Needs("ld_alpha_reference", lambda v: v.ld_alpha is not None, "ld_alpha"),
    Needs("sample_max_new_tokens", lambda v: v.sample_prompts > 0, "sample_prompts"),
    Needs("num_train_epochs", lambda v: v.max_steps <= 0, "max_steps to be absent"),
    Needs("eval_steps", lambda v: v.eval_strategy == "steps", "eval_strategy: steps"),
    Needs("eval_delay", lambda v: v.eval_strategy != "no", "eval_strategy"),
    Needs("save_steps", lambda v: v.save_strategy == "steps", "save_strategy: steps"),
    Needs("logging_steps", lambda v: v.logging_strategy == "steps" or v.eval_strategy == "steps",
          "logging_strategy: steps"),
    Needs("fsdp_config", lambda v: v.fsdp, "fsdp"),
)  # fmt: skip


def find_errors(values: SimpleNamespace, unknown: Collection[str]) -> list[Problem]:
    """The rows of ERRORS that are broken; rows that read a key of `unknown` value are left out."""
    return _find(ERRORS, values, unknown)


def find_warnings(values: SimpleNamespace, changed: Collection[str]) -> list[str]:
    """What is allowed but hardly meant; `changed` are the keys given with another value than the default."""
    found = [f"{problem.key}: {problem.text}" for problem in _find(WARNINGS, values, ())]
    idle = [row for row in NEEDS if row.key in changed and not row.holds(values)]
    if idle:
        found.append("without effect: " + ", ".join(f"{row.key} (needs {row.condition})" for row in idle))
    return found


def _find(rows: tuple[Check, ...], values: SimpleNamespace, unknown: Collection[str]) -> list[Problem]:
    return [
        Problem(row.keys[0], row.message.format_map(vars(values)))
        for row in rows
        if not any(key in unknown for key in row.keys) and row.is_broken(values)
    ]
