"""Does what a run is going to write fit on its disk?

Asked of the base model's files before the model is loaded, and of the model itself before the first step. A
run is refused for what it writes in any case; for what it may write it is warned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from prefkit.config.schema import RunConfig
from prefkit.files import check_space, free_bytes, show_bytes
from prefkit.model.adapter import base_of
from prefkit.model.partitioned import size_of
from prefkit.train.output import OutputFolder

if TYPE_CHECKING:
    from transformers import TrainingArguments

Say = Callable[[str], None]
# Optimisers that keep two numbers for each weight in the weight's own format; of others nothing is presumed.
_ADAM = ("adamw_torch", "adamw_torch_fused", "adamw_apex_fused")
# How much of a base model's files is loaded at least: they may hold a vision tower or further heads.
_LOADED = 0.75


@dataclass(frozen=True)
class Sizes:
    """Bytes of one checkpoint and of the weights that a run ends with."""

    checkpoint: int
    final: int

    def needed(self, saves: int, limit: int | None, existing: int = 0) -> int:
        """Bytes that are written at most at a time beyond `existing` checkpoints, when `saves` more are saved
        and `limit` of them kept (`save_total_limit`). An old one goes only after a new one is there.

        >>> Sizes(10, 3).needed(saves=5, limit=1), Sizes(10, 3).needed(5, None), Sizes(10, 3).needed(0, 1)
        (20, 53, 3)
        """
        kept = existing + saves if not limit else min(existing + saves, limit)
        most = kept if not limit else max(min(existing + saves, limit + 1), existing + min(saves, 1))
        return max(most * self.checkpoint, kept * self.checkpoint + self.final) - existing * self.checkpoint


def check_before_loading(config: RunConfig, args: TrainingArguments, folder: OutputFolder, say: Say) -> None:
    """Compare the free space with what the base model's files tell, where the whole model is saved.

    Raises `DiskError` when not even one checkpoint and the final weights fit.
    """
    base = Path(config.model.model_name_or_path).expanduser()
    if config.tuning.finetuning_type == "lora" or not args.do_train:
        return
    number = _num_weights(base)
    trained_in_full = config.tuning.finetuning_type == "full"
    size = 2 if config.tuning.pure_bf16 or not trained_in_full else 4
    moments = _num_moments(args) if trained_in_full else 0
    sizes = Sizes(number * size * (1 + moments), number * size)
    saves = 0 if args.save_strategy == "no" or folder.checkpoint else 1
    sure = int(_LOADED * sizes.needed(saves, args.save_total_limit))
    _check(folder, sizes, sure, sizes.needed(2 * saves, args.save_total_limit), say)


def check_before_training(
    args: TrainingArguments,
    model: nn.Module,
    num_rows: int,
    stops_early: bool,
    folder: OutputFolder,
    say: Say,
) -> None:
    """Compare the free space with what the run will write; call it before `folder.clear()`.

    `num_rows` are those of an epoch. Raises `DiskError` when the checkpoints that exist at a time in any
    case, two of them or one, do not fit with the final weights.
    """
    sizes = sizes_of(model, args)
    number = folder.checkpoint.name.rpartition("-")[2] if folder.checkpoint else ""
    done = int(number) if number.isdecimal() else 0
    saves = num_saves(args, num_rows, done)
    existing = 0 if folder.holds_old_run else len(list(folder.path.glob("checkpoint-*")))
    certain = min(saves, 1 if stops_early else 2)
    sure = sizes.needed(certain, args.save_total_limit, existing)
    _check(folder, sizes, sure, sizes.needed(saves, args.save_total_limit, existing), say)


def sizes_of(model: nn.Module, args: TrainingArguments) -> Sizes:
    """What a checkpoint of the model takes: the trained adapter or the whole model, and its optimiser."""
    trained = _bytes(model, trained_only=True)
    weights = trained if base_of(model) is not model else _bytes(model, trained_only=False)
    words = _tokenizer_bytes(Path(str(base_of(model).name_or_path)).expanduser())
    return Sizes(weights + _num_moments(args) * trained + words, weights + words)


def num_saves(args: TrainingArguments, num_rows: int, done: int) -> int:
    """How often a run saves from step `done` on, at least."""
    if args.save_strategy not in ("steps", "epoch"):
        return 0
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    per_epoch = max(num_rows // per_step, 1)
    steps = args.max_steps if args.max_steps > 0 else int(args.num_train_epochs * per_epoch)
    every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
    return math.ceil(max(steps - done, 0) / (every if args.save_strategy == "steps" else per_epoch))


def _check(folder: OutputFolder, sizes: Sizes, sure: int, possible: int, say: Say) -> None:
    """`sure` and `possible` are bytes that the run writes in any case, and that it may write."""
    freed = sum(_size(path) for path in folder.old_files())
    what = f"{show_bytes(sizes.checkpoint)} a checkpoint and {show_bytes(sizes.final)} of final weights"
    check_space(folder.path, sure - freed, f"this run writes {what}, in all at least")
    free = free_bytes(folder.path) + freed
    if possible > free:
        say(
            f"Warning: the disk of {folder.path} may get full: this run writes {what}, up to "
            f"{show_bytes(possible)} in all, and {show_bytes(free)} are free. save_total_limit keeps fewer "
            "checkpoints."
        )


def _num_moments(args: TrainingArguments) -> int:
    return 2 if args.optim in _ADAM and not args.save_only_model else 0


def _tokenizer_bytes(base: Path) -> int:
    """Of the tokenizer's files in a model's folder, which go into each checkpoint; 0 where it is none."""
    return sum(_size(file) for name in ("*token*.json", "vocab*", "merges*") for file in base.glob(name))


def _bytes(model: nn.Module, trained_only: bool) -> int:
    return sum(
        size_of(weights) * weights.element_size()
        for weights in model.parameters()
        if weights.requires_grad or not trained_only
    )


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _num_weights(folder: Path) -> int:
    """Weights in a model's files, without a head of its own, which may be the embedding again.

    0 where the folder is none, or holds no such files or damaged ones: the loader says so.
    """
    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        files = sorted(folder.glob("model-*-of-*.safetensors"))
    try:
        tensors = [item for file in files for item in _read_header(file).items()]
        shapes = [it["shape"] for name, it in tensors if name not in ("__metadata__", "lm_head.weight")]
        return sum(math.prod(shape) for shape in shapes)
    except (ValueError, LookupError, TypeError):
        return 0


def _read_header(file: Path) -> dict[str, dict[str, list[int]]]:
    """Names and shapes in a safetensors file: JSON behind eight bytes that tell its length."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return dict(json.loads(stream.read(min(length, file.stat().st_size))))
