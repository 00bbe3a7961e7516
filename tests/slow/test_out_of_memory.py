"""A machine without the memory for a micro-batch trains it in pieces, to the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import make_model, make_tokenizer
from tests.train.runs import losses, weights

pytestmark = pytest.mark.slow

# Trains with so many bytes of address space beyond those that it has before its first step, 0 for any number.
SCRIPT = """
import os, re, resource, sys
from pathlib import Path

sys.path.insert(0, os.getcwd())
from prefkit import cli
from prefkit.train.trainer import PrefTrainer

def size(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

room = int(sys.argv.pop(1))
original = PrefTrainer.training_step
before = None

def step(self, *args, **kwargs):
    global before
    if before is None:
        before = size("VmSize")
        if room:
            resource.setrlimit(resource.RLIMIT_AS, (before + room, before + room))
    return original(self, *args, **kwargs)

PrefTrainer.training_step = step
try:
    cli.main()
finally:
    print("room", size("VmPeak") - before)
"""


@pytest.fixture
def train(write_config, tmp_path: Path):
    """Trains with a limited room beyond what is there before the first step: room taken, what was said."""
    model = tmp_path / "model"
    wide = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64, "initializer_range": 0.02}
    make_model(max_position_embeddings=1024, **wide).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    rows = [
        {"instruction": f"Say {i} " * 40, "input": "", "chosen": "yes " * (20 + i), "rejected": "no " * 30}
        for i in range(8)
    ]
    (tmp_path / "data" / "pairs.json").write_text(json.dumps(rows))
    script = tmp_path / "limited.py"
    script.write_text(SCRIPT)

    def run(name: str, room: int = 0) -> tuple[int, subprocess.CompletedProcess[str]]:
        out = tmp_path / name
        config = write_config(
            model_name_or_path=str(model),
            output_dir=str(out),
            per_device_train_batch_size=8,
            cutoff_len=1024,
            learning_rate=1e-4,
            optim="sgd",
        )
        # Memory that is freed goes back at once, so that the room is what is in use.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        command = [sys.executable, str(script), str(room), "train", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        taken = done.stdout.rsplit("room ", 1)[-1]
        return int(taken) if taken.strip().isdigit() else 0, done

    return run


def test_a_limit_on_memory_gives_pieces_and_the_same_weights(train, tmp_path: Path) -> None:
    peak, done = train("whole")
    assert done.returncode == 0 and "out of memory" not in done.stdout, done.stderr
    _, done = train("pieces", peak * 6 // 10)
    assert done.returncode == 0, done.stderr
    assert "Step 1: out of memory; micro-batches are now computed in 2 pieces" in done.stdout
    for one, other in zip(losses(tmp_path / "pieces"), losses(tmp_path / "whole"), strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    whole, pieces = weights(tmp_path / "whole"), weights(tmp_path / "pieces")
    assert all(torch.allclose(pieces[name], found, atol=1e-6) for name, found in whole.items())


def test_too_little_memory_for_one_row_is_explained(train) -> None:
    peak, _ = train("whole")
    _, done = train("none", peak // 40)
    assert done.returncode == 1
    assert "error: Step 1: out of memory: a single row does not fit: " in done.stderr
    assert "Traceback" not in done.stderr and "prefkit check FILE --memory" in done.stderr
