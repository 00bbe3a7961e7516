"""What a run writes of itself beside the weights: its config and `prefkit.json`."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefkit import __version__
from prefkit.config import RunConfig, dump_yaml, load_config
from prefkit.config.errors import UserError
from prefkit.config.schema import keys_of
from prefkit.data.ledger import Ledger, data_report

RECORD_FILE, CONFIG_FILE, DATA_FILE = "prefkit.json", "config.yaml", "data_report.json"
# Keys that may differ between a run and its resumption: they change neither weights nor metrics.
_HARMLESS = {
    *(
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "output_dir",
        "warmup_ratio",
    ),  # it is in warmup_steps
    *(
        "plot_loss",
        "sample_prompts",
        "sample_max_new_tokens",
        "hang_timeout",
        "do_eval",
        "do_predict",
        "run_name",
        "report_to",
    ),
    *("save_steps", "save_strategy", "save_total_limit", "logging_steps", "logging_strategy", "log_level"),
    *("ddp_backend", "dataloader_num_workers", "dataloader_pin_memory", "disable_tqdm", "cache_dir"),
    *("tokenized_path", "overwrite_cache", "preprocessing_num_workers"),
}
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "safetensors")


def library_versions() -> dict[str, str]:
    """Versions of prefkit and of the libraries that numbers depend on."""
    return {"prefkit": __version__, **{name: importlib.metadata.version(name) for name in _LIBRARIES}}


def write_record(folder: Path, config: RunConfig, facts: dict[str, Any]) -> None:
    """Write `config.yaml`, the resolved config, and `prefkit.json`, the facts of the run."""
    _replace(folder / CONFIG_FILE, dump_yaml(config.to_yaml_dict()))
    record = {**facts, "versions": library_versions()}
    _replace(folder / RECORD_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def write_data_report(folder: Path, ledgers: Iterable[Ledger]) -> None:
    """Write `data_report.json`: what became of every row."""
    report = json.dumps(data_report(ledgers), indent=2, ensure_ascii=False)
    _replace(folder / DATA_FILE, report + "\n")


def write_model_card(folder: Path, base_model: str, facts: str, is_adapter: bool) -> None:
    """Write `README.md`: what the adapter or model is, and how to load it."""
    what, reader = (
        ("A LoRA adapter of", "peft import AutoPeftModelForCausalLM as Model")
        if is_adapter
        else ("Tuned from", "transformers import AutoModelForCausalLM as Model")
    )
    _replace(
        folder / "README.md",
        f"""---
base_model: {json.dumps(base_model)}
library_name: {"peft" if is_adapter else "transformers"}
---

{what} {base_model}, trained by prefkit {__version__}: {facts}. The config is in
`{CONFIG_FILE}`, the data and versions in `{RECORD_FILE}`.

    from {reader}
    model = Model.from_pretrained("path/to/this/folder")
""",
    )


def check_weights(folder: Path, weights: dict[str, str]) -> None:
    """Compare the models that a run goes on with with those that it began with, by fingerprint.

    Raises `UserError` when one has changed since.
    """
    before = (read_record(folder) or {}).get("fingerprints", {})
    changed = [path for path, found in weights.items() if before.get(path, found) != found]
    if changed:
        raise UserError(
            f"{' and '.join(changed)} changed since the run in {folder} began, and a resumed run would be "
            "another. Restore the old weights, or write overwrite_output_dir: true to start afresh."
        )


def read_record(folder: Path) -> dict[str, Any] | None:
    """The facts of the run in a folder; None when there was none.

    Raises `UserError` when the record cannot be read.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): set another output_dir") from error
    return record


def changed_keys(folder: Path, config: RunConfig) -> list[str]:
    """Keys that matter and differ from those of the run in the folder, as `key: old -> new`."""
    before = load_config(folder / CONFIG_FILE).config
    return [
        f"{key}: {before.value(key)} -> {config.value(key)}"
        for key in keys_of(RunConfig)
        if before.value(key) != config.value(key) and key not in _HARMLESS
    ]


def _replace(file: Path, text: str) -> None:
    """Write a file so that a kill leaves the old text or the new one."""
    scratch = file.with_name(f".{file.name}.new")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(file)
