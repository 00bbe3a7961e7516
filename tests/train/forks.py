"""Work in forked processes: it costs no import, may be killed, and what it changes goes with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from prefkit.cli import main

_MULTI_THREADED = "ignore:This process .* is multi-threaded:DeprecationWarning"  # of Python 3.12
# The `pytestmark` of a module of tests that fork. The threads that Python warns of hold no lock that a child
# wants.
FORKS = [
    pytest.mark.filterwarnings(_MULTI_THREADED),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="forks after autograd has started threads for the GPU"
    ),
]


def forks(test: Any) -> Any:
    """Mark one test as one that forks."""
    for mark in FORKS:
        test = mark(test)
    return test


class Fork:
    """A fork of this process that does `work`, in a process group of its own.

    What it prints goes to a file. It ends with the code that `work` returns or leaves with, or with 1 after a
    traceback.
    """

    def __init__(self, printed: Path, work: Callable[[], Any]) -> None:
        self.file = printed
        self.pid = os.fork()
        if self.pid == 0:
            self._do(work)

    def _do(self, work: Callable[[], Any]) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            os.environ["OMP_NUM_THREADS"] = "1"  # accelerate warns in a run of two processes without it
            AcceleratorState._reset_state(reset_partial_state=True)
            code = work() or 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:  # noqa: BLE001  (the child must not go on with the tests)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def end(self) -> int:
        """Wait for it; its exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def poll(self) -> int | None:
        """Its exit code if it has ended, else None."""
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else None

    def kill_after(self, seconds: float) -> int | None:
        """SIGKILL it after a time; the exit code if it has ended before, else None."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (code := self.poll()) is not None:
                return code
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        self.end()
        return None

    def printed(self) -> str:
        """What it has printed."""
        return self.file.read_text()


def command(*words: object, **environment: str) -> Callable[[], None]:
    """The work of a prefkit command."""

    def work() -> None:
        os.environ.update(environment)
        sys.argv = ["prefkit", *map(str, words)]
        main()

    return work


def two_ranks(*words: object) -> list[dict[str, Any]]:
    """The work of a prefkit command in each of two processes that work together: arguments for `Fork`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = ({"RANK": rank, "LOCAL_RANK": rank, **shared} for rank in "01")
    return [{"work": command(*words, "ddp_backend=gloo", **rank)} for rank in ranks]


def run_in_two(folder: Path, *words: object) -> str:
    """Run a prefkit command in two processes that work together; what the first printed."""
    ranks = [
        Fork(folder / f"rank-{rank}.txt", **arguments) for rank, arguments in enumerate(two_ranks(*words))
    ]
    codes = [rank.end() for rank in ranks]
    assert codes == [0, 0], "".join(rank.printed() for rank in ranks)
    return ranks[0].printed()


def call(*words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a prefkit command in a fork: what it printed to stdout and stderr, and its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        texts = {name: Path(folder, name) for name in ("stdin", "stdout", "stderr")}
        texts["stdin"].write_text(stdin)
        texts["stderr"].touch()

        def work() -> None:
            os.dup2(os.open(texts["stderr"], os.O_WRONLY), 2)
            os.dup2(os.open(texts["stdin"], os.O_RDONLY), 0)
            sys.stdin = os.fdopen(0)
            command(*words)()

        code = Fork(texts["stdout"], work).end()
        stdout, stderr = texts["stdout"].read_text(), texts["stderr"].read_text()
    return subprocess.CompletedProcess(["prefkit", *map(str, words)], code, stdout, stderr)
