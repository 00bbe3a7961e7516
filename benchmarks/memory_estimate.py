"""Estimated against measured peak memory of real trainings of SmolLM2-135M-Instruct.

Measured is the largest resident set of `prefkit train` in a process of its own, less the resident set after
its imports. The estimate is that of `prefkit check`, made in another process. A run has four rows, so that
four steps take its largest micro-batch. `bf16` is `bf16: true`: the forward in bfloat16.

`--fit` prints the two measured numbers of prefkit/check/memory.py. They come from the curves of
`memory.json` (a random Llama of 4 layers, see memory.py), in which none of the runs is.

    python benchmarks/memory_estimate.py [--runs NAME ...] [--steps 4] [--cutoff 512]
    python benchmarks/memory_estimate.py --fit
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FP32, BF16 = {"dtype": "float32"}, {"bf16": True}
FULL = {"finetuning_type": "full"}
BATCH = {"per_device_train_batch_size": 4}
RUNS: dict[str, dict[str, Any]] = {
    "LoRA, fp32": FP32,
    "LoRA, bf16": BF16,
    "full, fp32": {**FULL, **FP32},
    "full, bf16": {**FULL, **BF16},
    "LoRA, bf16, batch 4": {**BF16, **BATCH},
    "LoRA, bf16, batch 4, checkpointing": {**BF16, **BATCH, "disable_gradient_checkpointing": False},
}
# Runs that were first measured when the estimate was as it is.
LATER: dict[str, dict[str, Any]] = {
    "freeze, fp32, cutoff 384": {**FP32, "finetuning_type": "freeze", "cutoff_len": 384},
    "LoRA, fp32, batch 2, cutoff 256": {**FP32, "per_device_train_batch_size": 2, "cutoff_len": 256},
    "full, fp32, checkpointing": {**FULL, **FP32, "disable_gradient_checkpointing": False},
    "LoRA, fp32, batch 2, repeat layout, simpo": {
        **FP32, "per_device_train_batch_size": 2, "batch_layout": "repeat", "pref_loss": "simpo"
    },
}  # fmt: skip
RUNS |= LATER


def write_config(name: str, args: argparse.Namespace, folder: Path) -> Path:
    """The config of a run: `--steps` updates, each on all of its few rows."""
    batch = RUNS[name].get("per_device_train_batch_size", 1)
    config = {
        "model_name_or_path": args.model, "stage": "dpo", "do_train": True, "dataset": args.dataset,
        "dataset_dir": args.data, "cutoff_len": args.cutoff, "max_samples": 4, "ref_cache": False,
        "per_device_train_batch_size": batch, "max_steps": args.steps, "save_strategy": "no",
        "learning_rate": 1e-6, "output_dir": str(folder / "out"), "overwrite_output_dir": True,
        "cache_dir": str(folder), **RUNS[name],
    }  # fmt: skip
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return file


def train(config: Path) -> dict[str, float]:
    """Peak of a training above the imports, in bytes; to be called in a fresh process."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from peak import resident_bytes, resident_peak, restart_resident_peak

    from prefkit.cli import _quiet_libraries
    from prefkit.config import load_config
    from prefkit.runs.report import make_console
    from prefkit.train.run import train as run

    _quiet_libraries()
    imports = resident_bytes()
    restart_resident_peak()
    run(load_config(config).config, make_console(io.StringIO()))
    return {"imports": imports, "measured": resident_peak() - imports}


def estimate(config: Path) -> dict[str, Any]:
    """The parts of the estimate, in bytes."""
    from prefkit.check.run import check
    from prefkit.config.load import load_config

    return dict(check(load_config(config), None, lambda text: None).to_dict()["memory"]["parts"])


def in_process(what: str, config: Path) -> dict[str, Any]:
    """`train` or `estimate` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--only", what, str(config)], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """Each run with its estimate; a line for each as it comes."""
    file = RESULTS / "memory_estimate.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in args.runs:
        with tempfile.TemporaryDirectory() as folder:
            config = write_config(name, args, Path(folder))
            parts = in_process("estimate", config)
            known = {key: results.get(name, {}).get(key) for key in ("imports", "measured")}
            found = known if args.keep and known["measured"] else in_process("train", config)
        estimated = sum(parts.values())
        ratio = round(estimated / found["measured"], 3)
        results[name] = {**found, "estimated": estimated, "ratio": ratio, "parts": parts}
        print(name, f"{estimated / 1e6:,.0f} of {found['measured'] / 1e6:,.0f} MB, {ratio:.2f}", flush=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
    return results


def table(results: dict[str, Any]) -> str:
    """The figures in MB, as Markdown."""
    lines = ["| run | estimated | measured | ratio |", "|---|---:|---:|---:|"]
    for name, row in results.items():
        lines.append(
            f"| {name} | {row['estimated'] / 1e6:,.0f} | {row['measured'] / 1e6:,.0f} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines)


def fit() -> tuple[float, float]:
    """(bytes of the process, bytes kept for a byte of activations).

    The first is the median of what was resident beyond the peak where all logits exist: their blocks go back
    to the system. The second is the median, over the curves of length and batch, of the rest over the
    activations of the same step without checkpointing: a median of ratios, since an error counts by its share
    of the peak. The longest repeated row is left out, whose masks are larger than the heap's blocks.
    """
    curves = json.loads((RESULTS / "memory.json").read_text())

    def excess(row: dict[str, Any]) -> float:
        return float(row["resident"] - row["libraries"] - row["peak"])

    process = statistics.median(excess(row) for row in curves["vocabulary"] if row["all_logits"])
    ratios = []
    for rows in (curves["length"], curves["batch"]):
        plain = {(row["series"], row["x"]): row["activations"] for row in rows}
        for row in rows:
            activations = plain[row["series"].removesuffix(", checkpointing"), row["x"]]
            if row["series"] != "accumulated" and activations < 1e9:
                ratios.append((excess(row) - process) / activations)
    return process, statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"))
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--dataset", default="dpo_en_demo")
    parser.add_argument("--cutoff", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS), help="none: the table only")
    parser.add_argument("--keep", action="store_true", help="estimate again, and keep what was measured")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        what, config = args.only
        print(json.dumps({"train": train, "estimate": estimate}[what](Path(config))))
    elif args.fit:
        process, kept = fit()
        print(f"PROCESS = {process:.0f}\nKEPT = {kept:.2f}")
    else:
        print(table(measure_all(args)))


if __name__ == "__main__":
    main()
