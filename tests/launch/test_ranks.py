"""Processes that are started, watched and ended: small ones, which only do what the test is about."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefkit.config.errors import UserError
from prefkit.launch import ranks
from prefkit.launch.failure import Ended, describe, exit_code, find_first, full_story
from prefkit.launch.plan import Launch
from prefkit.launch.ranks import Ranks, own_command
from prefkit.launch.variables import Meeting
from prefkit.train.launched import FOLDER, Report, read_report, write_report

# What each process does, as words of Python; `rank` is its number.
START = """
import os, signal, sys, time
from prefkit.config.errors import UserError
from prefkit.train.launched import end_with_parent, write_report
rank = int(os.environ["RANK"])
def fail(error, code=1):
    write_report(error)
    os._exit(code)
"""


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"_TO_NOTICE": 0.5, "_TO_WRITE_STACKS": 2.0, "_TO_SAVE": 5.0}.items():
        monkeypatch.setattr(ranks, name, seconds)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))


def begin(folder: Path, work: str, processes: int = 2, **plan: Any) -> Ranks:
    command = [sys.executable, "-c", START + textwrap.dedent(work)]
    return Ranks(Launch(processes, "test", 1, **plan), command, folder)


def run(folder: Path, work: str, processes: int = 2) -> tuple[Ranks, str]:
    """The processes after their end, and what is said of it."""
    all_of_them = begin(folder, work, processes)
    all_of_them.wait()
    first = find_first(all_of_them.ended)
    assert first is not None
    return all_of_them, describe(first, all_of_them.ended, processes, folder, None)


def test_each_is_told_its_place(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    work = """
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR OMP_NUM_THREADS".split()
    print(*(os.environ[name] for name in names), sys.stdin.read() == "")
    """
    others = Meeting(1, 2, 2, "10.0.0.5", 29500)
    started = begin(tmp_path, work, meeting=others)
    started.wait()
    assert {rank: one.code for rank, one in started.ended.items()} == {2: 0, 3: 0}
    assert (tmp_path / "3.log").read_text() == "3 1 4 2 1 10.0.0.5 1 True\n"
    begin(tmp_path, work, processes=1).wait()
    assert capfd.readouterr().out == "0 0 1 1 0 127.0.0.1 1 True\n"


def test_the_one_that_failed_first_is_named_and_the_others_are_killed(tmp_path: Path) -> None:
    """One that only lost its connection is not the first, whatever its clock says."""
    work = """
    if rank == 0:
        fail(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]"))
    if rank == 1:
        time.sleep(0.2)
        fail(ValueError("shapes differ"))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
    """
    began = time.monotonic()
    after, said = run(tmp_path, work, processes=3)
    assert time.monotonic() - began < 10
    assert said == "error: process 1 of 3 failed: ValueError: shapes differ"
    assert after.ended[2].was_killed and not after.ended[0].was_killed
    story = "".join(full_story(after.ended, tmp_path))
    assert "Connection closed" in story and "==== process 2: killed after another one failed" in story


def test_an_error_of_all_is_said_once_and_one_of_one_with_its_number(tmp_path: Path) -> None:
    after, said = run(tmp_path, 'fail(UserError("no such data"), 2)')
    assert said == "error: no such data" and exit_code(find_first(after.ended), 0) == 2
    work = """
    class Mine(UserError):
        of_one_rank = True
    fail(Mine("row 7 is not finite"), 65) if rank == 1 else time.sleep(60)
    """
    after, said = run(tmp_path, work)
    assert said == "error: process 1 of 2: row 7 is not finite"
    assert exit_code(find_first(after.ended), 0) == 65


def test_one_that_is_killed_or_leaves_without_a_word(tmp_path: Path) -> None:
    after, said = run(tmp_path, "os.kill(os.getpid(), 9) if rank else time.sleep(60)")
    assert "process 1 of 2 was killed by SIGKILL, which is what the kernel does when memory runs out" in said
    assert exit_code(find_first(after.ended), 0) == 137
    after, said = run(tmp_path, "os.kill(os.getpid(), 11) if rank else time.sleep(60)")
    assert "killed by SIGSEGV: native code crashed" in said
    after, said = run(tmp_path, 'print("a last word") if rank else time.sleep(60); os._exit(5)')
    assert said == "error: process 1 of 2 ended with code 5.\n  Its last lines:\n  a last word"


def test_stacks_of_a_hang_are_shown_once_for_those_that_are_alike(tmp_path: Path) -> None:
    work = """
    line = 7 if rank == 2 else 8
    print(f"noise\\nerror: No progress (rank {rank})\\nThread 0x{rank}f\\n  in place_{line}")
    time.sleep(rank / 2)
    os._exit(70)
    """
    after, said = run(tmp_path, work, processes=4)
    assert exit_code(find_first(after.ended), 0) == 70
    assert not any(one.was_killed for one in after.ended.values())
    assert said.count("place_8") == 1 and said.count("place_7") == 1 and "noise" not in said
    assert "Processes 1, 3, alike:" in said and "Process 2:" in said
    assert "error: the processes made no progress" in said


STOPS = """
def stop(number, frame):
    time.sleep(rank)
    os._exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, {handler})
open(os.path.join(os.environ["PREFKIT_LAUNCH_FOLDER"], f"ready-{rank}"), "w").close()
time.sleep(60)
"""


class Parent:
    """A process that starts two and waits for them, and what is in it."""

    def __init__(self, folder: Path, handler: str) -> None:
        code = f"""
        import sys
        from pathlib import Path
        from prefkit.launch.plan import Launch
        from prefkit.launch.ranks import Ranks
        from prefkit.launch.failure import exit_code, find_first
        work = Path({str(folder / "work.py")!r}).read_text()
        ranks = Ranks(Launch(2, "test", 1), [sys.executable, "-c", work], Path({str(folder)!r}))
        ranks.wait()
        sys.exit(exit_code(find_first(ranks.ended), ranks.stopped_by))
        """
        (folder / "work.py").write_text(START + "end_with_parent()\n" + STOPS.replace("{handler}", handler))
        self.process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
        while not all((folder / f"ready-{rank}").exists() for rank in (0, 1)):
            time.sleep(0.02)
            assert self.process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_handed_on_and_all_are_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    parent = Parent(tmp_path, "stop")
    parent.process.send_signal(number)
    assert parent.process.wait(20) == 128 + number


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    parent = Parent(tmp_path, "lambda *_: None")
    parent.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert parent.process.poll() is None
    parent.process.send_signal(signal.SIGTERM)
    assert parent.process.wait(20) == 143


def test_all_stand_still_with_the_one_that_waits(tmp_path: Path) -> None:
    """Ctrl-Z, and `fg`."""
    parent = Parent(tmp_path, "stop")
    all_of_them = [parent.process.pid, *children(parent.process.pid)]
    assert len(all_of_them) == 3
    parent.process.send_signal(signal.SIGTSTP)
    wait_for(lambda: [state(pid) for pid in all_of_them] == ["T"] * 3)
    parent.process.send_signal(signal.SIGCONT)
    wait_for(lambda: "T" not in [state(pid) for pid in all_of_them])
    parent.process.send_signal(signal.SIGTERM)
    assert parent.process.wait(20) == 143


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state(pid: int) -> str:
    """The letter by which the system says what a process does."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_none_outlives_the_one_that_waits(tmp_path: Path) -> None:
    end = "open(os.path.join(os.environ['PREFKIT_LAUNCH_FOLDER'], f'end-{rank}'), 'w').close()"
    parent = Parent(tmp_path, f"lambda *_: ({end}, os._exit(0))")
    parent.process.kill()
    parent.process.wait()
    wait_for(lambda: all((tmp_path / f"end-{rank}").exists() for rank in (0, 1)))


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"MASTER_PORT={port}: Address already in use. Name another port"):
            begin(tmp_path, "", meeting=Meeting(port=port))


def test_the_command_is_a_list_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "a file.yaml", "run_name='two words' \"x\"=\n"]
    monkeypatch.setattr(sys, "path", ["/usr/bin", *sys.path])
    assert own_command(words) == [sys.executable, "-P", "-m", "prefkit", *words]
    monkeypatch.setattr(sys, "path", [str(Path.cwd()), *sys.path])
    assert own_command(words) == [sys.executable, "-m", "prefkit", *words]


def test_a_report_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    write_report(RuntimeError("NCCL error: unhandled system error"))
    report = read_report(tmp_path, 3)
    assert isinstance(report, Report) and report.lost_peer and not report.is_users and report.rank == 3
    assert read_report(tmp_path, 2) is None
    alone = {3: Ended(3, 1, 0.0, report)}
    assert "process 3 of 4 lost its connection" in describe(alone[3], alone, 4, tmp_path, None)
