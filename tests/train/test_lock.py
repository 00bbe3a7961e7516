"""Two runs on one folder: the second is refused; a killed one never blocks."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from prefkit.config.errors import UserError
from prefkit.train.lock import LOCK_FILE, FolderLock
from tests.train.forks import FORKS
from tests.train.runs import run

pytestmark = FORKS


def refuse(text: str) -> None:
    raise AssertionError(text)


def hold(folder: Path, with_worker: bool = False) -> int:
    """A process that holds the lock until it is killed; returns its id once it does."""
    reader, writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        try:
            FolderLock(folder, refuse)
            if with_worker and os.fork() == 0:
                time.sleep(3)
                os._exit(0)
            os.write(writer, b".")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"."
    os.close(reader)
    return holder


@pytest.mark.parametrize("with_worker", [False, True], ids=["alone", "a worker lives on"])
def test_the_second_is_refused_until_the_first_is_killed(tmp_path: Path, with_worker: bool) -> None:
    holder = hold(tmp_path, with_worker)
    try:
        with pytest.raises(UserError, match=rf"another run is at work in .* \(process {holder} on "):
            FolderLock(tmp_path, refuse)
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    lock = FolderLock(tmp_path, refuse)
    assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_run_is_refused_by_name_and_starts_when_the_other_is_gone(write_config, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    holder = hold(tmp_path / "out")
    with pytest.raises(UserError, match="another run is at work"):
        run(write_config())
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    run(write_config())
    assert not (tmp_path / "out" / LOCK_FILE).exists()


def test_release_while_another_waits_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opened the file before it was removed must not believe that it holds the folder."""
    first = FolderLock(tmp_path, refuse)
    original, calls = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            first.release()
        original(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = FolderLock(tmp_path, refuse)
    assert len(calls) == 2
    with pytest.raises(UserError):
        FolderLock(tmp_path, refuse)
    second.release()


def test_where_there_are_no_locks_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    said: list[str] = []
    FolderLock(tmp_path, said.append).release()
    assert "without locks" in said[0]
