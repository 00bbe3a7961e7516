"""The folder of a run: may it be used, and does an earlier run in it go on?"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefkit.config.errors import UserError
from prefkit.config.schema import RunConfig
from prefkit.runs.record import RECORD_FILE, changed_keys, read_record
from prefkit.train.callbacks import LOG_FILE
from prefkit.train.checkpoint import find_newest_checkpoint, remove_leftovers, verify_checkpoint


@dataclass(frozen=True)
class OutputFolder:
    """`checkpoint` is where training goes on from, if anywhere; `finished`: there is nothing to do."""

    path: Path
    checkpoint: Path | None = None
    finished: bool = False


def open_output_folder(config: RunConfig, say: Callable[[str], None]) -> OutputFolder:
    """Make or check `output_dir`; `say` tells the user what was found.

    `resume_from_checkpoint` may name the checkpoint, or with false start over; otherwise the newest whole
    one is taken.

    Raises `UserError` for a folder with files of another origin, for a finished run of another config,
    for a folder that cannot be written, and for a named checkpoint that is not whole.
    """
    path = Path(config.training["output_dir"]).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".prefkit-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {path}: {error.strerror}") from error
    record = read_record(path)
    asked = config.training.get("resume_from_checkpoint")
    if config.output.overwrite_output_dir or asked is False:
        _clear(path, ours=record is not None)
        return OutputFolder(path)
    if record is None and any(path.iterdir()):
        raise UserError(
            f"output_dir: {path} has files in it that are not from a prefkit run. "
            "Set another output_dir, or overwrite_output_dir: true to write among them."
        )
    if isinstance(asked, str):
        verify_checkpoint(asked)
        say(f"Resuming from {asked}.")
        return OutputFolder(path, Path(asked))
    if record is None:
        return OutputFolder(path)
    changed = changed_keys(path, config)
    if record.get("finished"):
        if changed:
            raise UserError(
                f"output_dir: {path} holds a finished run of another config ({'; '.join(changed)}). "
                "Set another output_dir, or overwrite_output_dir: true to start afresh."
            )
        return OutputFolder(path, finished=True)
    remove_leftovers(path)
    checkpoint = find_newest_checkpoint(path, lambda name, why: say(f"Passing over {name}: {why}."))
    if checkpoint is None:
        say(f"An earlier run in {path} left no checkpoint; starting from the beginning.")
    else:
        say(f"Resuming from {checkpoint}.")
        if changed:
            say(f"Changed since that run began: {'; '.join(changed)}.")
    return OutputFolder(path, checkpoint)


def _clear(path: Path, ours: bool) -> None:
    """Remove what an earlier run of ours would resume from or mix into the new one's log."""
    if not ours:
        return
    for checkpoint in path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    remove_leftovers(path)
    for name in (LOG_FILE, RECORD_FILE):
        (path / name).unlink(missing_ok=True)
