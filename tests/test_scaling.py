"""The formulas and the simulation of docs/scaling.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from prefkit.config import load_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def formulas(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return __import__("scaling_formulas")


@pytest.fixture
def sim(formulas: Any) -> Any:
    return __import__("scaling_sim")


def test_weights_of_llama(formulas: Any) -> None:
    assert formulas.LLAMA_8B.weights == 8_030_261_248
    assert formulas.LLAMA_70B.weights == 70_553_706_496
    assert formulas.LLAMA_8B.lora(8) == 20_971_520


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ("ddp", 4 + 8 + 4 + 4),  # weight, moments, bucket, reference
        ("zero1", 2 + 2 + 4 + 2),  # weight, half a master, half the moments, reference
        ("zero2", 2 + 2 + 4 + 2),
        ("zero3", 1 + 2 + 4 + 1 + 1),  # halves of these, and of the place for a gradient
        ("fsdp", 2 + 4 + 2),
    ],
)
def test_bytes_of_a_trained_weight_on_two_ranks(formulas: Any, engine: str, expected: float) -> None:
    run = formulas.Run(engine, 2, frozen=0, trained=1, reference="copy")
    assert sum(run.held().values()) == expected


def test_traffic_of_a_step_of_two_micro_steps(formulas: Any) -> None:
    def of(engine: str, **more: Any) -> dict[str, float]:
        return formulas.Run(engine, 2, frozen=10, trained=1, micro_steps=2, **more).traffic()

    assert of("ddp") == {"all-reduce": 4}
    assert of("zero1") == {"all-reduce": 2, "all-gather": 1}
    assert of("zero2") == {"all-reduce": 4, "all-gather": 1}
    assert of("zero3") == {"all-gather": 22 + 22 + 20, "reduce-scatter": 2}
    assert of("zero3", checkpointing=True, reference="none") == {"all-gather": 3 * 22, "reduce-scatter": 2}
    assert of("fsdp", checkpointing=True) == {"all-gather": 3 * 22, "reduce-scatter": 4}


def test_a_step_waits_for_its_slowest_rank(sim: Any) -> None:
    shape = sim.SHAPES["llama-8b"]
    cluster = sim.Cluster(nvlink=1e30, network=1e30, hop=0.0)
    seconds = np.array([1.0, 3.0, 3.0, 1.0])
    cells = sim.in_order(4, 2, 1)
    times = {
        engine: sim.step_time(sim.Case(shape, engine, 16, 1, 2, "off", True), cluster, 2, seconds, cells)
        for engine in ("ddp", "fsdp")
    }
    assert times == pytest.approx({"ddp": 4.0, "fsdp": 6.0})


def test_lengths_of_a_file_are_estimated(sim: Any, tmp_path: Path) -> None:
    rows = [
        {"instruction": "x" * 456, "chosen": "y" * 912, "rejected": "z"},
        {
            "conversations": [{"from": "human", "value": "x" * 456}],
            "chosen": {"from": "gpt", "value": "y" * 912},
            "rejected": {"from": "gpt", "value": "z"},
        },
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    assert sim.read_lengths([tmp_path / "pairs.json"], 1000).tolist() == [[100, 200, 1]] * 2
    assert sim.read_lengths([tmp_path / "pairs.json"], 250).tolist() == [[100, 125, 1]] * 2
    assert (sim.read_lengths([], 2048).max(0) < 2048).all()


@pytest.mark.slow
def test_the_simulation_runs(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "scaling_sim.py", "--quick", "--output", tmp_path / "it.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "it.json").read_text())
    assert (tmp_path / "it.png").stat().st_size > 10_000
    for by_ranks in results.values():
        assert by_ranks["1"]["dealt"] == by_ranks["1"]["in order"] == by_ranks["1"]["ideal"]
        assert all(it["ideal"] < it["dealt"] < it["in order"] for it in list(by_ranks.values())[1:])


@pytest.mark.slow
def test_formulas_say_what_two_processes_send(tmp_path: Path) -> None:
    script = [sys.executable, BENCHMARKS / "scaling_check.py", "--quick", "--kinds", "lora"]
    done = subprocess.run(
        [*script, "--engines", "ddp", "zero2", "--output", tmp_path / "it.json"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "it.json").read_text())
    sent = [row for row in rows if row["what"] not in ("tensors", "held", "peak")]
    assert len(sent) == 3
    for row in sent:
        assert row["measured"] == pytest.approx(row["formula"], rel=1e-3)


PLANS = Path(__file__).parents[1] / "docs" / "scaling.md"
ENGINES = {"z2.json": "ds_z2_config.json", "z3.json": "ds_z3_config.json"}


def keys_of_plans() -> dict[str, dict[str, Any]]:
    """The YAML of each plan, and with what each training of all weights, or FSDP2, changes."""
    found: dict[str, dict[str, Any]] = {}
    name = ""
    for block in re.findall(r"```yaml\n(.*?)```", PLANS.read_text(encoding="utf-8"), re.DOTALL):
        keys = yaml.safe_load(block)
        if block.startswith("#"):
            name = block.splitlines()[0]
            found[name] = keys
        else:
            before = dict(found[name])
            if "fsdp" in keys:
                del before["deepspeed"]
            found[f"{name}, {next(iter(keys))}"] = before | keys
    return found


def test_the_plans_are_configs(tmp_path: Path) -> None:
    plans = keys_of_plans()
    assert len(plans) == 5
    for name, keys in plans.items():
        if engine := keys.get("deepspeed"):
            example = PLANS.parents[1] / "examples" / "deepspeed" / ENGINES[Path(engine).name]
            keys["deepspeed"] = str(example)
        file = tmp_path / "plan.yaml"
        file.write_text(yaml.safe_dump(keys))
        assert load_config(file).config.value("stage") in ("dpo", "ppo"), name
