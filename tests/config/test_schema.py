"""The keys a user sees are pinned: a changed list or default needs a sentence in the commit."""

import dataclasses

import pytest
import torch

from prefkit.config import TuningConfig
from prefkit.config.foreign import FOREIGN
from prefkit.config.key import STAGES
from prefkit.config.schema import (
    GROUPS,
    KEYS,
    METRICS,
    PART_METRICS,
    REWARD_METRICS,
    RunConfig,
    UseConfig,
    keys_of,
)
from prefkit.objectives.logps import PairLogps
from prefkit.objectives.metrics import pairwise_metrics, reward_metrics
from prefkit.objectives.pairwise import LOSSES, Rewards

REQUIRED = "required"
PINNED = {
    "model": {
        "model_name_or_path": REQUIRED, "model_revision": "main", "cache_dir": None,
        "trust_remote_code": False, "dtype": "auto", "adapter_name_or_path": (), "add_tokens": (),
        "add_special_tokens": (), "resize_vocab": False, "rope_scaling": None, "flash_attn": "auto",
        "moe_aux_loss_coef": None, "quantization_bit": None, "quantization_type": "nf4",
        "double_quantization": True, "disable_gradient_checkpointing": None, "batch_layout": "auto",
    },
    "data": {
        "template": None, "dataset": (), "eval_dataset": (), "eval_on_each_dataset": False,
        "dataset_dir": "data", "media_dir": None, "media_hosts": (), "image_max_pixels": 589824,
        "image_min_pixels": 1024, "video_max_pixels": 65536, "video_min_pixels": 256, "video_fps": 2.0,
        "video_maxlen": 128, "cutoff_len": 2048, "truncation": "prefkit", "max_samples": None,
        "mix_strategy": "concat", "interleave_probs": (), "streaming": False, "buffer_size": 16384,
        "on_bad_row": None, "duplicate_prompts": "keep", "ranked_responses": "group", "tokenized_path": None,
        "overwrite_cache": False, "preprocessing_num_workers": None, "val_size": 0.0, "default_system": None,
        "tool_format": None,
        "enable_thinking": True, "preserve_thinking": False, "disable_shuffling": False,
    },
    "method": {
        "stage": REQUIRED, "pref_loss": "sigmoid", "pref_beta": 0.1, "pref_ftx": 0.0,
        "dpo_label_smoothing": 0.0, "simpo_gamma": 0.5, "ld_alpha": None, "ld_alpha_reference": True,
        "early_stopping_steps": None, "ipo_average": True, "pref_bco_weight": 0.0,
        "kto_chosen_weight": 1.0, "kto_rejected_weight": 1.0, "rm_center_coefficient": 0.0,
    },
    "reference": {
        "ref_model": None, "ref_model_adapters": (), "ref_model_quantization_bit": None, "ref_cache": None,
    },
    "tuning": {
        "finetuning_type": "lora", "create_new_adapter": False, "lora_rank": 8, "lora_alpha": None,
        "lora_dropout": 0.0, "lora_target": ("all",), "additional_target": (), "use_rslora": False,
        "use_dora": False, "pissa_init": False, "pissa_iter": 16, "loraplus_lr_ratio": None,
        "loraplus_lr_embedding": 1e-6, "freeze_trainable_layers": 2, "freeze_trainable_modules": ("all",),
        "freeze_extra_modules": (), "freeze_vision_tower": True, "freeze_multi_modal_projector": True,
        "freeze_language_model": False, "pure_bf16": False,
    },
    "reward": {
        "reward_model": None, "reward_model_type": "lora", "reward_model_adapters": (),
        "reward_function": None, "reward_weights": (), "reward_timeout": 60.0, "reward_retries": 5,
        "reward_model_quantization_bit": None,
    },
    "ppo": {
        "ppo_buffer_size": 1, "ppo_epochs": 4, "ppo_group_size": 1, "ppo_score_norm": False,
        "ppo_missing_eos_penalty": 0.0,
        "ppo_target": 6.0, "ppo_init_kl": 0.2, "ppo_kl_horizon": 10_000.0, "ppo_whiten_rewards": False,
        "ppo_gamma": 1.0, "ppo_lambda": 0.95, "ppo_clip": 0.2, "ppo_value_clip": 0.2,
        "ppo_value_coefficient": 0.1, "ppo_ptx": 0.0, "ppo_ptx_dataset": (),
        "rollout_engine": "transformers",
    },
    "generation": {
        "do_sample": True, "temperature": 0.95, "top_p": 0.7, "top_k": 50, "repetition_penalty": 1.0,
        "max_new_tokens": 1024,
    },
    "output": {
        "overwrite_output_dir": False, "plot_loss": False, "sample_prompts": 0,
        "sample_max_new_tokens": 256, "hang_timeout": 1800,
    },
    "export": {"export_dir": None, "export_size": 5, "export_device": "cpu", "export_value_head": None},
}  # fmt: skip


@pytest.mark.parametrize("group", GROUPS)
def test_our_keys_and_defaults(group):
    found = {name: k.default if not k.required else REQUIRED for name, k in KEYS.items() if k.group == group}
    assert found == PINNED[group]


def test_groups_are_the_fields_of_the_configs():
    run, use = ([field.name for field in dataclasses.fields(config)] for config in (RunConfig, UseConfig))
    assert run == [
        *("model", "data", "method", "reference", "tuning"),
        *("reward", "ppo", "generation", "output", "training"),
    ]
    assert use == ["model", "data", "export", "generation"]
    assert {*run, *use} == {*GROUPS, "training"}


def test_the_keys_of_a_config_are_those_of_its_groups():
    groups = ("model", "data", "generation", "export")
    assert keys_of(UseConfig) == [name for group in groups for name in PINNED[group]]
    assert {*keys_of(RunConfig), *PINNED["export"]} == {*KEYS}


def test_metrics_are_those_of_the_objectives():
    """What `metric_for_best_model` may name; config may not import torch to ask."""
    one = torch.ones(1)
    found = {
        name: pairwise_metrics(PairLogps(-one, -one, one, one), Rewards(one, one), loss.parts)
        for name, loss in LOSSES.items()
    }
    assert {*METRICS} == {"loss", *(metric for metrics in found.values() for metric in metrics)}
    for metric in METRICS[1:]:
        assert PART_METRICS.get(metric, tuple(LOSSES)) == tuple(n for n in LOSSES if metric in found[n])
    assert {*REWARD_METRICS} == {"loss", *reward_metrics(Rewards(one, one))}


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.name)
def test_every_key_is_described(key):
    assert key.help.strip()
    if key.group != "training":
        assert key.help.endswith(".")
        assert ". " not in key.help, "one sentence"
    if key.choices and isinstance(key.default, str):
        assert key.default in key.choices
    assert set(key.stages) <= set(STAGES) and key.stages
    if key.limits and isinstance(key.default, int | float):
        assert key.admits(key.default)
    if key.name not in FOREIGN:
        assert key.types


def test_no_key_has_two_owners():
    own = [name for group in GROUPS for name in PINNED[group]]
    training = [name for name, key in KEYS.items() if key.group == "training"]
    assert len({*own, *training}) == len(own) + len(training)
    assert not set(own) & set(FOREIGN)
    assert set(training) & set(FOREIGN) == {
        "hub_token", "parallelism_config", "local_rank", "remove_unused_columns", "label_names",
        "disable_tqdm", "logging_nan_inf_filter",
    }  # fmt: skip


LLAMA_FACTORY = """
stage finetuning_type pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight
kto_rejected_weight simpo_gamma ld_alpha ppo_buffer_size ppo_epochs ppo_score_norm ppo_target
ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit reward_model
reward_model_adapters reward_model_quantization_bit reward_model_type lora_rank lora_alpha lora_dropout
lora_target additional_target loraplus_lr_ratio loraplus_lr_embedding use_rslora use_dora pissa_init
pissa_iter pissa_convert create_new_adapter oft_rank oft_block_size oft_target module_dropout
freeze_trainable_layers freeze_trainable_modules freeze_extra_modules use_llama_pro pure_bf16
freeze_vision_tower freeze_multi_modal_projector freeze_language_model disable_shuffling
early_stopping_steps plot_loss include_effective_tokens_per_second compute_accuracy use_galore use_apollo
use_badam use_adam_mini use_muon use_swanlab swanlab_project template dataset eval_dataset dataset_dir
media_dir cutoff_len streaming buffer_size mix_strategy interleave_probs overwrite_cache
preprocessing_batch_size preprocessing_num_workers max_samples ignore_pad_token_for_loss val_size
eval_on_each_dataset packing tool_format default_system enable_thinking preserve_thinking tokenized_path
data_shared_file_system train_on_prompt mask_history neat_packing model_name_or_path adapter_name_or_path
adapter_folder cache_dir model_revision trust_remote_code use_fast_tokenizer resize_vocab
split_special_tokens add_tokens add_special_tokens new_special_tokens_config init_special_tokens
rope_scaling flash_attn use_unsloth use_unsloth_gc enable_liger_kernel disable_gradient_checkpointing
use_reentrant_gc upcast_layernorm upcast_lmhead_output moe_aux_loss_coef quantization_bit
quantization_method quantization_type double_quantization image_max_pixels image_min_pixels
video_max_pixels video_min_pixels video_fps video_maxlen audio_sampling_rate use_audio_in_video
crop_to_patches image_do_pan_and_scan infer_backend infer_dtype export_dir export_size export_device
export_legacy_format export_hub_model_id hf_hub_token ms_hub_token om_hub_token overwrite_output_dir fp8
do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty length_penalty
skip_special_tokens ray_num_workers ray_init_kwargs master_addr master_port warmup_ratio
"""


@pytest.mark.parametrize("name", LLAMA_FACTORY.split())
def test_every_key_of_llama_factory_is_known(name):
    assert name in KEYS or name in FOREIGN


MOVED = """
adapter_name_or_path create_new_adapter resize_vocab add_tokens add_special_tokens rope_scaling flash_attn
moe_aux_loss_coef quantization_bit quantization_type double_quantization early_stopping_steps pure_bf16
ref_model ref_model_adapters ref_model_quantization_bit pissa_init pissa_iter loraplus_lr_ratio
loraplus_lr_embedding freeze_trainable_layers freeze_trainable_modules freeze_extra_modules do_sample
temperature top_p top_k repetition_penalty max_new_tokens export_dir export_size export_device
eval_on_each_dataset mix_strategy interleave_probs streaming buffer_size tokenized_path overwrite_cache
preprocessing_num_workers kto_chosen_weight kto_rejected_weight ppo_buffer_size ppo_epochs ppo_score_norm
ppo_target ppo_whiten_rewards reward_model reward_model_adapters reward_model_quantization_bit
reward_model_type media_dir image_max_pixels image_min_pixels freeze_vision_tower
freeze_multi_modal_projector freeze_language_model video_max_pixels video_min_pixels video_fps video_maxlen
"""


@pytest.mark.parametrize("name", MOVED.split())
def test_a_key_that_is_implemented_is_foreign_no_more(name):
    assert name in KEYS and name not in FOREIGN


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_keys_say_nothing_at_their_default(name):
    row = FOREIGN[name]
    assert row.is_off(row.default) and row.is_off(None)
    assert row.is_off(False) is (row.default is not True)
    assert row.hint


def test_an_adapter_made_in_python_resolves_alpha_too():
    assert TuningConfig(lora_rank=4).lora_alpha == 8
    assert dataclasses.replace(TuningConfig(), lora_alpha=3).lora_alpha == 3
