"""Bytes that each of two processes sends and holds in a step, against the formulas of docs/scaling.md.

Two gloo processes train random Llamas of width 512 in bf16 by DPO, with LoRA and in full with a second model
as reference, two micro-steps a step. What they send is what they hand to torch's collectives; what they hold
is their tensors between two steps, and resident memory then and at its peak, of the larger model less the
smaller: what does not grow with the model cancels.
FSDP2 runs on a CPU by the patch of tests/train/engines.py, so that the script wants the folder it lies in.

    python benchmarks/scaling_check.py [--engines ddp zero3] [--checkpointing] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from scaling_formulas import ENGINES, Run, Shape  # noqa: E402
from scaling_probe import watch  # noqa: E402

from tests.conftest import make_model, make_tokenizer  # noqa: E402
from tests.train.engines import KEYS, use_fsdp_on_cpu, zero  # noqa: E402
from tests.train.forks import Fork, two_ranks  # noqa: E402

RANKS, MICRO_STEPS = 2, 2
VOCABULARY, WIDTH, LORA_RANK = 264, 512, 64
PATIENCE = 300.0  # seconds for a run
# ZeRO-3 keeps weights that come up again soon, which in a model so small are all.
_FORGETFUL = {
    "stage3_max_live_parameters": 100000,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 100000,
}
ENGINE_KEYS = KEYS | {"zero3": {"deepspeed": zero(3, **_FORGETFUL)}}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"finetuning_type": "lora", "lora_rank": LORA_RANK, "lora_target": "all"},
    "full": {"finetuning_type": "full"},
}


def shape_of(layers: int) -> Shape:
    """The model of so many layers."""
    return Shape(layers, WIDTH, 1408, 8, 2, VOCABULARY, 64)


def make_files(folder: Path, layers: int) -> None:
    """The model, and pairs that are all equally long."""
    shape = shape_of(layers)
    model = make_model(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        initializer_range=0.02,
    )  # fmt: skip
    assert sum(it.numel() for it in model.parameters()) == shape.weights
    model.bfloat16().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": f"Say {i}", "chosen": f"{i} is", "rejected": f"No {i}"} for i in range(10, 34)]
    (folder / "pairs.json").write_text(json.dumps(rows))
    info = {"pairs": {"file_name": "pairs.json", "ranking": True}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def measure(engine: str, kind: str, folder: Path, checkpointing: bool) -> dict[str, Any]:
    """What the first process sends and holds in its last step. Leaves the program where one fails."""
    name = f"{kind}-{engine}"
    config = {
        "model_name_or_path": str(folder / "model"), "stage": "dpo", "do_train": True, "dataset": "pairs",
        "dataset_dir": str(folder), "output_dir": str(folder / name), "bf16": True, "use_cpu": True,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": MICRO_STEPS, "max_steps": 3,
        "logging_steps": 1, "cutoff_len": 128, "save_strategy": "no", "ref_cache": False,
        "activation_checkpointing": checkpointing, **ENGINE_KEYS[engine], **KINDS[kind],
    }  # fmt: skip
    file = folder / f"{name}.json"
    file.write_text(json.dumps(config))

    def watched(rank: int, command: Callable[[], None]) -> Callable[[], None]:
        def work() -> None:
            warnings.simplefilter("ignore")
            if engine == "fsdp":
                use_fsdp_on_cpu()
            watch(folder / f"{name}-{rank}.json")
            command()

        return work

    ranks = [
        Fork(folder / f"{name}-{rank}.txt", watched(rank, given["work"]))
        for rank, given in enumerate(two_ranks("train", file))
    ]
    codes = [it.kill_after(PATIENCE) for it in ranks]
    if codes != [0, 0]:
        raise SystemExit(f"{name} ended with {codes}:\n{ranks[0].printed()[-3000:]}")
    last: dict[str, Any] = json.loads((folder / f"{name}-0.json").read_text())[-1]
    return last


def foretell(engine: str, kind: str, layers: int, checkpointing: bool) -> Run:
    """The same as a formula has it."""
    shape = shape_of(layers)
    frozen, trained = (shape.weights, shape.lora(LORA_RANK)) if kind == "lora" else (0, shape.weights)
    reference = "off" if kind == "lora" else "copy"
    return Run(engine, RANKS, frozen, trained, reference, MICRO_STEPS, checkpointing)


def rows_of(
    kind: str, engine: str, found: dict[int, dict[str, Any]], checkpointing: bool
) -> list[dict[str, Any]]:
    """Measured and foretold: traffic of the larger model, memory of it less the smaller one."""
    small, large = sorted(found)
    told = {layers: foretell(engine, kind, layers, checkpointing) for layers in found}
    rows = []
    for name, expected in told[large].traffic().items():
        sent = found[large]["sent"].get(name, 0) * (RANKS - 1) / RANKS
        rows.append({"what": name, "measured": sent, "formula": expected})
    held = {layers: sum(run.held().values()) for layers, run in told.items()}
    peak = {layers: held[layers] + told[layers].gradients() for layers in found}
    for name, of_formula in (("tensors", held), ("held", held), ("peak", peak)):
        measured = found[large][name] - found[small][name]
        rows.append({"what": name, "measured": measured, "formula": of_formula[large] - of_formula[small]})
    return [{"kind": kind, "engine": engine, **row} for row in rows]


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--layers", nargs=2, type=int, default=[2, 8])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--quick", action="store_true", help="smaller models")
    parser.add_argument("--output", type=Path, help="JSON of the table")
    args = parser.parse_args()
    layers = [1, 2] if args.quick else args.layers
    folder, own = Path(tempfile.mkdtemp()), os.getpid()
    rows: list[dict[str, Any]] = []
    try:
        for number in layers:
            (folder / str(number)).mkdir()
            make_files(folder / str(number), number)
        print(f"{'':6}{'engine':8}{'MB':16}{'measured':>10}{'formula':>10}{'ratio':>8}")
        for kind in args.kinds:
            for engine in args.engines:
                found = {n: measure(engine, kind, folder / str(n), args.checkpointing) for n in layers}
                for row in rows_of(kind, engine, found, args.checkpointing):
                    rows.append(row)
                    measured, formula = row["measured"] / 1e6, row["formula"] / 1e6
                    ratio = measured / formula if formula else float("nan")
                    print(
                        f"{kind:6}{engine:8}{row['what']:16}{measured:10.1f}{formula:10.1f}{ratio:8.2f}",
                        flush=True,
                    )
    finally:
        if os.getpid() == own:
            shutil.rmtree(folder)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
