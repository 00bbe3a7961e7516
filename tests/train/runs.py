"""Runs of the tiny model, and what they leave, for the tests here."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from prefkit.config import load_config
from prefkit.config.uses import SCORING
from prefkit.model.reward_model import RewardModel, open_reward_model
from prefkit.runs.report import make_console
from prefkit.runs.use import read_use_config
from prefkit.train.run import train


def run(config: Path, *overrides: str) -> str:
    """Train; returns what was printed."""
    console = make_console(io.StringIO())
    train(load_config(config, overrides).config, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Python in two processes under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    paths = [
        str(Path.cwd()),
        *os.environ.get("PYTHONPATH", "").split(os.pathsep),
    ]  # this package, in scripts too
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run([*launcher, *command], capture_output=True, text=True, env=environment, timeout=200)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter or model that a run saved."""
    return load_file(next(folder.glob("*model.safetensors")))


def same(one: Path, other: Path) -> bool:
    """Whether two runs saved the same bits."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read(file: Path) -> Any:
    """A JSON file."""
    return json.loads(file.read_text())


def losses(folder: Path) -> list[float]:
    """The logged losses."""
    return [line["loss"] for line in read(folder / "trainer_state.json")["log_history"] if "loss" in line]


def unfinish(folder: Path) -> None:
    """Make a finished run look like one that was killed after its last checkpoint but one."""
    record = read(folder / "prefkit.json")
    (folder / "prefkit.json").write_text(json.dumps(record | {"finished": False}))
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    (newest / "manifest.json").unlink()


def load_reward_model(folder: Path) -> RewardModel:
    """The reward model of a run or an export, as `prefkit score` opens it."""
    config = read_use_config(str(folder), [], SCORING).config
    return open_reward_model(config.model, config.data.cutoff_len)
