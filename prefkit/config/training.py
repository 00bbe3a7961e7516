"""The keys of transformers.TrainingArguments, from a file that `tools/generate.py` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .key import REQUIRED, Key

TRAINING_FILE = Path(__file__).with_name("training_arguments.json")

_LIMITS: dict[str, dict[str, Any]] = {
    "adam_beta1": {"minimum": 0, "below": 1},
    "adam_beta2": {"minimum": 0, "below": 1},
    "adam_epsilon": {"above": 0},
    "data_seed": {"minimum": 0, "maximum": 2**32 - 1},
    "dataloader_num_workers": {"minimum": 0},
    "dataloader_prefetch_factor": {"minimum": 1},
    "ddp_timeout": {"minimum": 1},
    "eval_accumulation_steps": {"minimum": 1},
    "eval_delay": {"minimum": 0},
    "eval_steps": {"minimum": 0},
    "gradient_accumulation_steps": {"minimum": 1},
    "label_smoothing_factor": {"minimum": 0, "below": 1},
    "learning_rate": {"minimum": 0},
    "logging_steps": {"minimum": 0},
    "max_grad_norm": {"minimum": 0},
    "max_steps": {"minimum": -1},
    "neftune_noise_alpha": {"minimum": 0},
    "num_train_epochs": {"minimum": 0},
    "per_device_eval_batch_size": {"minimum": 1},
    "per_device_train_batch_size": {"minimum": 1},
    "save_steps": {"minimum": 0},
    "save_total_limit": {"minimum": 0},
    "seed": {"minimum": 0, "maximum": 2**32 - 1},
    "torch_empty_cache_steps": {"minimum": 1},
    "warmup_steps": {"minimum": 0},
    "weight_decay": {"minimum": 0},
}


# What these do by default in the transformers that LLaMA-Factory is used with.
_ELSEWHERE = {"report_to": "every tracker that is installed"}


WARMUP_RATIO = Key(
    "warmup_ratio",
    "training",
    ("float",),
    0.0,
    "Share of all steps in which the learning rate rises; kept as warmup_steps below 1.",
    minimum=0,
    below=1,
)


def training_keys() -> dict[str, Key]:
    """The keys of TrainingArguments, and `warmup_ratio`, which transformers had before."""
    described = json.loads(TRAINING_FILE.read_text(encoding="utf-8"))["arguments"]
    keys = {
        row["name"]: Key(
            row["name"],
            "training",
            tuple(row["types"]),
            REQUIRED if row.get("required") else row["default"],
            row["help"],
            row["nullable"],
            tuple(row["choices"]),
            example="saves/my-run" if row.get("required") else "",
            elsewhere=_ELSEWHERE.get(row["name"], ""),
            **_LIMITS.get(row["name"], {}),
        )
        for row in described
    }
    return {**keys, WARMUP_RATIO.name: WARMUP_RATIO}
