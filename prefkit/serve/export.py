"""Merge adapters into their base and write a model that needs nothing of prefkit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefkit.config.errors import UserError
from prefkit.config.schema import UseConfig
from prefkit.data.vision import Vision
from prefkit.model.errors import ModelError
from prefkit.model.load import DTYPES
from prefkit.model.probe import (
    TOLERANCE,
    Probe,
    Rows,
    compare,
    distance,
    measure,
    question_rows,
    read_probe,
)
from prefkit.model.reward import VALUE_HEAD
from prefkit.runs.reward_model import has_value_head, names_reward_model
from prefkit.serve.card import GENERATING, SEEING, make_record, write_facts
from prefkit.serve.export_reward import export_reward_model
from prefkit.serve.load import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefkit.data.template import ChatTemplate

Say = Callable[[str], None]
# Share of what training changed that rounding may take unsaid.
_SHARE_TO_MENTION = 0.05


def export(config: UseConfig, say: Say) -> Path:
    """Write the model with its adapters merged to `export_dir`, read it again and compare.

    The log-probs of the probe rows, or their scores, must be the same before merging and after reading,
    within rounding. Nothing is left behind when they are not. Raises `UserError` for a folder that is not
    empty and for keys that are not for this model, and `ModelError` for one that is not what was trained.
    """
    folder = Path(config.export.export_dir or "").expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"export_dir: {folder} is not an empty folder: write another")
    is_reward = _is_reward_model(config, say)
    with _written_as_a_whole(folder) as scratch:
        if is_reward:
            export_reward_model(config, scratch, say)
        else:
            export_language_model(config, scratch, say)
    use = "score {} data.jsonl -o scores.jsonl` scores with" if is_reward else "chat {}` talks to"
    say(f"Written to {folder}; `prefkit {use.format(folder)} it.")
    return folder


def _is_reward_model(config: UseConfig, say: Say) -> bool:
    """What is exported. Raises `UserError` where a head is asked of a language model."""
    name = config.model.trained_last
    if names_reward_model(config.model):
        return True
    if has_value_head(config.model):
        say(
            f"{name} has a value head beside it and is exported as a reward model. A policy that PPO has "
            f"trained has one too: to export that as a language model, move {VALUE_HEAD} away."
        )
        return True
    if config.export.export_value_head:
        raise UserError(
            f"export_value_head: {name} is a language model and has no head for scores: remove it"
        )
    return False


@contextmanager
def _written_as_a_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when all went well, and else is gone."""
    scratch = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        yield scratch
        for file in scratch.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def export_language_model(config: UseConfig, folder: Path, say: Say) -> None:
    """Write a language model to `folder`, with its record and card, as `export` says."""
    loaded = load_model(config)
    if loaded.proof is not None:
        say(f"Adapter and base are those of the training: {loaded.proof:.1e} nats per token apart.")
    model = loaded.model
    accelerator = torch.accelerator.current_accelerator() if config.export.export_device == "auto" else None
    model.to(accelerator or "cpu")
    rows = _probe_rows(config, loaded.template)
    vision = loaded.template.vision
    before = measure(model, rows, vision)
    untuned = _untuned(model, rows, vision)
    if config.model.adapter_name_or_path:
        adapters = ", ".join(config.model.adapter_name_or_path)
        say(f"Merging {adapters} into {config.model.model_name_or_path} ...")
        model = model.merge_and_unload(safe_merge=True)
    _write(model, loaded.template, config, folder)
    probe = Probe(rows, before, str(model.dtype).removeprefix("torch."), False)
    moved = None if untuned is None else distance(probe, untuned)
    apart = _compare(probe, folder, config, vision, moved)
    record = make_record(config, {"nats_per_token": apart, "moved_by_training": moved})
    proof = f"probe rows within {apart:.1e} nats per token of the adapter"
    write_facts(folder, config, record, GENERATING if vision is None else SEEING, {"proof": proof})
    told = "" if moved is None else f" (the adapter moves them by {moved:.1e})"
    if moved is not None and apart > _SHARE_TO_MENTION * moved:
        say(
            f"warning: rounding to {probe.dtype} takes {apart / moved:.0%} of what training changed; write "
            "dtype: float32 to keep it, and another export_dir."
        )
    say(f"Proof: {len(rows)} probe rows agree before and after within {apart:.1e} nats per token{told}.")


def _probe_rows(config: UseConfig, template: ChatTemplate) -> Rows:
    """Rows of the training's own probe, or questions of ours."""
    for path in (*reversed(config.model.adapter_name_or_path), config.model.model_name_or_path):
        if probe := read_probe(Path(path)):
            return probe.rows
    return question_rows(template)


def _untuned(model: Any, rows: Rows, vision: Vision | None) -> list[list[float]] | None:
    """The log-probs without the last adapter: what the merged ones must not be."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None
    with model.disable_adapter():
        return measure(model, rows, vision)


def _write(model: PreTrainedModel, template: ChatTemplate, config: UseConfig, folder: Path) -> None:
    model.save_pretrained(str(folder), max_shard_size=f"{config.export.export_size}GB")
    template.tokenizer.padding_side = "left"  # as generation wants it
    template.saved.save_pretrained(str(folder))


def _compare(
    probe: Probe, folder: Path, config: UseConfig, vision: Vision | None, moved: float | None
) -> float:
    """Distance of the written model from the probe.

    Raises `ModelError` when it is another model, or nearer to the untuned one, which training `moved`.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind: Any = AutoModelForCausalLM if vision is None else AutoModelForImageTextToText
    written = kind.from_pretrained(
        folder, dtype=DTYPES.get(config.model.dtype, "auto"), trust_remote_code=config.model.trust_remote_code
    )
    apart, tolerance = compare(probe, written, vision)
    if moved is not None:
        tolerance = min(tolerance, max(moved / 2, TOLERANCE[torch.float32]))
    if not apart <= tolerance:
        raise ModelError(
            f"The merged model is not the one with adapters: log-probs of the probe rows are {apart:.2g} "
            f"nats per token apart (tolerance {tolerance:g} in {probe.dtype}). Nothing was written. Write "
            "dtype: float32 to merge without rounding."
        )
    return apart
