"""Pairs per second and peak memory of a DPO step, by batch layout and number format.

Each run is a process of its own; the figure is the median over `--repeats`, taken in turns so that a
busy moment hits all alike. Peak memory is the process's largest resident set, libraries included.

    python benchmarks/layouts.py [--data DIR --dataset NAME] [--pairs 20] [--cutoff 1024] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

RUN = """
import resource, sys
from prefkit.cli import main
sys.argv = ["prefkit", "train", *sys.argv[1:]]
try:
    main()
finally:
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def measure(layout: str, dtype: str, args: argparse.Namespace) -> tuple[float, float]:
    """(pairs per second, peak GB) of one run."""
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "model_name_or_path": args.model, "stage": "dpo", "do_train": True, "dataset": args.dataset,
            "dataset_dir": args.data, "cutoff_len": args.cutoff, "max_samples": args.pairs,
            "batch_layout": layout, "dtype": dtype, "bf16": dtype == "bfloat16", "save_strategy": "no",
            "output_dir": f"{folder}/out", "per_device_train_batch_size": args.batch,
            "num_train_epochs": 1, "pref_loss": args.loss,
        }  # fmt: skip
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config))
        done = subprocess.run([sys.executable, "-c", RUN, str(file)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        peak = int(done.stdout.rsplit("PEAK", 1)[1]) / 2**20
        results = json.loads((Path(folder) / "out" / "train_results.json").read_text())
    return args.pairs / results["train_runtime"], peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--data", default="data")
    parser.add_argument("--dataset", default="dpo_en_demo")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--cutoff", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--loss", default="sigmoid")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    cases = list(product(("shared", "repeat"), args.dtypes))
    found: dict[tuple[str, str], list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(args.repeats):
        for case in cases:
            found[case].append(measure(*case, args))
            print(*case, "{:.3f} pairs/s, {:.2f} GB".format(*found[case][-1]), flush=True)
    print(f"\nmedian of {args.repeats}, {args.pairs} pairs of {args.dataset}, cutoff_len {args.cutoff}:")
    for (layout, dtype), runs in found.items():
        speed, peak = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"{layout:8}{dtype:10}{speed:7.3f} pairs/s {peak:6.2f} GB")


if __name__ == "__main__":
    main()
