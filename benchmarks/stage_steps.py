"""CPU time of a micro-step of KTO and of a reward model in the layouts `shared` and `repeat`.

A micro-step is the forward of the policy and, for KTO, of the reference, and the backward, on 4 rows (2 of
long prompts) with LoRA on SmolLM2-135M-Instruct in fp32, built as `prefkit train` builds it; no update, no
reference cache. Rows are those of the shipped sets, and random ones with prompts of 500 tokens and responses
of 150. Seconds are CPU time of one thread, medians over `--repeats` rounds in turns.

    python benchmarks/stage_steps.py [--batches 3] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from micro_step import RESULTS, MicroStep, cpu_seconds, make_config, make_step, random_examples

SETS = {"kto": "kto_en_demo", "rm": "dpo_en_demo"}
LONG = 500  # tokens of a prompt


def make_steps(stage: str, is_long: bool, batches: int) -> dict[str, MicroStep]:
    """The same micro-batches in either layout."""
    steps = {}
    for layout in ("shared", "repeat"):
        keys = {"stage": stage, "dataset": SETS[stage], "batch_layout": layout, "cutoff_len": 1024}
        rows = 2 if is_long else 4
        examples = random_examples(rows, LONG, stage) if is_long else []
        with tempfile.TemporaryDirectory() as scratch:
            steps[layout] = make_step(make_config(keys, Path(scratch)), examples, rows, batches)
    return steps


def measure(steps: dict[str, MicroStep], repeats: int) -> dict[str, Any]:
    """Seconds of a micro-step, their ratio, and the tokens that one computes, padding included."""
    number = len(steps["shared"].batches)
    seconds = cpu_seconds(steps, repeats)
    tokens = {
        name: round(sum(batch["input_ids"].numel() for batch in step.batches) / number)
        for name, step in steps.items()
    }
    return {
        "seconds": {name: round(value / number, 3) for name, value in seconds.items()},
        "ratio": round(seconds["repeat"] / seconds["shared"], 3),
        "tokens": tokens,
    }


def main() -> None:
    """Measure all cases, print them and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "stage_steps.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for stage, name in SETS.items():
        for is_long in (False, True):
            case = f"{stage}, {f'prompts of {LONG}' if is_long else name}"
            results[case] = measure(make_steps(stage, is_long, args.batches), args.repeats)
            print(case, json.dumps(results[case]), flush=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
