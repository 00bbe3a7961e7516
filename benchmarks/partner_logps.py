"""Three ways to the log-probs of KTO's partners: time and memory of a micro-step of SmolLM2-135M-Instruct.

- `with gradient`: partners are second responses of their rows, and their gradient is thrown away.
- `own forward`: without gradient, in a batch of their own with their prompts.
- `read on`: without gradient, from keys and values of the prompts that the judged responses leave.

prefkit (`judged_logps`) does the last in the layout `shared`, and the second in `repeat`. Rows are random
token ids, with responses of 150; the reference reads response and partner in one row. Seconds are CPU time of
one thread, medians over `--repeats` rounds in turns; MB are what torch's allocator had given out at most
beyond what was there before.

    python benchmarks/partner_logps.py [--rows 1] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from micro_step import RESULTS, MicroStep, cpu_seconds, make_config, make_step, random_examples
from peak import PeakMemory
from torch import Tensor, nn

from prefkit.data.picking import pick
from prefkit.model.partners import judged_logps
from prefkit.model.policy import LogpsOf, response_logps
from prefkit.objectives.logps import ResponseLogps, sum_by_response

PROMPTS = (50, 500)


def own_forward(model: nn.Module, batch: dict[str, Any]) -> ResponseLogps:
    """Judged responses and partners, every other one, in a batch each with their prompts."""
    numbers = range(batch["num_responses"])
    parts: dict[int, Tensor] = {}
    for which, has_gradient in ((numbers[::2], True), (numbers[1::2], False)):
        with torch.set_grad_enabled(has_gradient):
            found = response_logps(model, pick(batch, which))
        lengths = [batch["response_lengths"][number] for number in which]
        parts |= zip(which, found.token_logps.split(lengths), strict=True)
    return sum_by_response(torch.cat([parts[n] for n in numbers]), batch["owner"], len(numbers))


WAYS: dict[str, dict[str, LogpsOf]] = {
    "shared": {"with gradient": response_logps, "own forward": own_forward, "read on": judged_logps},
    "repeat": {"with gradient": response_logps, "own forward": judged_logps},
}
# Layout, what is trained, whether activations are checkpointed, tokens of the prompts.
CASES = [*product(["shared"], ["lora", "full"], [False, True], PROMPTS),
         *product(["repeat"], ["lora"], [False, True], PROMPTS)]  # fmt: skip


def measure(step: MicroStep, ways: dict[str, LogpsOf], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds, of each way and relative to the first, and MB."""
    stage: Any = step.stage

    def run(logps: LogpsOf) -> None:
        stage.policy_logps = logps
        step()

    seconds = cpu_seconds({name: lambda logps=logps: run(logps) for name, logps in ways.items()}, repeats)
    peaks = {}
    for name, logps in ways.items():
        step.model.zero_grad()
        with PeakMemory() as memory:
            run(logps)
        peaks[name] = memory.peak
    plain = seconds["with gradient"]
    return {
        name: {
            "seconds": round(seconds[name], 2),
            "ratio": round(seconds[name] / plain, 3),
            "megabytes": round(peaks[name] / 1e6),
        }
        for name in ways
    }


def main() -> None:
    """Measure all cases, print them and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "partner_logps.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for layout, tuning, checkpointing, prompt in CASES:
        keys = {
            "stage": "kto", "dataset": "kto_en_demo", "finetuning_type": tuning, "batch_layout": layout,
            "disable_gradient_checkpointing": not checkpointing,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            examples = random_examples(args.rows, prompt, "kto")
            step = make_step(make_config(keys, Path(scratch)), examples, args.rows, batches=1)
        name = f"{layout}, {tuning}, {'checkpointing, ' if checkpointing else ''}prompts of {prompt}"
        results[name] = measure(step, WAYS[layout], args.repeats)
        print(name, json.dumps(results[name]), flush=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
