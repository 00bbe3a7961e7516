"""A disk that is full, over its quota, read-only or faulty: found early, or said plainly and nothing lost."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefkit.config.errors import UserError
from prefkit.files import DiskError
from prefkit.train.checkpoint_files import find_newest_checkpoint, remove_leftovers, verify_checkpoint
from tests.train.faults import fail_at, in_child, mount_small, on_small_disk, remount
from tests.train.forks import FORKS
from tests.train.runs import run, same
from tests.train.test_checkpoint import TinyTrainer, make_trainer
from tests.train.test_crashes import sweep, whole

pytestmark = FORKS
__all__ = ["whole"]  # a fixture

PAGE = 4096
LARGE = 1 << 26


class Parting(TinyTrainer):
    """Before the save of step 9 it calls `try_save` with what saves to a folder like its own, and asks again
    until that returns False.
    """

    try_save: Callable[[int, Callable[[Path], None]], bool]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.state.global_step == 9:

            def save(folder: Path) -> None:
                self.args.output_dir = str(folder)
                super(Parting, self)._save_checkpoint(model, trial)

            for number in itertools.count():
                if not self.try_save(number, save):
                    break
        super()._save_checkpoint(model, trial)


def part(tmp_path: Path, try_save: Callable[[Path, int, Callable[[Path], None]], bool]) -> TinyTrainer:
    """Train; `try_save(run folder, number, save)` is called before the save of step 9."""
    trainer = make_trainer(tmp_path / "run", Parting, save_total_limit=1)
    trainer.try_save = lambda number, save: try_save(tmp_path / "run", number, save)  # type: ignore[attr-defined]
    trainer.train()
    return trainer


def check_failed(folder: Path, error: OSError) -> None:
    """After a failed save: the older checkpoint is whole, the space is free again, the error names a file."""
    assert error.filename and error.strerror
    verify_checkpoint(folder / "checkpoint-6")
    assert {path.name for path in folder.iterdir()} == {"checkpoint-6"}


def check_saved(folder: Path, reference: Path) -> None:
    """The checkpoint has the bytes of the run that met no fault, but for times and the folder's name."""
    verify_checkpoint(folder)
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "optimizer.json", "scheduler.json"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes()


def test_a_disk_gets_full_at_each_page_of_a_save(tmp_path: Path) -> None:
    """The older checkpoint stays, the space comes back, and with more space the same save is done."""
    faulted: list[str] = []

    def try_save(run_folder: Path, pages: int, save: Callable[[Path], None]) -> bool:
        small, notes = tmp_path / "small", tmp_path / "notes.json"
        small.mkdir(exist_ok=True)
        notes.unlink(missing_ok=True)

        def work() -> None:
            mount_small(small, LARGE)
            shutil.copytree(run_folder, small, dirs_exist_ok=True)
            disk = os.statvfs(small)
            remount(small, (disk.f_blocks - disk.f_bfree + pages) * PAGE)
            try:
                save(small)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                check_failed(small, error)
                notes.write_text(json.dumps(str(error.filename)))
                remount(small, LARGE)
                save(small)
            assert {path.name for path in small.iterdir()} == {"checkpoint-9"}
            shutil.copytree(small / "checkpoint-9", tmp_path / "saved" / str(pages))

        assert on_small_disk(work) == 0, pages
        if notes.exists():
            faulted.append(Path(json.loads(notes.read_text())).name)
        return notes.exists()

    folder = Path(part(tmp_path, try_save).args.output_dir)
    saved = sorted((tmp_path / "saved").iterdir())
    reference = tmp_path / "saved" / str(len(saved) - 1)  # where all pages were there
    for checkpoint in saved:
        check_saved(checkpoint, reference)
    assert len(faulted) >= len(list(reference.iterdir()))
    written_here = {"optimizer.safetensors", "optimizer.json", "scheduler.json", "stage_state.json"}
    assert set(faulted) >= written_here | {"rng_state_0.json", "manifest.json"}
    assert (folder / "checkpoint-12").is_dir()


def test_a_quota_stops_a_save(tmp_path: Path) -> None:
    """A limit on the size of a file, at sizes from nothing to more than the largest file has."""
    limits = [0, 1, 100, 500, 1000, 2000, 4000, 6000, 8000, 16000, 1 << 20]

    def try_save(run_folder: Path, number: int, save: Callable[[Path], None]) -> bool:
        def work() -> int:
            folder = tmp_path / f"limited-{number}"
            shutil.copytree(run_folder, folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits[number], resource.RLIM_INFINITY))
            try:
                save(folder)
            except OSError as error:
                assert error.errno == errno.EFBIG
                check_failed(folder, error)
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                save(folder)
                return 2
            return 0

        code = in_child(work)
        assert code == (0 if limits[number] == 1 << 20 else 2), limits[number]
        return code == 2

    part(tmp_path, try_save)
    for number in range(len(limits)):
        check_saved(tmp_path / f"limited-{number}" / "checkpoint-9", tmp_path / "limited-10" / "checkpoint-9")


def save_with_errors(tmp_path: Path, first: int, stride: int) -> int:
    """Let each `stride`-th operation of a save fail; how many did.

    A whole checkpoint is left, and the next start and save leave no litter.
    """
    failed = 0

    def try_save(run_folder: Path, number: int, save: Callable[[Path], None]) -> bool:
        nonlocal failed
        operation = first + number * stride

        def work() -> int:
            folder = tmp_path / "faulty"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(run_folder, folder)
            operations = fail_at(operation, errno.EIO)
            try:
                save(folder)
            except OSError as error:
                assert error.errno == errno.EIO and error.filename
            if operations() < operation:
                return 0
            assert find_newest_checkpoint(folder)
            remove_leftovers(folder)
            save(folder)
            verify_checkpoint(folder / "checkpoint-9")
            assert {path.name for path in folder.iterdir()} == {"checkpoint-9"}
            return 2

        code = in_child(work)
        assert code in (0, 2), operation
        failed += code == 2
        return code == 2

    part(tmp_path, try_save)
    return failed


def test_an_error_at_an_operation_of_a_save(tmp_path: Path) -> None:
    assert save_with_errors(tmp_path, first=2, stride=3) > 12


def test_what_the_disk_gives_back_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older checkpoint stays where the new one is not on the disk as it was written."""
    trainer = make_trainer(tmp_path, max_steps=2, save_steps=1, save_total_limit=1)
    original = os.fsync

    def garbling(descriptor: int) -> None:
        original(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == "optimizer.safetensors" and trainer.state.global_step == 2:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(os, "fsync", garbling)
    with pytest.raises(OSError, match=r"did not keep .*optimizer\.safetensors was changed") as caught:
        trainer.train()
    assert caught.value.errno == errno.EIO
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    verify_checkpoint(tmp_path / "checkpoint-1")


# Whole runs


def run_on_small_disk(config: Path, folder: Path, size: int) -> int:
    """Run on a disk of `size` bytes, then on a large one; 74 where the first was too small."""

    def work() -> int:
        small = folder.with_name("small-disk")
        small.mkdir(exist_ok=True)
        mount_small(small, size)
        code = 0
        try:
            run(config, f"output_dir={small / 'out'}")
        except DiskError as error:
            code = error.exit_code
            assert str(small) in str(error) and "free" in str(error)
        remount(small, LARGE)
        run(config, f"output_dir={small / 'out'}")
        shutil.copytree(small / "out", folder)
        return code

    return on_small_disk(work)


SIZES = [0x20000, 0x58000]


def test_a_run_goes_on_once_the_disk_has_space(whole: tuple[Path, Path], tmp_path: Path) -> None:
    config, reference = whole
    codes = []
    for size in SIZES:
        codes.append(run_on_small_disk(config, tmp_path / f"{size}", size))
        assert same(tmp_path / f"{size}", reference), size
    assert codes == [74] * len(SIZES)
    assert run_on_small_disk(config, tmp_path / "large", LARGE) == 0


def fail_and_run_again(config: Path, reference: Path, operation: int) -> bool:
    """Let the n-th file operation of a run fail, and give the same command again; False where there is none.

    What a failure does not end, such as that of removing a scratch file, ends well.
    """
    folder = reference.with_name(f"failed-{operation}")

    def work() -> int:
        os.environ["XDG_CACHE_HOME"] = f"{folder}-cache"
        operations = fail_at(operation, errno.EIO)
        try:
            run(config, f"output_dir={folder}")
        except UserError as error:
            assert "Input/output error" in str(error) or "damaged" in str(error)
        return 2 if operations() >= operation else 0

    code = in_child(work)
    assert code in (0, 2), operation
    run(config, f"output_dir={folder}")
    assert same(folder, reference), operation
    shutil.rmtree(folder)
    return code == 2


@pytest.mark.slow
def test_a_run_whose_disk_fails_goes_on(whole: tuple[Path, Path]) -> None:
    assert sweep(lambda operation: fail_and_run_again(*whole, operation), itertools.count(2, 37)) > 4


def test_the_message_says_what_is_whole_and_what_to_do(whole: tuple[Path, Path], tmp_path: Path) -> None:
    config, _ = whole
    small = tmp_path / "small-disk"
    small.mkdir()

    def work() -> None:
        mount_small(small, LARGE)
        out = small / "out"
        from prefkit.train.trainer import PrefTrainer

        original = PrefTrainer._save_checkpoint

        def fill(self: Any, model: Any, trial: Any) -> None:
            if self.state.global_step == 4:
                disk = os.statvfs(small)
                remount(small, (disk.f_blocks - disk.f_bfree + 5) * PAGE)
            original(self, model, trial)

        PrefTrainer._save_checkpoint = fill  # type: ignore[method-assign]
        with pytest.raises(DiskError) as caught:
            run(config, f"output_dir={out}", "overwrite_output_dir=true")
        told = str(caught.value)
        assert f"{out}/.saving-4" in told
        assert "No space left on device. The disk has 24.6 kB free now" in told, told
        assert f"{out / 'checkpoint-2'} is whole" in told
        assert "the same command without overwrite_output_dir goes on from there" in told

    assert on_small_disk(work) == 0


def test_a_read_only_disk_is_found_at_once(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(
        model_name_or_path="nobody/nothing", output_dir=str(tmp_path / "small-disk" / "out")
    )
    (tmp_path / "small-disk").mkdir()

    def work() -> None:
        mount_small(tmp_path / "small-disk", LARGE)
        remount(tmp_path / "small-disk", LARGE, read_only=True)
        before = time.perf_counter()
        with pytest.raises(DiskError, match=r"cannot write to .*/out: Read-only file system"):
            run(config)
        assert time.perf_counter() - before < 1

    assert on_small_disk(work) == 0


@pytest.mark.skipif(os.getuid() == 0, reason="root may write to every folder")
def test_a_folder_without_permission_is_found_at_once(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(DiskError, match=r"cannot write to .*: Permission denied"):
        run(write_config(model_name_or_path="nobody/nothing"))


def test_a_file_is_no_output_folder(write_config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    for folder in (tmp_path / "out", tmp_path / "out" / "below"):
        config = write_config(model_name_or_path="nobody/nothing", output_dir=str(folder))
        with pytest.raises(DiskError, match=f"cannot write to {folder}: {tmp_path / 'out'} is not a folder"):
            run(config)
