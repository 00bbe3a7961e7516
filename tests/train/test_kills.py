"""SIGKILL at any instant, then the same command again: the run ends as one that was never stopped.

Each trial is a forked process that runs the real command on a tiny model, with dropout, accumulation,
evaluations, checkpoints in the middle of an epoch and every part of the state that a stage keeps.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer import Trainer

from prefkit.train import checkpoint as checkpoints
from prefkit.train.checkpoint import PickleFreeCheckpoints
from prefkit.train.checkpoint_files import verify_checkpoint
from tests.train.forks import FORKS, Fork, command, run_in_two, two_ranks

pytestmark = FORKS

COMMON: dict[str, Any] = {
    "max_steps": ...,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 3,
    "eval_dataset": "held_out",
    "eval_strategy": "steps",
    "eval_steps": 5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "lora_dropout": 0.1,
    "sample_prompts": 0,
    "template": "chatml",
    "plot_loss": False,
}
# Of each stage, the losses that differ in what they keep. 12 rows: 6 steps an epoch.
STAGES: dict[str, dict[str, Any]] = {
    "dpo-sigmoid": {"pref_bco_weight": 0.5, "max_grad_norm": 0.5},
    "orpo": {"pref_loss": "orpo", "finetuning_type": "full", "learning_rate": 1e-3},
    "kto": {"stage": "kto", "dataset": "judged", "eval_dataset": "judged_held_out", "pref_ftx": 0.1},
    "simpo": {
        "pref_loss": "simpo",
        "dataloader_num_workers": 1,
        "load_best_model_at_end": True,
        "save_steps": 4,
        "eval_steps": 4,
    },
    "ppo": {
        "stage": "ppo",
        "reward_function": f"{Path(__file__).with_name('rewards.py')}:plain",
        "ppo_epochs": 2,
        "ppo_group_size": 2,
        "ppo_score_norm": True,
        "ppo_ptx": 0.1,
        "ppo_ptx_dataset": "pairs",
        "max_new_tokens": 8,
    },
    "rm": {"stage": "rm", "rm_center_coefficient": 0.1, "do_predict": True},
}
MORE: dict[str, dict[str, Any]] = {
    "hinge": {"pref_loss": "hinge", "logging_strategy": "epoch", "save_strategy": "epoch"},
    "ipo": {"pref_loss": "ipo", "ref_cache": True, "optim": "adafactor", "eval_strategy": "epoch"},
    "cut short": {"max_steps": 9, "num_train_epochs": ..., "eval_strategy": "epoch"},
    "kto_pair": {"pref_loss": "kto_pair", "per_device_train_batch_size": 2},
    "streaming": {"streaming": True, "max_steps": 12, "buffer_size": 4, "num_train_epochs": ...},
}
TIMES = re.compile(r".*(runtime|per_second|_time|seconds)$|total_flos")


def timeless(value: Any) -> Any:
    """JSON without what depends on the clock or on the place of the folder."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not TIMES.fullmatch(key)}
    if isinstance(value, list):
        return [timeless(item) for item in value]
    return re.sub(r"^.*/(?=checkpoint-)", "", value) if isinstance(value, str) else value


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves: sha256 of tensors, contents of JSON without times."""
    left: dict[str, Any] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".safetensors":
            left[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif file.suffix == ".jsonl":
            left[name] = [timeless(json.loads(line)) for line in file.read_text().splitlines()]
        elif file.suffix == ".json" and file.name not in ("manifest.json", "training_args.json"):
            left[name] = timeless(json.loads(file.read_text()))
        else:
            left[name] = "is there"
    return left


class Lab:
    """Runs of one config, each in a folder of its own."""

    def __init__(self, config: Path, root: Path) -> None:
        self.config, self.root = config, root
        self.whole, started = root / "whole", time.monotonic()
        self.run(self.whole)
        self.seconds = time.monotonic() - started
        self.expected = outcome(self.whole)

    def start(self, folder: Path, prepare: Callable[[], None] | None = None) -> Fork:
        """Start, or go on with, the run in a folder; `prepare` may change things in its process first."""

        def work() -> None:
            if prepare is not None:
                prepare()
            command("train", self.config, f"output_dir={folder}")()

        return Fork(self.root / f"{folder.name}.txt", work)

    def run(self, folder: Path, prepare: Callable[[], None] | None = None) -> str:
        """Run to the end; what was printed."""
        fork = self.start(folder, prepare)
        assert fork.end() == 0, fork.printed()
        return fork.printed()

    def is_same(self, folder: Path, last_only: bool = False) -> bool:
        """Whether a run ended as the one that was never stopped; `last_only` leaves out older checkpoints,
        which a signal adds to."""
        last = max(int(path.name[11:]) for path in self.whole.glob("checkpoint-*"))
        older = "checkpoint-(?!{last}/)" if last_only else "nothing"
        found, expected = (
            {name: what for name, what in left.items() if not re.match(older.format(last=last), name)}
            for left in (outcome(folder), self.expected)
        )
        return found == expected

    def kill(self, name: str, kills: int) -> list[float]:
        """Kill a run that often, at random instants of its time, and let it end; returns the instants."""
        folder, instants = self.root / name, []
        for _ in range(kills):
            instants.append(random.SystemRandom().uniform(0, self.seconds))
            fork = self.start(folder)
            if (code := fork.kill_after(instants[-1])) is not None:
                assert code == 0, fork.printed()
                instants.pop()
                break
            for checkpoint in folder.glob("checkpoint-*"):
                verify_checkpoint(checkpoint)  # never half a one
        said = self.run(folder)
        assert outcome(folder) == self.expected, f"killed after {instants} s\n{said}"
        return instants


@pytest.fixture
def lab(write_config: Callable[..., Path], tmp_path: Path) -> Callable[[dict[str, Any]], Lab]:
    def make(keys: dict[str, Any]) -> Lab:
        return Lab(write_config(**(COMMON | keys)), tmp_path)

    return make


def rest_is_slow(first: Iterable[Any], rest: Iterable[Any]) -> list[Any]:
    """Parameters of a test of which `make test` tries the first alone."""
    return [
        *first,
        *(pytest.param(*(it if isinstance(it, tuple) else (it,)), marks=pytest.mark.slow) for it in rest),
    ]


@pytest.mark.parametrize("stage", rest_is_slow(["dpo-sigmoid", "kto", "rm", "ppo"], ["orpo", "simpo"]))
def test_two_kills(stage: str, lab: Callable[[dict[str, Any]], Lab]) -> None:
    lab(STAGES[stage]).kill("killed", 2)


def test_two_processes_are_killed(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """Both at an instant of the training; then they end with the bits of two that were not."""
    config = write_config(**(COMMON | STAGES["dpo-sigmoid"] | {"gradient_accumulation_steps": 1}))
    started = time.monotonic()
    run_in_two(tmp_path, "train", config, f"output_dir={tmp_path / 'whole'}")
    seconds = time.monotonic() - started
    words = ("train", config, f"output_dir={tmp_path / 'killed'}")
    ranks = [Fork(tmp_path / f"killed-{rank}.txt", **each) for rank, each in enumerate(two_ranks(*words))]
    time.sleep(random.SystemRandom().uniform(0.3, 0.9) * seconds)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
        rank.end()
    run_in_two(tmp_path, *words)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*STAGES, *MORE])
def test_two_hundred_kills(stage: str, lab: Callable[[dict[str, Any]], Lab]) -> None:
    one, kills, trial = lab((STAGES | MORE)[stage]), 0, 0
    while kills < 200:
        trial += 1
        kills += len(one.kill(f"trial-{trial}", 3))


# Negative controls: the equality above fails as soon as a part of the state starts afresh.


def forget_nothing() -> None:
    """The control of the controls."""


def forget_generators() -> None:
    original = PickleFreeCheckpoints._load_rng_state

    def load(self: Any, checkpoint: Any) -> None:
        original(self, checkpoint)
        torch.manual_seed(0)

    PickleFreeCheckpoints._load_rng_state = load  # type: ignore[method-assign]


def forget_optimizer() -> None:
    def load(self: Any, checkpoint: Any) -> None:
        pass

    PickleFreeCheckpoints._load_optimizer_and_scheduler = load  # type: ignore[method-assign]


def forget_place_in_the_data() -> None:
    original = Trainer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.args.ignore_data_skip = True

    Trainer.__init__ = init  # type: ignore[method-assign]


FORGETTING = [forget_nothing, forget_generators, forget_optimizer, forget_place_in_the_data]


def die_before_save(step: int) -> Callable[[], None]:
    """What to do in a child so that it is killed as it begins to save that step."""

    def prepare() -> None:
        original = checkpoints.PickleFreeCheckpoints._save_checkpoint

        def save(self: Any, *args: Any) -> None:
            if self.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            original(self, *args)

        checkpoints.PickleFreeCheckpoints._save_checkpoint = save  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize("stage", rest_is_slow(["dpo-sigmoid"], ["orpo", "simpo"]))
def test_each_part_of_the_state_is_needed(stage: str, lab: Callable[[dict[str, Any]], Lab]) -> None:
    one = lab(STAGES[stage])
    step = 4 + STAGES[stage].get("save_steps", COMMON["save_steps"])  # so that it goes on within an epoch
    killed = one.root / "killed"
    assert one.start(killed, die_before_save(step)).end() == -9
    for forget in FORGETTING:
        folder = one.root / forget.__name__
        shutil.copytree(killed, folder)
        one.run(folder, forget)
        if stage == "orpo" and forget is forget_generators:
            continue  # a full model has no dropout, so that nothing is drawn at random
        assert one.is_same(folder) is (forget is forget_nothing), forget.__name__
