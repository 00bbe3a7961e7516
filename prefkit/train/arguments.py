"""From our config to transformers.TrainingArguments."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from prefkit.config.engines import stage_of
from prefkit.config.errors import UserError
from prefkit.config.schema import RunConfig
from prefkit.train import fully_sharded
from prefkit.train.strategy import wants_deepspeed, wants_fsdp

if TYPE_CHECKING:
    from transformers import TrainingArguments

# What the Trainer must not decide by itself, whatever the YAML says.
_FIXED: dict[str, Any] = {
    "remove_unused_columns": False,  # our batches are no rows of a table
    "label_names": [],
    "disable_tqdm": True,  # our own progress bar
    "logging_nan_inf_filter": False,  # it hides a loss that is not a number
    "enable_jit_checkpoint": False,  # `SaveAndStop` does it, at a step boundary
    "auto_find_batch_size": False,  # it changes the batch
}


# Trackers that `report_to` may name, and what to install for each.
_TRACKERS = {
    "wandb": "prefkit[wandb]",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "mlflow": "mlflow",
}


def make_training_arguments(config: RunConfig) -> TrainingArguments:
    """The Trainer's arguments, with defaults for the machine: CPU when there is no accelerator, activation
    checkpointing on an accelerator only.

    Raises `UserError` when a tracker is not installed or transformers refuses the combination.
    """
    from transformers import TrainingArguments

    _check_trackers(config.training.get("report_to"))

    given = dict(config.training)
    has_accelerator = torch.accelerator.is_available() and not given.get("use_cpu")
    # The old name of activation checkpointing is deprecated, and used by every config there is.
    kwargs = given.pop("gradient_checkpointing_kwargs", None) or given.get("activation_checkpointing_kwargs")
    kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
    asked = given.pop("gradient_checkpointing", None)
    if asked is not None:
        given["activation_checkpointing"] = asked
    elif config.model.disable_gradient_checkpointing is not None:
        given["activation_checkpointing"] = not config.model.disable_gradient_checkpointing
    given.setdefault("activation_checkpointing", has_accelerator)
    given["activation_checkpointing_kwargs"] = {"use_reentrant": False, **(kwargs or {})}
    given.setdefault("log_level", "error")
    given.setdefault("log_level_replica", "error")
    given.setdefault("ddp_find_unused_parameters", False)
    if "LOCAL_RANK" in os.environ and not has_accelerator:
        given.setdefault("ddp_backend", "gloo")
    if config.method.stage == "ppo":
        given.setdefault("logging_steps", 1)  # a rollout takes long
        if (
            config.training.get("load_best_model_at_end")
            or config.method.early_stopping_steps
            or (config.training.get("save_strategy") == "best")
        ):
            given.setdefault("metric_for_best_model", "score")
    if config.data.disable_shuffling:
        given["train_sampling_strategy"] = "sequential"
    if stage_of(given.get("deepspeed")) == 0:
        given.pop("deepspeed")  # it splits nothing, and is what torch does among several processes
    if given.get("deepspeed") or wants_deepspeed(os.environ):
        from prefkit.train.zero import start_deepspeed

        start_deepspeed(on_cpu=not has_accelerator)
    if given.get("fsdp") or wants_fsdp(os.environ):
        fully_sharded.check_fsdp(has_accelerator, int(os.environ.get("WORLD_SIZE", "1")))
        fully_sharded.check_accelerate_config(os.environ)
        given["accelerator_config"] = fully_sharded.sum_as_they_come(given.get("accelerator_config"))
    if given.get("fsdp"):
        given["fsdp_config"] = fully_sharded.settings_of_fsdp(given.get("fsdp_config"), given["fsdp"])
    try:
        args = TrainingArguments(**{**given, **_FIXED, "use_cpu": not has_accelerator})
    except (ValueError, ImportError) as error:
        raise UserError(f"transformers refuses these training arguments: {error}") from error
    _check_accelerator(args)
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to this process, which can use one. `prefkit train` starts a "
            "process for each, unless a launcher has started it: have that start as many, or set "
            "CUDA_VISIBLE_DEVICES to one of them."
        )
    return args


def _check_accelerator(args: TrainingArguments) -> None:
    """Raises `UserError` for what accelerate would do to batches, which are dealt to processes here."""
    config: Any = args.accelerator_config
    wanted = {"split_batches": False, "even_batches": True, "use_seedable_sampler": True}
    changed = [name for name, value in wanted.items() if getattr(config, name) is not value]
    changed += ["dispatch_batches"] if config.dispatch_batches else []
    if changed:
        raise UserError(
            f"accelerator_config: {', '.join(changed)} has no place here, since rows are dealt to processes "
            "by their cost, each once, in an order drawn by data_seed: remove it. "
            "per_device_train_batch_size is that of one process."
        )


def without_engine(config: RunConfig) -> RunConfig:
    """The config for one process that splits nothing among others."""
    engines = {"deepspeed", "fsdp", "fsdp_config"}
    kept = {name: value for name, value in config.training.items() if name not in engines}
    return replace(config, training=kept)


def _check_trackers(report_to: str | list[str] | None) -> None:
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in _TRACKERS and importlib.util.find_spec(name) is None:
            raise UserError(f"report_to: {name} is not installed: pip install '{_TRACKERS[name]}'")
