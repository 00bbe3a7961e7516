"""Try `rollout_engine: vllm` against our own drawing, on the demo model and 16 prompts.

Compares greedy tokens with `generate`, before and after the trained weights are changed, looks
whether the same seed gives the same samples, and times both engines. Run it from the repository, in an
environment with vllm (docs/architecture.md, Rollouts):

    python -m tools.try_vllm PROMPTS.json [--finetuning lora] [--dtype float32] [--tokens 64]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer

from prefkit.config.load import load_config
from prefkit.config.schema import RunConfig
from prefkit.model.attention import plain_attention
from prefkit.model.generate import GREEDY
from prefkit.model.rollout import Sampled, Stream, sample_responses
from prefkit.model.vision import load_template
from prefkit.train.arguments import make_training_arguments
from prefkit.train.policy import Policy, build_policy
from prefkit.train.strategy import choose_strategy
from prefkit.train.vllm_engine import VllmEngine, open_vllm_engine

MODEL, PROMPTS = "models/smollm2-135m-instruct", 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", type=Path, help="JSON list of rows with an `instruction`")
    parser.add_argument("--finetuning", default="lora", choices=("lora", "full", "freeze"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", default=64, type=int)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["instruction"]}], add_generation_prompt=True, return_dict=False
        )
        for row in json.loads(options.prompts.read_text(encoding="utf-8"))[:PROMPTS]
    ]
    with TemporaryDirectory() as folder:
        config = _make_config(Path(folder), options)
        args = make_training_arguments(config)
        template = load_template(config.model, config.data)
        policy = build_policy(config, args, template, print, choose_strategy(args))
        start = time.perf_counter()
        engine = open_vllm_engine(config, policy, print)
        print(f"opened in {time.perf_counter() - start:.1f} s")
        try:
            _compare(engine, policy, config, prompts, [tokenizer.eos_token_id])
        finally:
            engine.close()


def _make_config(folder: Path, options: argparse.Namespace) -> RunConfig:
    lines = {
        "model_name_or_path": MODEL,
        "stage": "ppo",
        "do_train": True,
        "finetuning_type": options.finetuning,
        "rollout_engine": "vllm",
        "reward_function": "none.py:none",
        "dataset": "none",
        "output_dir": str(folder),
        "dtype": options.dtype,
        "pure_bf16": options.dtype == "bfloat16",
        "cutoff_len": 512,
        "max_new_tokens": options.tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
    }
    if options.finetuning == "lora":
        lines |= {"lora_target": "all", "lora_rank": 12, "use_rslora": True}
    (folder / "run.yaml").write_text(json.dumps(lines), encoding="utf-8")
    return load_config(folder / "run.yaml").config


def _compare(
    engine: VllmEngine, policy: Policy, config: RunConfig, prompts: list[list[int]], stops: list[int]
) -> None:
    def draw(num_responses: int, seed: int = 0, which: slice = slice(None), **changes: Any) -> list[Sampled]:
        return engine.draw(
            prompts[which],
            numbers=list(range(len(prompts)))[which],
            num_responses=num_responses,
            generation=replace(config.generation, **changes),
            stop_ids=stops,
            stream=Stream(42, seed),
        )

    tokens = config.generation.max_new_tokens
    before = _greedy(draw)
    print(f"greedy as generate, first weights: {_agree(before, _generated(policy, prompts, tokens, stops))}")
    _change(policy)
    after = _greedy(draw)
    print(f"greedy as generate, changed weights: {_agree(after, _generated(policy, prompts, tokens, stops))}")
    print(f"greedy as before the change: {_agree(after, before)}")
    sampled = draw(4)
    print(f"sampled again alike: {_agree(_rows(sampled), _rows(draw(4)))}")
    print(f"sampled in batches of 4 alike: {_agree(_rows(sampled), _batched(draw))}")
    print(f"sampled in another rollout alike: {_agree(_rows(sampled), _rows(draw(4, seed=1)))}")
    print(f"ended: {sum(sum(it.ended) for it in sampled)} of {4 * len(prompts)}")
    for num_responses in (1, 4):
        for name, run in (("vllm", draw), ("own", partial(_own, policy, config, prompts, stops))):
            speeds = [f"{_speed(run, num_responses):.0f}" for _ in range(3)]
            print(f"{len(prompts)} x {num_responses}, {name}: {', '.join(speeds)} tokens/s")


def _greedy(draw: Callable[..., list[Sampled]]) -> list[list[int]]:
    return _rows(draw(1, do_sample=False))


def _batched(draw: Callable[..., list[Sampled]]) -> list[list[int]]:
    return [row for i in range(0, PROMPTS, 4) for row in _rows(draw(4, which=slice(i, i + 4)))]


def _rows(sampled: list[Sampled]) -> list[list[int]]:
    return [ids for it in sampled for ids in it.response_ids]


def _agree(rows: list[list[int]], others: list[list[int]]) -> str:
    same = sum(row == other for row, other in zip(rows, others, strict=True))
    return f"{same} of {len(rows)}"


def _generated(policy: Policy, prompts: list[list[int]], tokens: int, stops: list[int]) -> list[list[int]]:
    """What `generate` gives, up to the first of the tokens `stops`."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model: Any = policy.model.eval()
    keys = {"max_new_tokens": tokens, "eos_token_id": stops, "pad_token_id": 0, **GREEDY}
    with torch.no_grad(), plain_attention(policy.base):
        rows = model.generate(input_ids=ids, attention_mask=mask, **keys)[:, longest:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), tokens) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def _change(policy: Policy) -> None:
    """Move what is trained far enough for other answers."""
    torch.manual_seed(0)
    for name, weights in policy.model.named_parameters():
        if weights.requires_grad and "value_head" not in name:
            scale = 0.02 if "lora" in name else 0.05 * float(weights.float().std())
            weights.data += scale * torch.randn_like(weights)


def _own(
    policy: Policy, config: RunConfig, prompts: list[list[int]], stops: list[int], num_responses: int
) -> list[Sampled]:
    return sample_responses(
        policy.model,
        prompts,
        numbers=range(len(prompts)),
        num_responses=num_responses,
        generation=config.generation,
        stop_ids=stops,
        stream=Stream(42, 0),
    )


def _speed(run: Callable[[int], list[Sampled]], num_responses: int) -> float:
    start = time.perf_counter()
    drawn = sum(map(len, _rows(run(num_responses))))
    return drawn / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
