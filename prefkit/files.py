"""Files that outlive a kill, a power cut and a full disk, and the error of a disk that takes no more.

A file is written aside, forced to disk and renamed, so that its name always leads to the old text or to the
new one. A disk fault comes as an OSError from Python and as a text from libraries in Rust; both become a
`DiskError`, which says where, why, how much is free and what the run goes on from.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from prefkit.config.errors import UserError

SCRATCH_SUFFIX = ".prefkit-new"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_DENIED = {errno.EACCES, errno.EPERM}
_RUST = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers spell an error number


class DiskError(UserError):
    """A disk is full, read-only or broken; the message says where, what is free and what is whole."""

    exit_code = os.EX_IOERR


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each entered on the disk. Raises OSError."""
    if not folder.is_dir():
        if folder.parent != folder:
            make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


def replace_text(file: Path, text: str) -> None:
    """Write a UTF-8 file so that a kill or a power cut leaves the old text or the new one. Raises OSError."""
    scratch = file.with_name(f".{file.name}{SCRATCH_SUFFIX}")
    with naming(file):
        try:
            scratch.write_text(text, encoding="utf-8")
            fsync(scratch)
            scratch.replace(file)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
        fsync(file.parent)


def fsync(path: Path) -> None:
    """Force a file's content, or a folder's names, to disk."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fsync_files(folder: Path) -> None:
    """Force the files in a folder to disk, neither their names nor folders below.

    Hidden ones are scratch, or a lock that some file systems let go of when the file is opened once more.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            fsync(path)


def forget_cached(file: Path) -> None:
    """Ask the system to drop what it holds of a file in memory, so that the next reader reads the disk.

    It drops what is on the disk alone: call `fsync` before. Does nothing where the system cannot.
    """
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def describe(file: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write to the disk of a path; a quota is not known to it."""
    while not path.exists() and path.parent != path:
        path = path.parent
    return shutil.disk_usage(path).free


def show_bytes(number: float) -> str:
    """A size for people.

    >>> show_bytes(999), show_bytes(1234567), show_bytes(5e10)
    ('999 bytes', '1.2 MB', '50.0 GB')
    """
    if number < 1000:
        return f"{number:.0f} bytes"
    power = min(int(math.log10(number)) // 3, 4)
    return f"{number / 1000**power:.1f} {['', 'kB', 'MB', 'GB', 'TB'][power]}"


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises `DiskError` when `needed` bytes do not fit on the disk of a folder; `what` introduces them."""
    free = free_bytes(folder)
    if needed > free:
        raise DiskError(
            f"{folder}: {what} {show_bytes(needed)}, and the disk has {show_bytes(free)} free. Make room, or "
            "set another output_dir."
        )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let a disk fault leave as an OSError that names its file: `path`, unless it names one itself."""
    try:
        yield
    except Exception as error:
        fault = find_fault(error)
        if fault is None or (fault is error and fault.filename):
            raise
        raise OSError(fault.errno, fault.strerror, fault.filename or str(path)) from error


@contextmanager
def naming_disk_faults(
    folder: Path, find_whole: Callable[[], Path | None], command: str = "the same command"
) -> Iterator[None]:
    """Turn a disk fault into a `DiskError`; `find_whole` gives the checkpoint that `command` goes on from.

    An error that is for the user already stays as it is, and so does a permission that is missing outside
    `folder`, where nothing is written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        fault = find_fault(error)
        if fault is None or (fault.errno in _DENIED and not _is_below(fault.filename, folder)):
            raise
        path = Path(os.fsdecode(fault.filename or folder))
        raise DiskError(
            f"{path}: {fault.strerror}. The disk has {show_bytes(free_bytes(path))} free now. "
            f"{_tell(find_whole)} once the disk takes files again, {command} goes on from there."
        ) from error


def find_fault(error: BaseException | None) -> OSError | None:
    """The disk fault that an error is or comes from; None where it is something else."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL | _DENIED:
            return error
        # tokenizers raises Exception itself.
        if type(error) in (Exception, SafetensorError) and (found := _RUST.search(str(error))):
            number = int(found[1])
            if number in _FULL | _DENIED:
                return OSError(number, os.strerror(number))
        error = error.__cause__
    return None


def _is_below(filename: Any, folder: Path) -> bool:
    return filename is None or Path(os.fsdecode(filename)).absolute().is_relative_to(folder.absolute())


def _tell(find_whole: Callable[[], Path | None]) -> str:
    try:
        whole = find_whole()
    except OSError as error:
        return f"The checkpoints cannot be read either ({error.strerror});"
    return f"{whole} is whole;" if whole else "No checkpoint was saved, the start is all there is;"
