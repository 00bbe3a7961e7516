"""Peak memory of a training step against length, vocabulary, batch and finetuning type.

A step is the forward of policy and reference, the backward and the update, with everything built as
`prefkit train` builds it, from random token ids (`memory_step.py`). What it takes is counted exactly, from
the records of torch's allocator (`peak.py`); `resident` is what the system saw, libraries included. Each
point is a process of its own. docs/performance.md explains the curves.

    python benchmarks/memory.py [--curves length vocabulary batch finetuning] [--quick] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import tempfile
import warnings
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from memory_plots import draw, table
from memory_step import Point, measure
from torch import set_num_threads
from transformers.utils import logging

ROOT = Path(__file__).parents[1]
FOLDERS = ROOT / "benchmarks" / "results", ROOT / "docs"  # of the figures and of the pictures
REAL_MODEL = str(ROOT / "models" / "smollm2-135m-instruct")
LAYOUTS = ("shared", "repeat")
FORK = multiprocessing.get_context("fork")  # the libraries are imported once for all points


def length_points(quick: bool) -> list[Point]:
    """Against row length, by layout and with and without checkpointing."""
    lengths = (64, 128) if quick else (256, 512, 1024, 2048, 4096)
    return [
        Point("length", name, length, tokens=length, keys=keys)
        for name, keys in _by_layout().items()
        for length in lengths
    ]


def vocabulary_points(quick: bool) -> list[Point]:
    """Against vocabulary: log-probs in chunks and from all logits, head frozen and trained."""
    sizes = (2_000, 8_000) if quick else (8_000, 32_000, 64_000, 152_000, 256_000)
    tuning = {"LoRA": {}, "full": {"finetuning_type": "full"}}
    heads = {"prefkit": False, "all logits": True}
    return [
        Point(
            *("vocabulary", f"{head}, {name}", size, size),
            tokens=64 if quick else 256,
            all_logits=plain,
            keys={"batch_layout": "repeat", **keys},
        )
        for (head, plain), (name, keys) in product(heads.items(), tuning.items())
        for size in sizes
    ]


def batch_points(quick: bool) -> list[Point]:
    """Against pairs in a micro-batch, and against pairs accumulated one by one."""
    sizes = (1, 2) if quick else (1, 2, 4, 8)
    tokens = 64 if quick else 512
    return [
        *(
            Point("batch", name, size, tokens=tokens, pairs=size, keys=keys)
            for name, keys in _by_layout().items()
            for size in sizes
        ),
        *(
            Point("batch", "accumulated", n, tokens=tokens, keys={"gradient_accumulation_steps": n})
            for n in sizes
        ),
    ]


def finetuning_points(quick: bool) -> list[Point]:
    """One point for each way to train, on the real model unless `quick`."""
    mixed, full = {"bf16": True}, {"finetuning_type": "full"}
    ways: dict[str, dict[str, Any]] = {
        "LoRA": mixed,
        "LoRA\ncontinued": mixed,
        "QLoRA\n4-bit": {**mixed, "quantization_bit": 4},
        "freeze\n2 layers": {**mixed, "finetuning_type": "freeze"},
        "full,\nsecond copy": {**mixed, **full},
        "full,\nref_cache": {**mixed, **full, "ref_cache": True},
        "full,\npure_bf16": {**full, "pure_bf16": True},
    }
    model, tokens = (32_000, 64) if quick else (REAL_MODEL, 512)
    return [
        Point("finetuning", "step", name, model, tokens, adapted="continued" in name, keys=keys)
        for name, keys in ways.items()
    ]


def _by_layout() -> dict[str, dict[str, Any]]:
    names = {False: "", True: ", checkpointing"}
    return {
        f"{layout}{names[saves]}": {"batch_layout": layout, "activation_checkpointing": saves}
        for layout, saves in product(LAYOUTS, (False, True))
    }


CURVES = {
    "length": length_points,
    "vocabulary": vocabulary_points,
    "batch": batch_points,
    "finetuning": finetuning_points,
}


def run(point: Point, scratch: Path) -> dict[str, Any]:
    """A point with what was measured, in a process of its own."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: sender.send(measure(point, scratch)))
    child.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        raise SystemExit(f"{point} failed") from None
    child.join()
    return {**asdict(point), **found}


def prepare_for_forks() -> None:
    """One thread, quiet libraries, and no search for garbage among what they hold."""
    set_num_threads(1)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    gc.collect()
    gc.freeze()


def measure_all(points: list[Point], scratch: Path) -> list[dict[str, Any]]:
    """The measured points of a curve; tells each as it comes."""
    rows = []
    for number, point in enumerate(points, 1):
        row = run(point, scratch)
        rows.append(row)
        sizes = ", ".join(f"{name} {row[name] / 1e6:,.0f}" for name in ("activations", "peak", "resident"))
        print(
            f"{point.curve} {number}/{len(points)}, {point.series} {' '.join(str(point.x).split())}: "
            f"{sizes} MB, {row['seconds']:.2f} s",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--curves", nargs="*", choices=CURVES, default=list(CURVES), help="none: draw only")
    parser.add_argument("--quick", action="store_true", help="a smaller grid, to try the script")
    parser.add_argument("--output", type=Path, help="folder of memory.json and the pictures")
    args = parser.parse_args()
    if args.quick and not args.output:
        parser.error("--quick needs --output, since its figures are not those of the docs")
    json_folder, picture_folder = [args.output] * 2 if args.output else FOLDERS
    for folder in (json_folder, picture_folder):
        folder.mkdir(parents=True, exist_ok=True)
    prepare_for_forks()
    file = json_folder / "memory.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for curve in args.curves:
            results[curve] = measure_all(CURVES[curve](args.quick), Path(scratch))
            file.write_text(json.dumps(results, indent=1) + "\n")
    for curve, rows in results.items():
        draw(curve, rows, picture_folder)
        print(f"\n{curve}\n{table(curve, rows)}")


if __name__ == "__main__":
    main()
