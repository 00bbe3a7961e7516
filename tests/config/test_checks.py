"""Every rule across keys has a YAML that breaks it."""

from pathlib import Path

import pytest

from prefkit.config import ConfigError, load_config
from prefkit.config.checks import ERRORS, NEEDS, WARNINGS
from prefkit.config.foreign import FOREIGN
from prefkit.config.schema import KEYS

BASE = {
    "model_name_or_path": "m",
    "stage": "dpo",
    "do_train": "true",
    "dataset": "pairs",
    "output_dir": "out",
}

BROKEN = {
    "report_to": "report_to: wnadb",
    "no_training": "do_train: false\ndo_eval: true\nval_size: 0.1",
    "dataset_missing": "dataset: null",
    "length_grouping": "train_sampling_strategy: group_by_length",
    "neftune": "neftune_noise_alpha: 5",
    "dataset_dir_remote": "dataset_dir: REMOTE:user/data",
    "val_size_one": "val_size: 1",
    "val_size_count": "val_size: 1.5",
    "held_out_twice": "val_size: 0.1\neval_dataset: more",
    "held_out_missing": "eval_strategy: epoch",
    "sample_prompts_held_out": "sample_prompts: 4",
    "label_smoothing_loss": "pref_loss: hinge\ndpo_label_smoothing: 0.1",
    "label_smoothing_factor": "label_smoothing_factor: 0.1",
    "ref_model_reference_free": "pref_loss: orpo\nref_model: other",
    "bco_reference_free": "pref_loss: simpo\npref_beta: 2\npref_bco_weight: 1",
    "ld_alpha_reference_free": "pref_loss: orpo\nld_alpha: 0.5",
    "ld_alpha_ipo": "pref_loss: ipo\nld_alpha: 0.5",
    "half_precision": "fp16: true\nbf16: true",
    "half_precision_eval": "fp16_full_eval: true\nbf16_full_eval: true",
    "no_steps": "num_train_epochs: 0",
    "warmup_twice": "warmup_ratio: 0.1\nwarmup_steps: 20",
    "logging_steps_zero": "logging_steps: 0",
    "save_steps_zero": "save_steps: 0",
    "best_model_strategy": "load_best_model_at_end: true\nval_size: 0.1\neval_strategy: epoch",
    "best_model_steps": "load_best_model_at_end: true\nval_size: 0.1\neval_strategy: steps\neval_steps: 300",
    "scheduler_without_eval": "lr_scheduler_type: reduce_lr_on_plateau",
    "checkpointing": "disable_gradient_checkpointing: true\ngradient_checkpointing: true",
    "checkpointing_alias": "gradient_checkpointing: true\nactivation_checkpointing: false",
    "deepspeed": "deepspeed: ds.json",
    "fsdp": "fsdp: full_shard",
    "prefetch_without_workers": "dataloader_prefetch_factor: 2",
}

WARNED = {
    "simpo_beta": "pref_loss: simpo\npref_beta: 0.9",
    "simpo_margin": "pref_loss: simpo\npref_beta: 1\nsimpo_gamma: 2.5",
    "lora_dropout": "lora_dropout: 0.1",
}

ALLOWED = [
    "pref_loss: ipo\nipo_average: false\nld_alpha: 0.5",
    "pref_loss: hinge\nld_alpha: 0.5",
    "pref_loss: orpo\nref_model: null",
    "pref_loss: sigmoid\ndpo_label_smoothing: 0.49",
    "pref_loss: simpo\npref_beta: 2.0\nsimpo_gamma: 0.5",
    "val_size: 100\nsample_prompts: 4",
    "max_steps: 5",
    "num_train_epochs: 0\nmax_steps: 5\nlogging_steps: 1",
    "load_best_model_at_end: true\nval_size: 0.1\neval_strategy: steps\neval_steps: 0.1\nsave_steps: 0.3",
    "load_best_model_at_end: true\nval_size: 0.1\neval_strategy: steps",
    "load_best_model_at_end: true\nval_size: 0.1\neval_strategy: epoch\nsave_strategy: best",
    "disable_gradient_checkpointing: false\ngradient_checkpointing: true",
    "gradient_checkpointing: true\nactivation_checkpointing: true",
    "logging_strategy: epoch\nsave_strategy: epoch",
    "warmup_steps: 0.1",
]


@pytest.fixture
def load(tmp_path: Path):
    """Load BASE with some lines changed or added."""

    def run(lines: str):
        changed = BASE | dict(line.split(": ", 1) for line in lines.splitlines())
        path = tmp_path / "run.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in changed.items()))
        return load_config(path)

    return run


def test_every_row_has_a_name_and_a_yaml():
    assert [row.name for row in ERRORS] == list(BROKEN)
    assert [row.name for row in WARNINGS] == list(WARNED)
    for row in (*ERRORS, *WARNINGS):
        assert all(key in KEYS or key in FOREIGN for key in row.keys), row.name


@pytest.mark.parametrize("row", ERRORS, ids=lambda row: row.name)
def test_error(load, row):
    with pytest.raises(ConfigError) as caught:
        load(BROKEN[row.name])
    (problem,) = caught.value.problems
    assert problem.startswith(row.keys[0] + ": " + row.message.partition("{")[0])
    assert "{" not in problem


@pytest.mark.parametrize("row", WARNINGS, ids=lambda row: row.name)
def test_warning(load, row):
    (warning,) = (w for w in load(WARNED[row.name]).warnings if w.startswith(row.keys[0]))
    assert "{" not in warning


@pytest.mark.parametrize("lines", ALLOWED)
def test_allowed(load, lines):
    assert load(lines).warnings == ()


def test_the_text_on_a_reference_of_a_reference_free_loss_stands_alone(load):
    with pytest.raises(ConfigError) as caught:
        load("pref_loss: simpo\npref_beta: 2\nref_model: other")
    (problem,) = caught.value.problems
    assert "simpo is reference-free" in problem


def test_a_key_of_wrong_type_breaks_no_rule_beside(load):
    with pytest.raises(ConfigError) as caught:
        load("dataset: 5\nval_size: much\neval_strategy: steps")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["dataset", "val_size"]


IDLE = {
    "simpo_gamma": "simpo_gamma: 1",
    "ipo_average": "ipo_average: false",
    "ld_alpha_reference": "ld_alpha_reference: false",
    "sample_max_new_tokens": "sample_max_new_tokens: 9",
    "num_train_epochs": "num_train_epochs: 5\nmax_steps: 5",
    "eval_steps": "eval_steps: 5",
    "eval_delay": "eval_delay: 5",
    "save_steps": "save_steps: 5\nsave_strategy: epoch",
    "logging_steps": "logging_steps: 5\nlogging_strategy: epoch",
    "fsdp_config": "fsdp_config: {a: 1}",
}


@pytest.mark.parametrize("row", NEEDS, ids=lambda row: row.key)
def test_a_key_without_effect_is_named(load, row):
    assert load(IDLE[row.key]).warnings == (f"without effect: {row.key} (needs {row.condition})",)


def test_keys_without_effect_share_one_warning_and_off_is_silent(load):
    (warning,) = load("simpo_gamma: 1\nipo_average: false\neval_steps: 0").warnings
    assert (
        warning == "without effect: simpo_gamma (needs pref_loss: simpo), ipo_average (needs pref_loss: ipo)"
    )
    assert load("simpo_gamma: 0").warnings == ()
