"""The keys of transformers.TrainingArguments reach the Trainer, each as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_pt_utils import AcceleratorConfig

from prefkit.config import load_config
from prefkit.config.errors import UserError
from prefkit.config.foreign import FOREIGN
from prefkit.config.key import Key
from prefkit.config.schema import KEYS
from prefkit.train.arguments import make_training_arguments

# A value that differs from the default, where one cannot be made up from the type, and what it needs beside.
VALUES: dict[str, Any] = {
    "optim_args": "a=1",
    "max_steps": 7,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_ratio": 0.25,
    "optim": "adamw_torch",
    "optim_target_modules": ["attn"],
    "include_for_metrics": ["loss"],
    "metric_for_best_model": "eval_rewards/margins",
    "accelerator_config": {"non_blocking": True},
    "liger_kernel_config": {"rope": True},
    "activation_checkpointing_kwargs": {"determinism_check": "none"},
    "gradient_checkpointing_kwargs": {"determinism_check": "none"},
    "debug": "underflow_overflow",
    "log_level": "info",
    "log_level_replica": "info",
    "logging_steps": 7,
    "save_steps": 7,
    "train_sampling_strategy": "sequential",
    "include_num_input_tokens_seen": "all",
    "fsdp_config": {"min_num_params": 5},
    "dataloader_prefetch_factor": 3,
    "ddp_timeout": 60,
}
BESIDE: dict[str, dict[str, Any]] = {
    "eval_strategy": {"val_size": 0.1},
    "eval_on_start": {"val_size": 0.1},
    "do_eval": {"val_size": 0.1},
    "do_predict": {"val_size": 0.1},
    "do_train": {"do_train": True},
    "load_best_model_at_end": {"val_size": 0.1, "eval_strategy": "steps"},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
    "save_strategy": {"logging_steps": 1},
}
# Arrive under another name, or are decided by this package: each has a test of its own, here or elsewhere.
OTHERWISE = {
    "do_train",  # a run without it is tests/train/test_references.py::test_evaluation_without_training
    "deepspeed",  # refused
    "fsdp",  # refused
    "label_smoothing_factor",  # refused
    "neftune_noise_alpha",  # refused
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs",
    "warmup_ratio",
    "use_cpu",
    "enable_jit_checkpoint",  # a warning says that it has no effect
    "auto_find_batch_size",  # likewise
    "report_to",
    "tf32",  # transformers refuses it without a GPU that has it
    "ddp_backend",  # and this without processes that talk to each other
}
PASSED = [
    name
    for name, key in KEYS.items()
    if key.group == "training" and name not in FOREIGN and name not in OTHERWISE
]


def other_value(key: Key) -> Any:
    """A value that the key takes and that is not its default."""
    if key.name in VALUES:
        return VALUES[key.name]
    if key.choices:
        return next(choice for choice in key.choices if choice != key.default)
    if "bool" in key.types:
        return not key.default
    if "float" in key.types:
        return (key.default or 0) / 2 + 0.25
    if "int" in key.types:
        return (key.default or 0) + 3
    return "some text"


@pytest.mark.parametrize("name", PASSED)
def test_each_key_arrives(write_config: Any, name: str) -> None:
    value = other_value(KEYS[name])
    config = load_config(write_config(**{**BESIDE.get(name, {}), name: value})).config
    arrived = getattr(make_training_arguments(config), name)
    arrived = getattr(arrived, "value", arrived)
    if name == "accelerator_config":
        arrived = {part: getattr(arrived, part) for part in value}
    assert arrived == value or arrived == [value]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("split_batches", True),
        ("dispatch_batches", True),
        ("even_batches", False),
        ("use_seedable_sampler", False),
    ],
)
def test_accelerate_leaves_batches_alone(write_config: Any, name: str, value: bool) -> None:
    config = load_config(write_config(accelerator_config={name: value})).config
    with pytest.raises(UserError, match=f"accelerator_config: {name} has no place here"):
        make_training_arguments(config)


def test_checkpointing_has_one_switch_and_two_names(write_config: Any, monkeypatch: Any) -> None:
    """On a CPU it is off unless it is asked for: by gradient_checkpointing, activation_checkpointing or
    disable_gradient_checkpointing."""

    def made(**keys: Any) -> Any:
        return make_training_arguments(load_config(write_config(use_cpu=True, **keys)).config)

    assert made().activation_checkpointing is False
    assert made(disable_gradient_checkpointing=False).activation_checkpointing is True
    assert made(disable_gradient_checkpointing=True).activation_checkpointing is False
    assert made(gradient_checkpointing=True).activation_checkpointing is True
    assert made(activation_checkpointing=True).activation_checkpointing is True
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        kwargs = made(**{name: {"determinism_check": "none"}}).activation_checkpointing_kwargs
        assert kwargs == {"use_reentrant": False, "determinism_check": "none"}
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    config = load_config(write_config()).config
    monkeypatch.setattr("transformers.TrainingArguments", lambda **given: _Given(given))
    args: Any = make_training_arguments(config)
    assert (args.given["activation_checkpointing"], args.given["use_cpu"]) == (True, False)


class _Given:
    """Arguments of a machine that is not here."""

    n_gpu = 1
    accelerator_config = AcceleratorConfig()

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given


@pytest.mark.parametrize(("name", "value"), [("tf32", True), ("ddp_backend", "gloo")])
def test_what_transformers_refuses_here_arrives_too(
    write_config: Any, monkeypatch: Any, name: str, value: Any
) -> None:
    config = load_config(write_config(**{name: value})).config
    monkeypatch.setattr("transformers.TrainingArguments", lambda **given: _Given(given))
    args: Any = make_training_arguments(config)
    assert args.given[name] == value


def test_a_tracker_must_be_installed(write_config: Any, monkeypatch: Any) -> None:
    config = load_config(write_config(report_to=["tensorboard", "wandb"])).config
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "wandb" or None)
    with pytest.raises(UserError, match="report_to: tensorboard is not installed: pip install 'tensorboard'"):
        make_training_arguments(config)
    monkeypatch.undo()
    config.training["report_to"] = ["flyte"]
    assert make_training_arguments(config).report_to == ["flyte"]


def test_warmup_ratio_is_a_share_of_the_steps(write_config: Any) -> None:
    args = make_training_arguments(load_config(write_config(warmup_ratio=0.25)).config)
    assert args.get_warmup_steps(40) == 10


def test_disable_shuffling_is_the_sequential_sampler(write_config: Any) -> None:
    config = load_config(write_config(disable_shuffling=True)).config
    assert make_training_arguments(config).train_sampling_strategy == "sequential"


def test_what_the_trainer_may_not_decide(write_config: Path) -> None:
    given = {"remove_unused_columns": True, "disable_tqdm": False, "logging_nan_inf_filter": True}
    given |= {"enable_jit_checkpoint": True, "auto_find_batch_size": True}
    args = make_training_arguments(load_config(write_config(**given)).config)  # type: ignore[operator]
    assert {name for name in given if getattr(args, name)} == {"disable_tqdm"}
