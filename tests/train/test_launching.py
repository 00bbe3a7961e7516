"""`prefkit train` that starts several processes, as a user types it: what is printed, how fast it ends, and with
which code. Faults are put into the processes by a module that Python imports as it starts."""

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

from prefkit.train.checkpoint import find_newest_checkpoint, verify_checkpoint
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
            if name != "prefkit.train.dpo":
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
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "OMP"))}
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
        return self.process.returncode, stdout, without_noise(stderr)


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
    assert read(tmp_path / "out" / "prefkit.json")["processes"] == 2
    assert not list((tmp_path / "out").glob("failed*"))


def test_an_error_in_one_process(start: Any, write_config, tmp_path: Path) -> None:
    fault = "rank == '1' and [][0]"
    code, stdout, stderr = start(write_config(max_steps=6), fault=fault, **TWO).end()
    log = tmp_path / "out" / "failed_processes.log"
    assert code == 1
    assert stderr.startswith("error: process 1 of 2 failed: IndexError: list index out of range\n  at ")
    assert "Traceback" not in stderr + stdout and len(stderr.splitlines()) < 5 and str(log) in stderr
    story = log.read_text()
    assert story.count("Traceback") >= 1 and "IndexError" in story and "==== process 0" in story
    # The file stands in the way of nothing: a run that goes on is that of the folder.
    assert not (tmp_path / "out" / "prefkit.json").exists() or read(tmp_path / "out" / "prefkit.json")


def test_a_process_that_is_killed_and_a_restart(start: Any, write_config, tmp_path: Path) -> None:
    """It goes on from the newest checkpoint, even where the command would start afresh."""
    mark = tmp_path / "mark"
    fault = f"rank == '1' and not Path({str(mark)!r}).exists() and (Path({str(mark)!r}).touch(), os.kill(os.getpid(), 9))"
    config = write_config(max_steps=4, save_steps=1, overwrite_output_dir=True)
    code, stdout, stderr = start(config, fault=fault, MAX_RESTARTS="1", **TWO).end()
    assert code == 0, stderr
    assert stderr.startswith("error: process 1 of 2 was killed by SIGKILL, which is what the kernel does when")
    assert "Starting all again, from the newest checkpoint; 0 restarts are left." in stderr
    assert "Resuming from " in stdout and read(tmp_path / "out" / "trainer_state.json")["global_step"] == 4


def test_a_hang_ends_with_the_stacks_of_both(start: Any, write_config, tmp_path: Path) -> None:
    fault = "rank == '1' and fall_asleep()"
    config = write_config(hang_timeout=3, max_steps=6, save_steps=2)
    code, _, stderr = start(config, fault=fault, **TWO).end()
    assert code == 70, stderr
    assert "after step 2 (rank 0)" in stderr and "after step 2 (rank 1)" in stderr
    assert "in fall_asleep" in stderr and "Process 1:" in stderr
    assert "error: the processes made no progress" in stderr
    verify_checkpoint(tmp_path / "out" / "checkpoint-2")


def test_a_signal_saves_and_gives_its_code(start: Any, write_config, tmp_path: Path) -> None:
    """To the command, as a batch system sends it; all processes have ended when it has."""
    started = start(write_config(max_steps=500, save_steps=1000), "sample_prompts=0", fault="(Path(r'{}') / f'at-{{rank}}').touch()".format(tmp_path), **TWO)
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
