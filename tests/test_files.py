"""Files that are replaced whole, and the error of a disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from prefkit.config.errors import UserError
from prefkit.files import (
    DiskError,
    check_space,
    describe,
    find_fault,
    free_bytes,
    make_folder,
    naming,
    naming_disk_faults,
    replace_text,
)


def no_checkpoint() -> None:
    """There is none."""


def failing(number: int, *names: str) -> OSError:
    return OSError(number, os.strerror(number), *names)


def test_a_text_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    for text in ("old", "new ä"):
        replace_text(file, text)
        assert file.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [file]
    assert describe(file)["size"] == 6


def test_the_old_text_stays_where_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "notes.txt"
    replace_text(file, "old")

    def full(descriptor: int) -> None:
        raise failing(errno.ENOSPC)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*notes\.txt"):
        replace_text(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_folders_are_made_and_entered_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("prefkit.files.fsync", synced.append)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        make_folder(tmp_path / "file" / "below")


def test_an_error_of_a_library_in_rust_is_a_disk_fault(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError) as caught:
        save_file({"a": torch.zeros(1)}, tmp_path / "absent" / "file")
    assert find_fault(caught.value) is None  # nothing is wrong with the disk
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    fault = find_fault(full)
    assert fault is not None and (fault.errno, fault.filename) == (errno.ENOSPC, None)
    with (
        pytest.raises(OSError, match=r"No space left on device: .*weights") as named,
        naming(Path("weights")),
    ):
        raise full
    assert named.value.errno == errno.ENOSPC


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_a_disk_fault_says_all(tmp_path: Path, number: int) -> None:
    file = str(tmp_path / "weights")
    with (
        pytest.raises(DiskError) as caught,
        naming_disk_faults(tmp_path, lambda: tmp_path / "checkpoint-3", "this command"),
    ):
        raise failing(number, file)
    told = str(caught.value)
    assert caught.value.exit_code == 74
    assert told.startswith(f"{file}: {os.strerror(number)}. The disk has ") and "free now" in told
    assert f"{tmp_path / 'checkpoint-3'} is whole; once the disk takes files again, this command" in told


def test_without_a_checkpoint_that_is_said(tmp_path: Path) -> None:
    told = rf"^{tmp_path}: No space.* No checkpoint was saved"
    with pytest.raises(DiskError, match=told), naming_disk_faults(tmp_path, no_checkpoint):
        raise failing(errno.ENOSPC)

    def unreadable() -> None:
        raise failing(errno.EIO)

    told = "checkpoints cannot be read either"
    with pytest.raises(DiskError, match=told), naming_disk_faults(tmp_path, unreadable):
        raise failing(errno.EIO)


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    elsewhere = failing(errno.EACCES, "/etc/shadow")
    others = (
        elsewhere,
        failing(errno.ENOENT, "absent"),
        ValueError("(os error 28)"),
        UserError("of the user"),
    )
    for error in others:
        with pytest.raises(type(error)) as caught, naming_disk_faults(tmp_path, no_checkpoint):
            raise error
        assert caught.value is error
    with pytest.raises(DiskError, match="Permission denied"), naming_disk_faults(tmp_path, no_checkpoint):
        raise failing(errno.EACCES, str(tmp_path / "below" / "file"))


def test_space_is_that_of_the_disk(tmp_path: Path) -> None:
    free = free_bytes(tmp_path / "not" / "there")
    assert free > 0
    check_space(tmp_path, 1, "a file needs")
    with pytest.raises(DiskError, match=r"a file needs \d+\.\d TB, and the disk has .* free"):
        check_space(tmp_path, free + 10**15, "a file needs")
