"""What makes a run the run it is: a checkpoint is gone on with only where all of it is the same.

Each checkpoint has it in `run.json`. A change of anything here would make a resumed run another than the
one that began, without a word; so it is refused, with what changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

from prefkit.config import RunConfig, load_config
from prefkit.config.engines import stage_of
from prefkit.config.errors import UserError
from prefkit.config.schema import keys_of
from prefkit.data.dataset import RunData
from prefkit.data.rows import template_facts
from prefkit.data.template import ChatTemplate
from prefkit.objectives.pairwise import LOSSES
from prefkit.runs.record import CONFIG_FILE, library_versions

RUN_FILE = "run.json"
# Keys that may differ between a run and its resumption: they change neither weights nor metrics.
MAY_CHANGE = {
    *("overwrite_output_dir", "resume_from_checkpoint", "output_dir"),
    *("plot_loss", "sample_prompts", "sample_max_new_tokens", "hang_timeout", "do_eval", "do_predict"),
    *("run_name", "report_to", "disable_tqdm", "log_level", "cache_dir", "tokenized_path", "overwrite_cache"),
    "dataset_dir",  # the rows are compared by their content
    *("save_steps", "save_strategy", "save_total_limit", "logging_steps", "logging_strategy"),
    *("reward_timeout", "reward_retries"),
    *("ddp_backend", "dataloader_num_workers", "dataloader_pin_memory", "preprocessing_num_workers"),
}
_MAY_DIFFER = ("machine", "processes", "reward function")
# What other parts of the identity say: warmup_steps, the rows of a step, and the engine.
_DERIVED = {"warmup_ratio", "per_device_train_batch_size", "gradient_accumulation_steps", "deepspeed"}
_WAY_OUT = (
    "A resumed run would be another. Put it back as it was; or go on from its weights in another output_dir "
    "with adapter_name_or_path or model_name_or_path; or write overwrite_output_dir: true to start afresh.\n"
    + fill(f"These keys may change: {', '.join(sorted(MAY_CHANGE - {'output_dir'}))}.", 100)
)


_STEP = (
    "The rows of a step are processes x per_device_train_batch_size x gradient_accumulation_steps: with "
    "another number of processes, change one of the other two along.\n"
)


def identify(
    config: RunConfig,
    template: ChatTemplate,
    data: RunData,
    models: Mapping[str, str],
    num_processes: int,
    functions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The identity of a run as JSON values; `models` has the fingerprints of those it starts from, and
    `functions` of files whose functions judge: one that failed is mended, and the run goes on."""
    versions = library_versions()
    identity = {
        "config": _compared(config),
        "data set": {ledger.name: ledger.sha256 or "streamed" for ledger in data.ledgers},
        "images": {"content": digest} if (digest := data.image_digest()) else {},
        "template": template_facts(template),
        "model": dict(models),
        "prefkit": {"version": versions.pop("prefkit")},
        "step": _rows_of_step(config, num_processes),
        "engine": {"ZeRO stage": stage_of(config.training.get("deepspeed")) or None},
        "processes": {"number": num_processes},
        # Other libraries or threads may round otherwise; the run stays what it is.
        "machine": {**versions, "threads": torch.get_num_threads()},
        "reward function": dict(functions or {}),
    }
    same: dict[str, Any] = json.loads(json.dumps(identity))
    return same


def check_same_run(checkpoint: Path, identity: Mapping[str, Any]) -> list[str]:
    """Compare the run that a checkpoint is of with this one; returns what may make it end otherwise and is
    allowed to.

    Raises `UserError` with all differences when they are not the same run.
    """
    before = read_identity(checkpoint)
    changed = [
        text for part in identity if part not in _MAY_DIFFER for text in _differences(before, identity, part)
    ]
    if changed:
        lines = "\n  ".join(changed)
        hint = _STEP if any(text.startswith("step ") for text in changed) else ""
        raise UserError(f"{checkpoint} is of a run with something else:\n  {lines}\n{hint}{_WAY_OUT}")
    return [text for part in _MAY_DIFFER for text in _differences(before, identity, part)]


def read_identity(checkpoint: Path) -> dict[str, Any]:
    """The identity of the run that a checkpoint is of. Raises `UserError` where it has none."""
    try:
        identity: dict[str, Any] = json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint} does not say of which run it is ({RUN_FILE}: {error}), so it cannot be gone on "
            "with. Its weights can: name it as adapter_name_or_path or model_name_or_path, in another "
            "output_dir."
        ) from error
    return identity


def check_same_config(place: Path, config: RunConfig) -> None:
    """Compare the config of the run in a folder, or of a checkpoint, with this one, before anything is read.

    Raises `UserError` with all differences.
    """
    if (place / RUN_FILE).is_file():
        before = read_identity(place)["config"]
    else:
        saved = load_config(place / CONFIG_FILE).config
        before = _compared(saved)
    now = _compared(config)
    old, new = json.loads(json.dumps([{"config": before}, {"config": now}]))
    if changed := list(_differences(old, new, "config")):
        lines = "\n  ".join(changed)
        raise UserError(f"output_dir: {place} holds a run of another config:\n  {lines}\n{_WAY_OUT}")


def _rows_of_step(config: RunConfig, num_processes: int) -> dict[str, int]:
    """How many rows an optimiser step has, on all processes together; also a micro-batch, where the loss
    takes a number from all of it."""
    micro = num_processes * int(config.value("per_device_train_batch_size"))
    rows = {"rows": micro * int(config.value("gradient_accumulation_steps"))}
    method = config.method
    if method.stage == "kto" or (method.stage == "dpo" and LOSSES[method.pref_loss].needs_batch_kl):
        rows["rows of a micro-batch"] = micro
    return rows


def _compared(config: RunConfig) -> dict[str, Any]:
    """The keys that may not change, with their values; where a server of scores listens may."""
    moves = {"reward_model"} if config.reward.reward_model_type == "api" else set()
    return {key: config.value(key) for key in keys_of(RunConfig) if key not in MAY_CHANGE | _DERIVED | moves}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], part: str) -> Iterator[str]:
    """Each difference in one part of two identities, in words."""
    old, new = before.get(part, {}), now.get(part, {})
    title = "" if part == "config" else f"{part} "
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            yield f"{title}{name}: {_show(old.get(name))} -> {_show(new.get(name))}"


def _show(value: Any) -> str:
    """A value for a message; of a long hash its beginning."""
    is_hash = isinstance(value, str) and len(value) >= 24 and set(value) <= set("0123456789abcdef")
    return f"{value[:12]}..." if is_hash else str(value)
