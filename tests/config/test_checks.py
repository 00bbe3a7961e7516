"""Every rule across keys has a YAML that breaks it."""

from pathlib import Path

import pytest

from prefkit.config import ConfigError, load_config, load_use_config
from prefkit.config.checks import ERRORS, NEEDS, OF_STAGES, WARNINGS
from prefkit.config.foreign import FOREIGN
from prefkit.config.key import STAGES
from prefkit.config.schema import KEYS
from prefkit.config.uses import EXPORT, TALKING

BASE = {
    "model_name_or_path": "m",
    "stage": "dpo",
    "do_train": "true",
    "dataset": "pairs",
    "output_dir": "out",
}

TWO = "deepspeed: {zero_optimization: {stage: 2}}\n"
THREE = "deepspeed: {zero_optimization: {stage: 3}}\n"
JUDGED = "stage: ppo\nreward_model: r\n"
EACH = "eval_dataset: a,b\neval_on_each_dataset: true\n"
BROKEN = {
    "report_to": "report_to: wnadb",
    "no_training": "do_train: false\ndo_eval: true\neval_dataset: held_out",
    "nothing_to_do": "do_train: false\nref_model: other\ndo_eval: true\nval_size: 0.1",
    "dataset_missing": "dataset: null",
    "length_grouping": "train_sampling_strategy: group_by_length",
    "neftune": "neftune_noise_alpha: 5",
    "val_size_one": "val_size: 1",
    "val_size_count": "val_size: 1.5",
    "held_out_twice": "val_size: 0.1\neval_dataset: more",
    "held_out_missing": "eval_strategy: epoch",
    "sample_prompts_held_out": "sample_prompts: 4",
    "eval_on_each": "eval_on_each_dataset: true\neval_dataset: a",
    "interleave_probs_concat": "interleave_probs: 0.5,0.5\ndataset: a,b",
    "interleave_probs_length": "interleave_probs: 0.5,0.5\ndataset: a,b,c\nmix_strategy: interleave_under",
    "interleave_probs_sum": "interleave_probs: 0.5,0.4\ndataset: a,b\nmix_strategy: interleave_over",
    "streaming_steps": "streaming: true",
    "streaming_val_size": "streaming: true\nmax_steps: 5\nval_size: 0.1",
    "streaming_max_samples": "streaming: true\nmax_steps: 5\nmax_samples: 100",
    "streaming_ref_cache": "streaming: true\nmax_steps: 5\nref_cache: true",
    "kto_weights": "stage: kto\nkto_chosen_weight: 0\nkto_rejected_weight: 0",
    "reward_model_missing": "stage: ppo",
    "reward_model_tuning": "stage: ppo\nreward_model: r\nfinetuning_type: full",
    "reward_model_pissa": "stage: ppo\nreward_model: r\npissa_init: true",
    "reward_model_address": "stage: ppo\nreward_model: localhost:80\nreward_model_type: api",
    "reward_model_folder": "stage: ppo\nreward_model: http://localhost:80/score",
    "reward_adapters_type": f"{JUDGED}reward_model_adapters: a",
    "reward_adapters_alone": "stage: ppo\nreward_function: r.py:score\nreward_model_type: full\n"
    "reward_model_adapters: a",
    "reward_function_form": "stage: ppo\nreward_function: r.score",
    "reward_weights_number": f"{JUDGED}reward_weights: 1,2",
    "reward_weights_zero": f"{JUDGED}reward_weights: 0,0\nreward_function: r.py:score",
    "reward_model_bits": f"{JUDGED}reward_model_quantization_bit: 5\nreward_model_type: full",
    "reward_model_merge": f"{JUDGED}reward_model_type: full\nreward_model_quantization_bit: 4\n"
    "reward_model_adapters: a",
    "ppo_group_greedy": f"{JUDGED}ppo_group_size: 2\ndo_sample: false",
    "ppo_streaming": f"{JUDGED}streaming: true\nmax_steps: 5",
    "scheduler_ppo": f"{JUDGED}lr_scheduler_type: greedy\neval_strategy: epoch\nval_size: 0.1",
    "ppo_ptx_dataset": f"{JUDGED}ppo_ptx: 0.5",
    "ppo_ptx_weight": f"{JUDGED}ppo_ptx_dataset: answered",
    "vllm_base": f"{JUDGED}rollout_engine: vllm\nquantization_bit: 4",
    "vllm_adapter": f"{JUDGED}rollout_engine: vllm\nuse_dora: true",
    "label_smoothing_loss": "pref_loss: hinge\ndpo_label_smoothing: 0.1",
    "label_smoothing_factor": "label_smoothing_factor: 0.1",
    "ref_model_reference_free": "pref_loss: orpo\nref_model: other",
    "ref_adapters_alone": "ref_model_adapters: a",
    "ref_quantization_alone": "ref_model_quantization_bit: 4",
    "ref_quantization_adapters": "ref_model: r\nref_model_adapters: a\nref_model_quantization_bit: 8",
    "ref_quantization_bits": "ref_model: r\nref_model_quantization_bit: 6",
    "quantization_bits": "quantization_bit: 5",
    "quantization_tuning": "quantization_bit: 8\nfinetuning_type: full",
    "quantization_adapters": "quantization_bit: 4\nadapter_name_or_path: a,b",
    "quantization_tokens": "quantization_bit: 4\nadd_special_tokens: <x>",
    "quantization_pissa": "quantization_bit: 4\npissa_init: true",
    "pure_bf16": "pure_bf16: true\ndtype: float32",
    "adapter_tuning": "adapter_name_or_path: a\nfinetuning_type: freeze",
    "create_new_adapter": "create_new_adapter: true",
    "create_new_adapter_untrained": "create_new_adapter: true\nadapter_name_or_path: a\ndo_train: false\n"
    "do_predict: true\neval_dataset: held_out",
    "lora_target": "lora_target: []",
    "use_rslora_tuning": "use_rslora: true\nfinetuning_type: full",
    "use_dora_tuning": "use_dora: true\nfinetuning_type: freeze",
    "pissa_init_tuning": "pissa_init: true\nfinetuning_type: full",
    "loraplus_lr_ratio_tuning": "loraplus_lr_ratio: 16\nfinetuning_type: full",
    "pissa_adapter": "pissa_init: true\nadapter_name_or_path: a",
    "pissa_dora": "pissa_init: true\nuse_dora: true",
    "pissa_iter": "pissa_init: true\npissa_iter: 0",
    "freeze_layers": "finetuning_type: freeze\nfreeze_trainable_layers: 0",
    "freeze_modules": "finetuning_type: freeze\nfreeze_trainable_modules: []",
    "image_pixels": "image_min_pixels: 2000\nimage_max_pixels: 1000",
    "video_pixels": "video_min_pixels: 2000\nvideo_max_pixels: 1000",
    "freeze_all": "freeze_language_model: true",
    "freeze_language": "freeze_language_model: true\nfreeze_vision_tower: false\nfinetuning_type: freeze",
    "early_stopping_eval": "early_stopping_steps: 3",
    "best_metric": "metric_for_best_model: accuracy",
    "best_metric_kto": "stage: kto\nmetric_for_best_model: rewards/accuracies",
    "best_metric_each": f"{EACH}metric_for_best_model: eval_loss",
    "best_metric_missing": f"{EACH}eval_strategy: epoch\nearly_stopping_steps: 2",
    "best_metric_loss": "metric_for_best_model: eval_sft_loss",
    "best_metric_rm": "stage: rm\nmetric_for_best_model: eval_accuracy",
    "best_metric_ppo": f"{JUDGED}metric_for_best_model: eval_loss",
    "router_loss_rm": "stage: rm\nmoe_aux_loss_coef: 0.01",
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
    "fsdp": "fsdp: hybrid_shard",
    "two_engines": f"{TWO}fsdp: full_shard",
    "deepspeed_untrained": f"{TWO}do_train: false\nadapter_name_or_path: a\ndo_eval: true\neval_dataset: h",
    "deepspeed_bf16": f"{TWO}bf16: true\npure_bf16: true",
    "deepspeed_dtype": f"{TWO}dtype: bfloat16",
    "engine_optimizer": f"{TWO}optim: adafactor",
    "engine_loraplus": "deepspeed: {optimizer: {type: Adam}, zero_optimization: {stage: 2}}\n"
    "loraplus_lr_ratio: 16",
    "split_quantized": f"{THREE}quantization_bit: 4",
    "split_ref_quantized": f"{THREE}ref_model: r\nref_model_quantization_bit: 4",
    "split_pissa": f"{THREE}pissa_init: true",
    "split_merges": f"{THREE}adapter_name_or_path: a,b",
    "split_tokens": f"{THREE}resize_vocab: true",
    "split_reward_adapter": f"{JUDGED}fsdp: full_shard",
    "split_vllm": f"{JUDGED}{THREE}reward_model_type: full\nrollout_engine: vllm",
    "prefetch_without_workers": "dataloader_prefetch_factor: 2",
}

WARNED = {
    "simpo_beta": "pref_loss: simpo\npref_beta: 0.9",
    "simpo_margin": "pref_loss: simpo\npref_beta: 1\nsimpo_gamma: 2.5",
    "lora_dropout": "lora_dropout: 0.1",
    "early_stopping_last": "early_stopping_steps: 3\nval_size: 0.1\neval_strategy: epoch",
    "jit_checkpoint": "enable_jit_checkpoint: true",
    "auto_batch_size": "auto_find_batch_size: true",
    "data_skip": "ignore_data_skip: true",
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
    "finetuning_type: full\nbf16: true",
    "finetuning_type: full\npure_bf16: true\nbf16: true\ndtype: bfloat16",
    "finetuning_type: freeze\nfreeze_trainable_layers: -1\nfreeze_trainable_modules: mlp,self_attn",
    "finetuning_type: freeze\nfreeze_trainable_layers: 0\nfreeze_extra_modules: lm_head",
    "adapter_name_or_path: a,b\ncreate_new_adapter: true\nlora_rank: 16\nuse_dora: true",
    "adapter_name_or_path: a,b\ncreate_new_adapter: true\npissa_init: true\npissa_iter: -1",
    "adapter_name_or_path: a\nref_model: r\nref_model_adapters: b,c",
    "adapter_name_or_path: a\ndo_train: false\ndataset: null\ndo_predict: true\neval_dataset: held_out",
    "create_new_adapter: true\nadapter_name_or_path: a\nref_model: r\ndo_train: false\ndataset: null\n"
    "do_eval: true\neval_dataset: held_out",
    "quantization_bit: 4\nadapter_name_or_path: a\nquantization_type: fp4\ndouble_quantization: false",
    "quantization_bit: 8\npure_bf16: true\nloraplus_lr_ratio: 16\nloraplus_lr_embedding: 1e-5",
    "ref_model: r\nref_model_quantization_bit: 4\nquantization_type: fp4",
    "resize_vocab: true\nadd_tokens: <a>,<b>\nadditional_target: embed_tokens,lm_head",
    "pref_loss: orpo\nref_cache: false\nmetric_for_best_model: odds_ratio_loss",
    "early_stopping_steps: 3\nval_size: 0.1\neval_strategy: epoch\nsave_strategy: epoch\n"
    "load_best_model_at_end: true\nmetric_for_best_model: eval_rewards/margins",
    f"{EACH}eval_strategy: epoch\nmetric_for_best_model: eval_b_rewards/margins\n"
    "save_strategy: best\nload_best_model_at_end: true",
    f"{EACH}pref_loss: orpo\nmetric_for_best_model: a_sft_loss",
    "dataset: a,b\nmix_strategy: interleave_over\ninterleave_probs: 0.33,0.67",
    "dataset: a,b\nmix_strategy: interleave_once",
    "streaming: true\nbuffer_size: 50\nmax_steps: 5\nval_size: 10",
    "tokenized_path: t\npreprocessing_num_workers: 2\noverwrite_cache: true\ntruncation: llamafactory",
    "on_bad_row: skip\nduplicate_prompts: skip\nranked_responses: pairs",
    "ref_cache: true\nrope_scaling: yarn\nflash_attn: fa2\nmoe_aux_loss_coef: 0.01",
    "stage: kto\nkto_chosen_weight: 0\nkto_rejected_weight: 1.5\npref_ftx: 0.1\nref_model: r\n"
    "ref_cache: true",
    f"stage: kto\n{EACH}metric_for_best_model: eval_b_rewards/auc\neval_strategy: epoch",
    "stage: rm\nload_best_model_at_end: true\nval_size: 0.1\neval_strategy: epoch\nsave_strategy: epoch\n"
    "metric_for_best_model: eval_rewards/accuracies\nresume_from_checkpoint: true",
    f"{EACH}stage: rm\nmetric_for_best_model: eval_b_rewards/margins",
    "stage: rm\nranked_responses: pairs\nlora_dropout: 0.1\nrm_center_coefficient: 0.01",
    "stage: rm\ndo_train: false\ndataset: null\ndo_eval: true\neval_dataset: held_out",
    "stage: ppo\nreward_model: r\nval_size: 0.1\neval_strategy: epoch\nload_best_model_at_end: true\n"
    "save_strategy: epoch\nreport_to: swanlab\nref_model: r",
    "stage: ppo\nreward_model: r\nppo_epochs: 2\nppo_target: 3\nppo_buffer_size: 4\nppo_score_norm: true\n"
    "ppo_whiten_rewards: true\ntemperature: 1\ntop_k: 0\ntop_p: 1\nmax_new_tokens: 64\n"
    "repetition_penalty: 1.1\npissa_init: true\nreward_model_type: full",
    "stage: ppo\nreward_model: http://localhost:8000/score\nreward_model_type: api\nreward_timeout: 5\n"
    "reward_retries: 0",
    "stage: ppo\nreward_function: rewards/short.py:score\nfinetuning_type: full\nreward_weights: 0.1\n"
    "ppo_ptx: 0.1\nppo_ptx_dataset: a,b",
    f"{JUDGED}reward_function: r.py:score\nreward_weights: 1,-0.5\nrollout_engine: vllm\n"
    "use_rslora: true\nppo_group_size: 4",
    f"{JUDGED}ppo_init_kl: 0.1\nppo_kl_horizon: 1000\nppo_gamma: 0.99\nppo_lambda: 1\nppo_clip: 0.1\n"
    "ppo_value_clip: 0.5\nppo_value_coefficient: 1",
    "stage: ppo\nreward_model: r\nreward_model_type: full\nfinetuning_type: full\nreward_model_adapters: a",
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
    assert [row.key for row in NEEDS] == list(IDLE)


@pytest.mark.parametrize("row", ERRORS, ids=lambda row: row.name)
def test_error(load, row):
    with pytest.raises(ConfigError) as caught:
        load(BROKEN[row.name])
    (problem,) = caught.value.problems
    message = row.message if isinstance(row.message, str) else ""
    assert problem.startswith(row.keys[0] + ": " + message.partition("{")[0])
    assert "{" not in problem


@pytest.mark.parametrize("row", WARNINGS, ids=lambda row: row.name)
def test_warning(load, row):
    (warning,) = (w for w in load(WARNED[row.name]).warnings if w.startswith(row.keys[0]))
    assert "{" not in warning


@pytest.mark.parametrize("lines", ALLOWED)
def test_allowed(load, lines):
    assert load(lines).warnings == ()


@pytest.mark.parametrize("lines", ["", "val_size: 0.1\ndo_train: false\nref_model: r", "eval_dataset: a"])
def test_val_size_needs_a_data_set_to_take_rows_from(load, lines):
    with pytest.raises(ConfigError):
        load("dataset: null\nval_size: 0.1\n" + lines)


@pytest.mark.parametrize("metric", ["eval_c_loss", "a_", "eval_a_accuracy", "a_eval_loss"])
def test_a_metric_of_one_data_set_names_it(load, metric):
    with pytest.raises(ConfigError, match="eval_NAME_METRIC: a NAME of eval_dataset, and for METRIC one of"):
        load(f"{EACH}metric_for_best_model: {metric}")


def test_a_data_set_may_begin_like_another(load):
    lines = "eval_dataset: a,a_b\neval_on_each_dataset: true\nmetric_for_best_model: eval_a_b_loss"
    assert load(lines).warnings == ()


def test_a_part_of_another_loss_is_no_metric_of_a_data_set(load):
    with pytest.raises(ConfigError, match="is not measured with pref_loss: sigmoid"):
        load(f"{EACH}metric_for_best_model: eval_a_sft_loss")


@pytest.mark.parametrize("row", OF_STAGES, ids=lambda row: row.key)
def test_a_key_of_another_stage_is_named(load, row):
    """Each key that not all stages read, with a stage that does not."""
    key = KEYS[row.key]
    stage = next(stage for stage in STAGES if stage not in key.stages)
    value = OTHERWISE.get(row.key) or (str(not key.default).lower() if key.types == ("bool",) else "0.5")
    lines = f"stage: {stage}\n{row.key}: {value}" + ("\nreward_model: r" if stage == "ppo" else "")
    (warning,) = load(lines).warnings
    assert warning.startswith("without effect: ")
    assert f"{row.key} (needs stage: {' or '.join(key.stages)})" in warning


OTHERWISE = {
    "sample_prompts": "2\nval_size: 0.1",
    "sample_max_new_tokens": "5",
    "ranked_responses": "pairs",
    "pref_loss": "orpo",
    "dpo_label_smoothing": "0.1",
    "ref_model": "r",
    "ref_model_adapters": "a\nref_model: r",
    "ref_model_quantization_bit": "8\nref_model: r",
    "simpo_gamma": "1",
    "reward_model": "r",
    "reward_model_type": "full",
    "reward_model_adapters": "a",
    "reward_function": "r.py:score",
    "reward_retries": "2",
    "ppo_group_size": "2",
    "ppo_ptx_dataset": "a",
    "rollout_engine": "vllm",
    "reward_model_quantization_bit": "8",
    "ppo_buffer_size": "2",
    "ppo_epochs": "2",
    "top_k": "5",
    "max_new_tokens": "5",
    "ref_cache": "true",
}


def test_the_text_on_a_reference_of_a_reference_free_loss_stands_alone(load):
    with pytest.raises(ConfigError) as caught:
        load("pref_loss: simpo\npref_beta: 2\nref_model: other")
    (problem,) = caught.value.problems
    assert "simpo is reference-free" in problem


def test_a_key_of_wrong_type_breaks_no_rule_beside(load):
    with pytest.raises(ConfigError) as caught:
        load("dataset: 5\nval_size: much\neval_strategy: steps")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["dataset", "val_size"]


def test_several_adapters_are_refused_under_quantised_weights_and_so_is_merging_the_only_one(load):
    for lines in ("adapter_name_or_path: a,b", "adapter_name_or_path: a\ncreate_new_adapter: true"):
        with pytest.raises(ConfigError, match="adapters cannot be merged into quantised weights"):
            load("quantization_bit: 4\n" + lines)


@pytest.mark.parametrize("line", ["fp16: true", "dtype: float16"])
def test_pure_bf16_goes_with_no_other_number_format(load, line):
    with pytest.raises(ConfigError, match="pure_bf16: holds every weight in bfloat16: remove it, or fp16"):
        load("pure_bf16: true\n" + line)


def test_forgotten_do_train_says_what_evaluation_alone_needs_at_once(load):
    with pytest.raises(ConfigError) as caught:
        load("do_train: false")
    first, second = caught.value.problems
    assert "write do_train: true; to evaluate without training, name the adapter_name_or_path" in first
    assert "an eval_dataset is measured: write one, with do_eval: true or do_predict: true" in second


@pytest.mark.parametrize("kind", ["lora", "api"])
def test_adapters_go_upon_a_whole_reward_model_alone(load, kind):
    address = "http://localhost:8000/score" if kind == "api" else "r"
    lines = f"stage: ppo\nreward_model: {address}\nreward_model_type: {kind}\nreward_model_adapters: a"
    with pytest.raises(ConfigError, match=f"and reward_model_type is {kind}: write reward_model_type: full"):
        load(lines)


@pytest.mark.parametrize(
    ("written", "is_one"),
    [
        ("score.py:score", True),
        ("/my rewards/v1.2.py:bewertung_ä", True),
        ("C:/rewards.py:f", True),
        ("score.py", False),
        ("score.py:", False),
        ("score:score", False),
        ("score.py:1st", False),
        ("score.py:module.score", False),
        (":score", False),
    ],
)
def test_a_function_is_named_by_its_file(load, written, is_one):
    try:
        assert load(f"stage: ppo\nreward_function: '{written}'").warnings == ()
    except ConfigError as error:
        assert not is_one and "write path/to/file.py:name" in str(error)
    else:
        assert is_one


@pytest.mark.parametrize(
    "line",
    [
        *("quantization_bit: 8", "rope_scaling: yarn", "resize_vocab: true", "add_tokens: <a>"),
        *("add_special_tokens: <a>", "adapter_name_or_path: a,b", "use_dora: true"),
        "adapter_name_or_path: a\ncreate_new_adapter: true",
        *("pissa_init: true\nreward_model_type: full", "additional_target: lm_head"),
    ],
)
def test_vllm_takes_a_model_from_its_folder_with_plain_lora(load, line):
    with pytest.raises(ConfigError, match=r"rollout_engine: vllm .*write rollout_engine: transformers"):
        load(f"{JUDGED}rollout_engine: vllm\n{line}")
    assert load(f"{JUDGED}{line}")


MEASURED = "do_train: false\nadapter_name_or_path: a\ndo_eval: true\neval_dataset: held_out"
STREAMED = "streaming: true\nmax_steps: 5\n"
IDLE = {
    "simpo_gamma": "simpo_gamma: 1",
    "ipo_average": "ipo_average: false",
    "ld_alpha_reference": "ld_alpha_reference: false",
    "mix_strategy": "mix_strategy: interleave_under",
    "buffer_size": "buffer_size: 5",
    "tokenized_path": f"{STREAMED}tokenized_path: t",
    "overwrite_cache": f"{STREAMED}overwrite_cache: true",
    "preprocessing_num_workers": f"{STREAMED}preprocessing_num_workers: 2",
    "reward_model_type": "stage: ppo\nreward_function: r.py:score\nreward_model_type: full",
    "reward_model_quantization_bit": f"{JUDGED}reward_model_quantization_bit: 4",
    "reward_timeout": f"{JUDGED}reward_timeout: 5",
    "reward_retries": f"{JUDGED}reward_model_type: full\nreward_retries: 2",
    "ppo_target": f"{JUDGED}ppo_target: 5\nppo_init_kl: 0",
    "ppo_kl_horizon": f"{JUDGED}ppo_kl_horizon: 100\nppo_init_kl: 0",
    "ppo_value_clip": f"{JUDGED}ppo_value_clip: 0.5\nppo_value_coefficient: 0",
    "logging_first_step": f"{JUDGED}logging_first_step: true",
    "temperature": f"{JUDGED}temperature: 0.5\ndo_sample: false",
    "top_p": f"{JUDGED}top_p: 0.5\ndo_sample: false",
    "top_k": f"{JUDGED}top_k: 5\ndo_sample: false",
    "dataset": MEASURED,
    "sample_prompts": MEASURED + "\ndataset: null\nsample_prompts: 2",
    "sample_max_new_tokens": "sample_max_new_tokens: 9",
    "num_train_epochs": "num_train_epochs: 5\nmax_steps: 5",
    "eval_steps": "eval_steps: 5",
    "eval_delay": "eval_delay: 5",
    "save_steps": "save_steps: 5\nsave_strategy: epoch",
    "logging_steps": "logging_steps: 5\nlogging_strategy: epoch",
    "fsdp_config": "fsdp_config: {a: 1}",
    "ref_cache": "ref_cache: true\npref_loss: orpo",
    "quantization_type": "quantization_type: fp4\nquantization_bit: 8",
    "double_quantization": "double_quantization: false",
    "lora_rank": "lora_rank: 4\nfinetuning_type: full",
    "lora_alpha": "lora_alpha: 4\nadapter_name_or_path: a",
    "lora_dropout": "lora_dropout: 0.1\nadapter_name_or_path: a",
    "lora_target": "lora_target: q_proj\nfinetuning_type: freeze",
    "additional_target": "additional_target: lm_head\nfinetuning_type: full",
    "use_rslora": "use_rslora: true\nadapter_name_or_path: a",
    "use_dora": "use_dora: true\nadapter_name_or_path: a",
    "freeze_trainable_layers": "freeze_trainable_layers: 3",
    "freeze_trainable_modules": "freeze_trainable_modules: mlp\nfinetuning_type: full",
    "freeze_extra_modules": "freeze_extra_modules: lm_head",
    "pissa_iter": "pissa_iter: 4",
    "loraplus_lr_embedding": "loraplus_lr_embedding: 1e-5",
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


USE_BROKEN = {
    "infer_backend": "infer_backend: vllm",
    "using_bits": "quantization_bit: 6",
    "using_adapters": "quantization_bit: 4\nadapter_name_or_path: a,b",
    "using_tokens": "quantization_bit: 8\nadd_tokens: <x>",
    "infer_dtype": "infer_dtype: float16",
    "num_beams": "num_beams: 4",
    "max_length": "max_length: 512",
    "skip_special_tokens": "skip_special_tokens: false",
    "export_dir": "export_dir: null",
    "export_legacy": "export_legacy_format: true",
    "export_quantized": "quantization_bit: 4",
    "export_quantization": "export_quantization_bit: 4",
    "export_hub": "export_hub_model_id: me/mine",
    "hub_token": "hub_token: hf_0",
    "hf_hub_token": "hf_hub_token: hf_0",
    "hf_token": "hf_token: hf_0",
    "push_to_hub_token": "push_to_hub_token: hf_0",
    "ms_hub_token": "ms_hub_token: x",
    "om_hub_token": "om_hub_token: x",
    "swanlab_api_key": "swanlab_api_key: x",
    "swanlab_lark_secret": "swanlab_lark_secret: x",
    "adapter_folder": "adapter_folder: sub",
    "new_special_tokens_config": "new_special_tokens_config: tokens.yaml",
    "quantization_method": "quantization_method: hqq",
}
USE_IDLE = {
    "export_size": "export_size: 2\nexport_value_head: lora",
    "quantization_type": "quantization_type: fp4\nquantization_bit: 8",
    "double_quantization": "double_quantization: false",
    "temperature": "temperature: 0.5\ndo_sample: false",
    "top_p": "top_p: 0.5\ndo_sample: false",
    "top_k": "top_k: 5\ndo_sample: false",
}
USES = {"talking": TALKING, "export": EXPORT}


@pytest.fixture
def use(tmp_path: Path):
    """Load a model and an export_dir with some lines changed or added, for one of USES."""

    def run(name: str, lines: str):
        changed = {"model_name_or_path": "m"} | ({"export_dir": "out"} if name == "export" else {})
        changed |= dict(line.split(": ", 1) for line in lines.splitlines())
        path = tmp_path / "use.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in changed.items()))
        return load_use_config(path, (), {}, USES[name])

    return run


def test_every_row_of_a_use_has_a_yaml():
    assert {row.name for rules in USES.values() for row in rules.errors} == {*USE_BROKEN}
    assert {row.key for rules in USES.values() for row in rules.needs} == {*USE_IDLE}
    for rules in USES.values():
        assert not rules.warnings
        assert all(key in KEYS or key in FOREIGN for row in rules.errors for key in row.keys)
        assert all(key in KEYS for key in rules.unused)


@pytest.mark.parametrize(
    ("name", "row"),
    [(name, row) for name, rules in USES.items() for row in rules.errors],
    ids=lambda case: case if isinstance(case, str) else case.name,
)
def test_error_of_a_use(use, name, row):
    with pytest.raises(ConfigError) as caught:
        use(name, USE_BROKEN[row.name])
    (problem,) = caught.value.problems
    assert problem.startswith(f"{row.keys[0]}: {row.message}")


@pytest.mark.parametrize(
    ("name", "row"),
    [(name, row) for name, rules in USES.items() for row in rules.needs],
    ids=lambda case: case if isinstance(case, str) else case.key,
)
def test_a_key_without_effect_on_a_use_is_named(use, name, row):
    expected = f"without effect: {row.key} (needs {row.condition})"
    assert use(name, USE_IDLE[row.key]).warnings == (expected,)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("talking", "infer_backend: huggingface\ntrust_remote_code: true\ntemplate: qwen3"),
        ("talking", "adapter_name_or_path: a,b\nadd_tokens: <x>\nrope_scaling: linear"),
        ("talking", "quantization_bit: 4\nadapter_name_or_path: a\nquantization_type: fp4"),
        ("talking", "temperature: 0\nmax_new_tokens: 5"),
        ("talking", "infer_backend: null\nlora_rank: 8"),
        ("export", "adapter_name_or_path: a,b\ndtype: bfloat16\nexport_size: 2\nexport_device: auto"),
        ("export", "export_legacy_format: false\nquantization_method: bnb"),
        ("export", "export_size: 2\nexport_value_head: full"),
    ],
)
def test_allowed_for_a_use(use, name, lines):
    assert use(name, lines).warnings == ()


@pytest.mark.parametrize(
    ("name", "lines", "unused"),
    [
        ("talking", "stage: dpo\nlora_rank: 4", "lora_rank, stage"),
        ("talking", "dataset: a\nbatch_layout: shared\ntemplate: x", "batch_layout, dataset"),
        ("talking", "export_dir: out\nexport_size: 9", "export_dir, export_size"),
        (
            "talking",
            "length_penalty: 4\nvllm_maxlen: 5\nuse_unsloth: true",
            "length_penalty, use_unsloth, vllm_maxlen",
        ),
        ("talking", "on_bad_row: skip\nstreaming: true", "on_bad_row, streaming"),
        ("export", "temperature: 0.5\ndouble_quantization: false", "double_quantization, temperature"),
        ("export", "infer_backend: vllm\nref_model: r\nval_size: 5", "infer_backend, ref_model, val_size"),
    ],
)
def test_keys_of_another_use_are_named(use, name, lines, unused):
    assert use(name, lines).warnings == (f"not used here: {unused}",)


def test_training_names_the_keys_of_export_and_generation(load):
    assert load("export_dir: out\nmax_new_tokens: 5\ntop_p: 0.9").warnings == (
        "without effect: top_p (needs stage: ppo), max_new_tokens (needs stage: ppo)",
        "not used here: export_dir",
    )
