"""A micro-step of a stage, built as `prefkit train` builds it, for other benchmarks to time."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import set_seed

from prefkit.config import load_config
from prefkit.config.schema import RunConfig
from prefkit.data.dataset import RunData, load_data
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair
from prefkit.model.adapter import base_of
from prefkit.model.padding import set_pad_token
from prefkit.model.reference import Reference
from prefkit.model.vision import load_template
from prefkit.train.arguments import make_training_arguments
from prefkit.train.build import build_stage
from prefkit.train.policy import build_policy
from prefkit.train.references import ReferenceBuilder, fingerprints
from prefkit.train.stages import Stage
from prefkit.train.strategy import choose_strategy

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass
class MicroStep:
    """Forward of policy and reference, loss and backward on each of `batches` in turn; no update."""

    model: nn.Module
    stage: Stage
    batches: list[dict[str, Any]]

    def __call__(self) -> None:
        """One round through the batches."""
        for batch in self.batches:
            self.model.zero_grad()
            self.stage.compute(self.model, batch).losses.mean().backward()


def make_config(keys: dict[str, Any], scratch: Path) -> RunConfig:
    """The config of a run in fp32 on the demo model, with these keys besides."""
    given = {
        "model_name_or_path": str(ROOT / "models" / "smollm2-135m-instruct"),
        "dtype": "float32",
        "do_train": True,
        "dataset_dir": str(ROOT / "data"),
        "cutoff_len": 1024,
        "ref_cache": False,
        "cache_dir": str(scratch),
        "output_dir": str(scratch / "out"),
        "report_to": "none",
        **keys,
    }
    file = scratch / "config.json"
    file.write_text(json.dumps(given))
    return load_config(file).config


def make_step(config: RunConfig, examples: Sequence[TokenizedExample], rows: int, batches: int) -> MicroStep:
    """Up to `batches` micro-batches of `rows` of the examples, or of the set that the config names."""
    args = make_training_arguments(config)
    set_seed(args.seed)
    template = load_template(config.model, config.data)
    tokenizer = template.tokenizer
    if config.method.stage == "rm":
        set_pad_token(tokenizer, template, config.model)
    if not examples:
        examples = load_data(config, template, args.seed, _say_nothing, lambda items, title: items).train
    strategy = choose_strategy(args)
    policy = build_policy(config, args, template, _say_nothing, strategy)
    reference: Reference | None = None
    if config.method.stage != "rm":
        data = RunData([], [], [])  # type: ignore[arg-type]
        builder = ReferenceBuilder(
            *(config, args, policy, tokenizer, data, fingerprints(config)),
            say=_say_nothing,
            track=lambda items, title: items,
            strategy=strategy,
        )
        reference = builder.build()
    policy.model.train()
    if args.activation_checkpointing:
        base_of(policy.model).activation_checkpointing_enable({"use_reentrant": False})
    packed = [
        policy.packer([examples[n] for n in range(start, start + rows)])
        for start in range(0, len(examples), rows)[:batches]
    ]
    return MicroStep(policy.model, build_stage(config, policy, reference, starts_here=False), packed)


def random_examples(number: int, prompt: int, stage: str) -> list[TokenizedExample]:
    """Rows of random token ids: a prompt of `prompt` tokens with two responses of 150."""
    draw = random.Random(0)

    def ids(many: int) -> list[int]:
        return [draw.randrange(1000, 40_000) for _ in range(many)]

    facts: dict[str, Any] = {"pairs": (Pair(0, 1),), "labels": ("chosen", "rejected")}
    if stage == "kto":
        facts = {"pairs": (), "labels": ("desirable", "partner")}
    return [
        TokenizedExample(ids(prompt), [ids(150), ids(150)], source=f"f:{n}", **facts) for n in range(number)
    ]


def cpu_seconds(ways: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """CPU seconds of each way, the median of several rounds taken in turns after one that warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, run in ways.items():
            started = time.process_time()
            run()
            found[name].append(time.process_time() - started)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def _say_nothing(text: str) -> None:
    pass
