"""An end, with all stacks, for a run that hangs, and a clear word for one whose data worker died."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from traceback import walk_tb
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefkit.config.errors import UserError
from prefkit.train.launched import HANG

_HELP = (
    "Where a step, an evaluation batch or a save simply takes longer, raise `hang_timeout`; otherwise the "
    "stacks say what it waited for. The same command goes on from the newest checkpoint, if there is one."
)
_SLACK = 5  # seconds beyond the time-out by which a hung process has ended
_WORKERS_TIME = 1.0  # seconds in which the data workers write their stacks
_RANKS_TIME = 2.0  # seconds in which other ranks write theirs: a launcher ends all when one has ended
# How torch's errors about a data worker begin; the second is what remains where batches are pinned.
_DEATHS = ("DataLoader worker (pid", "Pin memory thread exited unexpectedly")

_stacks_to: int | None = None  # descriptor that a forked child writes its stacks to; None: nothing is watched


def _answer_with_stacks() -> None:
    """Have a forked child write its stacks when it gets SIGUSR2.

    It inherits no threads, so neither the watch nor the alarm of the process that it comes from.
    """
    if _stacks_to is not None:
        faulthandler.register(signal.SIGUSR2, file=_stacks_to, all_threads=True)


os.register_at_fork(after_in_child=_answer_with_stacks)


class Watchdog:
    """Ends this process, inside the context, when `beat` was not called for `seconds`; 0 never does.

    A thread looks at least once a second. When a beat is overdue it writes to stderr what happened and the
    stacks of all threads of this process and of its data workers, and ends both, with exit code 70. Where a
    C call holds the interpreter's lock, so that this thread cannot run, faulthandler's own thread writes
    the stacks, 5 seconds later, and ends the process with exit code 1.

    Time in which the whole process stood still (Ctrl-Z, a suspended job) does not count, unless it exceeds
    `seconds`. `rank` is for the message.
    """

    def __init__(self, seconds: float, rank: int = 0) -> None:
        self.seconds, self.rank = seconds, rank
        self._beats = self._step = 0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int | None = None) -> None:
        """Say that the run is alive, and which optimiser step was its last."""
        self._beats += 1
        if step is not None:
            self._step = step

    def __enter__(self) -> Watchdog:
        """Start to watch."""
        global _stacks_to
        if self.seconds:
            # Not sys.stderr: a progress bar or a test may stand in for it, and its lock may be taken.
            _stacks_to = sys.__stderr__.fileno() if sys.__stderr__ else os.open(os.devnull, os.O_WRONLY)
            self._descriptor = _stacks_to
            self._arm()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Watch no longer."""
        global _stacks_to
        if self.seconds:
            _stacks_to = None
            self._left.set()
            self._thread.join()

    def _arm(self) -> None:
        """Have faulthandler end the process; where memory is short it cannot, until the next look."""
        with suppress(RuntimeError, MemoryError):
            faulthandler.dump_traceback_later(self.seconds + _SLACK, exit=True, file=self._descriptor)

    def _watch(self) -> None:
        interval = min(1.0, self.seconds / 10)
        beats, waited, looked = self._beats, 0.0, time.monotonic()
        while not self._left.wait(interval):
            self._arm()
            now = time.monotonic()
            # No more than this thread could have seen: a process that was stopped has not hung.
            waited += min(now - looked, 2 * interval)
            looked = now
            if beats != self._beats:
                beats, waited = self._beats, 0.0
            if waited >= self.seconds:
                self._end()
        faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        signal.alarm(_SLACK)  # ends the process even if nobody reads stderr and writing to it blocks
        try:
            self._write_stacks()
        finally:
            for child in multiprocessing.active_children():
                child.kill()  # a worker that hangs would outlive this process
            os._exit(HANG)

    def _write_stacks(self) -> None:
        self._write(
            f"\nerror: No progress for {self.seconds} s after step {self._step} (rank {self.rank}), which "
            "`hang_timeout` takes for a hang: the stacks of all threads and data workers follow, and this "
            "process ends.\n"
        )
        faulthandler.dump_traceback(self._descriptor, all_threads=True)
        workers = multiprocessing.active_children()
        for worker in workers:
            self._write(f"\n{worker.name}, pid {worker.pid}, of rank {self.rank}:\n")
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGUSR2)
            time.sleep(_WORKERS_TIME / len(workers))
        self._write(f"\nEnded after {self.seconds} s without progress (rank {self.rank}). {_HELP}\n")
        time.sleep(_RANKS_TIME)

    def _write(self, text: str) -> None:
        os.write(self._descriptor, text.encode())


class Heartbeat(TrainerCallback):
    """Beats at whatever the Trainer tells of: each micro-batch, of an evaluation too, each log and save."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Beat. A save starts right after this, or after a log or an evaluation."""
        self.watchdog.beat(state.global_step)

    on_train_begin = on_epoch_begin = on_step_begin = on_substep_end = on_pre_optimizer_step = on_step_end
    on_prediction_step = on_evaluate = on_log = on_save = on_epoch_end = on_train_end = on_step_end


class WorkerDied(UserError):
    """A process that loads data ended before its time."""

    exit_code = HANG
    of_one_rank = True


@contextmanager
def named_worker_deaths() -> Iterator[None]:
    """Raises `WorkerDied` for whatever torch raises when a data worker was killed or ended."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if not _is_worker_death(error):
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch raises again, here or later
        what = str(error).strip() or type(error).__name__
        raise WorkerDied(
            f"A process that loads data died ({what}). Most often the system ended it for want "
            "of memory: free some, or write `dataloader_num_workers: 0`, which needs no such process. The "
            "same command goes on from the newest checkpoint, if there is one."
        ) from error


def _is_worker_death(error: Exception) -> bool:
    """Whether it is torch's error about a worker, or a connection that broke while a worker handed its batch
    over: torch then looks for dead workers, an instant too early."""
    if isinstance(error, RuntimeError):
        return str(error).startswith(_DEATHS)
    return any(frame.f_code.co_name == "_try_get_data" for frame, _ in walk_tb(error.__traceback__))
