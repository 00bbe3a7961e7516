"""Tokens per second of a rollout, against transformers' `generate` on the same prompts.

16 prompts and exactly 64 tokens a response, drawn with prefkit's default keys; prompts as they are in the
data set, or 500 tokens of its text; the model alone, or with a LoRA adapter in fp32. The three ways take
turns. Before each turn the script waits until the machine is idle, and it notes which share of the processors
others took meanwhile: `others`. The figure is the median of the turns, of the calm ones if there are enough.

    python benchmarks/rollout.py [--model DIR] [--data FILE] [--repeats 5] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import GenerationConfig as GenerateConfig

from prefkit.config.schema import GenerationConfig
from prefkit.model.adapter import linear_names
from prefkit.model.rollout import Stream, sample_responses

ROOT = Path(__file__).parents[1]
PROMPTS, TOKENS, LONG = 16, 64, 500
# Responses to a prompt, whether prompts are long, whether there is an adapter.
CASES = ((4, False, False), (1, False, False), (4, True, False), (4, False, True))
CALM = 0.05  # share of the processors


@dataclass
class Measured:
    """Turns of one way in one case: tokens per second, and what others took of the processors."""

    dtype: str
    responses: int
    prompt_tokens: list[int]
    adapter: bool
    way: str
    rates: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The median of the calm turns, or of all where fewer than three were calm."""
        calm = [rate for rate, share in zip(self.rates, self.others, strict=True) if share < CALM]
        return statistics.median(calm if len(calm) >= 3 else self.rates)


def read_prompts(tokenizer: Any, data: str, long: bool) -> list[list[int]]:
    """Token ids of the first prompts, or of as many stretches of the set's text."""
    rows = json.loads(Path(data).read_text())
    if long:
        text = tokenizer(
            "\n\n".join(row["instruction"] + "\n" + row["output"] for row in rows[:300])
        ).input_ids
        return [text[i * LONG : (i + 1) * LONG] for i in range(PROMPTS)]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "\n".join(filter(None, (row["instruction"], row["input"])))}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for row in rows[:PROMPTS]
    ]


def with_generate(model: Any, prompts: list[list[int]], responses: int, cache: str) -> None:
    """One rollout by transformers."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    keys = GenerationConfig()
    config = GenerateConfig(
        max_new_tokens=TOKENS,
        do_sample=True,
        temperature=keys.temperature,
        top_p=keys.top_p,
        top_k=keys.top_k,
        num_return_sequences=responses,
        cache_implementation=cache,
        pad_token_id=0,
    )
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    assert output.shape == (len(prompts) * responses, length + TOKENS)


def with_prefkit(model: Any, prompts: list[list[int]], responses: int) -> None:
    """One rollout by prefkit."""
    found = sample_responses(
        model,
        prompts,
        numbers=range(len(prompts)),
        num_responses=responses,
        generation=GenerationConfig(max_new_tokens=TOKENS),
        stop_ids=[],
        stream=Stream(seed=0, rollout=0),
    )
    assert all(len(ids) == TOKENS for sampled in found for ids in sampled.response_ids)


def processor_seconds() -> tuple[float, float]:
    """Seconds that all processors of the machine were busy since it started, and those of this process."""
    ticks = [int(it) for it in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    own = os.times()
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), own.user + own.system


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds of a run, and the share of all processors that others took meanwhile."""
    (busy, own), start = processor_seconds(), time.perf_counter()
    run()
    (busy_after, own_after), seconds = processor_seconds(), time.perf_counter() - start
    others = (busy_after - busy) - (own_after - own)
    return seconds, max(0.0, others / (seconds * (os.cpu_count() or 1)))


def wait_until_calm(patience: float) -> None:
    """Return once others have let the machine be for two seconds, or at the end of one's patience."""
    deadline = time.monotonic() + patience
    while timed(lambda: time.sleep(2))[1] > CALM and time.monotonic() < deadline:
        time.sleep(3)


def load(args: argparse.Namespace, dtype: str, adapter: bool) -> Any:
    """The model, if asked for with an adapter on all of its linear layers that is not zero."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype))
    if adapter:
        torch.manual_seed(0)
        lora = LoraConfig(r=8, target_modules=sorted(linear_names(model)), init_lora_weights=False)
        model = get_peft_model(model, lora)
    return model.eval()


def measure(
    args: argparse.Namespace, dtype: str, responses: int, long: bool, adapter: bool
) -> list[Measured]:
    """All ways in one case."""
    model = load(args, dtype, adapter)
    prompts = read_prompts(AutoTokenizer.from_pretrained(args.model), args.data, long)
    ways: dict[str, Callable[[], None]] = {
        "generate, dynamic cache": lambda: with_generate(model, prompts, responses, "dynamic"),
        "generate, static cache": lambda: with_generate(model, prompts, responses, "static"),
        "prefkit": lambda: with_prefkit(model, prompts, responses),
    }
    lengths = [len(prompt) for prompt in prompts]
    found = {way: Measured(dtype, responses, lengths, adapter, way) for way in ways}
    for _ in range(args.repeats):
        for way, run in ways.items():
            wait_until_calm(args.patience)
            seconds, others = timed(run)
            rate = len(prompts) * responses * TOKENS / seconds
            found[way].rates.append(round(rate, 1))
            found[way].others.append(round(others, 3))
            print(
                f"{dtype} {responses} {long} {adapter} {way}: {rate:.0f} tokens/s, others {others:.0%}",
                flush=True,
            )
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"))
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data" / "alpaca_en_demo.json"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--patience", type=float, default=300, help="seconds to wait for an idle machine")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "rollout.json"))
    args = parser.parse_args()
    results = [each for dtype, case in product(args.dtypes, CASES) for each in measure(args, dtype, *case)]
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    told = {"machine": machine, "torch": torch.__version__, "tokens": TOKENS}
    rows = [{**asdict(result), "rate": result.rate} for result in results]
    Path(args.output).write_text(json.dumps({**told, "results": rows}, indent=1) + "\n")
    for plain, static, ours in zip(results[::3], results[1::3], results[2::3], strict=True):
        ratio = ours.rate / max(plain.rate, static.rate)
        case = f"{PROMPTS} x {ours.responses}, prompts of {statistics.mean(ours.prompt_tokens):.0f}"
        case += ", adapter" if ours.adapter else ""
        rates = f"generate {plain.rate:.0f} / {static.rate:.0f}, prefkit {ours.rate:.0f} tokens/s"
        print(f"{ours.dtype:9} {case}: {rates}, {ratio:.2f} x")


if __name__ == "__main__":
    main()
