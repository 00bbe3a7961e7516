"""Keys of LLaMA-Factory and of older transformers that this version does not implement.

At its default, or switched off, such a key says nothing and is passed over. Otherwise `refuse` means
that training without it would not be what the YAML asks for, `ignore` that only speed, logging or
another stage would differ.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from .source import YesNo

Verdict = Literal["refuse", "ignore"]


class Foreign(NamedTuple):
    """What LLaMA-Factory takes when the key is absent, our verdict on it, and what to do instead."""

    default: Any
    verdict: Verdict
    hint: str

    def is_off(self, value: object) -> bool:
        """Whether the value asks for nothing: the default, null, or false, zero or empty where the default is
        not true."""
        value = bool(value) if isinstance(value, YesNo) else value
        is_default = value == self.default and isinstance(value, bool) is isinstance(self.default, bool)
        return value is None or is_default or (not value and self.default is not True)


_SECRET = "a secret belongs into the environment, never into a config: set "
_OPTIMIZERS = "this optimizer is not in this version: remove the key, or name another one with optim"
_LAYERS = "not in this version: remove the key, and choose layers with finetuning_type: freeze"

_GROUPS: tuple[tuple[Verdict, str, dict[str, Any]], ...] = (
    ("refuse", _SECRET + "HF_TOKEN, or run `hf auth login`",
     {"hub_token": None, "hf_hub_token": None, "hf_token": None, "push_to_hub_token": None}),
    ("refuse", _SECRET + "MODELSCOPE_API_TOKEN", {"ms_hub_token": None}),
    ("refuse", _SECRET + "OM_TOKEN", {"om_hub_token": None}),
    ("refuse", _SECRET + "SWANLAB_API_KEY", {"swanlab_api_key": None}),
    ("refuse", _SECRET + "a variable of your own", {"swanlab_lark_secret": None}),
    ("refuse", "has a new name: write eval_strategy", {"evaluation_strategy": "no"}),
    ("refuse", "shared batches have no padding to save: remove it", {"group_by_length": False}),
    ("refuse", "has a new name: write use_cpu: true", {"no_cuda": False}),
    ("refuse", "not in this version: write bf16: true", {"fp8": False}),
    ("refuse", "only Python code can set it", {"parallelism_config": None}),
    ("refuse", "write the whole path into adapter_name_or_path", {"adapter_folder": None}),
    ("refuse", "name the tokens with add_special_tokens", {"new_special_tokens_config": None}),
    ("refuse", "new rows are drawn around the mean of the others: remove the key",
     {"init_special_tokens": "noise_init"}),
    ("refuse", "special tokens in the text of a message are always read as text here: remove the key",
     {"split_special_tokens": False}),
    ("refuse", "each process holds its model on one device: remove the key",
     {"quantization_device_map": None}),
    ("refuse", "the model is trained as its checkpoint says: remove the key",
     {"mixture_of_depths": None, "shift_attn": False,
      "train_from_scratch": False, "upcast_layernorm": False, "upcast_lmhead_output": False}),
    ("refuse", _LAYERS, {"use_llama_pro": False}),
    ("refuse", "bitsandbytes is the only quantiser here: remove the key", {"quantization_method": "bnb"}),
    ("refuse", _OPTIMIZERS,
     {"use_galore": False, "use_apollo": False, "use_badam": False, "use_adam_mini": False,
      "use_muon": False}),
    ("refuse", "this backend is not in this version: remove the key; several GPUs are used without it",
     {"use_kt": False, "use_mca": False, "ray_num_workers": 1}),
    ("refuse", "preference pairs are not packed: remove the key; batch_layout: shared saves the same work",
     {"packing": None, "neat_packing": False}),
    ("refuse", "a preference loss always reads whole responses and no prompt: remove the key",
     {"train_on_prompt": False, "mask_history": False, "use_dft_loss": False}),
    ("refuse", "padding is never scored: remove the key", {"ignore_pad_token_for_loss": True}),
    ("refuse", "weights are always written as safetensors: remove the key", {"save_safetensors": True}),
    ("refuse", "a tokenizer is always the fast one: remove the key", {"use_fast_tokenizer": True}),
    ("refuse", "rows are dealt to processes by their cost, and per_device_train_batch_size is that of one "
     "process: remove the key", {"split_batches": None, "dispatch_batches": None}),
    ("refuse", "has a new name: write report_to: swanlab", {"use_swanlab": False}),
    ("refuse", "answers come from transformers here: remove the key", {"infer_backend": "huggingface"}),
    ("refuse", "has a new name: write dtype", {"infer_dtype": "auto"}),
    ("refuse", "answers are drawn token by token, without beams: remove the key", {"num_beams": 1}),
    ("refuse", "has a new name: write max_new_tokens, which does not count the prompt", {"max_length": 1024}),
    ("refuse", "control tokens are never part of an answer: remove the key", {"skip_special_tokens": True}),
    ("refuse", "do_predict writes the metrics of each pair, and sample_prompts answers: remove the key",
     {"predict_with_generate": False}),
    ("ignore", "concerns speed or memory only",
     {"low_cpu_mem_usage": True, "use_unsloth": False,
      "use_unsloth_gc": False,
      "enable_liger_kernel": False, "use_reentrant_gc": True, "use_v1_kernels": False,
      "offload_folder": "offload", "preprocessing_batch_size": 1000,
      "half_precision_backend": "auto", "fp16_backend": "auto", "fp16_opt_level": "O1",
      "use_mps_device": False, "use_ipex": False, "torchdynamo": None, "local_rank": -1}),
    ("ignore", "found out by itself: a node that does not find the rows of rank 0 encodes its own",
     {"data_shared_file_system": False}),
    ("ignore", "concerns logging only",
     {"print_param_status": False, "include_tokens_per_second": False,
      "include_effective_tokens_per_second": False, "compute_accuracy": False}),
    ("ignore", "tensorboard writes where TENSORBOARD_LOGGING_DIR says", {"logging_dir": None}),
    ("ignore", "no profile is written",
     {"enable_torch_profiler": False,
      "profiler_output_dir": None, "profiler_wait_steps": 1, "profiler_warmup_steps": 1,
      "profiler_active_steps": 1, "profiler_repeat": 1, "profiler_record_shapes": True,
      "profiler_profile_memory": True, "profiler_with_stack": True}),
    ("ignore", "swanlab reads its own variables: SWANLAB_PROJ_NAME, SWANLAB_WORKSPACE, SWANLAB_MODE",
     {"swanlab_project": "llamafactory", "swanlab_workspace": None, "swanlab_run_name": None,
      "swanlab_mode": "cloud", "swanlab_logdir": None, "swanlab_lark_webhook_url": None}),
    ("ignore", "decided by prefkit itself",
     {"pissa_convert": False,
      "remove_unused_columns": True, "label_names": None, "disable_tqdm": None,
      "logging_nan_inf_filter": True}),
    ("ignore", "belongs to a key that is off",
     {"fp8_backend": "auto", "fp8_enable_fsdp_float8_all_gather": False,
      "oft_rank": 0, "oft_block_size": 32, "oft_target": "all", "module_dropout": 0.0,
      "galore_target": "all", "galore_rank": 16, "galore_update_interval": 200, "galore_scale": 2.0,
      "galore_proj_type": "std", "galore_layerwise": False, "apollo_target": "all", "apollo_rank": 16,
      "apollo_update_interval": 200, "apollo_scale": 32.0, "apollo_proj": "random",
      "apollo_proj_type": "std", "apollo_scale_type": "channel", "apollo_layerwise": False,
      "apollo_scale_front": False, "badam_mode": "layer", "badam_start_block": None,
      "badam_switch_mode": "ascending", "badam_switch_interval": 50, "badam_update_ratio": 0.05,
      "badam_mask_mode": "adjacent", "badam_verbose": 0, "kt_optimize_rule": None, "cpu_infer": 32,
      "chunk_size": 8192, "mode": "normal", "kt_maxlen": 4096, "kt_use_cuda_graph": True,
      "kt_mode": "normal", "kt_force_think": False, "ray_run_name": None, "ray_init_kwargs": None,
      "ray_storage_path": "./saves", "ray_storage_filesystem": None,
      "resources_per_worker": {"GPU": 1}, "placement_strategy": "PACK", "master_addr": None,
      "master_port": None}),
    ("refuse", "images are read whole, by the model's own processor: remove the key",
     {"image_do_pan_and_scan": False, "crop_to_patches": False}),
    ("ignore", "sound is not in this version, and rows without need no such key",
     {"use_audio_in_video": False, "audio_sampling_rate": 16000}),
    ("ignore", "belongs to predict_with_generate",
     {"sortish_sampler": False, "eval_num_beams": None, "generation_max_length": None,
      "generation_num_beams": None, "generation_config": None}),
    ("ignore", "belongs to num_beams", {"length_penalty": 1.0}),
    ("ignore", "concerns inference or export",
     {"use_kv_cache": True, "vllm_maxlen": 4096,
      "vllm_gpu_util": 0.7, "vllm_enforce_eager": False, "vllm_max_lora_rank": 32, "vllm_config": None,
      "sglang_maxlen": 4096, "sglang_mem_fraction": 0.7, "sglang_tp_size": -1, "sglang_config": None,
      "sglang_lora_backend": "triton",
      "export_quantization_bit": None, "export_quantization_dataset": None,
      "export_quantization_nsamples": 128, "export_quantization_maxlen": 1024,
      "export_legacy_format": False, "export_hub_model_id": None}),
)  # fmt: skip

FOREIGN = {
    key: Foreign(default, verdict, hint)
    for verdict, hint, defaults in _GROUPS
    for key, default in defaults.items()
}
