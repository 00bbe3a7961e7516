"""Processes that work together on this machine: started, watched, signalled, ended when one has failed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from prefkit.config.errors import UserError
from prefkit.launch.failure import Ended
from prefkit.launch.plan import Launch
from prefkit.train.launched import FOLDER, HANG, NODE, PARENT, SIGNALS, free_port, read_report

_INTERVAL = 0.05
# Seconds that the others have once one has ended: to notice, to write their stacks, to save.
_TO_NOTICE, _TO_WRITE_STACKS, _TO_SAVE = 2.0, 8.0, 30.0


class Ranks:
    """The processes of a launch, each a session of its own: a signal of the terminal reaches them through
    this process alone, once.

    Number 0 prints to where this process prints, and each other to a file in `folder`. Raises `UserError`
    when the port that is asked for is taken.
    """

    def __init__(self, plan: Launch, command: Sequence[str], folder: Path) -> None:
        self.folder = folder
        self.ended: dict[int, Ended] = {}
        self.stopped_by = 0
        self._kills = False
        shared = _shared_variables(plan, folder)
        self._running = {rank: self._start(command, plan, rank, shared) for rank in plan.ranks}

    def _start(
        self, command: Sequence[str], plan: Launch, rank: int, shared: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank - plan.ranks[0])}
        environment = {name: value for name, value in os.environ.items() if name != NODE}
        with (self.folder / f"{rank}.log").open("wb") as log:
            output = None if rank == 0 else log
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment | shared | variables,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until all have ended; `ended` then says how. When one has failed, others are killed soon after."""
        deadline = None
        with self._signals():
            while self._running:
                for rank, process in list(self._running.items()):
                    if (code := process.poll()) is not None:
                        self.ended[rank] = Ended(rank, code, time.time(), read_report(self.folder, rank))
                        del self._running[rank]
                        if code and deadline is None:
                            deadline = time.monotonic() + self._patience(self.ended[rank])
                if self._kills or (deadline is not None and time.monotonic() > deadline):
                    self._kill()
                time.sleep(_INTERVAL if self._running else 0)

    def _patience(self, first: Ended) -> float:
        if first.code == 128 + self.stopped_by and self.stopped_by:
            return _TO_SAVE
        return _TO_WRITE_STACKS if first.code == HANG and first.report is None else _TO_NOTICE

    def _kill(self) -> None:
        for rank, process in self._running.items():
            _signal(process, signal.SIGKILL)
            self.ended[rank] = Ended(rank, process.wait(), time.time(), was_killed=True)
        self._running.clear()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Within it a signal that would end this process goes to the others; a second one kills them."""
        before = {number: signal.signal(number, self._hand_on) for number in SIGNALS}
        before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._pause)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._kills = bool(self.stopped_by)
        self.stopped_by = self.stopped_by or number
        for process in self._running.values():
            _signal(process, number)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z stops all, until this process goes on."""
        for process in self._running.values():
            _signal(process, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for process in self._running.values():
            _signal(process, signal.SIGCONT)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To the process; what would end or hold it at once goes to its data workers as well."""
    if process.poll() is not None:
        return
    if number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT):
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


def _shared_variables(plan: Launch, folder: Path) -> dict[str, str]:
    """What each process of this machine is told."""
    meeting = plan.meeting
    if "TORCHELASTIC_USE_AGENT_STORE" not in os.environ and meeting.node == 0:
        _check_port(meeting.port)
    return {
        "WORLD_SIZE": str(plan.world),
        "LOCAL_WORLD_SIZE": str(plan.processes),
        "GROUP_RANK": str(meeting.node),
        "MASTER_ADDR": meeting.address,
        "MASTER_PORT": str(meeting.port or free_port()),
        "OMP_NUM_THREADS": str(plan.threads),
        FOLDER: str(folder),
        PARENT: str(os.getpid()),
    }


def _check_port(port: int) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise UserError(
                f"MASTER_PORT={port}: {error.strerror}. Name another port, or leave it out where all "
                "processes are on this machine."
            ) from error


def own_command(arguments: Sequence[str]) -> list[str]:
    """This command once more, with these arguments, each as it is.

    Where this process does not look for modules in the working folder, neither does the other.
    """
    looks_there = sys.path[0] in ("", str(Path.cwd()))
    return [sys.executable, *(() if looks_there else ("-P",)), "-m", "prefkit", *arguments]
