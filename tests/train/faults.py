"""Faults of a disk: a death, an error or a loss of power at a file operation, a disk that is full."""

from __future__ import annotations

import ctypes
import os
import stat
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KILLED = 9
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def in_child(work: Callable[[], int | None]) -> int:
    """Exit code of a fork of this process that does `work`: what it returns, 1 after a traceback."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work() or 0
        except BaseException:  # noqa: BLE001 - the exit code says it
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def before_each_file_operation(act: Callable[[], None]) -> None:
    """Call `act` before whatever changes a file in this process from now on; there is no way back.

    Writes of libraries in Rust are not seen, what Python opens, renames, removes or forces to disk is.
    """
    fsync = os.fsync

    def hook(event: str, details: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in _CHANGES:
            act()

    def noted_fsync(descriptor: int) -> None:
        act()
        fsync(descriptor)

    os.fsync = noted_fsync
    sys.addaudithook(hook)


def at_operation(operation: int, act: Callable[[], None]) -> Callable[[], int]:
    """Call `act` before the n-th file operation of this process from now on.

    Returns a function that says how many there have been.
    """
    number = 0

    def tick() -> None:
        nonlocal number
        number += 1
        if number == operation:
            act()

    before_each_file_operation(tick)
    return lambda: number


def die_at(operation: int) -> None:
    """End this process at its n-th file operation from now on, as a kill would."""
    at_operation(operation, lambda: os._exit(KILLED))


def fail_at(operation: int, number: int) -> Callable[[], int]:
    """Let the n-th file operation from now on fail with an error number; returns how many there have been."""

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return at_operation(operation, fail)


_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000
_READ_ONLY, _REMOUNT, _RECURSIVE, _PRIVATE = 1, 32, 0x4000, 0x40000
NO_MOUNTS = 77


def mount_small(folder: Path, size: int) -> None:
    """Mount a file system of `size` bytes, as `unshare -rm` does; call it in a child.

    Nobody else sees the mount, and it goes with the process. Where this is not allowed, as in a plain
    container, the process ends with NO_MOUNTS.
    """
    user, group = os.getuid(), os.getgid()
    try:
        _checked(_LIBC.unshare(_NEW_MOUNTS if user == 0 else _NEW_USER | _NEW_MOUNTS))
        if user:
            maps = {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"}
            for name, text in maps.items():
                Path("/proc/self", name).write_text(text)
        _checked(_LIBC.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None))
        _checked(_LIBC.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()))
    except OSError as error:
        print(f"no mount in a child: {error}")
        os._exit(NO_MOUNTS)


def remount(folder: Path, size: int, read_only: bool = False) -> None:
    """Give a file system that `mount_small` mounted another size, or make it read-only. Raises OSError."""
    flags = _REMOUNT | (_READ_ONLY if read_only else 0)
    _checked(_LIBC.mount(b"none", os.fsencode(folder), None, flags, f"size={size}".encode()))


def _checked(code: int) -> None:
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def on_small_disk(work: Callable[[], int | None]) -> int:
    """`in_child`, for work that calls `mount_small`; skips the test where that is not allowed."""
    code = in_child(work)
    if code == NO_MOUNTS:
        pytest.skip("a process may not mount a file system here (unshare, mount)")
    return code


Tree = dict[str, bytes | None]


class ForgetfulDisk:
    """What is left of a folder after a power cut, on a disk that keeps what it was forced to keep.

    `fsync` stands in for that of os. An inode that is known is held open, so that its number stays its own.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._held: dict[int, int] = {}
        self._hold(root)
        self._names[root.stat().st_ino] = self._list(root.stat().st_ino)

    def fsync(self, descriptor: int) -> None:
        """Keep the bytes of a file, or the names in a folder."""
        inode = self._hold(Path(f"/proc/self/fd/{descriptor}"))
        if self._is_folder(inode):
            self._names[inode] = self._list(inode)
        else:
            self._bytes[inode] = self._read(inode)

    def left(self, live_bytes: bool, live_names: bool) -> Tree:
        """Path -> content, None for a folder. What was not forced to disk is there too, or is not: bytes, or
        names.
        """
        tree: Tree = {}

        def visit(inode: int, path: str) -> None:
            if not self._is_folder(inode):
                tree[path] = self._read(inode) if live_bytes else self._bytes.get(inode, b"")
                return
            tree[path] = None
            names = self._list(inode) if live_names else self._names.get(inode, {})
            for name, below in names.items():
                visit(below, f"{path}/{name}")

        visit(self.root.stat().st_ino, ".")
        return tree

    def _hold(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        inode = os.fstat(descriptor).st_ino
        if inode in self._held:
            os.close(descriptor)
        self._held.setdefault(inode, descriptor)
        return inode

    def _is_folder(self, inode: int) -> bool:
        return stat.S_ISDIR(os.fstat(self._held[inode]).st_mode)

    def _list(self, inode: int) -> dict[str, int]:
        folder = Path(f"/proc/self/fd/{self._held[inode]}")
        names = [path.name for path in folder.iterdir()]
        return {name: self._hold(folder / name) for name in names}

    def _read(self, inode: int) -> bytes:
        return os.pread(self._held[inode], os.fstat(self._held[inode]).st_size, 0)


def write_tree(tree: Tree, folder: Path) -> None:
    """Make what `ForgetfulDisk.left` tells."""
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).write_bytes(content)
