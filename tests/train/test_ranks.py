"""The same numbers on any number of processes: two with batches of one against one with batches of two."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefkit.data.rows import Encoder
from prefkit.train import loading
from tests.train.engines import KEYS
from tests.train.forks import FORKS, run_in_two
from tests.train.runs import read, run, same, unfinish, weights
from tests.train.test_engines import run_on

pytestmark = FORKS

Write = Callable[..., Path]
REWARDS = Path(__file__).with_name("rewards.py")
TIMES = ("runtime", "per_second", "flos", "seconds", "work_imbalance")
LENGTHS = (40, 0, 3, 25, 1, 0, 60, 2, 9, 0, 31)  # of the rows, very unequal, an odd number of them


@pytest.fixture
def write(write_config: Write, dataset_dir: Path) -> Write:
    """A YAML that trains six steps on eleven rows and evaluates on five."""
    rows = [
        {
            "instruction": f"{i}? {'y' * length}",
            "chosen": f"{i} is {'a' * length} good",
            "rejected": f"{'no ' * (length % 7)}{i}",
            "output": f"{i} {'o' * length}",
            "kto_tag": i % 3 != 1,
        }
        for i, length in enumerate((*LENGTHS, 50, 1, 0, 22, 4))
    ]
    info = {}
    for name, part in (("uneven", rows[: len(LENGTHS)]), ("more", rows[len(LENGTHS) :])):
        (dataset_dir / f"{name}.json").write_text(json.dumps(part))
        info |= {f"{name}_pairs": {"file_name": f"{name}.json", "ranking": True}}
        info |= {f"{name}_judged": {"file_name": f"{name}.json"}}
    (dataset_dir / "dataset_info.json").write_text(json.dumps(info))

    def make(**keys: Any) -> Path:
        kind = "judged" if keys.get("stage") == "kto" else "pairs"
        given = {
            "dataset": f"uneven_{kind}",
            "eval_dataset": f"more_{kind}",
            "do_eval": True,
            "do_predict": True,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "max_steps": 6,
            "learning_rate": 1e-3,
            "adam_epsilon": 1e-3,  # Adam turns gradients near 0 into steps of full size, noise as well
            "cutoff_len": 400,
        }
        return write_config(**{**given, **keys})

    return make


def in_one(folder: Path, config: Path, *overrides: str) -> Path:
    """Run in one process with batches of two; the folder of the run."""
    batch = ("per_device_train_batch_size=2", "per_device_eval_batch_size=2")
    run(config, f"output_dir={folder / 'one'}", *batch, *overrides)
    return folder / "one"


def in_two(folder: Path, config: Path, *overrides: str) -> Path:
    """Run in two processes; the folder of the run."""
    run_in_two(folder, "train", config, f"output_dir={folder / 'two'}", *overrides)
    return folder / "two"


def log(folder: Path) -> list[dict[str, float]]:
    """The lines of the Trainer's log without what tells of time and work."""
    lines = read(folder / "trainer_state.json")["log_history"]
    return [{k: v for k, v in line.items() if not any(word in k for word in TIMES)} for line in lines]


def predictions(folder: Path) -> list[dict[str, Any]]:
    """What each held-out row was given, in order."""
    file = next(
        folder / name
        for name in ("predictions.jsonl", "generated_predictions.jsonl")
        if (folder / name).exists()
    )
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_same(one: Path, two: Path) -> None:
    """Logged losses and metrics, metrics of each held-out row and weights agree within 1e-5."""
    assert log(one) and len(log(one)) == len(log(two))
    tables = [(log(one), log(two))]
    if (one / "predict_results.json").exists() and not (one / "eval_samples.jsonl").exists():
        tables.append((predictions(one), predictions(two)))
    for a, b in (pair for table in tables for pair in zip(*table, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            same = a[name] if isinstance(a[name], str) else pytest.approx(a[name], rel=1e-5, abs=1e-5)
            assert b[name] == same, (name, a, b)
    before = weights(two)
    for name, value in weights(one).items():
        torch.testing.assert_close(before[name], value, atol=1e-5, rtol=1e-5)


CASES: dict[str, dict[str, Any]] = {
    "sigmoid with bco": {"pref_bco_weight": 0.3, "gradient_accumulation_steps": 2},
    "kto_pair": {"pref_loss": "kto_pair", "gradient_accumulation_steps": 2},
    "kto": {"stage": "kto"},
    "kto, accumulated": {"stage": "kto", "gradient_accumulation_steps": 2},
    "rm": {
        "stage": "rm",
        "gradient_accumulation_steps": 2,
        "include_num_input_tokens_seen": "non_padding",
        "batch_layout": "repeat",
    },
    "streamed": {"streaming": True, "buffer_size": 4, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("keys", CASES.values(), ids=CASES)
def test_two_processes_are_one_with_twice_the_batch(
    write: Write, tmp_path: Path, keys: dict[str, Any]
) -> None:
    """Eleven rows in steps of four or two: the last step leaves a rank without a row."""
    config = write(**keys)
    one, two = in_one(tmp_path, config), in_two(tmp_path, config)
    assert_same(one, two)
    reports = [read(folder / "data_report.json") for folder in (one, two)]
    assert reports[0] == reports[1]
    assert not (tmp_path / "rank-1.txt").read_text()
    found = [line for line in read(two / "trainer_state.json")["log_history"] if "loss" in line]
    assert ("num_input_tokens_seen" in found[-1]) == ("include_num_input_tokens_seen" in keys)
    full = [(line["work_imbalance"], line["work_imbalance/undealt"]) for line in found if line["step"] % 3]
    assert all(1 <= dealt <= undealt + 1e-6 for dealt, undealt in full)
    # A loss that takes something from all rows of a micro-step leaves nothing to deal with batches of one.
    is_joined = "kto" in keys.values() or "kto_pair" in keys.values()
    assert any(dealt < 0.97 * undealt for dealt, undealt in full) is not is_joined


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_weights_in_parts_wait_for_fillers(write: Write, tmp_path: Path, engine: str) -> None:
    """Where each pass gathers weights, and a loss the KL, a rank without a row is not waited for in vain."""
    keys = {"stage": "kto", "gradient_accumulation_steps": 2, "save_strategy": "no", "max_steps": 3}
    one = in_one(tmp_path, write(**keys))
    run_on(engine, tmp_path, write(**keys, **KEYS[engine]), f"output_dir={tmp_path / 'two'}")
    assert_same(one, tmp_path / "two")


def test_without_fillers_the_numbers_are_others(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: a filler that is learnt from as any row."""
    collate = loading.Collator.__call__

    def learns_always(self: loading.Collator, shared: loading.Shared) -> dict[str, Any]:
        return collate(self, loading.Shared(shared.rows, shared.share._replace(learns=True)))

    monkeypatch.setattr(loading.Collator, "__call__", learns_always)
    config = write()
    with pytest.raises(AssertionError):
        assert_same(in_one(tmp_path, config), in_two(tmp_path, config))


PPO: dict[str, Any] = {
    "stage": "ppo",
    "reward_function": f"{REWARDS}:plain",
    "template": "chatml",
    "max_new_tokens": 12,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "max_steps": 2,
    "gradient_accumulation_steps": 2,
    "ppo_epochs": 2,
    "ppo_buffer_size": 2,
    "ppo_ptx": 0.1,
    "ppo_ptx_dataset": "uneven_pairs",
    "ppo_whiten_rewards": True,
}


def test_ppo_updates_have_the_same_rows(write: Write, tmp_path: Path) -> None:
    """Two updates in each pass over a rollout."""
    config = write(**PPO, logging_steps=1)
    assert_same(in_one(tmp_path, config), in_two(tmp_path, config))


def test_two_processes_resume_in_the_midst_of_an_epoch(write: Write, tmp_path: Path) -> None:
    """From the first of three steps of the second epoch, to the same bits and log, fillers and work in it."""
    config = write(gradient_accumulation_steps=2, save_steps=4, lora_dropout=0.1, do_predict=False)
    folder = in_two(tmp_path, config)
    shutil.copytree(folder, tmp_path / "whole")
    unfinish(folder)
    assert "Resuming from" in run_in_two(tmp_path, "train", config, f"output_dir={folder}")
    assert same(folder, tmp_path / "whole")
    assert_same(tmp_path / "whole", folder)
    names = ("step", "work_imbalance", "work_imbalance/undealt")
    whole, resumed = (
        [[line.get(name) for name in names] for line in read(run / "trainer_state.json")["log_history"]]
        for run in (tmp_path / "whole", folder)
    )
    assert whole == resumed


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_rank_0_alone_encodes(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: str
) -> None:
    encode = Encoder.encode

    def noted(self: Encoder, example: Any) -> Any:
        with (tmp_path / f"encoded-{os.environ['RANK']}").open("a") as file:
            file.write(f"{example.source}\n")
        return encode(self, example)

    monkeypatch.setattr(Encoder, "encode", noted)
    config = write(tokenized_path=str(tmp_path / "tokens"), max_steps=1)
    if overwrite == "true":
        run_in_two(tmp_path, "train", config, f"output_dir={tmp_path / 'first'}")
        (tmp_path / "encoded-0").unlink()
    run_in_two(tmp_path, "train", config, f"overwrite_cache={overwrite}")
    assert len((tmp_path / "encoded-0").read_text().splitlines()) == 16
    assert not (tmp_path / "encoded-1").exists()
