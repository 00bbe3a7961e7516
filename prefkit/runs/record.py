"""What a run writes of itself beside the weights: its config and `prefkit.json`."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from prefkit import __version__
from prefkit.config import RunConfig, dump_yaml
from prefkit.config.errors import UserError
from prefkit.data.ledger import Ledger, data_report
from prefkit.files import replace_text

RECORD_FILE, CONFIG_FILE, DATA_FILE = "prefkit.json", "config.yaml", "data_report.json"
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "safetensors")


def library_versions() -> dict[str, str]:
    """Versions of prefkit and of the libraries that numbers depend on."""
    return {"prefkit": __version__, **{name: _version(name) for name in _LIBRARIES}}


@cache
def _version(library: str) -> str:
    return importlib.metadata.version(library)


def write_record(folder: Path, config: RunConfig, facts: dict[str, Any]) -> None:
    """Write `prefkit.json`, the facts of the run, and `config.yaml`, the resolved config.

    The record comes first: it says that the folder is a run's, whatever else a kill leaves in it.
    """
    _write_facts(folder, {**facts, "versions": library_versions()})
    replace_text(folder / CONFIG_FILE, dump_yaml(config.to_yaml_dict()))


def mark_cleared(folder: Path) -> None:
    """Write into `prefkit.json` that the run in a folder is being removed, and what is left is of no use."""
    _write_facts(folder, {**(read_record(folder) or {}), "finished": False, "cleared": True})


def _write_facts(folder: Path, facts: dict[str, Any]) -> None:
    replace_text(folder / RECORD_FILE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def write_data_report(folder: Path, ledgers: Iterable[Ledger]) -> None:
    """Write `data_report.json`: what became of every row."""
    report = json.dumps(data_report(ledgers), indent=2, ensure_ascii=False)
    replace_text(folder / DATA_FILE, report + "\n")


# In the dtype of the training: a score in another has other digits. transformers says that the base's head is
# new, before peft reads the one that was trained.
_LOADING_OF_REWARD_ADAPTER = """from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
    model = Model.from_pretrained(
        "path/to/this/folder", num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype="{dtype}"
    ).eval()  # the warning that `score` is new comes before the trained one is read
    messages = [{{"role": "user", "content": "Hello"}}, {{"role": "assistant", "content": "Hi."}}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    print(model(inputs["input_ids"]).logits[0, 0].item())"""


_LOADING_WITH_HEAD_BESIDE = """Its head is in `value_head.safetensors`, and transformers has no class
for the model with it: plain transformers cannot load it. `prefkit score`, `prefkit serve`, `prefkit export`
and ppo (`reward_model`) read this folder. What export writes is a language model, its head beside it, whose
README computes scores with transformers."""


_LOADING_OF_SEEING_ADAPTER = """    from peft import PeftModel
    from transformers import AutoModelForImageTextToText
    base = AutoModelForImageTextToText.from_pretrained({base}, dtype="auto")
    model = PeftModel.from_pretrained(base, "path/to/this/folder")"""


def write_model_card(
    folder: Path,
    base_model: str,
    facts: str,
    is_adapter: bool,
    kind: str = "CausalLM",
    dtype: str = "auto",
) -> None:
    """Write `README.md`: what the adapter or model is, and how to load it; `kind` is what transformers calls
    its models, or empty for a reward model that it has no class for, `dtype` that of an adapter's base in
    training."""
    library, auto = ("peft", "AutoPeftModelFor") if is_adapter else ("transformers", "AutoModelFor")
    loading = 'model = Model.from_pretrained("path/to/this/folder")'
    if kind == "SequenceClassification" and is_adapter:
        # Both stand in the config of the base, which knows of neither.
        loading = _LOADING_OF_REWARD_ADAPTER.format(dtype=dtype)
    loading = f"    from {library} import {auto}{kind} as Model\n    {loading}"
    if kind == "ImageTextToText" and is_adapter:  # of which peft has no auto class
        loading = _LOADING_OF_SEEING_ADAPTER.format(base=json.dumps(base_model))
    what = "A LoRA adapter of" if is_adapter else "Tuned from"
    replace_text(
        folder / "README.md",
        f"""---
base_model: {json.dumps(base_model)}
library_name: {library}
---

{what} {base_model}, trained by prefkit {__version__}: {facts}. The config is in
`{CONFIG_FILE}`, the data and versions in `{RECORD_FILE}`.

{loading if kind else _LOADING_WITH_HEAD_BESIDE}
""",
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
