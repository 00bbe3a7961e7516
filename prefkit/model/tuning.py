"""Which weights of a model are trained, and in which numbers: adapter, some layers, or all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from prefkit.config.schema import ModelConfig, TuningConfig
from prefkit.model.adapter import add_lora, base_of, start_from_adapters
from prefkit.model.errors import ModelError
from prefkit.model.reward import HEAD, HEAD_WEIGHT, is_reward_model
from prefkit.model.vision import PARTS, is_frozen

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def prepare_for_training(
    model: PreTrainedModel,
    model_config: ModelConfig,
    config: TuningConfig,
    resized: bool,
    mixed_precision: bool,
    one_dtype: torch.dtype | None = None,
) -> PreTrainedModel | PeftModel:
    """The policy: the right weights trainable, and these in fp32 unless `pure_bf16`.

    Without `mixed_precision` one forward cannot mix number formats: for freeze the frozen weights are fp32 as
    well, and modules trained in full beside an adapter stay in the dtype of the base. Where the vocabulary
    was `resized`, embedding and head are trained. The head of a reward model is always trained, in fp32
    unless `pure_bf16`, and freeze holds all of such a model so: what is saved has one number format, and
    reading it again rounds nothing. `one_dtype` is the format of all weights where an engine wants it so,
    which those that were read have already. Raises `ModelError` for absent modules or adapters.
    """
    from peft import PeftModel

    if config.freeze_language_model and model.config.model_type not in PARTS:
        raise ModelError(f"freeze_language_model: {model.name_or_path} does not see: remove the key")
    policy: PreTrainedModel | PeftModel = model
    if config.finetuning_type == "lora":
        started = start_from_adapters(model, model_config, config.create_new_adapter)
        # Still an adapter upon the model: that one is trained on.
        policy = started if isinstance(started, PeftModel) else add_lora(started, config, resized)
    elif config.finetuning_type == "freeze":
        vocabulary = _vocabulary_weights(model) if resized else set()
        head = {HEAD_WEIGHT} if is_reward_model(model) else set()
        _train_only(model, freeze_names(model, config) | vocabulary | head)
    if config.finetuning_type != "lora":
        for name, weights in model.named_parameters():
            weights.requires_grad_(weights.requires_grad and not is_frozen(name, model.config, config))
    if one_dtype is None:
        _set_dtypes(policy, config, mixed_precision)
    else:
        set_one_dtype(policy, one_dtype)
    return policy


def _set_dtypes(policy: PreTrainedModel | PeftModel, config: TuningConfig, mixed_precision: bool) -> None:
    dtype = torch.bfloat16 if config.pure_bf16 else torch.float32
    saved_as_one = is_reward_model(base_of(policy))
    whole = config.pure_bf16 or (config.finetuning_type == "freeze" and (saved_as_one or not mixed_precision))
    # Modules beside an adapter get what the layers before them put out, in the dtype of the base; the head of
    # a reward model casts it.
    in_base_dtype = config.finetuning_type == "lora" and not mixed_precision
    for name, weights in policy.named_parameters():
        casts = "lora_" in name or HEAD in name.split(".")
        trained = weights.requires_grad and (casts or not in_base_dtype)
        if weights.is_floating_point() and (trained or whole):
            weights.data = weights.data.to(dtype)


def set_one_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Give all weights one number format."""
    for weights in model.parameters():
        if weights.is_floating_point() and weights.dtype != dtype:
            weights.data = weights.data.to(dtype)


def freeze_names(model: PreTrainedModel, config: TuningConfig) -> set[str]:
    """Names of the parameters that `freeze` trains."""
    prefix, num_layers = _find_layers(model)
    count = config.freeze_trainable_layers
    if abs(count) > num_layers:
        raise ModelError(f"freeze_trainable_layers: the model has {num_layers} layers, not {abs(count)}")
    chosen = range(num_layers - count, num_layers) if count > 0 else range(-count)
    inside: dict[str, str] = {}  # parameter -> its path below the layer
    outside: dict[str, str] = {}
    for name, _ in model.named_parameters():
        number, _, path = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            outside[name] = name
        elif int(number) in chosen:
            inside[name] = path
    trained = set()
    for module in config.freeze_trainable_modules if chosen else ():
        trained |= set(inside) if module == "all" else _below("freeze_trainable_modules", module, inside)
    for module in config.freeze_extra_modules:
        trained |= _below("freeze_extra_modules", module, outside)
    return trained


def _below(key: str, module: str, paths: dict[str, str]) -> set[str]:
    """Parameters with `module` in their path."""
    found = {name for name, path in paths.items() if module in path.split(".")[:-1]}
    if not found:
        known = sorted({part for path in paths.values() for part in path.split(".")[:-1]})
        raise ModelError(f"{key}: no module named {module}; there are {', '.join(known)}")
    return found


def _find_layers(model: PreTrainedModel) -> tuple[str, int]:
    """(prefix of the names in the decoder's layers, how many there are)."""
    number = model.config.get_text_config().num_hidden_layers
    decoder = set(model.get_decoder().modules())  # not the layers of a vision tower
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number and module in decoder:
            return f"{name}.", number
    raise ModelError(f"finetuning_type: freeze finds no list of {number} layers in {type(model).__name__}")


def _vocabulary_weights(model: PreTrainedModel) -> set[str]:
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    wanted = {id(weights) for layer in layers if layer is not None for weights in layer.parameters()}
    return {name for name, weights in model.named_parameters() if id(weights) in wanted}


def _train_only(model: PreTrainedModel, names: set[str]) -> None:
    for name, weights in model.named_parameters():
        weights.requires_grad_(name in names)
