"""Peak memory of a training step against length, vocabulary, batch and finetuning type.

A point is a process of its own that builds policy, reference and trainer as `prefkit train` does, from random
token ids, and measures the second optimiser step: forward of policy and reference, backward, update. Figures
of tensors are counted exactly, operation by operation (`peak.py`); `resident` is what the system saw, with
libraries. docs/performance.md explains the curves.

    python benchmarks/memory.py [--curves length vocabulary batch finetuning] [--quick] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from types import MethodType
from typing import Any

from peak import (
    PeakMemory,
    bytes_of,
    resident_bytes,
    resident_peak,
    restart_resident_peak,
    tensors_in_memory,
)
from tokenizers import Tokenizer, models
from torch import Tensor, randint, set_num_threads
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging

from prefkit.config import load_config
from prefkit.config.schema import RunConfig
from prefkit.data.dataset import Pairs
from prefkit.data.encode import TokenizedExample
from prefkit.model.adapter import add_lora, base_of
from prefkit.model.load import load_causal_lm, load_tokenizer
from prefkit.model.reference import FrozenModel
from prefkit.train.arguments import make_training_arguments
from prefkit.train.policy import build_policy
from prefkit.train.references import ReferenceBuilder, fingerprints
from prefkit.train.stages import DpoStage
from prefkit.train.trainer import PrefTrainer

REAL_MODEL = "models/smollm2-135m-instruct"
VOCABULARY = 32_000
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
LAYOUTS = ("shared", "repeat")
FORK = multiprocessing.get_context("fork")  # the libraries are imported once for all points


@dataclass(frozen=True)
class Point:
    """One measurement: `model` is a folder, or the vocabulary of a random Llama; `tokens` are those of a
    prompt with its chosen response, half of them the prompt's; `keys` are those of the YAML."""

    curve: str
    series: str
    x: int | str
    model: str | int = VOCABULARY
    tokens: int = 512
    pairs: int = 1
    all_logits: bool = False
    adapted: bool = False  # training goes on from an adapter
    keys: dict[str, Any] = field(default_factory=dict)


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
        "full,\nsecond copy": {**mixed, **full, "ref_cache": False},
        "full,\nref_cache": {**mixed, **full, "ref_cache": True},
        "full,\npure_bf16": {**full, "pure_bf16": True, "ref_cache": False},
    }
    model, tokens = (VOCABULARY, 64) if quick else (REAL_MODEL, 512)
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


class Watch(TrainerCallback):
    """Of three steps, the first makes the optimiser's state, the second shows the resident set and the third
    is recorded by the profiler, which needs memory of its own."""

    def __init__(self) -> None:
        self.memory = PeakMemory()
        self.resident = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            restart_resident_peak()
        if state.global_step == 2:
            self.memory.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.memory.tag(p.grad for p in model.parameters() if p.grad is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.resident = resident_peak()
        if state.global_step == 3:
            self.memory.__exit__(None, None, None)


def measure(point: Point, scratch: Path) -> dict[str, int]:
    """Bytes: the parts that make up the peak of a step, and the resident set."""
    libraries = resident_bytes()
    trainer = make_trainer(point, scratch)
    reference, base = trainer.stage.reference, base_of(trainer.model)
    copy = bytes_of(reference.model.parameters()) if isinstance(reference, FrozenModel) else 0
    weights = bytes_of(tensors_in_memory()) - copy
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    memory = watch.memory
    state = bytes_of(tensor for values in trainer.optimizer.state.values() for tensor in values.values())
    rows = [base.get_input_embeddings().weight, base.get_output_embeddings().weight]
    return {
        "weights": weights,
        "embedding_and_head": bytes_of(rows),
        "second_copy": copy,
        "optimiser": state,
        "gradients": memory.tagged,
        "activations": memory.peak - memory.tagged,
        "peak": weights + copy + state + memory.peak,
        "resident": watch.resident,
        "libraries": libraries,
    }


def make_trainer(point: Point, scratch: Path) -> PrefTrainer:
    """The trainer of a run over random pairs, for three optimiser steps."""
    set_seed(0)
    config = make_config(point, scratch)
    args = make_training_arguments(config)
    tokenizer = load_tokenizer(config.model)
    policy = build_policy(config, args, tokenizer, lambda text: None)
    if point.all_logits:
        policy.base.forward = MethodType(all_logits_forward, policy.base)
    number = 3 * args.per_device_train_batch_size * args.gradient_accumulation_steps
    train = [make_pair(point.tokens, policy.base.config.vocab_size, i) for i in range(number)]
    hashes = fingerprints(config)
    reference = ReferenceBuilder(
        *(config, args, policy, tokenizer, Pairs(train, [], [], []), hashes),
        say=lambda text: None,
        track=lambda items, title: items,
    ).build()
    stage = DpoStage(config.method, reference, policy.compute_dtype)
    trainer = PrefTrainer(policy.model, args, stage, config.tuning, policy.layout, train, [], tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_pair(tokens: int, vocabulary: int, number: int) -> TokenizedExample:
    """Half of the tokens are the prompt's, half the chosen response's; the rejected one is 3/4 as long."""
    prompt, chosen, rejected = tokens // 2, tokens // 2, tokens * 3 // 8
    ids = randint(vocabulary, (prompt + chosen + rejected,)).tolist()
    responses = [ids[prompt : prompt + chosen], ids[prompt + chosen :]]
    return TokenizedExample(ids[:prompt], responses, [(0, 1)], f"random:{number}")


def make_config(point: Point, scratch: Path) -> RunConfig:
    """The config of a run, as a YAML would give it."""
    model = str(point.model) if isinstance(point.model, str) else make_llama(point.model, scratch)
    given = {
        "model_name_or_path": model,
        "stage": "dpo",
        "do_train": True,
        "dataset": "random",
        "cutoff_len": point.tokens,
        "cache_dir": str(scratch),
        "output_dir": str(scratch / "out"),
        "per_device_train_batch_size": point.pairs,
        "max_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        **point.keys,
    }
    file = scratch / "config.json"
    file.write_text(json.dumps(given))
    config = load_config(file).config
    if not point.adapted:
        return config
    add_lora(load_causal_lm(config.model), config.tuning).save_pretrained(str(scratch / "adapter"))
    file.write_text(json.dumps(given | {"adapter_name_or_path": str(scratch / "adapter")}))
    return load_config(file).config


def make_llama(vocabulary: int, scratch: Path) -> str:
    """The folder of a random Llama in fp32, its head apart from its embedding, made if it is not there."""
    folder = scratch / f"llama-{vocabulary}"
    if not folder.exists():
        config = LlamaConfig(**MODEL, vocab_size=vocabulary, tie_word_embeddings=False)
        LlamaForCausalLM(config).save_pretrained(folder)
        words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<unk>").save_pretrained(folder)
    return str(folder)


def all_logits_forward(
    self: Any, source: Tensor, target: Tensor, segments: None = None, **batch: Any
) -> dict[str, Tensor]:
    """What prefkit's forward returns, the plain way: the logits of every position and their log_softmax."""
    logits = type(self).forward(self, **batch, use_cache=False).logits.float()
    labels = batch["input_ids"][:, 1:, None]
    token_logps = logits[:, :-1].log_softmax(-1).gather(2, labels)[..., 0]
    return {"token_logps": F.pad(token_logps, (0, 1)).flatten()[source]}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--curves", nargs="*", choices=CURVES, default=list(CURVES))
    parser.add_argument("--quick", action="store_true", help="a smaller grid, to try the script")
    parser.add_argument("--output", type=Path, help="folder of memory.json and the pictures")
    args = parser.parse_args()
    prepare_for_forks()
    results: dict[str, list[dict[str, Any]]] = {}
    points = [point for curve in args.curves for point in CURVES[curve](args.quick)]
    with tempfile.TemporaryDirectory() as scratch:
        for number, point in enumerate(points, 1):
            start = time.perf_counter()
            row = run(point, Path(scratch))
            results.setdefault(point.curve, []).append(row)
            print(
                f"{number}/{len(points)} {point.curve} {' '.join(point.series.split())} {point.x!r}: "
                f"peak {row['peak'] / 1e6:,.0f} MB, activations {row['activations'] / 1e6:,.0f} MB, "
                f"resident {row['resident'] / 1e6:,.0f} MB ({time.perf_counter() - start:.1f} s)",
                flush=True,
            )
    (args.output / "memory.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
