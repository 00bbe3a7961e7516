"""What takes GPUs: NCCL under each engine, and flash kernels. `make test-gpu` runs it.

Each engine trains on two GPUs what one GPU trains with twice the batch, in bfloat16 as on a real cluster, so
that numbers agree to its three digits.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.engines import zero
from tests.train.runs import losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two GPUs"),
]
Write = Callable[..., Path]

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"deepspeed": zero(2)},
    "zero3": {"deepspeed": zero(3)},
    "zero3 offload": {"deepspeed": zero(3, offload_param={"device": "cpu"})},
    "fsdp": {"fsdp": "full_shard"},
    "fsdp offload": {"fsdp": "full_shard offload"},
}


def train(config: Path, gpus: str) -> None:
    """Train on the GPUs of these numbers, as a user does."""
    command = [sys.executable, "-m", "prefkit", "train", str(config)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_gpus_are_one_with_twice_the_batch(
    engine: str, tuning: str, write_config: Write, tmp_path: Path
) -> None:
    keys = {"finetuning_type": tuning, "bf16": True, "max_steps": 4, "learning_rate": 1e-4}
    one = write_config(**keys, output_dir=str(tmp_path / "one"), per_device_train_batch_size=2)
    train(one, "0")
    two = write_config(
        **keys, **ENGINES[engine], output_dir=str(tmp_path / "two"), per_device_train_batch_size=1
    )
    train(two, "0,1")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-2)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="wants flash-attn")
def test_flash_kernels_are_torchs_own(write_config: Write, tmp_path: Path) -> None:
    keys = {"bf16": True, "max_steps": 4, "learning_rate": 1e-4}
    for kind in ("sdpa", "fa2"):
        train(write_config(**keys, flash_attn=kind, output_dir=str(tmp_path / kind)), "0")
    assert losses(tmp_path / "fa2") == pytest.approx(losses(tmp_path / "sdpa"), rel=1e-2)
