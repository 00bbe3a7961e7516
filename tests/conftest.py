"""Tiny random models and a byte-level tokenizer, made here: no test needs the network."""

from __future__ import annotations

import gc
import itertools
import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# Kernels may sum in another order with other threads, and two busy threads are slower than one.
import torch

torch.set_num_threads(1)

from jinja2 import Environment  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 264,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte; control tokens first, ids 0 to 6."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[
            token for token in SPECIAL if token not in ("<|im_end|>", "<|endoftext|>")
        ],
    )
    fast.chat_template = CHATML
    return fast


def make_model(model_type: str = "llama", **changes: Any) -> Any:
    """A random two-layer model in fp32, the same for the same arguments."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_rows(number: int) -> list[dict[str, Any]]:
    """Alpaca pairs of unequal length."""
    return [
        {
            "instruction": f"Say {i} {'please ' * (i % 3)}",
            "input": "",
            "chosen": f"{i} is {'very ' * (i % 4)}good",
            "rejected": f"{'no ' * (i % 5)}{i}",
        }
        for i in range(number)
    ]


def make_judged_rows(number: int) -> list[dict[str, Any]]:
    """Alpaca rows with one judged answer, some prompts twice."""
    rows = make_rows(number)
    return [
        {
            "instruction": rows[i - i % 6 // 5]["instruction"],
            "output": row["rejected" if i % 3 == 1 else "chosen"],
            "kto_tag": i % 3 != 1,
        }
        for i, row in enumerate(rows)
    ]


@pytest.fixture
def dataset_dir(tmp_path: Path) -> Path:
    """A folder with `pairs`, 12 alpaca rows, and `held_out`, 4 more; likewise `judged`, `judged_held_out`."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = make_rows(16)
    (folder / "pairs.json").write_text(json.dumps(rows[:12]))
    (folder / "held_out.json").write_text(json.dumps(rows[12:]))
    judged = make_judged_rows(16)
    (folder / "judged.json").write_text(json.dumps(judged[:12]))
    (folder / "judged_held_out.json").write_text(json.dumps(judged[12:]))
    info: dict[str, Any] = {
        name: {"file_name": f"{name}.json", "ranking": True} for name in ("pairs", "held_out")
    }
    info |= {name: {"file_name": f"{name}.json"} for name in ("judged", "judged_held_out")}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def write_config(tmp_path: Path, tiny_model: Path, dataset_dir: Path) -> Callable[..., Path]:
    """Writes a YAML that trains the tiny model for two steps; arguments are keys to set besides."""

    def write(**changes: Any) -> Path:
        config = {
            "model_name_or_path": str(tiny_model),
            "stage": "dpo",
            "do_train": True,
            "dataset": "pairs",
            "dataset_dir": str(dataset_dir),
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "cutoff_len": 128,
            **changes,
        }
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        return file

    return write


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the reference log-probs of another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="session")
def compile_each_template_once() -> Iterator[None]:
    """peft compiles that of its model cards at each save."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "compile", cache(Environment.compile))
        yield


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    freeze()


_FINISHED = itertools.count(1)


def pytest_runtest_logfinish() -> None:
    """Tests import more: freeze whenever their number has doubled, and at each 256th."""
    number = next(_FINISHED)
    if number & (number - 1) == 0 or number % 256 == 0:
        freeze()


def freeze() -> None:
    """Take what is there for good out of the collector's way: it would walk all of torch again and again."""
    gc.collect()
    gc.freeze()
