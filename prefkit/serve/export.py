"""Merge adapters into their base and write a model that needs nothing of prefkit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefkit import __version__
from prefkit.config.errors import UserError
from prefkit.config.schema import UseConfig
from prefkit.data.examples import Message
from prefkit.model.errors import ModelError
from prefkit.model.load import DTYPES
from prefkit.model.probe import TOLERANCE, Probe, compare, distance, measure, read_probe
from prefkit.runs.record import RECORD_FILE, library_versions, read_record
from prefkit.runs.use import usage_of
from prefkit.serve.load import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefkit.data.template import ChatTemplate

Say = Callable[[str], None]
# Share of what training changed that rounding may take unsaid.
_SHARE_TO_MENTION = 0.05
# Probe rows for an adapter that has none of its own, as question and answer.
_QUESTIONS = (
    ("Name three rivers of Europe.", "The Rhine, the Danube and the Loire are rivers of Europe."),
    ("How do I boil an egg?", "Put it into boiling water for seven minutes, then cool it."),
    ("What is 12 times 12?", "12 times 12 is 144."),
)


def export(config: UseConfig, say: Say) -> Path:
    """Write the model with its adapters merged to `export_dir`, read it again and compare.

    The log-probs of the probe rows must be the same before merging and after reading, within rounding.
    Nothing is left behind when they are not. Raises `UserError` for a folder that is not empty, and
    `ModelError` for a model that is not what was trained.
    """
    folder = Path(config.export.export_dir or "").expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"export_dir: {folder} is not an empty folder: write another")
    loaded = load_model(config)
    if loaded.proof is not None:
        say(f"Adapter and base are those of the training: {loaded.proof:.1e} nats per token apart.")
    model = loaded.model
    accelerator = torch.accelerator.current_accelerator() if config.export.export_device == "auto" else None
    model.to(accelerator or "cpu")
    rows = _probe_rows(config, loaded.template)
    before = measure(model, rows)
    untuned = _untuned(model, rows)
    if config.model.adapter_name_or_path:
        adapters = ", ".join(config.model.adapter_name_or_path)
        say(f"Merging {adapters} into {config.model.model_name_or_path} ...")
        model = model.merge_and_unload(safe_merge=True)
    scratch = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        _write(model, loaded.template, config, scratch)
        probe = Probe(rows, before, str(model.dtype).removeprefix("torch."), False)
        moved = None if untuned is None else distance(probe, untuned)
        apart = _compare(probe, scratch, config, moved)
        _write_facts(config, scratch, apart, moved)
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    told = "" if moved is None else f" (the adapter moves them by {moved:.1e})"
    if moved is not None and apart > _SHARE_TO_MENTION * moved:
        say(
            f"warning: rounding to {probe.dtype} takes {apart / moved:.0%} of what training changed; write "
            "dtype: float32 to keep it, and another export_dir."
        )
    say(f"Proof: {len(rows)} probe rows agree before and after within {apart:.1e} nats per token{told}.")
    return folder


def _probe_rows(config: UseConfig, template: ChatTemplate) -> list[tuple[list[int], list[int]]]:
    """Rows of the training's own probe, or questions of ours."""
    for path in (*reversed(config.model.adapter_name_or_path), config.model.model_name_or_path):
        if probe := read_probe(Path(path)):
            return probe.rows
    rows = []
    for question, answer in _QUESTIONS:
        prompt, responses = template.encode([Message("user", question)], [Message("assistant", answer)])
        rows.append((prompt, responses[0]))
    return rows


def _untuned(model: Any, rows: list[tuple[list[int], list[int]]]) -> list[list[float]] | None:
    """The log-probs without the last adapter: what the merged ones must not be."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None
    with model.disable_adapter():
        return measure(model, rows)


def _write(model: PreTrainedModel, template: ChatTemplate, config: UseConfig, folder: Path) -> None:
    model.save_pretrained(str(folder), max_shard_size=f"{config.export.export_size}GB")
    template.tokenizer.padding_side = "left"  # as generation wants it
    template.tokenizer.save_pretrained(str(folder))
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone


def _compare(probe: Probe, folder: Path, config: UseConfig, moved: float | None) -> float:
    """Distance of the written model from the probe.

    Raises `ModelError` when it is another model, or nearer to the untuned one, which training `moved`.
    """
    from transformers import AutoModelForCausalLM

    written: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES.get(config.model.dtype, "auto"), trust_remote_code=config.model.trust_remote_code
    )
    apart, tolerance = compare(probe, written)
    if moved is not None:
        tolerance = min(tolerance, max(moved / 2, TOLERANCE[torch.float32]))
    if not apart <= tolerance:
        raise ModelError(
            f"The merged model is not the one with adapters: log-probs of the probe rows are {apart:.2g} "
            f"nats per token apart (tolerance {tolerance:g} in {probe.dtype}). Nothing was written. Write "
            "dtype: float32 to merge without rounding."
        )
    return apart


def _write_facts(config: UseConfig, folder: Path, apart: float, moved: float | None) -> None:
    """`prefkit.json` and the model card."""
    model = config.model
    run = read_record(Path(model.trained_last)) or {}
    kept = ("stage", "loss", "finetuning_type", "reference", "trained_on", "data", "pairs")
    record = {
        "base_model": model.model_name_or_path,
        "adapters": list(model.adapter_name_or_path),
        "usage": usage_of(config),
        "proof": {"nats_per_token": apart, "moved_by_training": moved},
        "run": {name: run[name] for name in kept if name in run},
        "versions": library_versions(),
    }
    (folder / RECORD_FILE).write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (folder / "README.md").write_text(_card(config, record), encoding="utf-8")


def _card(config: UseConfig, record: dict[str, Any]) -> str:
    """The model card: where the model comes from, how it is used, and how it was checked."""
    run, usage = record["run"], config.data
    data = f"{', '.join(run.get('trained_on', []))} ({run.get('pairs', {}).get('trained')} pairs)"
    facts = {
        "base model": record["base_model"],
        "adapters merged": ", ".join(record["adapters"]) or "none",
        "training": f"{run['loss']} loss on {data}" if "loss" in run else "not recorded",
        "reference": run.get("reference", "not recorded"),
        "chat template": usage.template or "the model's own",
        "thinking": {True: "on", False: "off", None: "as the response has it"}[usage.enable_thinking],
        "system message": usage.default_system or "none added",
        "proof": f"probe rows within {record['proof']['nats_per_token']:.1e} nats per token of the adapter",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
base_model: {json.dumps(record["base_model"])}
library_name: transformers
---

Exported by prefkit {__version__}; `{RECORD_FILE}` has the facts for machines.

| | |
|---|---|
{table}

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
    messages = [{{"role": "user", "content": "Hello"}}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1] :]
    print(tokenizer.decode(answer, skip_special_tokens=True))
"""
