"""The folder of a run: may it be used, and does an earlier run in it go on?"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefkit.config.errors import UserError
from prefkit.config.schema import RunConfig
from prefkit.model.probe import PROBE_FILE
from prefkit.runs.identity import check_same_config
from prefkit.runs.record import CONFIG_FILE, DATA_FILE, RECORD_FILE, read_record
from prefkit.train.checkpoint import find_newest_checkpoint, remove_leftovers, verify_checkpoint
from prefkit.train.lock import LOCK_FILE, FolderLock
from prefkit.train.spikes import SPIKE_FILE

# What a run writes into its folder.
_WRITTEN = (
    *("checkpoint-*", ".saving-*", ".old-*", "adapter_*", "training_*", "trainer_*", "*_results.json"),
    *("model*.safetensors*", "config.json", "generation_config.json", PROBE_FILE),
    *("samples.md", "samples.jsonl", "predictions.jsonl", "README.md", CONFIG_FILE, RECORD_FILE, DATA_FILE),
    SPIKE_FILE,
)


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
        run is worth more than a message.
        """
        if not self.holds_old_run:
            return
        for pattern in _WRITTEN:
            for path in self.path.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def make_output_folder(config: RunConfig, say: Callable[[str], None]) -> FolderLock:
    """Make `output_dir`, and hold it for this run.

    Raises `UserError` when it cannot be written, or when another run is at work in it.
    """
    path = Path(config.training["output_dir"]).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        return FolderLock(path, say)
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {path}: {error.strerror}") from error


def open_output_folder(config: RunConfig, say: Callable[[str], None]) -> OutputFolder:
    """Look into `output_dir`, which is there; `say` tells the user what was found.

    `resume_from_checkpoint` may name the checkpoint, or with false start over; otherwise the newest whole
    one is taken.

    Raises `UserError` for a folder with files of another origin, for a run of another config,
    and for a named checkpoint that is not whole.
    """
    path = Path(config.training["output_dir"]).expanduser()
    record = read_record(path)
    asked = config.training.get("resume_from_checkpoint")
    if config.output.overwrite_output_dir or asked is False:
        return OutputFolder(path, holds_old_run=record is not None)
    if record is None and any(file.name != LOCK_FILE for file in path.iterdir()):
        raise UserError(
            f"output_dir: {path} has files in it that are not from a prefkit run. "
            "Set another output_dir, or overwrite_output_dir: true to write among them."
        )
    if isinstance(asked, str):
        verify_checkpoint(asked)
        check_same_config(Path(asked), config)
        say(f"Resuming from {asked}.")
        return OutputFolder(path, Path(asked))
    if record is None:
        return OutputFolder(path)
    check_same_config(path, config)
    if record.get("finished"):
        return OutputFolder(path, finished=True)
    remove_leftovers(path)
    checkpoint = find_newest_checkpoint(path, lambda name, why: say(f"Passing over {name}: {why}."))
    if checkpoint is None:
        say(f"An earlier run in {path} left no checkpoint; starting from the beginning.")
    else:
        say(f"Resuming from {checkpoint}.")
    return OutputFolder(path, checkpoint)
