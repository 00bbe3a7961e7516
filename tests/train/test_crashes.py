"""A kill at any file operation of a run, or a loss of power, loses nothing and blocks nothing."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from prefkit.config import load_config
from prefkit.train.lock import FolderLock
from prefkit.train.output import OutputFolder, open_output_folder
from prefkit.train.place import make_output_folder
from tests.train.faults import (
    KILLED,
    ForgetfulDisk,
    Tree,
    before_each_file_operation,
    die_at,
    in_child,
    write_tree,
)
from tests.train.forks import FORKS
from tests.train.runs import read, run, same

pytestmark = FORKS

# Two saves, of which the second removes the first, an evaluation, and samples.
KEYS: dict[str, Any] = {
    "max_steps": 4,
    "save_steps": 2,
    "save_total_limit": 1,
    "lora_dropout": 0.1,
    "lr_scheduler_type": "constant",  # so that each step, also one too many, changes the weights
    "eval_dataset": "held_out",
    "do_eval": True,
    "sample_prompts": 1,
    "sample_max_new_tokens": 3,
}


@pytest.fixture
def whole(write_config: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """The config of a run, and the folder of one that nothing disturbed."""
    config = write_config(**KEYS)
    run(config, f"output_dir={tmp_path / 'whole'}")
    return config, tmp_path / "whole"


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def kill_and_run_again(config: Path, whole: Path, operation: int) -> bool:
    """Kill a run at its n-th file operation and give the same command again; False where it ended before."""
    folder = whole.with_name(f"killed-{operation}")
    here = f"output_dir={folder}"

    def killed() -> None:
        os.environ["XDG_CACHE_HOME"] = f"{folder}-cache"  # rows are encoded and kept once more
        die_at(operation)
        run(config, here)

    code = in_child(killed)
    assert code in (0, KILLED), operation
    run(config, here)
    assert same(folder, whole), operation
    assert names_in(folder) == names_in(whole), operation
    assert read(folder / "prefkit.json")["finished"], operation
    steps = [line.split(",")[0] for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    assert steps == [line.split(",")[0] for line in (whole / "trainer_log.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    return code == KILLED


def sweep(trial: Callable[[int], bool], operations: Iterable[int]) -> int:
    """Try operation after operation until the work ends before; how many were tried."""
    return sum(1 for _ in itertools.takewhile(trial, operations))


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(whole: tuple[Path, Path]) -> None:
    assert sweep(lambda operation: kill_and_run_again(*whole, operation), itertools.count(4, 29)) > 5


def test_the_start_of_a_run_may_be_killed_anywhere(whole: tuple[Path, Path], tmp_path: Path) -> None:
    """From the making of the folder to the last of the first files: the next start is not refused."""
    config, _ = whole

    def start_killed(operation: int) -> bool:
        folder = tmp_path / f"started-{operation}"
        loaded = load_config(config, [f"output_dir={folder}"]).config

        def start() -> None:
            from prefkit.runs.record import write_data_report, write_record

            die_at(operation)
            with FolderLock(make_output_folder(loaded), print):
                open_output_folder(loaded, print)
            write_record(folder, loaded, {"finished": False})
            write_data_report(folder, [])

        code = in_child(start)
        assert code in (0, KILLED), operation
        with FolderLock(make_output_folder(loaded), print):
            opened = open_output_folder(loaded, print)
        assert opened == OutputFolder(folder), operation
        left = {path.name for path in folder.iterdir()}
        assert left <= {"prefkit.json", "config.yaml", "data_report.json"}, operation
        return code == KILLED

    assert sweep(start_killed, itertools.count(1)) > 12


def test_a_folder_that_was_being_cleared_is_of_no_old_run(whole: tuple[Path, Path], tmp_path: Path) -> None:
    """A kill at each file operation of `clear` leaves the old run as it was, or none."""
    config, finished = whole
    untouched, half = 0, []

    def clear_killed(operation: int) -> bool:
        nonlocal untouched
        folder = tmp_path / f"cleared-{operation}"
        shutil.copytree(finished, folder)
        (folder / "notes.txt").write_text("of somebody")
        before = names_in(folder)

        def clear() -> None:
            die_at(operation)
            OutputFolder(folder, holds_old_run=True).clear()

        code = in_child(clear)
        assert code in (0, KILLED), operation
        opened = open_output_folder(load_config(config, [f"output_dir={folder}"]).config, print)
        if opened.finished:
            untouched += 1
            assert names_in(folder) == before
        else:
            assert opened == OutputFolder(folder, holds_old_run=True)
            half.append(folder)
        assert (folder / "notes.txt").exists()
        return code == KILLED

    assert sweep(clear_killed, itertools.count(1)) > 30
    assert 0 < untouched < 5
    for folder in (half[0], half[-2]):
        assert "starting from the beginning" in run(config, f"output_dir={folder}")
        assert same(folder, finished)
        assert names_in(folder) == names_in(finished) | {"notes.txt"}
        assert "cleared" not in read(folder / "prefkit.json")


class PowerCuts:
    """Looks at what a power cut would leave of a run, in four orders of writing, at each of its operations.

    The next start must take a checkpoint no older than the newest that was there an operation ago, and a
    folder that says "finished" must hold the weights.
    """

    def __init__(self, config: Path, weights: bytes, root: Path) -> None:
        self.config, self.weights, self.root = config, weights, root
        self.disk = ForgetfulDisk(root)
        self.seen: set[str] = set()
        self.finished = False
        self._required = 0
        self._looks = False

    def look(self) -> None:
        """Look, but not at the operations that this takes."""
        if self._looks:
            return
        self._looks = True
        for live_bytes, live_names in itertools.product((False, True), repeat=2):
            tree = self.disk.left(live_bytes, live_names)
            digest = hashlib.sha256(repr(sorted(tree.items())).encode()).hexdigest()
            if digest not in self.seen:
                self._start_on(tree)
            self.seen.add(digest)
        self._required = max([0, *(int(path.name[11:]) for path in self.root.glob("out/checkpoint-*"))])
        self._looks = False

    def _start_on(self, tree: Tree) -> None:
        left = self.root.with_name("left")
        write_tree(tree, left)
        config = load_config(self.config, [f"output_dir={left / 'out'}"]).config
        make_output_folder(config)
        opened = open_output_folder(config, no_word)
        self.finished = opened.finished
        if opened.finished:
            assert (left / "out" / "adapter_model.safetensors").read_bytes() == self.weights
        else:
            assert (int(opened.checkpoint.name[11:]) if opened.checkpoint else 0) >= self._required
        shutil.rmtree(left)


def no_word(text: str) -> None:
    """Say nothing."""


@pytest.mark.parametrize("obeys", [True, False])
def test_a_power_cut_loses_no_checkpoint(whole: tuple[Path, Path], tmp_path: Path, obeys: bool) -> None:
    """The control: on a disk that ignores what it is told, it does."""
    config, finished = whole
    root = tmp_path / "disk"
    root.mkdir()

    def watched() -> None:
        cuts = PowerCuts(config, (finished / "adapter_model.safetensors").read_bytes(), root)
        os.fsync = cuts.disk.fsync if obeys else lambda descriptor: None
        before_each_file_operation(cuts.look)
        run(config, f"output_dir={root / 'out'}")
        cuts.look()
        assert cuts.finished and len(cuts.seen) > 50

    assert in_child(watched) == (0 if obeys else 1)
