"""A hang ends with all stacks, wherever it is; a run that is slow does not. In real processes, which end."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import get_worker_info

from prefkit.train import watchdog
from prefkit.train.checkpoint_files import verify_checkpoint
from prefkit.train.dpo import DpoStage
from prefkit.train.loading import Collator
from prefkit.train.watchdog import Watchdog
from tests.train.forks import FORKS, Fork, command, two_ranks
from tests.train.runs import read, torchrun
from tests.train.test_kills import rest_is_slow

pytestmark = FORKS
TIMEOUT = 3  # seconds, as `hang_timeout`
HANGS = {"hang_timeout": TIMEOUT, "max_steps": 4, "save_steps": 2}


@pytest.fixture(autouse=True)
def wait_for_no_other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that ends gives the others no time for their stacks: here no launcher ends them."""
    monkeypatch.setattr(watchdog, "_RANKS_TIME", 0)


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
    collate, calls = Collator.__call__, iter(range(1000))

    def collates(self: Collator, examples: Any) -> Any:
        if get_worker_info() and next(calls) == 2:
            change()
        return collate(self, examples)

    monkeypatch.setattr(Collator, "__call__", collates)


def in_time(mark: Path, slack: float = 10) -> bool:
    """Whether it is no longer than time-out and slack since the hang began; 5 s do on an idle machine."""
    return time.time() - mark.stat().st_mtime < TIMEOUT + slack


def test_hang_timeout(write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that sleeps."""
    hang_at_third_step(monkeypatch, lambda: fall_asleep(tmp_path / "mark"))
    config = write_config(**HANGS)
    child = Fork(tmp_path / "stderr", command("train", config))
    assert child.end() == 70
    assert in_time(tmp_path / "mark")
    assert "error: No progress for 3 s after step 2 (rank 0)" in child.printed()
    assert "in fall_asleep" in child.printed() and "in training_step" in child.printed()
    verify_checkpoint(tmp_path / "out" / "checkpoint-2")
    monkeypatch.undo()
    again = Fork(tmp_path / "again", command("train", config))
    assert again.end() == 0, again.printed()
    assert read(tmp_path / "out" / "trainer_state.json")["global_step"] == 4


def test_a_data_worker_that_hangs(write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def note_and_sleep() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        fall_asleep(tmp_path / "mark")

    change_worker(monkeypatch, note_and_sleep)
    config = write_config(**HANGS, dataloader_num_workers=1)
    child = Fork(tmp_path / "stderr", command("train", config))
    assert child.end() == 70
    assert in_time(tmp_path / "mark")
    worker = (tmp_path / "pid").read_text()
    main, stacks = child.printed().split(f", pid {worker}, of rank 0:\n")
    assert "_next_data" in main and "in fall_asleep" in stacks
    assert not is_running(int(worker))


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that has ended and waits for its parent's notice is none."""
    file = Path(f"/proc/{pid}/stat")
    return file.exists() and file.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("rank", rest_is_slow(["1"], ["0"]))
def test_a_data_worker_that_is_killed(
    rank: str, write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever rank it belongs to says so."""
    change_worker(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    config = write_config(dataloader_num_workers=1, max_steps=6)
    child = Fork(tmp_path / "stderr", command("train", config, RANK=rank))
    assert child.end() == 70
    (line,) = [line for line in child.printed().splitlines() if line.startswith("error: ")]
    assert "A process that loads data died" in line
    assert "`dataloader_num_workers: 0`" in line and "goes on from the newest checkpoint" in line


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), watchdog.named_worker_deaths():
        raise RuntimeError("shapes differ")


@pytest.mark.slow
def test_a_call_that_keeps_the_interpreter(
    write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "_SLACK", 2)
    hang_at_third_step(monkeypatch, lambda: fall_asleep(tmp_path / "mark", ctypes.PyDLL(None).sleep))
    config = write_config(**HANGS)
    child = Fork(tmp_path / "stderr", command("train", config))
    assert child.end() == 1
    assert in_time(tmp_path / "mark")
    assert "Timeout (0:00:05)!" in child.printed() and "in fall_asleep" in child.printed()


def test_a_rank_that_stands_still(write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one, which waits for it, ends with its stacks; a launcher then ends the one that stands."""

    def stop() -> None:
        if os.environ["RANK"] == "1":
            (tmp_path / "mark").touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    hang_at_third_step(monkeypatch, stop)
    arguments = two_ranks("train", write_config(**HANGS))
    waits, stands = (Fork(tmp_path / f"rank-{rank}", **each) for rank, each in enumerate(arguments))
    assert waits.end() == 70
    assert in_time(tmp_path / "mark")
    assert "after step 2 (rank 0)" in waits.printed() and "most recent call first" in waits.printed()
    os.kill(stands.pid, signal.SIGKILL)
    assert stands.end() == -signal.SIGKILL


SLEEPS_ON_RANK_1 = """
import os, time
from prefkit.cli import main
from prefkit.train.dpo import DpoStage
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


@pytest.mark.slow
def test_a_rank_that_hangs_under_torchrun(
    write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks write their stacks before torchrun, which ends all when one has ended, can end the other."""
    (tmp_path / "hangs.py").write_text(SLEEPS_ON_RANK_1)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    done = torchrun("-m", "hangs", "train", str(write_config(**HANGS, ddp_backend="gloo")))
    assert done.returncode != 0
    assert in_time(tmp_path / "mark", slack=15)
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
    child = Fork(tmp_path / "stderr", command("train", config))
    assert child.end() == 0, child.printed()


def test_time_in_which_the_process_stands_still_does_not_count(tmp_path: Path) -> None:
    def beats() -> None:
        with Watchdog(0.5):
            (tmp_path / "started").touch()
            time.sleep(0.3)  # a step, in the middle of which it is stopped

    child = Fork(tmp_path / "stderr", beats)
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(child.pid, signal.SIGCONT)
    assert child.end() == 0, child.printed()


def test_a_stderr_that_nobody_reads_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs() -> None:
        monkeypatch.setattr(watchdog, "_SLACK", 1)
        os.dup2(full_pipe(), 2)
        with Watchdog(0.5):
            time.sleep(60)

    start = time.monotonic()
    assert Fork(tmp_path / "stderr", hangs).end() == -signal.SIGALRM
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

    child = Fork(tmp_path / "stderr", watches_and_sleeps)
    assert child.end() == 0, child.printed()
