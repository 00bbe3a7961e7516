"""What a process that `prefkit.launch` started knows of that, and how it tells what went wrong; no torch."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from prefkit.config.errors import UserError

# SIGUSR1 is what a batch system is told to send before the time is up (`sbatch --signal=USR1@300`).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
HANG = 70  # the exit code of a process that made no progress, or whose data worker died
# The folder for reports, and the process that waits; both are in the environment of such a process.
FOLDER, PARENT = "PREFKIT_LAUNCH_FOLDER", "PREFKIT_LAUNCH_PARENT"
# With RDZV_ID torchrun starts one process on each machine; this tells it how many to start in turn.
NODE = "PREFKIT_LAUNCH_NODE"
_LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|gloo/|NCCL|process group|store.*(timeout|timed out)", re.I
)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Report:
    """How a process ended: `lost_peer` says that it only noticed the end of another one.

    `is_users` marks what the user can mend; `of_one` that others do not meet it as well.
    """

    rank: int
    time: float
    message: str
    trace: str = ""
    is_users: bool = False
    of_one: bool = True
    lost_peer: bool = False


def is_launched() -> bool:
    """Whether `prefkit.launch` started this process."""
    return FOLDER in os.environ


def has_starter() -> bool:
    """Whether another process of this command has read the config, and said what is to be said of it."""
    return is_launched() or NODE in os.environ


def end_with_parent() -> None:
    """Have this process get SIGTERM, upon which it saves and ends, when the one that waits is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(os.environ[PARENT]):
        os.kill(os.getpid(), signal.SIGTERM)


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def write_report(error: BaseException) -> None:
    """Leave word of what ended this process, for the one that waits for it."""
    rank = int(os.environ["RANK"])
    if isinstance(error, UserError):
        of_one, of_another = error.of_one_rank, error.of_another_rank
        report = Report(rank, time.time(), str(error), "", True, of_one, lost_peer=of_another)
    else:
        words = f"{type(error).__name__}: {error}".strip(": ")
        trace = "".join(traceback.format_exception(error))
        report = Report(rank, time.time(), words, trace, lost_peer=bool(_LOST_PEER.search(words)))
    _file(Path(os.environ[FOLDER]), rank).write_text(json.dumps(asdict(report)), "utf-8")


def read_report(folder: Path, rank: int) -> Report | None:
    """What `write_report` left, if anything."""
    file = _file(folder, rank)
    return Report(**json.loads(file.read_text("utf-8"))) if file.exists() else None


def _file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"
