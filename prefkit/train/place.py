"""Where a run writes. It needs no torch, so that a folder that cannot be used is said at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from prefkit.config.schema import RunConfig
from prefkit.files import DiskError, make_folder
from prefkit.train.lock import FolderLock

PROBE = ".prefkit-probe"
FAILURE_LOG = "failed_processes.log"  # of several that worked together; with a number, where machines did


def output_path(config: RunConfig) -> Path:
    """The folder of `output_dir`."""
    return Path(config.training["output_dir"]).expanduser()


def make_output_folder(config: RunConfig) -> Path:
    """Make `output_dir` and write a file in it; returns the folder. Raises `DiskError` when that fails."""
    path = output_path(config)
    probe = path / PROBE
    try:
        make_folder(path)
        with probe.open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink(missing_ok=True)  # another process of this run tries as well
    except (FileExistsError, NotADirectoryError) as error:
        raise DiskError(f"output_dir: cannot write to {path}: {error.filename} is not a folder") from error
    except OSError as error:
        raise DiskError(f"output_dir: cannot write to {path}: {error.strerror}") from error
    return path


def command_that_goes_on(config: RunConfig) -> str:
    """What to run so that an interrupted run goes on from its newest checkpoint, in words."""
    keys = ["overwrite_output_dir"] if config.output.overwrite_output_dir else []
    if config.training.get("resume_from_checkpoint") not in (None, True):
        keys.append("resume_from_checkpoint")
    return f"the same command without {' and '.join(keys)}" if keys else "the same command"


def look_ahead(config: RunConfig, say: Callable[[str], None]) -> None:
    """Raises what the start of the run would raise later: `DiskError` for a folder that cannot be written,
    `UserError` for one in which another run is at work."""
    FolderLock(make_output_folder(config), say).release()
