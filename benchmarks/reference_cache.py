"""Time, peak memory and result of a DPO run with and without the reference cache, on a real model.

For each kind of training: a run without the cache, one that fills it, one that reads it. Each is a process
of its own with the same seed; `weights` is the start of the sha256 of what it saved. Time is that of the
whole command, median over `--repeats`, and of training alone; peak memory is the process's largest
resident set, libraries included.

    python benchmarks/reference_cache.py [--data DIR --dataset NAME] [--pairs 8] [--epochs 2] [--repeats 1]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 2e-5},
    "continued": {"learning_rate": 2e-5, "adapter_name_or_path": "ADAPTER"},
    "full": {"learning_rate": 1e-6, "finetuning_type": "full"},
}


@dataclass(frozen=True)
class Measured:
    """One run: seconds of the command, seconds of training, peak GB, hash of the saved weights."""

    seconds: float
    training: float
    peak: float
    weights: str


def measure(config: dict[str, Any], folder: Path) -> Measured:
    """Run a config in a process of its own."""
    config = {**config, "output_dir": str(folder / "out"), "overwrite_output_dir": True}
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    start = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "prefkit", "train", str(file)], stdout=subprocess.PIPE, text=True
    ) as process:
        output = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(output)
    results = json.loads((folder / "out" / "train_results.json").read_text())
    weights = next((folder / "out").glob("*model.safetensors")).read_bytes()
    return Measured(
        time.monotonic() - start,
        results["train_runtime"],
        usage.ru_maxrss / 2**20,
        hashlib.sha256(weights).hexdigest()[:12],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--data", default="data")
    parser.add_argument("--dataset", default="dpo_en_demo")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cutoff", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS))
    args = parser.parse_args()
    common = {
        "model_name_or_path": args.model, "dtype": "float32", "stage": "dpo", "do_train": True,
        "dataset": args.dataset, "dataset_dir": args.data, "cutoff_len": args.cutoff,
        "max_samples": args.pairs, "num_train_epochs": args.epochs, "save_strategy": "no",
        "per_device_train_batch_size": args.batch, "logging_steps": 1,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = folder / "adapter"
        if "continued" in args.kinds:
            measure({**common, **KINDS["lora"], "num_train_epochs": 1}, folder)
            (folder / "out").rename(adapter)
        print(f"{args.pairs} pairs, {args.epochs} epochs, batch {args.batch}, cutoff_len {args.cutoff}, fp32")
        print(f"{'kind':10} {'cache':8} {'whole s':>8} {'train s':>8} {'peak GB':>8}  weights")
        for kind in args.kinds.split(","):
            keys = {k: str(adapter) if v == "ADAPTER" else v for k, v in KINDS[kind].items()}
            runs: dict[str, list[Measured]] = {"none": [], "filled": [], "read": []}
            for number in range(args.repeats):
                cache = str(folder / f"cache-{kind}-{number}")
                for label, found in runs.items():
                    chosen = {"ref_cache": label != "none", "cache_dir": cache}
                    found.append(measure({**common, **keys, **chosen}, folder))
            for label, found in runs.items():
                whole, training, peak = (
                    statistics.median(getattr(run, field) for run in found)
                    for field in ("seconds", "training", "peak")
                )
                hashes = ", ".join(sorted({run.weights for run in found}))
                print(f"{kind:10} {label:8} {whole:8.1f} {training:8.1f} {peak:8.2f}  {hashes}", flush=True)


if __name__ == "__main__":
    main()
