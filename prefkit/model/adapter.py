"""LoRA adapters: a new one, one to go on with, those to merge, and what can be wrong with them."""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from prefkit.config.schema import ModelConfig, TuningConfig
from prefkit.files import replace_text
from prefkit.model.errors import ModelError
from prefkit.model.load import num_rows
from prefkit.model.reward import HEAD, HEAD_WEIGHT, is_reward_model, set_value_head
from prefkit.model.vision import is_frozen

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Names of adapters within a model: the trained one, and a frozen copy of what it was at the start.
TRAINED, INITIAL = "default", "initial"
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD_IN_FILE = f"base_model.model.{HEAD_WEIGHT}"


def add_lora(model: PreTrainedModel, config: TuningConfig, resized: bool = False) -> PeftModel:
    """The model with a fresh adapter, whose weights are fp32 and alone trainable.

    `lora_target: all` means every linear layer but the head. Where the vocabulary was `resized`, embedding
    and head are trained along, since new rows know nothing. Raises `ModelError` when a target is not in
    the model.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    frozen = [name for name, _ in model.named_modules() if is_frozen(name, model.config, config)]
    targets = (
        sorted(linear_names(model, frozen)) if config.lora_target == ("all",) else list(config.lora_target)
    )
    modules = {name for full, _ in model.named_modules() for name in (full, full.rsplit(".", 1)[-1])}
    absent = [name for name in (*targets, *config.additional_target) if name not in modules]
    if absent:
        raise ModelError(
            f"lora_target/additional_target: no module named {', '.join(absent)}; "
            f"linear layers here: {', '.join(sorted(linear_names(model)))}"
        )
    kept = set(frozen)
    if targets and all(full in kept for full in _named(model, targets)):
        raise ModelError(
            f"lora_target: {', '.join(targets)} are frozen: set freeze_vision_tower, "
            "freeze_multi_modal_projector or freeze_language_model to false, or name others"
        )
    vocabulary = _vocabulary_names(model) if resized else []
    in_full = list(dict.fromkeys([*config.additional_target, *vocabulary]))
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS if is_reward_model(model) else TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=[name for name in _named(model, targets) if name in kept] or None,
        modules_to_save=in_full or None,
        ensure_weight_tying=bool(in_full) and model.config.get_text_config().tie_word_embeddings,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=_initialisation(config),  # type: ignore[arg-type]
    )
    adapted = get_peft_model(model, lora)
    assert not isinstance(adapted, tuple)
    _name_head(adapted)
    if config.pissa_init:
        freeze_initial(adapted)  # what was taken out of the base, for reference and saving
    return adapted


def _named(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """The modules that targets of an adapter name."""
    names = (name for name, _ in model.named_modules())
    return [name for name in names if name in targets or name.rsplit(".", 1)[-1] in targets]


def _initialisation(config: TuningConfig) -> bool | str:
    if not config.pissa_init:
        return True
    return "pissa" if config.pissa_iter == -1 else f"pissa_niter_{config.pissa_iter}"


def _vocabulary_names(model: PreTrainedModel) -> list[str]:
    """Names of the embedding and of the head, the latter where it has weights of its own."""
    tied = model.config.get_text_config().tie_word_embeddings
    head = None if tied else model.get_output_embeddings()
    wanted = [model.get_input_embeddings()] + ([] if head is None else [head])
    return [
        name.rsplit(".", 1)[-1] for name, module in model.named_modules() if any(module is w for w in wanted)
    ]


def start_from_adapters(
    model: PreTrainedModel, config: ModelConfig, create_new: bool
) -> PreTrainedModel | PeftModel:
    """The model with `adapter_name_or_path`: all merged but the last, which stays an adapter and is
    trainable, unless a new one is to be created upon it. Raises `ModelError` for an unusable adapter."""
    paths = list(config.adapter_name_or_path)
    last = None if create_new or not paths else paths.pop()
    merged = merge_adapters(model, paths, config)
    return merged if last is None else load_adapter(merged, last, config, is_trainable=True)


def merge_adapters(model: PreTrainedModel, paths: Sequence[str], config: ModelConfig) -> PreTrainedModel:
    """The model with each adapter merged into its weights, in order, in the number format that these have."""
    if paths and model.dtype != torch.float32:
        logger.warning(
            "merging %s into weights in %s rounds part of it away; dtype: float32 keeps all of it",
            ", ".join(paths),
            str(model.dtype).removeprefix("torch."),
        )
    for path in paths:
        adapted = load_adapter(model, path, config)
        try:
            model = cast("PreTrainedModel", adapted.merge_and_unload(safe_merge=True))
        except ValueError as error:
            raise ModelError(f"adapter_name_or_path: {path} cannot be merged: {error}") from error
    return model


def load_adapter(
    model: PreTrainedModel, path: str, config: ModelConfig, is_trainable: bool = False
) -> PeftModel:
    """The model with the adapter of a folder or hub id; upon a reward model with the head that it brings.

    Raises `ModelError` when files are missing, when ranks are not what its config says, when it was made for
    a model of other modules or sizes, and when a trainable one brings no head where the model has one.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    folder = find_adapter(path, config)
    lora = read_adapter_config(folder)
    try:
        shapes = _read_shapes(folder / WEIGHTS)
        has_head = _fit_head(path, model, lora, folder, is_trainable)
        check_ranks(path, lora, shapes)
        _fit_rows(model, shapes)
        if has_head and is_trainable:
            shapes[HEAD_IN_FILE] = list(cast("nn.Linear", model.score).weight.shape)
            adapted = _with_own_head(model, lora, folder)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of missing keys, which check_complete refuses
                adapted = PeftModel.from_pretrained(model, str(folder), TRAINED, is_trainable, config=lora)
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS} is damaged: {error}") from error
    except KeyError as error:  # what peft says of a module saved in full, such as the head
        raise ModelError(f"{path}: {WEIGHTS} lacks {error.args[0]}") from error
    except (RuntimeError, ValueError) as error:
        reason = next((line.strip() for line in str(error).split("\n") if "mismatch" in line), str(error))
        raise ModelError(f"{path} is not an adapter of {model.name_or_path}: {reason}") from error
    _name_head(adapted)
    check_complete(path, adapted, shapes)
    return adapted


def _fit_head(path: str, model: PreTrainedModel, lora: LoraConfig, folder: Path, is_trainable: bool) -> bool:
    """Prepare model and config for an adapter upon a reward model: its own head, which is among its weights,
    or LLaMA-Factory's beside them, which the model then has. Says whether it was the latter."""
    from peft import TaskType

    brings_own = brings_head(lora)
    if not is_reward_model(model):
        if brings_own:
            raise ModelError(f"adapter_name_or_path: {path} is a reward model, which writes no text")
        return False
    if brings_own:
        if dtype := _read_dtype(folder / WEIGHTS, HEAD_IN_FILE):
            cast("nn.Module", model.score).to(dtype)
        return False
    has_head = set_value_head(model, folder)
    if is_trainable and not has_head:
        raise ModelError(
            f"adapter_name_or_path: {path} is of a language model and brings no head for scores: write "
            "create_new_adapter: true to train a new one, with a head, upon it"
        )
    lora.task_type = TaskType.SEQ_CLS if is_trainable else None
    return has_head


def brings_head(lora: LoraConfig) -> bool:
    """Whether an adapter is one of a reward model, its head among its weights."""
    from peft import TaskType

    return lora.task_type == TaskType.SEQ_CLS


def _with_own_head(model: PreTrainedModel, lora: LoraConfig, folder: Path) -> PeftModel:
    """The model with an adapter that has no head among its weights, the model's own trained beside it."""
    from peft import get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    head = cast("nn.Linear", model.score).weight.detach().clone()
    lora.inference_mode = False
    adapted = get_peft_model(model, lora, TRAINED)
    assert not isinstance(adapted, tuple)
    set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS) | {HEAD_IN_FILE: head}, TRAINED)
    return adapted


def _name_head(policy: PeftModel) -> None:
    """Name the head once among the modules saved in full: peft lists whatever it might be called, again each
    time that an adapter is loaded."""
    config: Any = policy.peft_config[TRAINED]
    if brings_head(config):
        others = [name for name in config.modules_to_save if name not in (HEAD, "classifier")]
        config.modules_to_save = [*dict.fromkeys(others), HEAD]


def find_adapter(path: str, config: ModelConfig) -> Path:
    """The folder of an adapter, fetched from the hub if it is not one here; it has both its files."""
    folder = Path(path).expanduser()
    if not folder.is_dir() and path.count("/") == 1 and not path.startswith((".", "/", "~")):
        folder = _download(path, config)
    if not folder.is_dir():
        raise ModelError(f"adapter_name_or_path: the folder {path} does not exist")
    missing = [name for name in (_CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        pickled = " (a pickle is not opened)" if (folder / "adapter_model.bin").is_file() else ""
        raise ModelError(f"adapter_name_or_path: {path} has no {' and no '.join(missing)}{pickled}")
    return folder


def _download(path: str, config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                path, cache_dir=config.cache_dir, allow_patterns=["*.json", "*.safetensors", "*.jinja"]
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"adapter_name_or_path: {path} is no folder here, and the hub does not give it: {reason}"
        ) from error


def read_adapter_config(folder: Path) -> LoraConfig:
    """The config of an adapter. Raises `ModelError` unless it is one of LoRA."""
    from peft import LoraConfig

    file = folder / _CONFIG
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = values.get("peft_type")
        if kind != "LORA":
            raise ModelError(f"{file}: peft_type {kind} is not known here, only LORA")
        # Through peft's own reader, which drops keys of newer versions.
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is damaged: {error}") from error
    assert isinstance(config, LoraConfig)
    if str(config.init_lora_weights).startswith(_CHANGE_THE_BASE):
        raise ModelError(
            f"{file}: init_lora_weights {config.init_lora_weights} took the start of this adapter out of the "
            "base, and only its run had what was left. A finished prefkit run saves it as plain LoRA; a "
            "checkpoint does not."
        )
    return config


def _read_shapes(file: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(str(file), "pt") as tensors:
        return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _read_dtype(file: Path, name: str) -> torch.dtype | None:
    """Number format of a tensor; None where it is not in the file."""
    from safetensors import safe_open

    with safe_open(str(file), "pt") as tensors:
        return tensors.get_tensor(name).dtype if name in tensors.keys() else None  # noqa: SIM118


def check_ranks(path: str, lora: LoraConfig, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises `ModelError` when a matrix among `shapes`, by name, has another rank than the config says."""
    allowed = {lora.r, *(lora.rank_pattern or {}).values()}
    for name, shape in shapes.items():
        rank = (
            shape[0] if ".lora_A." in name else shape[1] if ".lora_B." in name and len(shape) > 1 else lora.r
        )
        if rank not in allowed:
            raise ModelError(f"{path}: {name} has rank {rank}, but {_CONFIG} says r: {lora.r}")


def _fit_rows(model: PreTrainedModel, shapes: dict[str, list[int]]) -> None:
    """Resize the vocabulary to that of the embedding in the adapter; its rows replace the new ones."""
    rows = [shape[0] for name, shape in shapes.items() if "embed" in name and "lora" not in name]
    if rows and rows[0] > num_rows(model):
        model.resize_token_embeddings(rows[0], mean_resizing=False)


def check_complete(path: str, adapted: PeftModel, names: Iterable[str], adapter: str = TRAINED) -> None:
    """Raises `ModelError` unless the tensors of a file, by name, are those of an adapter: peft loads what
    fits and says nothing of the rest."""
    from peft import get_peft_model_state_dict

    found = set(names)
    wanted = set(get_peft_model_state_dict(adapted, adapter_name=adapter, save_embedding_layers=False))
    if surplus := sorted(found - wanted):
        raise ModelError(
            f"{path} is not an adapter of {base_of(adapted).name_or_path}, which has no place for "
            f"{surplus[0]} ({len(surplus)} such)"
        )
    if absent := sorted(wanted - found):
        raise ModelError(f"{path}: {WEIGHTS} lacks {absent[0]} ({len(absent)} such)")


def freeze_initial(policy: PeftModel) -> None:
    """Put a frozen copy of the trained adapter, as it is now, beside it."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(policy.peft_config[TRAINED])
    config.init_lora_weights = False  # type: ignore[attr-defined]
    config.inference_mode = True
    state = get_peft_model_state_dict(policy, adapter_name=TRAINED, save_embedding_layers=False)
    policy.add_adapter(INITIAL, config)
    set_peft_model_state_dict(policy, state, adapter_name=INITIAL)
    policy.set_adapter(TRAINED)


def save_as_plain_lora(policy: PeftModel, folder: Path) -> None:
    """Write a PiSSA adapter as an ordinary one of twice the rank, upon the base as it was.

    PiSSA trains A, B upon W - A0 B0, which nobody else has; [A, -A0] and [B, B0] say the same upon W.
    Needs the frozen copy of `freeze_initial` for A0 and B0.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    now = get_peft_model_state_dict(policy, adapter_name=TRAINED, save_embedding_layers=False)
    then = get_peft_model_state_dict(policy, adapter_name=INITIAL, save_embedding_layers=False)
    tensors = {}
    for name, weights in now.items():
        if ".lora_A." in name:
            weights = torch.cat([weights, then[name]], 0)
        elif ".lora_B." in name:
            weights = torch.cat([weights, -then[name]], 1)
        tensors[name] = weights.detach().cpu().contiguous()
    config = copy.deepcopy(policy.peft_config[TRAINED])
    # The scale is alpha / rank, and with rslora alpha / sqrt(rank).
    factor = math.sqrt(2) if config.use_rslora else 2  # type: ignore[attr-defined]
    config.r, config.lora_alpha = 2 * config.r, config.lora_alpha * factor  # type: ignore[attr-defined]
    config.init_lora_weights, config.inference_mode = True, True  # type: ignore[attr-defined]
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def save_without_head(policy: PeftModel, folder: Path) -> None:
    """Write the adapter of a reward model as one of a language model, its head left out."""
    policy.save_pretrained(str(folder), selected_adapters=[TRAINED], save_embedding_layers=False)
    leave_out_head(folder, str(base_of(policy).name_or_path))


def leave_out_head(folder: Path, base: str) -> None:
    """Make of the adapter of a reward model, in its files, one of the language model `base`."""
    from peft import TaskType
    from safetensors.torch import load_file, save_file

    tensors = {name: it.clone() for name, it in load_file(folder / WEIGHTS).items() if name != HEAD_IN_FILE}
    values = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    values |= {"task_type": TaskType.CAUSAL_LM.value, "base_model_name_or_path": base}
    values["modules_to_save"] = [name for name in values["modules_to_save"] or () if name != HEAD] or None
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    replace_text(folder / _CONFIG, json.dumps(values, indent=2, sort_keys=True) + "\n")


@contextmanager
def without_lora(policy: PeftModel) -> Iterator[None]:
    """The low-rank matrices switched off within the block, modules that are trained in full left as they are:
    `disable_adapter` would take the head away too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def as_it_was(policy: nn.Module) -> Iterator[None]:
    """Put back who needs a gradient and who trains, of whatever was there before the block.

    peft has both follow the adapter that is active.
    """
    gradients = [(weights, weights.requires_grad) for weights in policy.parameters()]
    modes = [(module, module.training) for module in policy.modules()]
    try:
        yield
    finally:
        for weights, needs_gradient in gradients:
            weights.requires_grad = needs_gradient
        for module, trains in modes:
            module.training = trains


@contextmanager
def initial_adapter(policy: PeftModel) -> Iterator[None]:
    """The frozen copy in place of the trained adapter within the block."""
    with as_it_was(policy):
        policy.set_adapter(INITIAL, inference_mode=True)
        try:
            yield
        finally:
            policy.set_adapter(TRAINED)


def base_of(model: nn.Module) -> PreTrainedModel:
    """The model under the adapter, if there is one."""
    from peft import PeftModel

    return cast("PreTrainedModel", model.get_base_model() if isinstance(model, PeftModel) else model)


def linear_names(model: PreTrainedModel, frozen: Sequence[str] = ()) -> set[str]:
    """Last part of the name of each linear layer, heads and those that are `frozen` left out.

    Left out is also what peft cannot adapt: projections of a Mamba layer whose weights its kernels read past
    their forward; routers; and, beside experts that are one tensor, the dense layers of the same name, which
    peft takes for those. What is left out is logged.
    """
    head = model.get_output_embeddings()
    kept = set(frozen)
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and name != HEAD
        and name not in kept
        and _is_plain(module)
    }
    refused = set()
    if any(hasattr(module, "A_log") and hasattr(module, "D") for module in model.modules()):
        refused |= names & {"out_proj", "dt_proj"}
    if any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters()):
        logger.warning("lora_target: all adapts no experts here; finetuning_type freeze and full train them")
        refused |= names & {"gate_proj", "up_proj", "down_proj"}
    if refused:
        logger.warning(
            "lora_target: all leaves out %s, which peft cannot adapt here", ", ".join(sorted(refused))
        )
    return names - refused


def _is_plain(module: nn.Module) -> bool:
    """Whether a linear layer returns its product and nothing else, as some routers do."""
    return type(module).__module__.startswith(("torch.", "bitsandbytes."))
