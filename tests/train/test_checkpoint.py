"""Resume equals never having stopped, bit for bit; a kill at any file operation loses nothing; no pickles."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import random
import shutil
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from prefkit.train.checkpoint import PickleFreeCheckpoints
from prefkit.train.checkpoint_files import (
    CheckpointError,
    find_newest_checkpoint,
    remove_leftovers,
    verify_checkpoint,
)
from prefkit.train.strategy import Replicated
from tests.train.faults import KILLED, die_at, in_child
from tests.train.forks import forks

ROWS, STEPS = 22, 12  # 11 micro-batches an epoch: 6 steps, the last one of a single micro-batch
TIME_FIELDS = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


class TinyTrainer(PickleFreeCheckpoints, Trainer):
    """Draws from every generator in each step and keeps a count as the state of its stage."""

    batches = 0

    @property
    def strategy(self) -> Replicated:  # type: ignore[override]
        return Replicated(self.args)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.batches += 1
        noise = 1 + 0.1 * random.random() + 0.1 * np.random.rand() + 0.001 * self.batches
        return model(input_ids=inputs["input_ids"], labels=inputs["input_ids"]).loss * noise

    def extra_state(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


class TinyLlama(LlamaForCausalLM):
    is_gradient_checkpointing = False  # peft 0.21 asks for this name, which transformers 5.23 deprecates


LORA = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def make_model(lora: LoraConfig | None = LORA) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_dropout=0.1,
    )
    return get_peft_model(TinyLlama(config), copy.deepcopy(lora)) if lora else TinyLlama(config)


def make_trainer(
    output_dir: Path, cls: type[TinyTrainer] = TinyTrainer, model: Any = None, **changes: Any
) -> TinyTrainer:
    rows = torch.randint(0, 64, (ROWS, 8), generator=torch.Generator().manual_seed(1))
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "save_steps": 3,
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return cls(
        model=model or make_model(),
        args=TrainingArguments(**arguments | changes),
        train_dataset=[{"input_ids": row} for row in rows],
        eval_dataset=[{"input_ids": row} for row in rows],
    )


def outcome(trainer: TinyTrainer, step: int = STEPS, rank: int = 0) -> dict[str, Any]:
    """All that a run leaves: bytes of its last checkpoint, and what it logged, without times."""
    folder = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    names = ["adapter_model.safetensors", "optimizer.safetensors", "optimizer.json", "scheduler.json"]
    left: dict[str, Any] = {name: (folder / name).read_bytes() for name in [*names, "stage_state.json"]}
    left["rng"] = json.loads((folder / f"rng_state_{rank}.json").read_text())
    del left["rng"]["seconds"]
    history = [*trainer.state.log_history]
    left["log"] = [{key: value for key, value in line.items() if key not in TIME_FIELDS} for line in history]
    return left


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that is never stopped: its folder, with all its checkpoints, and its outcome."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder)
    trainer.train()
    return folder, outcome(trainer)


@pytest.fixture
def copied(whole_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Copy some checkpoints of the whole run to a folder of their own."""

    def copy_of(*steps: int) -> Path:
        for step in steps:
            shutil.copytree(whole_run[0] / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
        return tmp_path / "run"

    return copy_of


def test_a_checkpoint_is_safetensors_and_json(whole_run: tuple[Path, dict[str, Any]]) -> None:
    folder = whole_run[0] / "checkpoint-9"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "optimizer.json",
        "optimizer.safetensors",
        "rng_state_0.json",
        "scheduler.json",
        "stage_state.json",
        "trainer_state.json",
        "training_args.json",
    ]
    assert {name.split("/")[1] for name in load_file(folder / "optimizer.safetensors")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert listed.keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}


@pytest.mark.parametrize("step", [3, 6, 9, 12])  # in an epoch, after one, in the second one, at the end
def test_resume_equals_never_stopping(
    step: int, whole_run: tuple[Path, dict[str, Any]], copied: Callable[..., Path]
) -> None:
    trainer = make_trainer(copied(step))
    trainer.train(resume_from_checkpoint=True)
    assert outcome(trainer) == whole_run[1]


def test_no_step_is_taken_after_the_last(tmp_path: Path) -> None:
    """Also where the last checkpoint is in the middle of an epoch, and the last step could still be taken."""
    keys = {"max_steps": 4, "save_steps": 4, "lr_scheduler_type": "constant"}
    whole = make_trainer(tmp_path, **keys)
    whole.train()
    resumed = make_trainer(tmp_path, **keys)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert outcome(resumed, 4) == outcome(whole, 4)
    assert equal(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


def test_a_resumed_run_resumes_again(
    whole_run: tuple[Path, dict[str, Any]], copied: Callable[..., Path]
) -> None:
    folder = copied(3)
    make_trainer(folder, max_steps=STEPS, save_total_limit=3).train(str(folder / "checkpoint-3"))
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    trainer = make_trainer(folder)
    trainer.train(resume_from_checkpoint=True)
    assert outcome(trainer) == whole_run[1]


def test_a_full_model_resumes(tmp_path: Path) -> None:
    trainers = [
        make_trainer(tmp_path / name, model=make_model(None), max_steps=4, save_steps=2) for name in "ab"
    ]
    trainers[0].train()
    trainers[1].train(str(tmp_path / "a" / "checkpoint-2"))
    for name in ["model.safetensors", "optimizer.safetensors", "optimizer.json", "scheduler.json"]:
        whole, resumed = (tmp_path / run / "checkpoint-4" / name for run in "ab")
        assert whole.read_bytes() == resumed.read_bytes()


FORGOTTEN = ["optimizer", "scheduler", "python", "numpy", "torch", "running loss", "stage"]


@pytest.mark.parametrize("forgotten", [None, *FORGOTTEN])
def test_each_part_of_the_state_is_needed(
    forgotten: str | None, whole_run: tuple[Path, dict[str, Any]], copied: Callable[..., Path]
) -> None:
    """Negative control: the equality above fails as soon as one part starts afresh."""

    class Forgetful(TinyTrainer):
        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            fresh = copy.deepcopy((self.optimizer.state_dict(), self.lr_scheduler.state_dict()))
            super()._load_optimizer_and_scheduler(checkpoint)
            if forgotten == "optimizer":
                self.optimizer.load_state_dict(fresh[0])
            if forgotten == "scheduler":
                self.lr_scheduler.load_state_dict(fresh[1])
            if forgotten == "stage":
                self.batches = 0

        def _load_rng_state(self, checkpoint: str | None) -> None:
            fresh = (random.getstate(), np.random.get_state(), torch.get_rng_state())
            super()._load_rng_state(checkpoint)
            if forgotten == "python":
                random.setstate(fresh[0])
            if forgotten == "numpy":
                np.random.set_state(fresh[1])
            if forgotten == "torch":
                torch.set_rng_state(fresh[2])
            if forgotten == "running loss":
                self._tr_loss.zero_()

    trainer = make_trainer(copied(9), Forgetful)
    trainer.train(resume_from_checkpoint=True)
    assert (outcome(trainer) == whole_run[1]) is (forgotten is None)


# Kills


class Doomed(TinyTrainer):
    """Before the save of step 9 its processes part: one child for each file operation dies there."""

    again = False  # save twice, so that the second save replaces a checkpoint
    killed: list[Path]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.state.global_step == 9:
            if self.again:
                super()._save_checkpoint(model, trial)
            self.killed, survived = [], False
            while not survived:
                survived = self._save_in_child(model, trial, operation=len(self.killed) + 1)
        super()._save_checkpoint(model, trial)

    def _save_in_child(self, model: Any, trial: Any, operation: int) -> bool:
        folder = Path(f"{self.args.output_dir}-killed-{operation}")
        shutil.copytree(str(self.args.output_dir), folder, copy_function=os.link)
        generator = random.getstate()

        def save() -> None:
            random.setstate(generator)  # a fork seeds it afresh
            self.args.output_dir = str(folder)
            die_at(operation)
            super(Doomed, self)._save_checkpoint(model, trial)

        code = in_child(save)
        assert code in (0, KILLED)
        if code == KILLED:
            self.killed.append(folder)
        return code == 0


class DoomedAgain(Doomed):
    again = True


@forks
@pytest.mark.parametrize("cls", [Doomed, pytest.param(DoomedAgain, marks=pytest.mark.slow)])
def test_a_kill_at_any_file_operation_of_a_save_leaves_a_whole_checkpoint(
    cls: type[Doomed], whole_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path / "run", cls, save_total_limit=1)
    trainer.train()
    assert len(trainer.killed) > 30
    newest = []
    for folder in trainer.killed:
        for checkpoint in folder.glob("checkpoint-*"):
            verify_checkpoint(checkpoint)  # no half checkpoint, even before the leftovers are removed
        remove_leftovers(folder)
        assert {path.name.split("-")[0] for path in folder.iterdir()} == {"checkpoint"}
        newest.append(find_newest_checkpoint(folder))
        assert newest[-1] is not None
    names = [path.name for path in newest if path]
    assert names == sorted(names, key=["checkpoint-6", "checkpoint-9"].index)
    assert set(names) == ({"checkpoint-9"} if trainer.again else {"checkpoint-6", "checkpoint-9"})
    for folder in {trainer.killed[names.count("checkpoint-6") - 1], trainer.killed[-1]}:
        resumed = make_trainer(folder)
        resumed.train(resume_from_checkpoint=True)
        assert outcome(resumed) == whole_run[1]


def test_all_is_on_disk_before_the_name_is(trained: TinyTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut leaves no checkpoint with holes: files and folders are synced before the rename."""
    output_dir, events = Path(trained.args.output_dir), []

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(path.relative_to(output_dir).as_posix())
        assert (output_dir / "checkpoint-1").exists() is (path == output_dir)

    monkeypatch.setattr(os, "fsync", fsync)
    trained._save_checkpoint(trained.model, None)
    written = {path.name for path in (output_dir / "checkpoint-1").iterdir()}
    assert set(events) == {".", ".saving-1", *(f".saving-1/{name}" for name in written)}


def test_leftovers(tmp_path: Path) -> None:
    for name in [
        ".saving-9",
        ".old-checkpoint-3",
        ".old-checkpoint-6",
        "checkpoint-6",
        ".old-checkpoint-1-deleted",
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "origin").write_text(name)
    (tmp_path / ".old-notes").write_text("of somebody")
    removed = remove_leftovers(tmp_path)
    assert (tmp_path / ".old-notes").read_text() == "of somebody"
    (tmp_path / ".old-notes").unlink()
    assert removed == [".old-checkpoint-1-deleted", ".old-checkpoint-3", ".old-checkpoint-6", ".saving-9"]
    left = {path.name: (path / "origin").read_text() for path in tmp_path.iterdir()}
    assert left == {"checkpoint-3": ".old-checkpoint-3", "checkpoint-6": "checkpoint-6"}
    assert remove_leftovers(tmp_path / "absent") == []


# Damage


def sign(folder: Path) -> None:
    """Make the manifest agree with the files again, so that only the loading itself can object."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    listed = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": listed}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: path.write_bytes(b""),
    "edited": flip,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(
    damage: Callable[[Path], Any], copied: Callable[..., Path]
) -> None:
    folder = copied(3, 6)
    for name in sorted(path.name for path in (folder / "checkpoint-6").iterdir()):
        shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-9")
        damage(folder / "checkpoint-9" / name)
        passed_over: dict[str, str] = {}
        assert find_newest_checkpoint(folder, passed_over.__setitem__) == folder / "checkpoint-6"
        assert passed_over.keys() == {"checkpoint-9"}
        assert name in passed_over["checkpoint-9"] or name == "manifest.json"
        with pytest.raises(CheckpointError, match="checkpoint-9"):
            verify_checkpoint(folder / "checkpoint-9")
        shutil.rmtree(folder / "checkpoint-9")


def test_an_explicit_damaged_checkpoint_is_an_error(copied: Callable[..., Path], tmp_path: Path) -> None:
    folder = copied(3, 6)
    flip(folder / "checkpoint-6" / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"checkpoint-6: optimizer\.safetensors was changed"):
        make_trainer(folder).train(str(folder / "checkpoint-6"))
    (folder / "checkpoint-3" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        make_trainer(folder).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="not a folder"):
        make_trainer(folder).train(str(folder / "checkpoint-7"))


def test_passing_over_is_logged(copied: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    folder = copied(3)
    (folder / "checkpoint-6").mkdir()
    (folder / "checkpoint-final").mkdir()
    assert find_newest_checkpoint(folder) == folder / "checkpoint-3"
    assert "checkpoint-6 is passed over" in caplog.text and "manifest.json" in caplog.text
    assert find_newest_checkpoint(folder / "absent") is None


LOADED = ["optimizer.json", "optimizer.safetensors", "scheduler.json", "stage_state.json", "rng_state_0.json"]


@pytest.mark.parametrize("name", LOADED)
def test_nothing_starts_afresh_for_want_of_a_file(
    name: str, copied: Callable[..., Path], trained: TinyTrainer
) -> None:
    """Even where the manifest agrees, each loader refuses a missing or garbled file by name."""
    folder = copied(3) / "checkpoint-3"
    for text in [None, "", "{", "[]", '{"0": NaN}']:
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
        sign(folder)
        verify_checkpoint(folder)
        with pytest.raises(CheckpointError, match=f"checkpoint-3: {name}"):
            trained._load_optimizer_and_scheduler(str(folder))
            trained._load_rng_state(str(folder))


def test_the_state_of_a_process_is_missed(copied: Callable[..., Path], trained: TinyTrainer) -> None:
    """Also by a run of fewer processes, which takes the sums of all."""
    path = copied(3) / "checkpoint-3" / "rng_state_0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"world_size": 2}))
    with pytest.raises(CheckpointError, match=r"rng_state_1\.json"):
        trained._load_rng_state(str(path.parent))


# Pickles


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


PICKLED = [
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "pytorch_model.bin",
    "adapter_model.bin",
]


@pytest.mark.parametrize("name", [*PICKLED, "training_args.bin", "stage.pkl", "reference/adapter_model.bin"])
def test_a_pickle_is_never_opened(name: str, copied: Callable[..., Path], tmp_path: Path) -> None:
    folder = copied(3, 6)
    pickled = folder / "checkpoint-6" / name
    pickled.parent.mkdir(exist_ok=True)
    pickled.write_bytes(pickle.dumps(Canary(tmp_path / "sung")))
    reasons: dict[str, str] = {}
    assert find_newest_checkpoint(folder, reasons.__setitem__) == folder / "checkpoint-3"
    assert name in reasons["checkpoint-6"]
    with pytest.raises(CheckpointError, match=f"checkpoint-6/{name} .* safetensors weights"):
        make_trainer(folder).train(str(folder / "checkpoint-6"))
    assert not (tmp_path / "sung").exists()


def test_unlisted_weights_are_refused(copied: Callable[..., Path]) -> None:
    folder = copied(3) / "checkpoint-3"
    (folder / "notes.txt").write_text("harmless")
    verify_checkpoint(folder)
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not in its manifest"):
        verify_checkpoint(folder)


def test_saving_and_resuming_pickle_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("pickle is used")

    for module, names in {
        pickle: ["load", "loads", "dump", "dumps", "Pickler", "Unpickler"],
        torch: ["load", "save"],
        torch.serialization: ["load", "save"],
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    with pytest.raises(AssertionError, match="pickle is used"):
        Trainer._save(make_trainer(tmp_path / "plain"), str(tmp_path / "plain"))
    make_trainer(tmp_path / "run", max_steps=3).train()
    trainer = make_trainer(tmp_path / "run", max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    suffixes = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors", ".md"}


# Contents


@pytest.fixture
def trained(tmp_path: Path) -> TinyTrainer:
    trainer = make_trainer(tmp_path / "trained", max_steps=1, save_strategy="no")
    trainer.train()
    return trainer


class Keeper(torch.optim.Optimizer):
    """Keeps state of many types."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                shared = torch.arange(6).reshape(2, 3).T
                self.state[parameter] = {
                    "step": torch.tensor(7.0),
                    "fp32": torch.randn(3, 5),
                    "bf16": torch.randn(4).bfloat16(),
                    "nan": torch.tensor([float("nan"), float("inf")]),
                    "uint8": torch.arange(256).to(torch.uint8),
                    "int64": shared,
                    "again": shared,
                    "count": 3,
                    "none": None,
                }


def equal(one: Any, other: Any) -> bool:
    """Same structure, types, dtypes and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        same_bits = one.contiguous().reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))
        return one.dtype == other.dtype and one.shape == other.shape and same_bits
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_returns_bit_for_bit(
    dtype: torch.dtype, trained: TinyTrainer, tmp_path: Path
) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in range(3)]
    groups = [
        {"params": parameters[:2], "lr": 0.1 + 0.2},
        {"params": parameters[2:], "lr": torch.tensor(0.1)},
    ]
    trained.optimizer = Keeper(
        groups, {"betas": (0.9, 0.999), "nested": {"path": (1, [2, (3,)])}, "eps": 5e-324}
    )
    trained.optimizer.step()
    trained._save_optimizer_and_scheduler(str(tmp_path))
    saved = trained.optimizer.state_dict()
    trained.optimizer = Keeper(groups, {"betas": (0.0, 0.0), "nested": {}, "eps": 0.0})
    trained._load_optimizer_and_scheduler(str(tmp_path))
    assert equal(trained.optimizer.state_dict(), saved)
    assert load_file(tmp_path / "optimizer.safetensors")["2/bf16"].dtype == torch.bfloat16


def test_adam_keeps_betas_as_a_tuple(copied: Callable[..., Path], trained: TinyTrainer) -> None:
    trained._load_optimizer_and_scheduler(str(copied(6) / "checkpoint-6"))
    assert trained.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: "int key"}, {"set"}, torch.zeros(1)])
def test_state_that_json_cannot_keep_is_refused(value: Any, tmp_path: Path) -> None:
    class Odd(TinyTrainer):
        def extra_state(self) -> dict[str, Any]:
            return {"value": value}

    with pytest.raises(CheckpointError, match=r"stage_state\.json"):
        make_trainer(tmp_path, Odd).train()
    assert not list(tmp_path.iterdir())


def test_plateau_scheduler_with_infinite_best(trained: TinyTrainer, tmp_path: Path) -> None:
    def plateau() -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(trained.optimizer.optimizer, patience=3)

    for steps in range(2):
        trained.lr_scheduler = whole = plateau()
        for _ in range(steps):
            whole.step(0.5)
        trained._save_optimizer_and_scheduler(str(tmp_path))
        trained.lr_scheduler = plateau()
        trained._load_optimizer_and_scheduler(str(tmp_path))
        assert trained.lr_scheduler.state_dict() == whole.state_dict()


def test_scaler(trained: TinyTrainer, tmp_path: Path) -> None:
    trained.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trained._save_optimizer_and_scheduler(str(tmp_path))
    trained.accelerator.scaler = torch.amp.GradScaler("cpu")
    trained._load_optimizer_and_scheduler(str(tmp_path))
    assert trained.accelerator.scaler.state_dict()["scale"] == 1024.0
    (tmp_path / "scaler.json").unlink()
    with pytest.raises(CheckpointError, match=r"scaler\.json"):
        trained._load_optimizer_and_scheduler(str(tmp_path))


def test_no_token_is_saved(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=1, save_steps=1, hub_token="hf_canary").train()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"hf_canary" in path.read_bytes()]
    arguments = json.loads((tmp_path / "checkpoint-1" / "training_args.json").read_text())
    assert arguments["max_steps"] == 1 and "hub_token" not in arguments


@pytest.mark.parametrize("limit, left", [(None, [3, 6, 9, 12]), (2, [9, 12]), (1, [12])])
def test_save_total_limit(limit: int | None, left: list[int], tmp_path: Path) -> None:
    make_trainer(tmp_path, save_total_limit=limit).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"checkpoint-{step}" for step in left)


def test_the_limit_holds_after_a_kill_between_the_last_save_and_its_rotation(
    copied: Callable[..., Path],
) -> None:
    folder = copied(9, STEPS)
    trainer = make_trainer(folder, save_total_limit=1)
    trainer.train(resume_from_checkpoint=True)
    assert [path.name for path in folder.iterdir()] == [f"checkpoint-{STEPS}"]


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path: Path) -> None:
    class Worse(TinyTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return {"eval_loss": float(self.state.global_step)}

    trainer = make_trainer(
        tmp_path,
        Worse,
        save_total_limit=2,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=3,
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-3"]
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-3")
    best = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert trainer.model.state_dict()[next(iter(best)).replace(".weight", ".default.weight")].equal(
        next(iter(best.values()))
    )
    flip(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="was changed"):
        trainer._load_best_model()


def run_rank(rank: int, folder: Path, port: int) -> None:
    """Train whole, then resume it from its middle: one of two processes that work together."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    AcceleratorState._reset_state(reset_partial_state=True)
    whole = make_trainer(folder / "whole", max_steps=5, save_steps=2)
    whole.train()
    resumed = make_trainer(folder / "resumed", max_steps=5, save_steps=2)
    resumed.train(str(folder / "whole" / "checkpoint-2"))
    assert resumed.args.world_size == 2
    assert outcome(resumed, 4, rank) == outcome(whole, 4, rank)
    verify_checkpoint(folder / "resumed" / "checkpoint-4")


@forks
def test_two_processes_resume_as_one_whole(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run_rank(rank, tmp_path, port)
                code = 0
            except Exception:
                traceback.print_exc()
                raise
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    names = {path.name for path in (tmp_path / "resumed" / "checkpoint-4").glob("rng_state_*")}
    assert names == {"rng_state_0.json", "rng_state_1.json"}
