"""DeepSpeed and FSDP2 train what one process trains."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.engines import KEYS, use_fsdp_on_cpu
from tests.train.forks import FORKS, Fork, two_ranks
from tests.train.runs import losses, run, weights

pytestmark = FORKS


def run_on(engine: str, folder: Path, config: Path) -> str:
    """Train in two processes by an engine; what the first printed."""
    ranks = []
    for rank, arguments in enumerate(two_ranks("train", config)):
        work = arguments["work"]

        def prepared(work: Any = work) -> Any:
            warnings.simplefilter("ignore")  # of what the libraries do among themselves
            if engine == "fsdp":
                use_fsdp_on_cpu()
            return work()

        ranks.append(Fork(folder / f"rank-{rank}.txt", prepared))
    codes = [rank.end() for rank in ranks]
    assert codes == [0, 0], "".join(rank.printed() for rank in ranks)
    return ranks[0].printed()


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("engine", KEYS)
def test_two_processes_are_one_with_twice_the_batch(
    engine: str, tuning: str, write_config: Any, tmp_path: Path
) -> None:
    keys = {"finetuning_type": tuning, "max_steps": 3, "lora_dropout": 0.0, "save_steps": 2}
    run(write_config(per_device_train_batch_size=2, output_dir=str(tmp_path / "one"), **keys))
    two = write_config(
        per_device_train_batch_size=1, output_dir=str(tmp_path / "two"), **keys, **KEYS[engine]
    )
    run_on(engine, tmp_path, two)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    found = weights(tmp_path / "two")
    for name, expected in weights(tmp_path / "one").items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)
