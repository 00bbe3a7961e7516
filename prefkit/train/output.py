"""The folder of a run: may it be used, and does an earlier run in it go on?"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prefkit.config.errors import UserError
from prefkit.config.schema import RunConfig
from prefkit.files import SCRATCH_SUFFIX, fsync
from prefkit.model.probe import PROBE_FILE
from prefkit.runs.calibration import CALIBRATION_FILE, CALIBRATION_PLOT, SCORES_FILE
from prefkit.runs.identity import check_same_config
from prefkit.runs.record import CONFIG_FILE, DATA_FILE, RECORD_FILE, mark_cleared, read_record
from prefkit.train.checkpoint_files import (
    LEFTOVER,
    CheckpointError,
    find_newest_checkpoint,
    remove_leftovers,
    verify_checkpoint,
)
from prefkit.train.lock import LOCK_FILE
from prefkit.train.place import FAILURE_LOG, PROBE, output_path
from prefkit.train.spikes import SPIKE_FILE

# What a run writes into its folder.
_WRITTEN = (
    *("checkpoint-*", ".saving-*", ".old-*", "adapter_*", "training_*", "trainer_*", "*_results.json"),
    *("model*.safetensors*", "config.json", "generation_config.json", PROBE_FILE),
    *("samples.md", "samples.jsonl", "predictions.jsonl", "README.md", CONFIG_FILE, RECORD_FILE, DATA_FILE),
    *(SPIKE_FILE, SCORES_FILE, CALIBRATION_FILE, CALIBRATION_PLOT),
    FAILURE_LOG.replace(".", "*."),
)
_FAILURE_LOG = re.compile(FAILURE_LOG.replace(".", r"(-\d+)?\."))
_SCRATCH = re.compile(rf"{re.escape(PROBE)}|\..+{re.escape(SCRATCH_SUFFIX)}")
_SCRATCH_OF_SAFETENSORS = re.compile(r"\.tmp\w{6}")


@dataclass(frozen=True)
class OutputFolder:
    """`checkpoint` is where training goes on from, if anywhere; `finished`: there is nothing to do.

    `holds_old_run` says that the files of an earlier run are to go before this one begins.
    """

    path: Path
    checkpoint: Path | None = None
    finished: bool = False
    holds_old_run: bool = False

    def clear(self) -> None:
        """Remove what an earlier run of ours left, and nothing else.

        Call it when model and data of the new run have been read: until then it may fail, and the old
        run is worth more than a message. The record goes on saying that the rest is of no use, so that a
        kill in the middle does not leave a run that looks whole; the new run replaces it.
        """
        if self.holds_old_run:
            mark_cleared(self.path)
            for path in self.old_files():
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            fsync(self.path)

    def old_files(self) -> Iterator[Path]:
        """The files and folders that `clear` removes."""
        if self.holds_old_run:
            found = {path for pattern in _WRITTEN for path in self.path.glob(pattern)}
            yield from sorted(found - {self.path / RECORD_FILE})


def open_output_folder(config: RunConfig, say: Callable[[str], None]) -> OutputFolder:
    """Look into `output_dir`, which is there; `say` tells the user what was found.

    `resume_from_checkpoint` may name the checkpoint, or with false start over; otherwise the newest whole
    one is taken.

    Raises `UserError` for a folder with files of another origin, for a run of another config,
    and for a named checkpoint that is not whole.
    """
    path = output_path(config)
    record = read_record(path)
    _remove_scratch(path, record is not None)
    if record is not None and record.get("cleared"):
        say(f"An earlier run in {path} was being removed; starting from the beginning.")
        return OutputFolder(path, holds_old_run=True)
    asked = config.training.get("resume_from_checkpoint")
    if config.output.overwrite_output_dir or asked is False:
        if record is not None and not record.get("finished"):
            _warn_of_removal(path, config, say)
        return OutputFolder(path, holds_old_run=record is not None)
    if record is None and any(not _is_scratch(file) for file in path.iterdir()):
        raise UserError(
            f"output_dir: {path} has files in it that are not from a prefkit run. "
            "Set another output_dir, or overwrite_output_dir: true to write among them."
        )
    if isinstance(asked, str):
        _verify_named(asked)
        check_same_config(Path(asked), config)
        say(f"Resuming from {asked}.")
        return OutputFolder(path, Path(asked))
    if record is None:
        return OutputFolder(path)
    if not record.get("finished") and not (path / CONFIG_FILE).exists():
        return OutputFolder(path)  # killed between its first file and its second
    check_same_config(path, config)
    if record.get("finished"):
        return OutputFolder(path, finished=True)
    remove_leftovers(path)
    checkpoint = find_newest_checkpoint(path, lambda name, why: say(f"Passing over {name}: {why}."))
    if checkpoint is None:
        say(f"An earlier run in {path} left no whole checkpoint; starting from the beginning.")
    else:
        say(f"Resuming from {checkpoint}.")
    return OutputFolder(path, checkpoint)


def _warn_of_removal(path: Path, config: RunConfig, say: Callable[[str], None]) -> None:
    """Tell of the checkpoint of an unfinished run that is going to be removed."""
    newest = find_newest_checkpoint(path, lambda name, why: None)
    if newest is not None:
        key = "overwrite_output_dir: true" if config.output.overwrite_output_dir else "resume_from_checkpoint"
        say(
            f"Warning: {path} holds an unfinished run. {key} removes it, {newest.name} and all, as soon as "
            "model and data are read; without that key it may go on."
        )


def _verify_named(checkpoint: str) -> None:
    try:
        verify_checkpoint(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(
            f"resume_from_checkpoint: {error}. Name another one, or leave the key out: then the newest whole "
            "checkpoint of output_dir is taken."
        ) from error


def _is_scratch(path: Path) -> bool:
    """Whether a name in an output folder is one that only a kill leaves, or that of its lock."""
    if path.name == LOCK_FILE or _FAILURE_LOG.fullmatch(path.name):
        return True
    return bool(_SCRATCH.fullmatch(path.name) or LEFTOVER.fullmatch(path.name))


def _remove_scratch(path: Path, is_ours: bool) -> None:
    """Remove what a killed start or a killed write left; a library's scratch only in the folder of a run."""
    for file in path.glob(".*"):
        if _SCRATCH.fullmatch(file.name) or (is_ours and _SCRATCH_OF_SAFETENSORS.fullmatch(file.name)):
            file.unlink(missing_ok=True)
