"""The DPO configs of the specification load, with the values they say."""

from pathlib import Path

import pytest

from prefkit.config import load_config

STANDARD = """\
model_name_or_path: Qwen/Qwen3-8B-Instruct
trust_remote_code: true

stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

pref_beta: 0.1
pref_loss: sigmoid

dataset: dpo_en_demo
template: qwen3_nothink
cutoff_len: 2048

output_dir: saves/qwen3-8b/lora/dpo
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
logging_steps: 10
save_steps: 500
plot_loss: true
"""

LOSS = "pref_beta: 0.1\npref_loss: sigmoid\n"

ORPO = STANDARD.replace(LOSS, "pref_loss: orpo\npref_beta: 0.1\n")

SIMPO = STANDARD.replace(
    LOSS, "pref_loss: simpo\npref_beta: 2.0\nsimpo_gamma: 0.5           # Target reward margin\n"
)

MULTIMODAL = """\
model_name_or_path: Qwen/Qwen3-VL-8B-Instruct
trust_remote_code: true

stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
freeze_vision_tower: true

pref_beta: 0.1
pref_loss: sigmoid

dataset: mllm_dpo_demo
template: qwen3_vl_nothink
image_max_pixels: 262144

output_dir: saves/qwen3-vl-8b/lora/dpo
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
bf16: true
"""

DEEPSPEED = """\
model_name_or_path: Qwen/Qwen3-8B-Instruct
trust_remote_code: true

stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
deepspeed: examples/deepspeed/ds_z2_config.json

pref_beta: 0.1
pref_loss: sigmoid

dataset: dpo_en_demo
template: qwen3_nothink

output_dir: saves/qwen3-8b/lora/dpo-ds
per_device_train_batch_size: 1
gradient_accumulation_steps: 4
learning_rate: 5.0e-6
num_train_epochs: 3.0
bf16: true
"""


@pytest.fixture
def load(tmp_path: Path):
    """Load a text as run.yaml."""

    def run(text: str):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(path)

    return run


def test_standard(load):
    config, warnings = load(STANDARD)
    assert warnings == ()
    assert config.model.model_name_or_path == "Qwen/Qwen3-8B-Instruct"
    assert config.model.trust_remote_code is True
    assert (config.method.stage, config.method.pref_loss, config.method.pref_beta) == ("dpo", "sigmoid", 0.1)
    assert (config.adapter.lora_rank, config.adapter.lora_alpha) == (8, 16)
    assert config.adapter.lora_target == ("all",)
    assert config.data.dataset == ("dpo_en_demo",)
    assert (config.data.template, config.data.cutoff_len) == ("qwen3_nothink", 2048)
    assert config.output.plot_loss is True
    assert config.training == {
        "do_train": True,
        "output_dir": "saves/qwen3-8b/lora/dpo",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 5e-6,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "bf16": True,
        "logging_steps": 10,
        "save_steps": 500,
    }


def test_orpo_and_simpo(load):
    orpo, warnings = load(ORPO)
    assert (orpo.method.pref_loss, orpo.method.pref_beta, warnings) == ("orpo", 0.1, ())
    simpo, warnings = load(SIMPO)
    assert (simpo.method.pref_loss, simpo.method.pref_beta, simpo.method.simpo_gamma) == ("simpo", 2.0, 0.5)
    assert warnings == ()


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "kto_pair", "orpo"])
def test_every_loss_with_the_standard_numbers(load, loss):
    config, warnings = load(STANDARD.replace("pref_loss: sigmoid", f"pref_loss: {loss}"))
    assert (config.method.pref_loss, warnings) == (loss, ())


@pytest.mark.parametrize("line", ["dpo_label_smoothing: 0.1", "ld_alpha: 0.5", "pref_ftx: 0.5"])
def test_dpo_parameters(load, line):
    name, value = line.split(": ")
    config, warnings = load(STANDARD + line)
    assert (config.value(name), warnings) == (float(value), ())


def test_deepspeed(load):
    config, warnings = load(DEEPSPEED)
    assert config.training["deepspeed"] == "examples/deepspeed/ds_z2_config.json"
    assert warnings == ()


def test_multimodal_image_keys_are_passed_over(load):
    config, warnings = load(MULTIMODAL)
    assert config.data.dataset == ("mllm_dpo_demo",)
    assert warnings == ("ignored: image_max_pixels (concerns images, video or sound)",)


def test_overwrite_output_dir(load):
    assert load(STANDARD + "overwrite_output_dir: true").config.output.overwrite_output_dir is True


def test_the_arguments_are_those_transformers_takes(load, tmp_path):
    """What `training` holds goes into TrainingArguments as it is."""
    from transformers import TrainingArguments

    given = load(STANDARD).config.training | {"output_dir": str(tmp_path), "use_cpu": True}
    args = TrainingArguments(**given)
    assert args.learning_rate == 5e-6
    assert args.get_warmup_steps(200) == 20
