"""Where the path of an image may lead: never out of its folder, whatever is written, linked or swapped."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from prefkit.data.images import MediaSource
from tests.data.pictures import WHERE, make_source, plain, refuse


@pytest.fixture
def source(tmp_path: Path) -> MediaSource:
    return make_source(tmp_path)


OUTSIDE, NO_PATH, NO_FILE = "image outside of media_dir", "malformed path", "image not a file"
HOSTILE: list[tuple[str, str]] = [
    ("", NO_PATH),
    ("a.png\0", NO_PATH),
    ("\0", NO_PATH),
    ("a.png\0.txt", NO_PATH),
    ("..\\out.png", NO_PATH),
    ("sub\\b.png", NO_PATH),
    ("C:\\Windows\\a.png", NO_PATH),
    ("\\\\host\\share\\a.png", NO_PATH),
    ("a\udcff.png", NO_PATH),
    ("a/" * 3000 + "a.png", NO_PATH),
    ("../out.png", OUTSIDE),
    ("sub/../a.png", OUTSIDE),
    ("sub/../../out.png", OUTSIDE),
    ("..", OUTSIDE),
    ("../media2/c.png", OUTSIDE),
    ("{folder}/../out.png", OUTSIDE),
    ("{folder}2/c.png", OUTSIDE),
    ("{folder}.png", OUTSIDE),
    ("{parent}/out.png", OUTSIDE),
    ("/", OUTSIDE),
    ("/etc/passwd", OUTSIDE),
    ("/etc/no-such-file", OUTSIDE),
    ("/dev/zero", OUTSIDE),
    ("/dev/stdin", OUTSIDE),
    ("/proc/self/environ", OUTSIDE),
    ("/proc/self/mem", OUTSIDE),
    ("/proc/self/root/etc/passwd", OUTSIDE),
    ("link_out.png", OUTSIDE),
    ("link_relative.png", OUTSIDE),
    ("link_dir/out.png", OUTSIDE),
    ("link_dir/media/a.png/../../out.png", OUTSIDE),
    ("link_to_link", OUTSIDE),
    ("link_proc", OUTSIDE),
    ("link_zero", OUTSIDE),
    ("link_sibling/c.png", OUTSIDE),
    (".", NO_FILE),
    ("sub", NO_FILE),
    ("sub/", NO_FILE),
    ("{folder}", NO_FILE),
    ("fifo", NO_FILE),
    ("link_fifo", NO_FILE),
    ("socket", NO_FILE),
    ("loop", "image not a file"),
    ("missing.png", "image missing"),
    ("link_dead", "image missing"),
    ("a.png/b.png", "image missing"),
    ("~/a.png", "image missing"),
    ("$HOME/a.png", "image missing"),
    ("%2e%2e/out.png", "image missing"),
    ("..%2fout.png", "image missing"),
    ("a.png ", "image missing"),
    ("..\u2215out.png", "image missing"),
    ("a" * 300, "image unreadable"),
]


@pytest.fixture
def traps(source: MediaSource, tmp_path: Path) -> MediaSource:
    folder = source.folder
    for sibling in (tmp_path / "media2" / "c.png", tmp_path / "media.png"):
        sibling.parent.mkdir(exist_ok=True)
        sibling.write_bytes(plain())
    for name, target in {
        "link_out.png": str(tmp_path / "out.png"),
        "link_relative.png": "../out.png",
        "link_dir": "..",
        "link_to_link": "link_out.png",
        "link_proc": "/proc/self/environ",
        "link_zero": "/dev/zero",
        "link_sibling": str(tmp_path / "media2"),
        "link_fifo": "fifo",
        "link_dead": "nothing",
        "loop": "loop",
    }.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as end:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket is at most 108 bytes
        end.bind("socket")
        os.chdir(here)
    return source


@pytest.mark.parametrize(("path", "reason"), HOSTILE)
def test_paths_stay_in_their_folder(traps: MediaSource, path: str, reason: str) -> None:
    text = path.format(folder=traps.folder, parent=traps.folder.parent) if "{" in path else path
    error = refuse(traps, text)
    assert error.reason == reason
    assert "media_dir" in str(error) or reason == "image unreadable"
    assert len(str(error)) < 1000


def test_what_an_absolute_path_outside_says(source: MediaSource) -> None:
    outside = str(source.folder.parent / "out.png")
    assert str(refuse(source, outside)) == (
        f"{WHERE}: '{outside}' is outside of media_dir ({source.folder}): set media_dir to a folder above it"
    )


def test_links_within_the_folder_are_followed(source: MediaSource, tmp_path: Path) -> None:
    (source.folder / "link").symlink_to("sub/b.png")
    (tmp_path / "other_name").symlink_to(source.folder)
    through = MediaSource(tmp_path / "other_name")
    real = str(source.folder / "sub" / "b.png")
    for value in ("link", real, f"/{real}", str(tmp_path / "other_name" / "sub" / "b.png")):
        assert through.store(value, WHERE).path == real


@pytest.mark.parametrize("swap", ["link", "fifo"])
def test_a_file_that_is_swapped_is_not_followed(
    source: MediaSource, monkeypatch: pytest.MonkeyPatch, swap: str
) -> None:
    file = source.folder / "a.png"
    real_open = os.open

    def swap_then_open(name: Any, *args: Any, **options: Any) -> int:
        if name == "a.png" and not file.is_symlink():
            file.unlink()
            file.symlink_to("../out.png") if swap == "link" else os.mkfifo(file)
        return real_open(name, *args, **options)

    monkeypatch.setattr(os, "open", swap_then_open)
    reason = "image unreadable" if swap == "link" else "image not a file"
    assert refuse(source, "a.png").reason == reason


def test_a_folder_that_is_swapped_is_not_followed(
    source: MediaSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "b.png").write_bytes(plain())
    real_open = os.open

    def swap_then_open(name: Any, *args: Any, **options: Any) -> int:
        if name == "sub" and not (source.folder / "sub").is_symlink():
            (source.folder / "sub").rename(tmp_path / "old")
            (source.folder / "sub").symlink_to("..")
        return real_open(name, *args, **options)

    monkeypatch.setattr(os, "open", swap_then_open)
    assert refuse(source, "sub/b.png").reason == "image missing"
    assert (source.folder / "sub" / "b.png").exists()


def test_what_may_not_be_read(source: MediaSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*args: Any, **options: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", deny)
    error = refuse(source, "a.png")
    assert error.reason == "image unreadable" and "Permission denied" in str(error)
