"""A model that sees, and configs over rows with pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.seeing import make_seen_rows, save_seeing_model


@pytest.fixture(scope="session")
def seeing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that sees, without its weights."""
    folder = save_seeing_model(tmp_path_factory.mktemp("seeing"))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def write_seeing(tmp_path: Path, seeing_model: Path) -> Callable[..., Path]:
    """Writes a config of a stage over rows with pictures, eight unless others are given, and keys besides."""
    data = tmp_path / "seen"
    data.mkdir()
    usual = make_seen_rows(data, 8)
    columns = {"messages": "conversations", "images": "images", "videos": "videos"}

    def write(rows: Sequence[dict[str, Any]] = usual, stage: str = "dpo", **changes: Any) -> Path:
        entry: dict[str, Any] = {"file_name": "rows.json", "formatting": "sharegpt", "columns": columns}
        if stage in ("dpo", "rm"):
            entry["ranking"] = True
            entry["columns"] = columns | {"chosen": "chosen", "rejected": "rejected"}
        else:
            rows = [
                {
                    "conversations": [*row["conversations"], row["rejected" if i % 2 else "chosen"]],
                    "kto_tag": not i % 2,
                    "images": row["images"],
                }
                for i, row in enumerate(rows)
            ]
            entry["columns"] = columns | ({"kto_tag": "kto_tag"} if stage == "kto" else {})
        (data / "rows.json").write_text(json.dumps(list(rows)))
        (data / "dataset_info.json").write_text(json.dumps({"rows": entry}))
        config = {
            "model_name_or_path": str(seeing_model),
            "template": "qwen3_vl_nothink",
            "stage": stage,
            "do_train": True,
            "dataset": "rows",
            "dataset_dir": str(data),
            "cutoff_len": 256,
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            **changes,
        }
        file = tmp_path / "seeing.json"
        file.write_text(json.dumps({name: it for name, it in config.items() if it is not ...}))
        return file

    return write


@pytest.fixture
def bare_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model's folder without its weights."""
    folder = tmp_path / "bare"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(folder.glob("*.safetensors"))
    return folder
