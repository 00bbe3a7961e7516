"""A fingerprint names the weights of a folder, whatever the folder's own name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefkit.config import TuningConfig
from prefkit.model import fingerprint as module
from prefkit.model.adapter import add_lora
from prefkit.model.errors import ModelError
from prefkit.model.fingerprint import fingerprint
from tests.conftest import make_model

BLOCK = 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    add_lora(make_model(), TuningConfig(lora_rank=2)).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


@pytest.fixture
def file_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], str]:
    """The fingerprint of a folder whose one file has such blocks; at most four of them are read."""
    monkeypatch.setattr(module, "_BLOCK", BLOCK)
    monkeypatch.setattr(module, "_BLOCKS", 4)

    def run(blocks: bytes) -> str:
        (tmp_path / "model.safetensors").write_bytes(b"".join(bytes([block]) * BLOCK for block in blocks))
        return fingerprint(tmp_path)

    return run


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_it_is_a_sha256_that_stays(folder: Path) -> None:
    found = fingerprint(folder)
    assert len(found) == 64 and int(found, 16)
    assert fingerprint(folder) == found


@pytest.mark.parametrize("kind", ["folder", "adapter"])
def test_a_copy_under_another_name_is_the_same(kind: str, request, tmp_path: Path) -> None:
    original = request.getfixturevalue(kind)
    shutil.copytree(original, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(original)


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_version": "9.9.9"},
        {"_name_or_path": "elsewhere"},
    ],
)
def test_what_a_config_says_of_itself_does_not_count(folder: Path, changes: dict) -> None:
    before = fingerprint(folder)
    edit_json(folder / "config.json", **changes)
    assert fingerprint(folder) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model_name_or_path": "elsewhere"},
        {"inference_mode": False},
        {"peft_version": "9.9.9"},
    ],
)
def test_what_an_adapter_says_of_itself_does_not_count(adapter: Path, changes: dict) -> None:
    before = fingerprint(adapter)
    edit_json(adapter / "adapter_config.json", **changes)
    assert fingerprint(adapter) == before


def test_spaces_order_of_keys_and_other_files_do_not_count(folder: Path) -> None:
    before = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    (folder / "README.md").write_text("# Mine")
    (folder / "tokenizer.json").write_text("{}")
    assert fingerprint(folder) == before


def test_a_changed_config_is_another_model(folder: Path) -> None:
    before = fingerprint(folder)
    edit_json(folder / "config.json", rms_norm_eps=1e-5)
    assert fingerprint(folder) != before


def test_a_changed_adapter_config_is_another_adapter(adapter: Path) -> None:
    before = fingerprint(adapter)
    edit_json(adapter / "adapter_config.json", lora_alpha=5)
    assert fingerprint(adapter) != before


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_one_changed_number_is_another_model(folder: Path, name: str) -> None:
    file, before = folder / "model.safetensors", fingerprint(folder)
    edit_weights(file, lambda tensors: None)
    assert fingerprint(folder) == before
    # by as little as there is
    edit_weights(file, lambda tensors: tensors[name].view(-1)[-1:].nextafter_(torch.tensor([9.0])))
    assert fingerprint(folder) != before


def test_a_renamed_and_a_further_file_of_weights_count(folder: Path) -> None:
    found = {fingerprint(folder)}
    shutil.copy(folder / "model.safetensors", folder / "more.safetensors")
    found.add(fingerprint(folder))
    (folder / "model.safetensors").unlink()
    assert len({*found, fingerprint(folder)}) == 3


def test_a_large_file_is_read_at_equal_distances(file_of_blocks) -> None:
    """Of ten blocks, those at 0, 2, 5 and 7."""
    before = file_of_blocks(bytes(10))
    seen = [i for i in range(10) if file_of_blocks(bytes(int(i == k) for k in range(10))) != before]
    assert seen == [0, 2, 5, 7]


def test_a_file_within_the_budget_is_read_whole(file_of_blocks) -> None:
    before = file_of_blocks(bytes(4))
    assert all(file_of_blocks(bytes(int(i == k) for k in range(4))) != before for i in range(4))


def test_a_retraining_of_a_large_file_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though less than a hundredth of the file is read."""
    monkeypatch.setattr(module, "_BLOCK", BLOCK)
    monkeypatch.setattr(module, "_BLOCKS", 8)
    file, before = folder / "model.safetensors", fingerprint(folder)
    size = file.stat().st_size
    assert size > 100 * 8 * BLOCK
    edit_weights(file, lambda tensors: [weights.mul_(1.001) for weights in tensors.values()])
    assert file.stat().st_size == size
    assert fingerprint(folder) != before


def test_a_large_file_that_grew_is_another(file_of_blocks) -> None:
    assert file_of_blocks(bytes(20)) != file_of_blocks(bytes(21))


def test_without_safetensors_there_is_nothing_to_name(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="has no safetensors weights"):
        fingerprint(tmp_path)


def test_a_damaged_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is damaged: Expecting property name"):
        fingerprint(folder)
