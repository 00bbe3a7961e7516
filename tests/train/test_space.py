"""A run that cannot fit on its disk is refused before it starts, and one that may not is warned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from transformers import TrainingArguments

import prefkit.files
import prefkit.train.space
from prefkit.files import DiskError
from prefkit.model.fingerprint import fingerprint
from prefkit.train.space import Sizes, num_saves, sizes_of
from tests.conftest import make_model
from tests.train.runs import run


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes the disk says are free."""

    def pretend(number: int) -> None:
        monkeypatch.setattr(prefkit.files, "free_bytes", lambda path: number)
        monkeypatch.setattr(prefkit.train.space, "free_bytes", lambda path: number)

    return pretend


@pytest.mark.parametrize(
    "saves, limit, existing, needed",
    [
        (1, None, 0, 13),  # one checkpoint and the weights
        (3, None, 0, 33),
        (3, None, 2, 33),
        (3, 1, 0, 20),  # two at a time; when the weights come, one has gone
        (3, 2, 0, 30),
        (3, 1, 1, 10),  # the old one is there already, and stays until the new one is
        (1, 2, 5, 10),
        (0, 1, 1, 3),
        (0, None, 0, 3),
    ],
)
def test_bytes_needed(saves: int, limit: int | None, existing: int, needed: int) -> None:
    assert Sizes(10, 3).needed(saves, limit, existing) == needed


def make_arguments(folder: Path, **keys: object) -> TrainingArguments:
    return TrainingArguments(**{"output_dir": str(folder), "use_cpu": True, "report_to": "none", **keys})


@pytest.mark.parametrize(
    "keys, done, saves",
    [
        ({"max_steps": 10, "save_steps": 4}, 0, 3),
        ({"max_steps": 10, "save_steps": 4}, 8, 1),
        ({"max_steps": 10, "save_steps": 4}, 10, 0),
        ({"max_steps": 10, "save_steps": 0.2}, 0, 5),
        ({"num_train_epochs": 3, "save_strategy": "epoch"}, 0, 3),
        ({"num_train_epochs": 3, "save_steps": 5}, 0, 2),  # 9 steps of 4 rows, 11 an epoch: at least
        ({"max_steps": 10, "save_strategy": "no"}, 0, 0),
    ],
)
def test_number_of_saves(keys: dict, done: int, saves: int, tmp_path: Path) -> None:
    assert num_saves(make_arguments(tmp_path, per_device_train_batch_size=4, **keys), 14, done) == saves


def test_a_checkpoint_is_as_large_as_told(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """The weights and the moments are told exactly; the rest of a checkpoint is small and not counted."""
    run(write_config(finetuning_type="full", max_steps=2, save_steps=2))
    told = sizes_of(make_model(), make_arguments(tmp_path))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    weights = (checkpoint / "model.safetensors").stat().st_size
    moments = (checkpoint / "optimizer.safetensors").stat().st_size
    assert told.final <= weights < told.final * 1.1
    assert told.checkpoint <= weights + moments < told.checkpoint * 1.1


def test_a_run_that_does_not_fit_is_refused_before_the_model_is_loaded(
    write_config: Callable[..., Path], free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = sizes_of(make_model(), make_arguments(Path("out")))
    free(told.checkpoint // 2)

    def load(*_: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("prefkit.train.run.build_policy", load)
    with pytest.raises(DiskError, match="in all at least"):
        run(write_config(finetuning_type="full"))
    for keys in ({"finetuning_type": "full", "save_strategy": "no"}, {}):  # the weights alone; an adapter
        with pytest.raises(AssertionError, match="the model is loaded"):
            run(write_config(**keys))


def test_a_run_that_does_not_fit_is_refused_before_the_first_step(
    write_config: Callable[..., Path], free: Callable[[int], None], tmp_path: Path
) -> None:
    config = write_config(max_steps=4, save_steps=2)
    run(config)
    before = fingerprint(tmp_path / "out")
    free(0)
    for folder in (tmp_path / "out2", tmp_path / "out"):
        overrides = [f"output_dir={folder}", "overwrite_output_dir=true", "lora_rank=256"]
        with pytest.raises(DiskError, match=r"this run writes .* a checkpoint and .* of final weights"):
            run(config, *overrides)
    assert fingerprint(tmp_path / "out") == before  # the old run is worth more than a message


def test_what_the_old_run_gives_back_counts(
    write_config: Callable[..., Path], free: Callable[[int], None]
) -> None:
    config = write_config(save_steps=1)
    run(config)
    free(0)
    assert "may get full" not in run(config, "overwrite_output_dir=true")


def test_what_is_not_certain_is_a_warning(
    write_config: Callable[..., Path], free: Callable[[int], None], tmp_path: Path
) -> None:
    """Six checkpoints are not certain: somebody may remove some, and two must fit."""
    config = write_config(max_steps=6, save_steps=1)
    told = "Warning: the disk of"
    assert told not in run(config)
    size = sum(
        (tmp_path / "out" / "checkpoint-1" / name).stat().st_size
        for name in ("adapter_model.safetensors", "optimizer.safetensors")
    )
    free(4 * size)
    assert told in run(config, f"output_dir={tmp_path / 'b'}")
    assert told not in run(config, f"output_dir={tmp_path / 'c'}", "save_total_limit=1")


def test_damaged_weights_are_left_to_the_loader(
    write_config: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for text in (b"", b"\x08" + bytes(7) + b"no json!", b"\xff" * 20):
        (folder / "model.safetensors").write_bytes(text)
        assert prefkit.train.space._num_weights(folder) == 0
    (folder / "model.safetensors").unlink()
    model = dict(make_model().state_dict())
    names = sorted(model)
    for number, part in enumerate((names[:9], names[9:]), 1):
        save_file({name: model[name] for name in part}, folder / f"model-0000{number}-of-00002.safetensors")
    weights = sum(tensor.numel() for tensor in model.values())
    assert prefkit.train.space._num_weights(folder) == weights - model["lm_head.weight"].numel()
