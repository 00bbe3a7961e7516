"""A wheel built from the clone works in a fresh environment outside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import make_rows

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow


def call(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_wheel_trains_with_a_named_template(tmp_path: Path, tiny_model: Path) -> None:
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("prefkit-*.whl")
    call(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    call(python, "-m", "pip", "install", "--quiet", "torch", "-c", constraints, cwd=tmp_path)
    call(python, "-m", "pip", "install", "--quiet", wheel, "-c", constraints, cwd=tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.json").write_text(json.dumps(make_rows(8)))
    info = {"pairs": {"file_name": "pairs.json", "ranking": True}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    keys = {"stage": "dpo", "do_train": True, "dataset": "pairs", "template": "qwen3", "max_steps": 1}
    config = tmp_path / "c.json"
    config.write_text(json.dumps({**keys, "model_name_or_path": str(tiny_model), "output_dir": "out"}))
    printed = call(tmp_path / "venv" / "bin" / "prefkit", "train", config, cwd=tmp_path)
    assert "adapter_model.safetensors" in printed
    where = call(python, "-c", "import prefkit; print(prefkit.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
