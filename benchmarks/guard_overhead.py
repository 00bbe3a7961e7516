"""What the finite gate and the watch for spikes take of a training: their share of the time of its steps.

A LoRA training of SmolLM2-135M-Instruct on real pairs runs in this process; the time inside the guard is
summed and compared with the time of the steps. The look at weights and optimiser before a save is compared
with the save. Medians of several runs; the share is of the same run, so that a busy machine changes little.

    python benchmarks/guard_overhead.py [--runs 3] [--steps 6] [--cutoff 256]
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prefkit.config import load_config
from prefkit.runs.report import make_console
from prefkit.train.guard import StepGuard
from prefkit.train.run import train
from prefkit.train.trainer import PrefTrainer

ROOT = Path(__file__).parents[1]


def clock(owner: type, name: str, times: dict[str, float]) -> None:
    """Add the seconds inside a method to `times`."""
    original: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = original(*args, **kwargs)
        times[name] = times.get(name, 0.0) + time.perf_counter() - started
        return result

    setattr(owner, name, timed)


def main() -> None:
    """Run, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "models/smollm2-135m-instruct"))
    parser.add_argument("--data", default=str(ROOT / "data"))
    parser.add_argument("--dataset", default="demo_pairs")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--cutoff", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, float] = {}
    for owner, name in (
        (StepGuard, "see"),
        (StepGuard, "end_step"),
        (PrefTrainer, "training_step"),
        (PrefTrainer, "check_finite"),
        (PrefTrainer, "_save_checkpoint"),
    ):
        clock(owner, name, times)
    shares: dict[str, list[float]] = {"guard / steps": [], "look before a save / save": []}
    for _ in range(args.runs):
        times.clear()
        with tempfile.TemporaryDirectory() as folder:
            overrides = [
                *(f"model_name_or_path={args.model}", f"dataset={args.dataset}", f"dataset_dir={args.data}"),
                *("stage=dpo", "do_train=true", "per_device_train_batch_size=2", f"max_steps={args.steps}"),
                *(f"cutoff_len={args.cutoff}", "max_samples=64", f"output_dir={folder}/out"),
                *("save_steps=2", "ref_cache=false", f"cache_dir={folder}", "learning_rate=1e-6"),
            ]
            empty = Path(folder) / "config.yaml"
            empty.write_text("{}\n")
            train(load_config(empty, overrides).config, make_console(io.StringIO()))
        shares["guard / steps"].append((times["see"] + times["end_step"]) / times["training_step"])
        shares["look before a save / save"].append(times["check_finite"] / times["_save_checkpoint"])
    for name, values in shares.items():
        print(f"{name}: {statistics.median(values):.3%} (of {', '.join(f'{value:.3%}' for value in values)})")


if __name__ == "__main__":
    main()
