"""DeepSpeed and FSDP2 train what one process trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.engines import KEYS, use_fsdp_on_cpu
from tests.train.forks import FORKS, Fork, two_ranks
from tests.train.runs import losses, read, run, weights

pytestmark = FORKS
Write = Callable[..., Path]

STAGES: dict[str, dict[str, Any]] = {
    "dpo": {"eval_dataset": "held_out"},
    "kto": {"stage": "kto", "dataset": "judged", "eval_dataset": "judged_held_out"},
    "rm": {"stage": "rm", "eval_dataset": "held_out"},
}
LORA_TUNING = {"finetuning_type": "lora", "additional_target": "lm_head"}
TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {"finetuning_type": "lora"},
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
}


def on(engine: str, work: Callable[[], Any]) -> Callable[[], Any]:
    """Work in a process in which the libraries may say what they like, and FSDP runs on a CPU."""

    def prepared() -> Any:
        warnings.simplefilter("ignore")
        if engine == "fsdp":
            use_fsdp_on_cpu()
        return work()

    return prepared


def run_on(engine: str, folder: Path, *words: object) -> str:
    """Train in two processes by an engine; what the first printed."""
    ranks = [
        Fork(folder / f"rank-{rank}.txt", on(engine, **arguments))
        for rank, arguments in enumerate(two_ranks("train", *words))
    ]
    codes = [rank.end() for rank in ranks]
    assert codes == [0, 0], "".join(rank.printed() for rank in ranks)
    return ranks[0].printed()


def assert_same(one: Path, other: Path) -> None:
    """Two runs logged the same losses and saved the same weights."""
    assert losses(other) == pytest.approx(losses(one), rel=1e-5)
    found = weights(other)
    for name, expected in weights(one).items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)
    if (one / "eval_results.json").is_file():
        a, b = (read(folder / "eval_results.json") for folder in (one, other))
        for name in a.keys() - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("engine", KEYS)
def test_two_processes_are_one_with_twice_the_batch(
    engine: str, stage: str, tuning: str, write_config: Write, tmp_path: Path
) -> None:
    keys = {**STAGES[stage], **TUNINGS[tuning], "max_steps": 3, "do_eval": True, "save_steps": 2}
    run(write_config(per_device_train_batch_size=2, output_dir=str(tmp_path / "one"), **keys))
    two = write_config(
        per_device_train_batch_size=1, output_dir=str(tmp_path / "two"), **keys, **KEYS[engine]
    )
    run_on(engine, tmp_path, two)
    assert_same(tmp_path / "one", tmp_path / "two")
