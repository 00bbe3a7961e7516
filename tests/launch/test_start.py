"""`prefkit train` in several processes, as a user types it: what is printed, how it ends, with which code.

Faults are put into the processes by a module that Python imports as it starts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefkit.config import load_config
from prefkit.config.errors import UserError
from prefkit.launch.plan import Devices, Launch
from prefkit.launch.start import count_cores, count_devices, keys_that_go_on, launch
from prefkit.train.checkpoint_files import find_newest_checkpoint, verify_checkpoint
from prefkit.train.launched import free_port
from tests.train.forks import call, forks
from tests.train.runs import read

ROOT = Path(__file__).parents[2]
TWO = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
# Does something in a process of the launch before its third micro-batch.
FAULT = """
import os
def arm():
    import importlib.abc, importlib.util, sys
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "prefkit.train.dpo":  # which loads what all others load
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            load = spec.loader.exec_module
            def exec_module(module):
                load(module)
                change(module.DpoStage)
            spec.loader.exec_module = exec_module
            return spec
    sys.meta_path.insert(0, Finder())
def change(stage):
    import signal, time
    from pathlib import Path
    from prefkit.config.errors import UserError
    compute, calls, rank = stage.compute, iter(range(1000)), os.environ["RANK"]
    def fall_asleep():
        time.sleep(120)
    def computes(self, model, inputs):
        if next(calls) == 2:
            {fault}
        return compute(self, model, inputs)
    stage.compute = computes
if "RANK" in os.environ:
    arm()
"""


class Started:
    """A command that runs; `end` waits for it."""

    def __init__(self, command: list[str], folder: Path, **variables: str) -> None:
        paths = [str(folder), str(ROOT)]
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "OMP"))
        }
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**kept, "PYTHONPATH": os.pathsep.join(paths), **variables},
            start_new_session=True,
        )

    def end(self) -> tuple[int, str, str]:
        """Its exit code, and what it printed."""
        stdout, stderr = self.process.communicate(timeout=120)
        return self.process.returncode, without_noise(stdout), without_noise(stderr)


def without_noise(text: str) -> str:
    """Without what DeepSpeed, where it is installed, says of itself."""
    return "".join(line for line in text.splitlines(keepends=True) if "real_accelerator.py" not in line)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Started]:
    """Starts `prefkit train` with overrides; `fault` is what happens in each process at its third batch."""

    def starts(config: Path, *overrides: str, fault: str = "pass", **variables: str) -> Started:
        (tmp_path / "sitecustomize.py").write_text(FAULT.replace("{fault}", fault))
        command = [sys.executable, "-m", "prefkit", "train", str(config), *overrides]
        return Started(command, tmp_path, **variables)

    return starts


def test_two_processes_and_values_with_spaces(start: Any, write_config, tmp_path: Path) -> None:
    """On a CPU, as typed: no key names a backend. The values arrive in every process as they are."""
    name = "two  words 'a' \"b\" c=d\n$HOME `x`"
    code, stdout, stderr = start(write_config(), f"run_name={json.dumps(name)}", **TWO).end()
    assert code == 0 and stderr == "", stderr
    assert stdout.startswith("Starting 2 processes on this machine (NPROC_PER_NODE), each with ")
    assert stdout.count("Reference:") == 1 and stdout.count("step 2/2") == 1
    assert processes(tmp_path) == 2
    assert load_config(tmp_path / "out" / "config.yaml").config.training["run_name"] == name
    assert not list((tmp_path / "out").glob("failed*"))


def processes(folder: Path) -> int:
    """How many processes saved the last checkpoint."""
    return int(read(folder / "out" / "checkpoint-2" / "run.json")["processes"]["number"])


def test_an_error_in_one_process(start: Any, write_config, tmp_path: Path) -> None:
    began = time.monotonic()
    code, stdout, stderr = start(write_config(max_steps=6), fault="rank == '1' and [][0]", **TWO).end()
    assert code == 1 and time.monotonic() - began < 90
    assert stderr.startswith("error: process 1 of 2 failed: IndexError: list index out of range\n  at ")
    assert "Traceback" not in stdout and len(stderr.splitlines()) == 3
    log = tmp_path / "out" / "failed_processes.log"
    assert str(log) in stderr and "==== process 0" in log.read_text()
    assert "Traceback (most recent call last)" in log.read_text() and "IndexError" in log.read_text()


@pytest.mark.parametrize("more", [{}, pytest.param({"RDZV_ID": "job"}, marks=pytest.mark.slow)])
def test_a_signal_saves_and_gives_its_code(
    more: dict[str, str], start: Any, write_config, tmp_path: Path
) -> None:
    """To the command, as a batch system sends it; all processes have ended when it has."""
    config = write_config(max_steps=500, save_steps=1000, sample_prompts=0)
    started = start(config, fault=f"(Path({str(tmp_path)!r}) / f'at-{{rank}}').touch()", **TWO, **more)
    while not (tmp_path / "at-1").exists():
        time.sleep(0.05)
        assert started.process.poll() is None
    started.process.send_signal(signal.SIGUSR1)
    code, _, stderr = started.end()
    assert code == 128 + signal.SIGUSR1, stderr
    assert "SIGUSR1: saving after this step" in stderr and "is saved. To go on from there" in stderr
    assert stderr.count("Ended by SIGUSR1") == 1 and "Traceback" not in stderr
    newest = find_newest_checkpoint(tmp_path / "out")
    assert newest is not None and f"{newest} is saved" in stderr


@forks
def test_wrong_variables_and_configs_that_cannot_be_read_again(
    write_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "two")
    monkeypatch.setenv("NNODES", "0")
    done = call("train", write_config())
    assert done.returncode == 1 and "NPROC_PER_NODE=two" in done.stderr and "NNODES=0" in done.stderr
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.delenv("NNODES")
    done = call("train", write_config(pref_loss="no"))
    assert done.returncode == 2 and "Starting" not in done.stdout
    config = load_config(write_config()).config
    with pytest.raises(UserError, match="several processes read it"):
        launch(Launch(2, "test", 1), config, Path("/dev/null"), [])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_devices_are_counted_whatever_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert count_devices() == Devices(0, 0)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert count_devices() == Devices(0, 0)
    assert count_cores() >= 1


def test_only_its_own_run_is_gone_on_with(write_config, tmp_path: Path) -> None:
    """What another attempt is told, where the command starts afresh."""
    config = load_config(write_config(overwrite_output_dir=True)).config
    record = tmp_path / "out" / "prefkit.json"
    assert keys_that_go_on(config, 0.0) == []
    record.parent.mkdir()
    record.touch()
    assert keys_that_go_on(config, time.time() + 60) == []
    keys = keys_that_go_on(config, time.time() - 60)
    again = load_config(write_config(overwrite_output_dir=True, resume_from_checkpoint="x"), keys).config
    assert not again.output.overwrite_output_dir
    assert again.training.get("resume_from_checkpoint") is None


@pytest.mark.slow
def test_a_process_that_is_killed_and_a_restart(start: Any, write_config, tmp_path: Path) -> None:
    """It goes on from the newest checkpoint, even where the command would start afresh."""
    mark = f"(mark := Path({str(tmp_path)!r}, 'mark'))"
    fault = f"rank == '0' or {mark}.exists() or mark.touch() or os.kill(os.getpid(), 9)"
    config = write_config(max_steps=4, save_steps=1, overwrite_output_dir=True)
    code, stdout, stderr = start(config, fault=fault, MAX_RESTARTS="1", **TWO).end()
    assert code == 0, stderr
    assert stderr.startswith(
        "error: process 1 of 2 was killed by SIGKILL, which is what the kernel does when"
    )
    assert "Starting all again, from the newest checkpoint; 0 restarts are left." in stderr
    assert "Resuming from " in stdout and read(tmp_path / "out" / "trainer_state.json")["global_step"] == 4


@pytest.mark.slow
def test_a_hang_ends_with_the_stacks_of_both(start: Any, write_config, tmp_path: Path) -> None:
    config = write_config(hang_timeout=3, max_steps=6, save_steps=2)
    code, _, stderr = start(config, fault="rank == '1' and fall_asleep()", **TWO).end()
    assert code == 70, stderr
    assert "after step 2 (rank 0)" in stderr and "after step 2 (rank 1)" in stderr
    assert "in fall_asleep" in stderr and "Process 1:" in stderr
    assert "error: the processes made no progress" in stderr
    verify_checkpoint(tmp_path / "out" / "checkpoint-2")


@pytest.mark.slow
def test_two_commands_as_two_machines(write_config, tmp_path: Path) -> None:
    """And with RDZV_ID, by which torchrun numbers them."""
    for more in ({}, {"RDZV_ID": "job", "MIN_NNODES": "2", "MAX_NNODES": "2"}):
        port = str(free_port())
        config = write_config(overwrite_output_dir=True)
        shared = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}
        command = [sys.executable, "-m", "prefkit", "train", str(config)]
        nodes = [Started(command, tmp_path, NODE_RANK=str(node), **shared) for node in (0, 1)]
        ends = [node.end() for node in nodes]
        assert [code for code, _, _ in ends] == [0, 0], ends
        assert processes(tmp_path) == 2
        assert sum("step 2/2" in stdout for _, stdout, _ in ends) == 1
        assert all(stderr == "" for _, _, stderr in ends), ends


@pytest.mark.slow
def test_an_error_on_one_of_two_machines(start: Any, write_config) -> None:
    """That one says what it is; the other that it lost it. With RDZV_ID, without a word of torchrun."""
    shared = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RDZV_ID": "job"}
    nodes = [start(write_config(max_steps=6), fault="rank == '1' and [][0]", **shared) for _ in range(2)]
    ends = [node.end() for node in nodes]
    assert [code for code, _, _ in ends] == [1, 1]
    assert sum("error: process 1 of 2 failed: IndexError" in stderr for _, _, stderr in ends) == 1
    assert sum("error: process 0 of 2 lost its connection" in stderr for _, _, stderr in ends) == 1
    assert not any("Traceback (most" in stderr or "elastic" in stderr for _, _, stderr in ends), ends


LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", "PORT", "-m"],
    "accelerate": [
        "accelerate",
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "PORT",
        "-m",
    ],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "PORT", "--module"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_other_launchers(name: str, write_config, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name(name)
    if not program.exists():
        pytest.skip(f"{name} is not installed")
    port = str(free_port())
    words = [port if word == "PORT" else word for word in LAUNCHERS[name]]
    command = [str(program), *words[1:], "prefkit", "train", str(write_config()), "run_name=two words"]
    code, stdout, stderr = Started(command, tmp_path, DS_ACCELERATOR="cpu", LOCAL_SIZE="2").end()
    assert code == 0, stderr
    assert processes(tmp_path) == 2 and stdout.count("step 2/2") == 1
    assert load_config(tmp_path / "out" / "config.yaml").config.training["run_name"] == "two words"


@pytest.mark.slow
def test_tasks_of_srun(write_config, tmp_path: Path) -> None:
    """By its variables alone: Slurm is not here."""
    config = write_config()
    shared = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    shared |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    command = [sys.executable, "-m", "prefkit", "train", str(config)]
    tasks = [
        Started(command, tmp_path, SLURM_PROCID=task, SLURM_LOCALID=task, SLURM_NODEID="0", **shared)
        for task in "01"
    ]
    ends = [task.end() for task in tasks]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert processes(tmp_path) == 2 and ends[1][1] == ""
