"""Runs in forked processes: a trial costs no import, and can be killed."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prefkit.cli import main

# Python 3.12 warns of forks; the threads that it means are idle ones of libraries.
FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def start(command: list[str], printed: Path, prepare: Callable[[], None] | None = None) -> int:
    """Run a prefkit command in a child, what it prints in a file; returns the child's id.

    `prepare` may change things in the child first.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        with printed.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["prefkit", *command]
        torch.set_num_threads(1)
        if prepare is not None:
            prepare()
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  (the child must not go on with the tests)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> int:
    """Wait for a child; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def has_ended(child: int) -> int | None:
    """The exit code of a child that has ended, else None."""
    ended, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def kill_after(child: int, seconds: float) -> int | None:
    """SIGKILL a child after a time; the exit code of one that has ended before, else None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (code := has_ended(child)) is not None:
            return code
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    finish(child)
    return None
