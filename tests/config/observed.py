"""Which test observes each key: what `docs/keys.md` shows and `test_observed.py` verifies."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
# File of tests -> function -> the keys that it observes.
_TESTS: dict[str, dict[str, str]] = {
    "tests/config/test_checks.py": {
        "test_error": "label_smoothing_factor neftune_noise_alpha",
    },
    "tests/config/test_secrets.py": {
        "test_secrets_are_refused_and_never_shown": "hub_token",
    },
    "tests/data/test_dataset.py": {
        "test_mix_strategy": "mix_strategy",
        "test_interleave_probs": "interleave_probs",
        "test_streaming": "streaming",
        "test_buffer_size": "buffer_size",
        "test_on_bad_row": "on_bad_row",
        "test_duplicate_prompts": "duplicate_prompts",
        "test_ranked_responses": "ranked_responses",
        "test_tokenized_path": "tokenized_path",
        "test_overwrite_cache": "overwrite_cache",
        "test_preprocessing_num_workers": "preprocessing_num_workers",
        "test_max_samples": "max_samples",
    },
    "tests/data/test_encode.py": {
        "test_truncation": "truncation",
        "test_a_response_is_whole_up_to_three_quarters": "cutoff_len",
    },
    "tests/data/test_sources.py": {
        "test_missing_dataset_info": "dataset_dir",
    },
    "tests/data/test_template.py": {
        "test_the_keys_reach_the_template": "tool_format",
        "test_default_system": "default_system",
        "test_qwen3_thoughts": "enable_thinking",
        "test_qwen3_thoughts_of_earlier_turns": "preserve_thinking",
    },
    "tests/model/test_adapter.py": {
        "test_new_tokens_get_rows_that_are_trained_and_come_back": "add_tokens",
        "test_a_vocabulary_that_is_too_small_is_refused_unless_it_may_grow": "resize_vocab",
        "test_all_adapters_but_the_last_are_merged": "adapter_name_or_path",
        "test_pissa_starts_at_the_base_and_is_saved_as_plain_lora": "pissa_init pissa_iter",
    },
    "tests/model/test_load.py": {
        "test_what_is_fetched_is_what_was_asked_for": "model_revision cache_dir trust_remote_code",
        "test_dtype_is_that_of_the_checkpoint_unless_given": "model_name_or_path dtype",
        "test_how_weights_are_quantised": "quantization_type double_quantization",
    },
    "tests/train/test_engines.py": {
        "test_two_processes_are_one_with_twice_the_batch": "deepspeed fsdp",
    },
    "tests/train/test_seeing.py": {
        "test_frozen_parts_stay_as_they_are": (
            "freeze_vision_tower freeze_multi_modal_projector freeze_language_model"
        ),
        "test_pixels_are_those_that_were_asked_for": "image_max_pixels image_min_pixels",
        "test_videos_are_taken_as_the_keys_say": ("video_max_pixels video_min_pixels video_fps video_maxlen"),
        "test_pictures_elsewhere_are_found_by_media_dir": "media_dir",
        "test_addresses_are_fetched_from_named_hosts_alone": "media_hosts",
    },
    "tests/model/test_tuning.py": {
        "test_freeze_trains_what_it_names": "freeze_trainable_layers freeze_extra_modules",
        "test_freeze_names_what_it_trains": "freeze_trainable_modules",
        "test_full_trains_every_weight": "finetuning_type",
        "test_numbers_of_trained_and_frozen_weights": "pure_bf16",
    },
    "tests/runs/test_use.py": {
        "test_a_training_yaml_talks_to_its_base": "stage",
    },
    "tests/serve/test_assistant.py": {
        "test_greedy_answer_is_that_of_generate": "do_sample",
        "test_one_token_to_draw_from_is_the_likeliest": "temperature top_p top_k",
        "test_repetition_penalty_asks_for_other_tokens": "repetition_penalty",
        "test_the_end_token_ends_an_answer": "max_new_tokens",
    },
    "tests/serve/test_export.py": {
        "test_a_folder_with_files_is_refused": "export_dir",
        "test_files_are_no_larger_than_asked": "export_size",
        "test_export_device_is_where_adapters_are_merged": "export_device",
    },
    "tests/serve/test_export_reward.py": {
        "test_a_value_head_beside_a_merged_language_model": "export_value_head",
    },
    "tests/serve/test_load.py": {
        "test_the_template_is_the_one_of_the_training": "template",
    },
    "tests/train/test_arguments.py": {
        "test_checkpointing_has_one_switch_and_two_names": "disable_gradient_checkpointing "
        "gradient_checkpointing activation_checkpointing_kwargs gradient_checkpointing_kwargs use_cpu",
        "test_warmup_ratio_is_a_share_of_the_steps": "warmup_ratio",
        "test_what_transformers_refuses_here_arrives_too": "tf32 ddp_backend",
        "test_a_tracker_must_be_installed": "report_to",
        "test_disable_shuffling_is_the_sequential_sampler": "disable_shuffling",
        "test_what_the_trainer_may_not_decide": "remove_unused_columns disable_tqdm logging_nan_inf_filter "
        "enable_jit_checkpoint auto_find_batch_size",
    },
    "tests/train/test_data.py": {
        "test_eval_on_each_dataset": "eval_on_each_dataset",
    },
    "tests/train/test_judges.py": {
        "test_reward_model_type_lora_is_the_reward_model_upon_the_policy": "reward_model reward_model_type",
        "test_reward_model_adapters_are_put_upon_it": "reward_model_adapters",
        "test_reward_model_quantization_bit_is_that_of_its_weights": "reward_model_quantization_bit",
        "test_reward_function_alone": "reward_function",
        "test_reward_weights_weigh_the_reward_model_first": "reward_weights",
    },
    "tests/train/test_kto.py": {
        "test_kto_weights_are_those_of_the_labels": "kto_chosen_weight kto_rejected_weight",
    },
    "tests/train/test_references.py": {
        "test_the_reference_is_the_one_named_and_does_not_move": "ref_model ref_model_adapters "
        "ref_model_quantization_bit create_new_adapter",
        "test_the_cache_is_on_where_rows_are_seen_again": "ref_cache",
        "test_evaluation_without_training": "do_train eval_dataset dataset",
    },
    "tests/train/test_reward.py": {
        "test_margins_and_rm_center_coefficient_change_the_loss": "rm_center_coefficient",
    },
    "tests/train/test_ppo.py": {
        "test_each_key_changes_what_is_learnt": "ppo_buffer_size ppo_epochs ppo_group_size ppo_score_norm "
        "ppo_target ppo_init_kl ppo_kl_horizon ppo_whiten_rewards ppo_gamma ppo_lambda ppo_clip "
        "ppo_value_clip ppo_value_coefficient ppo_ptx ppo_ptx_dataset ppo_missing_eos_penalty",
        "test_rollout_engine_is_what_draws": "rollout_engine",
    },
    "tests/train/test_reward_server.py": {
        "test_the_timeout_and_the_number_of_tries_are_those_of_the_keys": "reward_timeout reward_retries",
    },
    "tests/train/test_run.py": {
        "test_every_loss_trains_and_starts_where_its_formula_says": "pref_loss pref_beta",
        "test_layouts_train_the_same": "batch_layout",
        "test_val_size_holds_out_rows": "val_size",
        "test_lora_keys_reach_the_adapter": "lora_rank lora_alpha lora_dropout lora_target "
        "additional_target use_rslora",
        "test_low_precision_on_a_cpu": "use_dora",
        "test_overwrite_starts_afresh": "overwrite_output_dir",
        "test_a_run_leaves_its_files": "plot_loss sample_prompts sample_max_new_tokens",
    },
    "tests/train/test_dpo.py": {
        "test_pref_ftx_adds_the_mean_likelihood_of_chosen": "pref_ftx",
        "test_dpo_label_smoothing_weighs_both_signs": "dpo_label_smoothing",
        "test_simpo_gamma_is_a_margin_of_rewards": "simpo_gamma",
        "test_ipo_average_takes_means_or_sums": "ipo_average",
        "test_ld_alpha_on_one_side_or_both": "ld_alpha ld_alpha_reference",
        "test_bco_mean_moves_after_the_step_and_comes_back_from_a_checkpoint": "pref_bco_weight",
    },
    "tests/train/test_tuning.py": {
        "test_early_stopping_counts_evaluations_since_the_best": "early_stopping_steps",
        "test_added_tokens_are_tokens_and_their_rows_are_trained": "add_special_tokens",
        "test_rope_scaling_stretches_the_model": "rope_scaling",
        "test_the_attention_kernel_is_the_one_asked_for": "flash_attn",
        "test_the_load_balancing_loss_is_added": "moe_aux_loss_coef",
        "test_quantised_weights_stay_and_their_adapter_learns": "quantization_bit",
        "test_loraplus_learns_b_faster": "loraplus_lr_ratio",
        "test_loraplus_has_a_rate_for_embeddings": "loraplus_lr_embedding",
    },
    "tests/train/test_watchdog.py": {
        "test_hang_timeout": "hang_timeout",
    },
}
# What every other key of TrainingArguments goes through.
PASSED_ON = "tests/train/test_arguments.py::test_each_key_arrives"
OBSERVED = {
    key: f"{file}::{function}"
    for file, functions in _TESTS.items()
    for function, keys in functions.items()
    for key in keys.split()
}


@cache
def _definitions(file: str) -> dict[str, str]:
    """Text of each function and of each constant of a test module, decorators and all."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        names, first = [], node.lineno
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        found |= {name: "\n".join(lines[first - 1 : node.end_lineno]) for name in names}
    return found


def text_of(test: str) -> str:
    """A test with the helpers, fixtures and constants of its module that it names; KeyError without it."""
    file, _, function = test.partition("::")
    definitions = _definitions(file)
    wanted, seen = [function], {function: definitions[function]}
    while wanted:
        words = set(ast_names(seen[wanted.pop()]))
        for name in words & definitions.keys() - seen.keys():
            seen[name] = definitions[name]
            wanted.append(name)
    return "\n".join(seen.values())


def ast_names(text: str) -> list[str]:
    """Every name in a text of Python."""
    return [node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)] + [
        node.arg for node in ast.walk(ast.parse(text)) if isinstance(node, ast.arg)
    ]
