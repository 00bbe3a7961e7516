"""One training step of prefkit, measured: the policy, reference and trainer of a run over random pairs."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
from peak import (
    PeakMemory,
    bytes_of,
    resident_bytes,
    resident_peak,
    restart_resident_peak,
    tensors_in_memory,
)
from tokenizers import Tokenizer, models
from torch import Tensor, randint
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from prefkit.config import load_config
from prefkit.config.schema import RunConfig
from prefkit.data.dataset import RunData
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair
from prefkit.data.lengths import WHOLE
from prefkit.data.view import RowView
from prefkit.model.adapter import add_lora, base_of
from prefkit.model.load import load_causal_lm
from prefkit.model.reference import FrozenModel
from prefkit.model.vision import load_template
from prefkit.train.arguments import make_training_arguments
from prefkit.train.dpo import DpoStage
from prefkit.train.out_of_memory import Pieces
from prefkit.train.policy import build_policy
from prefkit.train.references import ReferenceBuilder, fingerprints
from prefkit.train.signals import StopSignals
from prefkit.train.strategy import choose_strategy
from prefkit.train.trainer import PrefTrainer

# A Llama of moderate size; its vocabulary is that of the point.
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Point:
    """One measurement: `model` is a folder, or the vocabulary of a random Llama; `tokens` are those of a
    prompt with its chosen response, half of them the prompt's; `keys` are those of the YAML."""

    curve: str
    series: str
    x: int | str
    model: str | int = 32_000
    tokens: int = 512
    pairs: int = 1
    all_logits: bool = False
    adapted: bool = False  # training goes on from an adapter
    keys: dict[str, Any] = field(default_factory=dict)


class Watch(TrainerCallback):
    """Of three steps, the first makes the optimiser's state, the second shows resident set and time, and the
    third is recorded by the profiler, which needs memory of its own."""

    def __init__(self) -> None:
        self.memory = PeakMemory()
        self.resident = self.gradients = 0  # bytes; all gradients, as they are for the update
        self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            restart_resident_peak()
            self.seconds -= time.perf_counter()
        if state.global_step == 2:
            self.memory.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            self.memory.tag(gradients)
            self.gradients = bytes_of(gradients)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.seconds += time.perf_counter()
            self.resident = resident_peak()
        if state.global_step == 3:
            self.memory.__exit__(None, None, None)


def measure(point: Point, scratch: Path) -> dict[str, float]:
    """The parts that make up the peak of a step and the resident set, in bytes, and the time of a step."""
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
        "all_gradients": watch.gradients,
        "peak": weights + copy + state + memory.peak,
        "resident": watch.resident,
        "libraries": libraries,
        "seconds": round(watch.seconds, 3),
    }


def make_trainer(point: Point, scratch: Path) -> PrefTrainer:
    """The trainer of a run over random pairs, for three optimiser steps."""
    set_seed(0)
    config = make_config(point, scratch)
    args = make_training_arguments(config)
    template = load_template(config.model, config.data)
    tokenizer = template.tokenizer
    strategy = choose_strategy(args)
    policy = build_policy(config, args, template, lambda text: None, strategy)
    if point.all_logits:
        policy.base.forward = MethodType(all_logits_forward, policy.base)
    number = 3 * args.per_device_train_batch_size * args.gradient_accumulation_steps
    train = [make_pair(point.tokens, policy.base.config.vocab_size, i) for i in range(number)]
    rows = RowView([train], np.array([(0, row, WHOLE) for row in range(number)]))
    data = RunData(rows, rows[:0], [])
    hashes = fingerprints(config)
    reference = ReferenceBuilder(
        *(config, args, policy, tokenizer, data, hashes),
        say=lambda text: None,
        track=lambda items, title: items,
        strategy=strategy,
    ).build()
    stage = DpoStage(config.method, reference, policy.compute_dtype)
    pieces = Pieces(config, args, reference, print)
    trainer = PrefTrainer(
        *(policy.model, args, stage, config.tuning, policy.packer, data, tokenizer),
        pieces=pieces,
        signals=StopSignals(),
        strategy=strategy,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_pair(tokens: int, vocabulary: int, number: int) -> TokenizedExample:
    """Half of the tokens are the prompt's, half the chosen response's; the rejected one is 3/4 as long."""
    prompt, chosen, rejected = tokens // 2, tokens // 2, tokens * 3 // 8
    ids = randint(vocabulary, (prompt + chosen + rejected,)).tolist()
    responses = [ids[prompt : prompt + chosen], ids[prompt + chosen :]]
    return TokenizedExample(ids[:prompt], responses, (Pair(0, 1),), f"random:{number}")


def make_config(point: Point, scratch: Path) -> RunConfig:
    """The config of a run, as a YAML would give it."""
    model = str(point.model) if isinstance(point.model, str) else make_llama(point.model, scratch)
    given = {
        "model_name_or_path": model,
        "stage": "dpo",
        "do_train": True,
        "dataset": "random",
        "template": "default",
        "cutoff_len": point.tokens,
        "cache_dir": str(scratch),
        "output_dir": str(scratch / "out"),
        "per_device_train_batch_size": point.pairs,
        "max_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "ref_cache": False,
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
