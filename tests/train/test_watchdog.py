"""A hang ends with all stacks, wherever it is; a run that is slow does not. In real processes, which end."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import get_worker_info

from prefkit import cli
from prefkit.train import trainer, watchdog
from prefkit.train.checkpoint import verify_checkpoint
from prefkit.train.stages import DpoStage
from prefkit.train.watchdog import Watchdog
from tests.train.runs import read, torchrun

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # Python 3.12
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="forks after autograd has started threads for the GPU"
    ),
]
TIMEOUT = 3  # seconds, as `hang_timeout`
HANGS = {"hang_timeout": TIMEOUT, "max_steps": 6, "save_steps": 2}


class Child:
    """A fork of this process, which may hang: what it writes to stderr and how it ends."""

    def __init__(self, stderr: Path, work: Callable[[], object]) -> None:
        self.stderr = stderr
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT, 0o600), 2)
                sys.stderr = sys.__stderr__
                os.environ["OMP_NUM_THREADS"] = "1"  # accelerate warns in a run of two processes without it
                AcceleratorState._reset_state(reset_partial_state=True)
                work()
                code = 0
            except SystemExit as end:
                code = end.code  # type: ignore[assignment]
            except Exception:
                traceback.print_exc()
                raise
            finally:
                sys.stderr.flush()
                os._exit(code)

    def end(self) -> int:
        """Its exit code, minus the signal that ended it; waits for it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def written(self) -> str:
        """What it has written to stderr."""
        return self.stderr.read_text()


def command(config: Path, **environment: str) -> None:
    """`prefkit train config`, in a process that may be changed."""
    os.environ.update(environment)
    sys.argv = ["prefkit", "train", str(config)]
    cli.main()


def fall_asleep(mark: Path, sleep: Callable[[float], object] = time.sleep) -> None:
    mark.touch()
    sleep(60)


def hang_at_third_step(monkeypatch: pytest.MonkeyPatch, hang: Callable[[], None]) -> None:
    """Each step is a micro-batch."""
    compute, calls = DpoStage.compute, iter(range(1000))

    def computes(self: DpoStage, model: Any, inputs: Any) -> Any:
        if next(calls) == 2:
            hang()
        return compute(self, model, inputs)

    monkeypatch.setattr(DpoStage, "compute", computes)


def change_worker(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Do something in the data worker, at its third batch."""
    collate, calls = trainer._collate, iter(range(1000))

    def collates(examples: Any, layout: Any) -> Any:
        if get_worker_info() and next(calls) == 2:
            change()
        return collate(examples, layout)

    monkeypatch.setattr(trainer, "_collate", collates)


def in_time(mark: Path, slack: float = 5) -> bool:
    """Whether it is no longer than time-out and slack since the hang began."""
    return time.time() - mark.stat().st_mtime < TIMEOUT + slack


def test_hang_timeout(write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that sleeps."""
    hang_at_third_step(monkeypatch, lambda: fall_asleep(tmp_path / "mark"))
    config = write_config(**HANGS)
    child = Child(tmp_path / "stderr", lambda: command(config))
    assert child.end() == 70
    assert in_time(tmp_path / "mark")
    assert "error: No progress for 3 s after step 2 (rank 0)" in child.written()
    assert "in fall_asleep" in child.written() and "in training_step" in child.written()
    verify_checkpoint(tmp_path / "out" / "checkpoint-2")
    monkeypatch.undo()
    again = Child(tmp_path / "again", lambda: command(config))
    assert again.end() == 0, again.written()
    assert read(tmp_path / "out" / "trainer_state.json")["global_step"] == 6


def test_a_data_worker_that_hangs(write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def note_and_sleep() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        fall_asleep(tmp_path / "mark")

    change_worker(monkeypatch, note_and_sleep)
    config = write_config(**HANGS, dataloader_num_workers=1)
    child = Child(tmp_path / "stderr", lambda: command(config))
    assert child.end() == 70
    assert in_time(tmp_path / "mark")
    worker = (tmp_path / "pid").read_text()
    main, stacks = child.written().split(f", pid {worker}, of rank 0:\n")
    assert "_next_data" in main and "in fall_asleep" in stacks
    assert not is_running(int(worker))


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that has ended and waits for its parent's notice is none."""
    file = Path(f"/proc/{pid}/stat")
    return file.exists() and file.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_data_worker_that_is_killed(
    rank: str, write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever rank it belongs to says so."""
    change_worker(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    config = write_config(dataloader_num_workers=1, max_steps=6)
    child = Child(tmp_path / "stderr", lambda: command(config, RANK=rank))
    assert child.end() == 70
    (line,) = [line for line in child.written().splitlines() if line.startswith("error: ")]
    assert "A process that loads data died" in line
    assert "`dataloader_num_workers: 0`" in line and "goes on from the last checkpoint" in line


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), watchdog.named_worker_deaths():
        raise RuntimeError("shapes differ")


def test_a_call_that_keeps_the_interpreter(
    write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "_SLACK", 2)
    hang_at_third_step(monkeypatch, lambda: fall_asleep(tmp_path / "mark", ctypes.PyDLL(None).sleep))
    config = write_config(**HANGS)
    child = Child(tmp_path / "stderr", lambda: command(config))
    assert child.end() == 1
    assert in_time(tmp_path / "mark")
    assert "Timeout (0:00:05)!" in child.written() and "in fall_asleep" in child.written()


def test_a_rank_that_stands_still(write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one, which waits for it, ends with its stacks; a launcher then ends the one that stands."""

    def stop() -> None:
        if os.environ["RANK"] == "1":
            (tmp_path / "mark").touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    hang_at_third_step(monkeypatch, stop)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    config = write_config(**HANGS, ddp_backend="gloo")

    def start(rank: str) -> Child:
        return Child(
            tmp_path / f"stderr-{rank}", lambda: command(config, RANK=rank, LOCAL_RANK=rank, **world)
        )

    waits, stands = start("0"), start("1")
    assert waits.end() == 70
    assert in_time(tmp_path / "mark")
    assert "after step 2 (rank 0)" in waits.written() and "most recent call first" in waits.written()
    os.kill(stands.pid, signal.SIGKILL)
    assert stands.end() == -signal.SIGKILL


SLEEPS_ON_RANK_1 = """
import os, time
from prefkit.cli import main
from prefkit.train.stages import DpoStage
compute, calls = DpoStage.compute, iter(range(1000))
def fall_asleep():
    open(os.environ["MARK"], "w").close()
    time.sleep(60)
def computes(self, model, inputs):
    if next(calls) == 2 and os.environ["RANK"] == "1":
        fall_asleep()
    return compute(self, model, inputs)
DpoStage.compute = computes
main()
"""


def test_a_rank_that_hangs_under_torchrun(
    write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks write their stacks before torchrun, which ends all when one has ended, can end the other."""
    (tmp_path / "hangs.py").write_text(SLEEPS_ON_RANK_1)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    done = torchrun("-m", "hangs", "train", str(write_config(**HANGS, ddp_backend="gloo")))
    assert done.returncode != 0
    assert in_time(tmp_path / "mark", slack=10)
    assert "after step 2 (rank 0)" in done.stderr and "after step 2 (rank 1)" in done.stderr
    assert "in fall_asleep" in done.stderr and "exitcode  : 70" in done.stderr
    verify_checkpoint(tmp_path / "out" / "checkpoint-2")


def test_a_slow_run_is_left_alone(write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches of 0.4 s: a step of six takes more than the time-out, and so does an evaluation."""
    compute = DpoStage.compute

    def computes(self: DpoStage, model: Any, inputs: Any) -> Any:
        time.sleep(0.4)
        return compute(self, model, inputs)

    monkeypatch.setattr(DpoStage, "compute", computes)
    config = write_config(
        **{"hang_timeout": 2, "max_steps": 1, "gradient_accumulation_steps": 6},
        **{"eval_dataset": "pairs", "do_eval": True, "per_device_eval_batch_size": 2},
    )
    child = Child(tmp_path / "stderr", lambda: command(config))
    assert child.end() == 0, child.written()


def test_time_in_which_the_process_stands_still_does_not_count(tmp_path: Path) -> None:
    def beats() -> None:
        with Watchdog(0.5):
            (tmp_path / "started").touch()
            time.sleep(0.3)  # a step, in the middle of which it is stopped

    child = Child(tmp_path / "stderr", beats)
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(child.pid, signal.SIGCONT)
    assert child.end() == 0, child.written()


def test_a_stderr_that_nobody_reads_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs() -> None:
        monkeypatch.setattr(watchdog, "_SLACK", 1)
        os.dup2(full_pipe(), 2)
        with Watchdog(0.5):
            time.sleep(60)

    start = time.monotonic()
    assert Child(tmp_path / "stderr", hangs).end() == -signal.SIGALRM
    assert time.monotonic() - start < 0.5 + 1 + 2


def full_pipe() -> int:
    """The end to write to of a pipe that takes no more."""
    _, end = os.pipe()
    os.set_blocking(end, False)
    while True:
        try:
            os.write(end, bytes(1))
        except BlockingIOError:
            os.set_blocking(end, True)
            return end


def test_nothing_is_left_of_a_watch_that_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def watches_and_sleeps() -> None:
        monkeypatch.setattr(watchdog, "_SLACK", 0.1)
        for seconds in (0.3, 0):  # 0 is no watch at all
            with Watchdog(seconds):
                assert any(thread.name == "watchdog" for thread in threading.enumerate()) is (seconds > 0)
                time.sleep(0.8 if seconds == 0 else 0)
        time.sleep(0.8)
        assert not any(thread.name == "watchdog" for thread in threading.enumerate())
        other = multiprocessing.get_context("fork").Process(target=unregisters)
        other.start()
        other.join()
        assert other.exitcode == 0

    def unregisters() -> None:
        assert not faulthandler.unregister(signal.SIGUSR2)

    child = Child(tmp_path / "stderr", watches_and_sleeps)
    assert child.end() == 0, child.written()
