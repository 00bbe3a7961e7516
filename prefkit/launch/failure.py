"""What became of processes that worked together: the one that failed first, in words."""

from __future__ import annotations

import re
import signal
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prefkit.train.launched import HANG, Report

_TAIL = 200_000  # bytes of what a process printed that are kept
_SHOWN_LINES = 15
_STACKS_BEGIN = "error: No progress"


@dataclass(frozen=True)
class Ended:
    """How a process ended: its code, or minus the signal; `was_killed` here after another one failed."""

    rank: int
    code: int
    time: float
    report: Report | None = None
    was_killed: bool = False

    @property
    def is_hang(self) -> bool:
        """Whether the process found itself to make no progress."""
        return self.code == HANG and self.report is None

    @property
    def is_users(self) -> bool:
        """Whether the same would come again, unless the user mends it."""
        return self.report is not None and self.report.is_users and self.code != HANG


def find_first(ended: Mapping[int, Ended]) -> Ended | None:
    """The process that failed by itself, and first; None if none has failed."""
    failed = [one for one in ended.values() if one.code and not one.was_killed]
    return min(failed, key=_order, default=None)


def _order(one: Ended) -> tuple[bool, float]:
    return (one.report is not None and one.report.lost_peer, one.report.time if one.report else one.time)


def exit_code(first: Ended | None, stopped_by: int) -> int:
    """The code of the whole: that of the first."""
    if first is None:
        return 128 + stopped_by if stopped_by else 1
    return as_shell(first.code)


def as_shell(code: int) -> int:
    """How a process ended, its code or minus the signal, as a shell would say it."""
    return code if code > 0 else 128 - code


def describe(first: Ended, ended: Mapping[int, Ended], world: int, folder: Path, log: Path | None) -> str:
    """What happened, to be printed; `folder` has what processes printed, `log` is a file with everything."""
    where = f"\nTracebacks and last words of all processes are in {log}." if log else ""
    again = "\nThe same command goes on from the newest checkpoint, if there is one."
    who = f"process {first.rank} of {world}"
    if first.is_hang:
        stacks = _stacks(ended, folder)
        return f"{stacks}error: the processes made no progress, see the stacks above.{where}{again}"
    if first.report is not None:
        return f"error: {_said(first.report, ended, world, who)}{where}"
    if first.code < 0:
        return f"error: {who} was killed by {_killer(-first.code)}.{where}{again}"
    return f"error: {who} ended with code {first.code}.{_last_lines(first, folder)}{where}"


def _said(report: Report, ended: Mapping[int, Ended], world: int, who: str) -> str:
    if report.is_users:
        same = {one.rank for one in ended.values() if one.report and one.report.message == report.message}
        is_alone = report.of_one and len(same) < world and world > 1
        return f"{who}: {report.message}" if is_alone else report.message
    what = f"{report.message}{_place(report.trace)}"
    if report.lost_peer:
        return f"{who} lost its connection to another one, which says why where it ran.\n  {what}"
    return f"{who} failed: {what}"


def _place(trace: str) -> str:
    """The innermost line of this package, or of whatever there is, in a traceback."""
    places = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', trace)
    ours = [place for place in places if "/prefkit/" in place[0]] or places
    return "\n  at {}:{} in {}".format(*ours[-1]) if ours else ""


def _killer(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL:
        return f"{name}, which is what the kernel does when memory runs out"
    if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT):
        return f"{name}: native code crashed"
    return name


def _printed(rank: int, folder: Path) -> str:
    """The end of what a process other than number 0 has printed."""
    file = folder / f"{rank}.log"
    if not file.exists():
        return ""
    with file.open("rb") as stream:
        stream.seek(max(file.stat().st_size - _TAIL, 0))
        return stream.read().decode(errors="replace")


def _last_lines(one: Ended, folder: Path) -> str:
    lines = _printed(one.rank, folder).strip().splitlines()[-_SHOWN_LINES:]
    return "".join(f"\n  {line}" for line in ["Its last lines:", *lines]) if lines else ""


def _stacks(ended: Mapping[int, Ended], folder: Path) -> str:
    """The stacks that processes other than number 0 have written, each that is the same only once."""
    ranks: dict[str, list[int]] = {}
    texts: dict[str, str] = {}
    for rank in sorted(ended):
        _, begin, stacks = _printed(rank, folder).partition(_STACKS_BEGIN)
        if begin:
            same = re.sub(r"0x[0-9a-f]+|\(rank \d+\)|of rank \d+|pid \d+|, line \d+ in", "", stacks)
            ranks.setdefault(same, []).append(rank)
            texts.setdefault(same, begin + stacks)
    return "".join(f"\n{_processes(ranks[same])}:\n{text}\n" for same, text in texts.items())


def _processes(ranks: Collection[int]) -> str:
    numbers = ", ".join(map(str, ranks))
    return f"Process {numbers}" if len(ranks) == 1 else f"Processes {numbers}, alike"


def full_story(ended: Mapping[int, Ended], folder: Path) -> Iterator[str]:
    """All that is known of each process, for a file."""
    for rank, one in sorted(ended.items()):
        fate = "killed after another one failed" if one.was_killed else f"exit code {one.code}"
        yield f"==== process {rank}: {fate}\n"
        if one.report is not None:
            yield one.report.trace or f"{one.report.message}\n"
        yield _printed(rank, folder)
