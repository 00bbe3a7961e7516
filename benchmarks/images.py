"""A DPO step over pictures, each seen once for both responses (`shared`) or once for each (`repeat`).

A random Qwen3-VL of middling size in fp32: 8 layers of width 512 behind 8 layers of width 384 that read
images, with LoRA or all weights trained. Each example has one picture, a short question and two responses of
about 60 tokens. Both layouts compute the same losses, which is checked here. CPU seconds are medians of
rounds in turns; memory is what torch's allocator gave out at most during a step, beyond what was there
before.

    python benchmarks/images.py [--sides 112 224 448] [--rounds 5] [--output benchmarks/results/images.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from PIL import Image

from benchmarks.micro_step import RESULTS, MicroStep, cpu_seconds, make_config, make_step
from benchmarks.peak import PeakMemory
from tests.seeing import save_seeing_model

TEXT = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    },
    "initializer_range": 0.02,
}
VISION = {
    "depth": 8,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_heads": 6,
    "patch_size": 14,
    "out_hidden_size": 512,
    "num_position_embeddings": 1024,
    "deepstack_visual_indexes": [2, 4],
}
TRAINED = {
    "LoRA, image reader frozen": {},
    "full, image reader trained": {"finetuning_type": "full", "freeze_vision_tower": False,
                                   "freeze_multi_modal_projector": False},
}  # fmt: skip


def write_rows(folder: Path, side: int, number: int) -> None:
    """Pairs, each about a picture of `side` x `side` pixels."""
    rows = []
    for i in range(number):
        torch.manual_seed(i)
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((side, side)).save(folder / f"{i}.png")
        rows.append({
            "conversations": [{"from": "human", "value": "<image>What is in this picture?"}],
            "chosen": {"from": "gpt", "value": f"Coloured squares, eight by eight, without any order, {i}."},
            "rejected": {"from": "gpt", "value": f"A cat that sleeps on a red chair beside a window, {i}."},
            "images": [f"{i}.png"],
        })  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(rows))
    entry = {"file_name": "rows.json", "ranking": True, "formatting": "sharegpt"}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": entry}))


def make_model(folder: Path) -> Path:
    """The random model, whose processor cuts pictures into patches of 14 x 14."""
    save_seeing_model(folder, "qwen3_vl", TEXT, VISION)
    file = folder / "preprocessor_config.json"
    facts = json.loads(file.read_text())
    limits = {"shortest_edge": 784, "longest_edge": 2**24}
    file.write_text(json.dumps(facts | {"patch_size": 14, "size": limits}))
    return folder


def compare(model: Path, side: int, keys: dict[str, Any], rounds: int) -> dict[str, Any]:
    """CPU seconds and peak MB of a step in either layout, and their ratios."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_rows(scratch, side, 2)
        steps: dict[str, MicroStep] = {}
        for layout in ("shared", "repeat"):
            config = make_config(
                {
                    **{"model_name_or_path": str(model), "stage": "dpo", "dataset": "rows"},
                    **{"dataset_dir": str(scratch), "batch_layout": layout, "template": "qwen3_vl_nothink"},
                    **keys,
                },
                scratch,
            )
            steps[layout] = make_step(config, (), rows=2, batches=1)
        seconds = cpu_seconds(steps, rounds)
        peaks, losses = {}, {}
        for layout, step in steps.items():
            step.model.zero_grad()
            with PeakMemory() as memory:
                step()
            peaks[layout] = memory.peak / 1e6
            losses[layout] = step.stage.compute(step.model, step.batches[0]).losses.detach()
        tokens = int((steps["shared"].batches[0]["input_ids"] == _image_token(steps["shared"])).sum()) // 2
    torch.testing.assert_close(losses["shared"], losses["repeat"], atol=1e-4, rtol=1e-4)
    return {
        "side": side,
        "image_tokens": tokens,
        "cpu_seconds": seconds,
        "peak_mb": peaks,
        "times_as_long": seconds["repeat"] / seconds["shared"],
        "times_as_much": peaks["repeat"] / peaks["shared"],
    }


def _image_token(step: MicroStep) -> int:
    return int(step.model.config.image_token_id)  # type: ignore[union-attr, arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sides", nargs="*", type=int, default=[112, 224, 448])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "images.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        for name, keys in TRAINED.items():
            for side in options.sides:
                row = {"trained": name, **compare(model, side, keys, options.rounds)}
                found.append(row)
                print(
                    f"{name}, {side} x {side} ({row['image_tokens']} tokens): repeat takes "
                    f"{row['times_as_long']:.2f} x the time and {row['times_as_much']:.2f} x the memory "
                    f"({row['peak_mb']['shared']:.0f} -> {row['peak_mb']['repeat']:.0f} MB)",
                    flush=True,
                )
    options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
