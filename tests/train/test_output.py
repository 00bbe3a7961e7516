"""Which folders a run takes for its own, and what it removes from them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prefkit.config import load_config
from prefkit.config.errors import UserError
from prefkit.train.checkpoint_files import CheckpointError
from prefkit.train.output import OutputFolder, open_output_folder
from prefkit.train.place import command_that_goes_on
from tests.train.runs import run, unfinish

SCRATCH = [".prefkit-probe", ".config.yaml.prefkit-new", ".prefkit.json.prefkit-new"]


@pytest.fixture
def open_out(write_config: Callable[..., Path], tmp_path: Path) -> Callable[..., OutputFolder]:
    """Opens the folder `out`."""
    (tmp_path / "out").mkdir()

    def opened(**keys: object) -> OutputFolder:
        return open_output_folder(load_config(write_config(**keys), []).config, print)

    return opened


@pytest.mark.parametrize("name", [*SCRATCH, ".prefkit.lock"])
def test_what_a_kill_leaves_is_not_foreign(
    open_out: Callable[..., OutputFolder], tmp_path: Path, name: str
) -> None:
    (tmp_path / "out" / name).write_text("half")
    assert open_out() == OutputFolder(tmp_path / "out")
    assert (tmp_path / "out" / name).exists() is (name == ".prefkit.lock")


@pytest.mark.parametrize("name", [".bashrc", ".tmpAb3dEf", "checkpoint-1", "config.yaml", ".old-notes"])
def test_what_else_there_is_is_foreign(
    open_out: Callable[..., OutputFolder], tmp_path: Path, name: str
) -> None:
    (tmp_path / "out" / name).write_text("of somebody")
    with pytest.raises(UserError, match="not from a prefkit run"):
        open_out()
    assert (tmp_path / "out" / name).exists()


def test_a_librarys_scratch_goes_from_the_folder_of_a_run(
    open_out: Callable[..., OutputFolder], tmp_path: Path
) -> None:
    """safetensors writes .tmpXXXXXX and renames it: a kill in between leaves it."""
    (tmp_path / "out" / "prefkit.json").write_text('{"finished": false}')
    for name in (".tmpAb3dEf", ".tmp-of-mine"):
        (tmp_path / "out" / name).touch()
    open_out()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"prefkit.json", ".tmp-of-mine"}


def test_a_record_without_a_config_is_a_start_that_was_killed(
    open_out: Callable[..., OutputFolder], tmp_path: Path
) -> None:
    (tmp_path / "out" / "prefkit.json").write_text('{"finished": false}')
    assert open_out() == OutputFolder(tmp_path / "out")


def test_clearing_keeps_the_facts_of_the_old_run_until_the_new_one_has_its_own(
    open_out: Callable[..., OutputFolder], tmp_path: Path
) -> None:
    record = tmp_path / "out" / "prefkit.json"
    record.write_text('{"finished": true, "base_model": "some/model"}')
    (tmp_path / "out" / "model.safetensors").write_text("weights")
    folder = open_out(overwrite_output_dir=True)
    assert list(folder.old_files()) == [tmp_path / "out" / "model.safetensors"]
    folder.clear()
    assert json.loads(record.read_text()) == {"finished": False, "base_model": "some/model", "cleared": True}
    assert open_out() == OutputFolder(tmp_path / "out", holds_old_run=True)


@pytest.mark.parametrize(
    "keys, told",
    [
        ({}, "the same command"),
        ({"resume_from_checkpoint": True}, "the same command"),
        ({"overwrite_output_dir": True}, "the same command without overwrite_output_dir"),
        (
            {"overwrite_output_dir": True, "resume_from_checkpoint": False},
            "the same command without overwrite_output_dir and resume_from_checkpoint",
        ),
    ],
)
def test_the_command_that_goes_on(write_config: Callable[..., Path], keys: dict, told: str) -> None:
    assert command_that_goes_on(load_config(write_config(**keys), []).config) == told


def test_an_unfinished_run_goes_only_with_a_warning(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(write_config(save_steps=1))
    config = load_config(write_config(overwrite_output_dir=True), []).config
    open_output_folder(config, print)
    assert capsys.readouterr().out == ""  # it is finished
    unfinish(tmp_path / "out")
    assert open_output_folder(config, print).holds_old_run
    said = capsys.readouterr().out
    assert "holds an unfinished run. overwrite_output_dir: true removes it, checkpoint-1 and all" in said


def test_a_named_checkpoint_that_is_damaged_says_what_to_do(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    run(write_config())
    (tmp_path / "out" / "checkpoint-2" / "optimizer.json").unlink()
    config = load_config(
        write_config(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2")), []
    ).config
    with pytest.raises(
        CheckpointError, match=r"optimizer\.json is missing\. Name another one, or leave the key out"
    ):
        open_output_folder(config, print)


def test_a_folder_that_cannot_be_used_is_said_before_torch_is_loaded(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("a file")
    code = f"import sys; sys.argv = ['prefkit', 'train', {str(write_config())!r}]\n"
    code += "from prefkit.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 74 and "Traceback" not in done.stderr, done.stderr
    assert "output_dir: cannot write to" in done.stderr and "is not a folder" in done.stderr
