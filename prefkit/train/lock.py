"""One run at a time in a folder, by `flock`: the system lets go of it however the run ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from prefkit.config.errors import UserError

LOCK_FILE = ".prefkit.lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


class FolderLock:
    """Holds `.prefkit.lock` in a folder until `release`, the end of a `with` block or that of the process.

    Raises `UserError` when another process holds it, naming that one. Where the file system has no locks
    `say` tells so, and the run goes on.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.file = folder / LOCK_FILE
        self._descriptor: int | None = None
        while self._descriptor is None:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(descriptor, 4096).decode(errors="replace")
                os.close(descriptor)
                if error.errno in _UNSUPPORTED:
                    say(f"{folder} is on a file system without locks: start no second run there.")
                    return
                raise UserError(
                    f"output_dir: another run is at work in {folder} ({_describe(holder)}). "
                    "Wait for it, stop it, or set another output_dir."
                ) from error
            if self._is_current(descriptor):
                self._descriptor = descriptor
            else:  # it was removed by its holder in the meantime
                os.close(descriptor)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        # A child that outlives this process, such as a data worker, must not hold the lock.
        os.register_at_fork(after_in_child=self._close)

    def release(self) -> None:
        """Remove the file and let go of it."""
        if self._descriptor is not None:
            self.file.unlink(missing_ok=True)
            self._close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.file.stat())
        except FileNotFoundError:
            return False


def _describe(holder: str) -> str:
    try:
        facts = json.loads(holder)
        return f"process {facts['pid']} on {facts['host']}"
    except (ValueError, LookupError, TypeError):
        return "process unknown"
