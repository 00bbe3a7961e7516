"""From the config of a use to a model that is ready for it, as it was trained."""

from __future__ import annotations

<<<<<<< HEAD
import json
import logging
import re
from collections.abc import Sequence
=======
>>>>>>> judges
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefkit.config.schema import UseConfig

if TYPE_CHECKING:
    from prefkit.data.template import ChatTemplate
    from prefkit.serve.assistant import Assistant

<<<<<<< HEAD
logger = logging.getLogger(__name__)

# What a run's config says of how its model is to be used. Not trust_remote_code: that is asked for each time.
_TEMPLATE = ("template", "default_system", "tool_format", "enable_thinking", "preserve_thinking")
_SCORED = ("cutoff_len", "truncation")
_ADAPTED = ("rope_scaling", "cutoff_len", "add_tokens", "add_special_tokens", "resize_vocab")


def read_use_config(source: str | None, overrides: Sequence[str], rules: Rules) -> LoadedConfig[UseConfig]:
    """The config of a use: `source` is a YAML or JSON file, the folder of a run, adapter or model, or the
    Hugging Face id of a model.

    A run's folder says which base, adapters, template and thinking mode it was trained with; what is
    written or overridden holds instead. Raises `ConfigError`, and `UserError` for a folder of neither.
    """
    if source is not None and "=" in source:
        overrides = [source, *overrides]
        source = None
    file = source if source and Path(source).is_file() else None
    if file is not None and rules is SCORING and (trained := _reward_run(file)):
        source, file = trained, None
    if source and file is None and re.search(r"\.(ya?ml|json)$", source):
        raise UserError(f"{source} does not exist")
    defaults = _defaults_of(source) if source and file is None else {}
    loaded = load_use_config(file, overrides, defaults, rules)
    recorded = _usage(Path(loaded.config.model.trained_last))
    return load_use_config(file, overrides, {**recorded, **defaults}, rules)


def _reward_run(file: str) -> str | None:
    """The folder into which a YAML file trains a reward model, None where it trains something else or
    nothing: the base that it names has no head for scores, so that nothing else can be meant."""
    entries, _ = read_file(Path(file))
    written = {entry.key: entry.value for entry in entries}
    if written.get("stage") != "rm" or "output_dir" not in written:
        return None
    folder = str(load_config(file).config.training["output_dir"])
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"{file} trains a reward model in {folder}, which is not there: prefkit train {file}")
    return folder


def _defaults_of(source: str) -> dict[str, Any]:
    """Model and adapters of a folder or id."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return {"model_name_or_path": source}
    if not (folder / "adapter_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{source} holds neither a model (config.json) nor an adapter (adapter_config.json)"
            )
        return {"model_name_or_path": source}
    record = read_record(_run_folder(folder))
    if record is None:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return {
            "model_name_or_path": config.get("base_model_name_or_path"),
            "adapter_name_or_path": [source],
        }
    below = record.get("adapters_below", [])
    return {"model_name_or_path": record["base_model"], "adapter_name_or_path": [*below, source]}


def _run_folder(folder: Path) -> Path:
    """The folder of the run, where this is one of its checkpoints."""
    is_checkpoint = folder.name.startswith("checkpoint-") and (folder.parent / RECORD_FILE).is_file()
    return folder.parent if is_checkpoint else folder


def _usage(folder: Path) -> dict[str, Any]:
    """How the model in a run's folder, or exported from one, is to be used; empty for other folders."""
    folder = _run_folder(folder)
    if (folder / CONFIG_FILE).is_file():
        config = load_config(folder / CONFIG_FILE).config
        names: tuple[str, ...] = (*_TEMPLATE, "dtype")
        if config.method.stage == "rm":
            names += _SCORED
        if config.tuning.finetuning_type == "lora":
            names += _ADAPTED  # a model saved whole carries these itself
        return {name: config.value(name) for name in names}
    record = read_record(folder)
    usage = record.get("usage", {}) if record else {}
    return {name: usage[name] for name in (*_TEMPLATE, "dtype", *_ADAPTED, *_SCORED) if name in usage}


def usage_of(config: UseConfig, is_adapter: bool = False, scores: bool = False) -> dict[str, Any]:
    """What the record of an exported model says of its use; of an adapter, what its base is made by too, and
    of a model that `scores`, how long its rows are."""
    names = (*_TEMPLATE, *(("dtype", *_ADAPTED) if is_adapter else ()), *(_SCORED if scores else ()))
    values = vars(config.data) | vars(config.model)
    return {name: values[name] for name in names}

=======
>>>>>>> judges

@dataclass(frozen=True)
class LoadedModel:
    """A model with its adapters merged but for the last, which stays one; `proof` says in nats per token
    how far it is from the probe of its training, None where there is nothing to compare."""

    model: Any
    template: ChatTemplate
    proof: float | None


def load_model(config: UseConfig) -> LoadedModel:
    """Read what a `UseConfig` names and check it against the probe rows of its training.

    Raises `UserError` for a reward model, and `ModelError` when something is missing or is not what was
    trained.
    """
    from prefkit.data.template import make_template
    from prefkit.model.adapter import start_from_adapters
    from prefkit.model.generate import stop_ids
    from prefkit.model.load import fit_vocabulary, load_causal_lm, load_tokenizer
    from prefkit.model.probe import verify
    from prefkit.runs.reward_model import names_reward_model

    name = config.model.trained_last
    if names_reward_model(config.model):
        raise UserError(
            f"{name} is a reward model, which gives scores and writes no text: `prefkit score {name} "
            f"data.jsonl -o scores.jsonl` scores a file, `prefkit serve {name}` answers requests"
        )
    tokenizer = load_tokenizer(config.model)
    template = make_template(tokenizer, config.data)
    base = load_causal_lm(config.model, config.data.cutoff_len)
    fit_vocabulary(base, tokenizer, config.model)
    base.generation_config.eos_token_id = stop_ids(base, template)
    model: Any = start_from_adapters(base, config.model, create_new=False)
    model.requires_grad_(False)
    model.eval()
    return LoadedModel(model, template, verify(model, Path(name), name))


def load_assistant(config: UseConfig) -> Assistant:
    """A model to talk to."""
    import torch

    from prefkit.model.reward import VALUE_HEAD
    from prefkit.runs.reward_model import has_value_head
    from prefkit.serve.assistant import Assistant

    loaded = load_model(config)
    model = config.model
    if Path(model.trained_last).is_dir() and has_value_head(model):
        logger.warning(
            "%s: %s beside it is not used; if this is a reward model, `prefkit score` scores with it",
            model.trained_last,
            VALUE_HEAD,
        )
    if model.quantization_bit is None:
        loaded.model.to(torch.accelerator.current_accelerator() or "cpu")
    name = Path(model.trained_last).name
    return Assistant(loaded.model, loaded.template, name, bool(model.adapter_name_or_path))
