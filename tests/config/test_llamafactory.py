"""Each rule of LLaMA-Factory across keys: a row here, a key that is refused, or lifted with the reason."""

import re
from pathlib import Path

import pytest

from prefkit.config.checks import ERRORS
from prefkit.config.foreign import FOREIGN
from prefkit.config.schema import KEYS
from prefkit.config.source import read_scalar
from prefkit.config.values import convert

# What is not allowed there -> the rows that say so here.
ROWS = {
    "ppo without reward_model": ["reward_model_missing"],
    "reward_model_type: lora with freeze or full": ["reward_model_tuning"],
    "dpo_label_smoothing with another loss than sigmoid": ["label_smoothing_loss"],
    "loraplus_lr_ratio, use_rslora, use_dora or pissa_init without lora": [
        *("loraplus_lr_ratio_tuning", "use_rslora_tuning", "use_dora_tuning", "pissa_init_tuning"),
    ],
    "bits of reference or reward model other than 4 and 8": ["ref_quantization_bits", "reward_model_bits"],
    "val_size without dataset": ["dataset_missing", "nothing_to_do", "held_out_twice"],
    "val_size beside eval_dataset": ["held_out_twice"],
    "interleave_probs with concat": ["interleave_probs_concat"],
    "interleave_probs of another length than dataset": ["interleave_probs_length"],
    "streaming with a fraction as val_size": ["streaming_val_size"],
    "streaming with max_samples": ["streaming_max_samples"],
    "streaming without max_steps": ["streaming_steps"],
    "an adapter without lora": ["adapter_tuning"],
    "quantised weights without an adapter": ["quantization_tuning"],
    "pissa_init upon quantised weights": ["quantization_pissa"],
    "resizing a quantised model": ["quantization_tokens"],
    "a new or a second adapter upon a quantised model": ["quantization_adapters"],
    "training without dataset": ["dataset_missing"],
    "do_eval or do_predict without held-out rows": ["held_out_missing", "nothing_to_do"],
    "pure_bf16 with DeepSpeed": ["deepspeed_bf16"],
    "GaLore and other optimisers with DeepSpeed": ["engine_optimizer"],
}
# What is not allowed there -> the keys that are refused here whatever stands beside them.
REFUSED = {
    "GaLore, APOLLO and BAdam together, with LoRA, with DDP or with DeepSpeed": [
        *("use_galore", "use_apollo", "use_badam"),
    ],
    "use_llama_pro without freeze or lora": ["use_llama_pro"],
    "train_on_prompt, mask_history or neat_packing outside sft": [
        *("train_on_prompt", "mask_history", "neat_packing"),
    ],
    "predict_with_generate outside sft": ["predict_with_generate"],
    "ppo with S^2 attention": ["shift_attn"],
    "ppo with KTransformers and a lora reward model": ["use_kt"],
    "vLLM or SGLang while training": ["infer_backend"],
    "fp8 with quantised weights": ["fp8"],
    "quantization_device_map while training": ["quantization_device_map"],
}
# What is not allowed there and works here.
LIFTED = {
    "load_best_model_at_end for rm and ppo": "a checkpoint does not depend on the stage",
    "resuming rm and ppo": "a checkpoint does not depend on the stage",
    "evaluation with ppo": "held-out rows are allowed with every stage",
    "a tracker other than wandb, tensorboard or trackio with ppo": "a tracker does not depend on the stage",
    "FORCE_TORCHRUN for DeepSpeed": "prefkit/launch starts processes for whatever trains",
    "pissa_init with a reference": "the adapter at its start is the reference",
    "unsloth with ppo and a lora reward model": "use_unsloth is passed over",
}
# What is found later, where the machine or the data is known.
LATER = {
    "several GPUs in one process": "prefkit/train/arguments.py",
    "a non-empty output_dir without a checkpoint": "prefkit/train/output.py",
    "a data set of another stage, unknown, missing or empty": "prefkit/data",
}


def test_rows_and_refused_keys_are_there():
    names = {row.name for row in ERRORS}
    assert {row for rows in ROWS.values() for row in rows} <= names
    keys = {key for keys in REFUSED.values() for key in keys}
    assert keys <= {name for name, row in FOREIGN.items() if row.verdict == "refuse"}
    assert not keys & KEYS.keys()


@pytest.mark.parametrize("rule", [*LIFTED, *LATER])
def test_what_is_not_a_row_has_a_reason(rule):
    assert (LIFTED | LATER)[rule]
    assert rule not in ROWS and rule not in REFUSED


def test_the_page_names_keys_that_are_there_and_values_that_they_take():
    page = (Path(__file__).parents[2] / "docs" / "from-llamafactory.md").read_text()
    restoring = [row.rpartition(" | ")[2] for row in page.splitlines() if row.startswith("| ")]
    written = re.findall(r"`(\w+): ?([^`]*)`", "".join(restoring))
    assert len(written) > 15
    for name, value in written:
        assert name in KEYS, name
        if value:
            convert(KEYS[name], read_scalar(value))
