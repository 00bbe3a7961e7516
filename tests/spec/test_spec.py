"""Every block of the specification, verbatim in this folder, runs, or is refused with the reason.

Model, output and number of steps are overridden, and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefkit.check.run import check
from prefkit.config import load_config
from prefkit.data.readers import DataError
from prefkit.runs.report import make_console
from prefkit.train.run import train
from tests.seeing import save_seeing_model
from tests.train.runs import read, weights

SPEC = Path(__file__).parent
ROOT = SPEC.parent.parent
# Start of the sha256 of each block: none may be missing or changed.
BLOCKS = {
    "dpo_alpaca.json": "9e24c434d31b41d4",
    "dpo_sharegpt.json": "581f229b454378d0",
    "dpo.yaml": "e2ff692a048b20af",
    "orpo.yaml": "b92d7e2224f0fbc1",
    "simpo.yaml": "d4e49ee504e08b50",
    "kto_data.json": "28b637360c1267a5",
    "kto.yaml": "6123f2859a24d6da",
    "reward.yaml": "1939cb8b1a44eb04",
    "ppo_data.json": "51e9c7cef7b32fe7",
    "ppo.yaml": "3fca847a6eed813f",
    "multimodal.yaml": "224ab2283110fdc7",
    "deepspeed.yaml": "686bd9f282de1da6",
}
RUN = ("dpo.yaml", "orpo.yaml", "simpo.yaml", "kto.yaml", "reward.yaml")
PPO = "ppo.yaml"
OTHER = {
    "deepspeed.yaml",
    "dpo_alpaca.json",
    "dpo_sharegpt.json",
    "kto_data.json",
    "ppo_data.json",
    "multimodal.yaml",
}


def test_every_block_is_here_word_for_word() -> None:
    found = {
        name: hashlib.sha256((SPEC / name).read_bytes()).hexdigest()[:16]
        for name in (path.name for path in SPEC.iterdir() if path.suffix in (".yaml", ".json"))
    }
    assert found == BLOCKS
    assert {*RUN, PPO, *OTHER} == BLOCKS.keys()


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a user stands: `dataset_dir` is `data` unless the YAML says otherwise."""
    monkeypatch.chdir(ROOT)


def write(name: str, folder: Path) -> Path:
    """A block as a file; one that says "rest same as DPO config" is completed so."""
    text = (SPEC / name).read_text()
    if "rest same as DPO config" in text:
        keys = {line.partition(":")[0] for line in text.splitlines()}
        rest = (SPEC / "dpo.yaml").read_text().splitlines(keepends=True)
        text = "".join(line for line in rest if line.partition(":")[0] not in keys) + text
    file = folder / name
    file.write_text(text)
    return file


def run(config: Path, model: Path, *overrides: str) -> tuple[Path, str]:
    output = config.parent / "out"
    given = [f"model_name_or_path={model}", f"output_dir={output}", "max_steps=2", *overrides]
    console = make_console(io.StringIO())
    train(load_config(config, given).config, console)
    return output, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", RUN)
def test_training_blocks_run(name: str, tmp_path: Path, tiny_model: Path) -> None:
    output, printed = run(write(name, tmp_path), tiny_model)
    assert (output / "adapter_model.safetensors").is_file()
    assert read(output / "trainer_state.json")["global_step"] == 2
    record = read(output / "prefkit.json")
    assert record["template"] == "qwen3_nothink"
    losses = {"dpo.yaml": "sigmoid", "reward.yaml": "bradley-terry"}
    assert record["loss"] == losses.get(name, name.removesuffix(".yaml"))
    assert f"340 {'rows' if name == 'kto.yaml' else 'pairs'} to train on" in printed


@pytest.mark.parametrize("name", ["dpo_alpaca.json", "dpo_sharegpt.json"])
def test_inline_samples_load_and_train(name: str, tmp_path: Path, tiny_model: Path) -> None:
    """Registered with `file_name`, `ranking` and `formatting` alone."""
    data = tmp_path / "data"
    data.mkdir()
    (data / name).write_text((SPEC / name).read_text())
    entry = {"file_name": name, "ranking": True, "formatting": "sharegpt" if "share" in name else "alpaca"}
    (data / "dataset_info.json").write_text(json.dumps({"dpo_en_demo": entry}))
    _, printed = run(write("dpo.yaml", tmp_path), tiny_model, f"dataset_dir={data}")
    assert "1 pair to train on" in printed


def test_the_inline_sample_of_kto_loads_and_trains(tmp_path: Path, tiny_model: Path) -> None:
    """Beside a row of another prompt and label; by itself it is one label, which teaches nothing."""
    (tmp_path / "kto_data.json").write_text((SPEC / "kto_data.json").read_text())
    (other,) = json.loads((SPEC / "kto_data.json").read_text().replace('"Q"', '"Another Q"'))
    (tmp_path / "other.json").write_text(json.dumps([other | {"kto_tag": False}]))
    entries = {"kto_en_demo": "kto_data.json", "other": "other.json"}
    info = {name: {"file_name": file, "formatting": "sharegpt"} for name, file in entries.items()}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    config = write("kto.yaml", tmp_path)
    _, printed = run(config, tiny_model, f"dataset_dir={tmp_path}", "dataset=kto_en_demo,other")
    assert "2 rows to train on" in printed
    with pytest.raises(DataError, match="are all desirable"):
        run(config, tiny_model, f"dataset_dir={tmp_path}", "overwrite_output_dir=true")


@pytest.mark.parametrize(
    ("name", "data", "dataset", "kinds"),
    [
        ("reward.yaml", "dpo_sharegpt.json", "dpo_en_demo", ["prompt", "chosen", "rejected"]),
        ("ppo.yaml", "ppo_data.json", "alpaca_en_demo", ["prompt"]),
    ],
)
def test_blocks_of_later_stages_and_their_data_are_checked(
    name: str, data: str, dataset: str, kinds: list[str], tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / data).write_text((SPEC / data).read_text())
    entry: dict[str, object] = {"file_name": data, "ranking": "dpo" in data}
    if '"conversations"' in (SPEC / data).read_text():
        entry["formatting"] = "sharegpt"
    (tmp_path / "dataset_info.json").write_text(json.dumps({dataset: entry}))
    given = [f"model_name_or_path={tiny_model}", f"dataset_dir={tmp_path}", "report_to=none"]
    report = check(load_config(write(name, tmp_path), given), None, lambda text: None)
    ((_, parts),) = report.examples
    assert [part.kind for part in parts] == kinds
    assert report.ledgers[0].is_balanced and report.ledgers[0].trained == 1


def test_the_ppo_block_runs(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rollouts, scored by the model that the block of `rm` leaves; the tracker has their numbers."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    rater, _ = run(write("reward.yaml", tmp_path), tiny_model)
    rater = rater.rename(tmp_path / "rater")
    output, printed = run(
        write(PPO, tmp_path), tiny_model, f"reward_model={rater}", "max_new_tokens=8", "bf16=false"
    )
    assert read(output / "trainer_state.json")["global_step"] == 2 * 4
    assert "an adapter upon the policy's weights" in printed and "160 rows to train on" in printed
    lines = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["current_steps"] for line in lines] == [1, 2]
    assert all({"loss", "reward"} <= line.keys() for line in lines)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_the_multimodal_block_learns_from_the_shipped_pictures(tmp_path: Path) -> None:
    seeing = save_seeing_model(tmp_path / "seeing")
    output, printed = run(write("multimodal.yaml", tmp_path), seeing)
    assert "a prompt is computed once for its responses" in printed
    assert read(output / "trainer_state.json")["log_history"]
    assert not any("visual" in name for name in weights(output))


def test_the_deepspeed_block_runs_by_its_launch_line(tmp_path: Path, tiny_model: Path) -> None:
    """`CUDA_VISIBLE_DEVICES=0,1,2,3 FORCE_TORCHRUN=1 llamafactory-cli train dpo_config.yaml`; where there is
    no GPU, in two processes."""
    words = [f"model_name_or_path={tiny_model}", f"output_dir={tmp_path / 'out'}", "max_steps=2"]
    command = [Path(sys.executable).with_name("llamafactory-cli"), "train", write("deepspeed.yaml", tmp_path)]
    given = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    done = subprocess.run(
        [*command, *words], env={**os.environ, **given}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Processes: 2, DeepSpeed, ZeRO stage 2." in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
