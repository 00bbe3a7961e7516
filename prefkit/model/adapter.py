"""Put a LoRA adapter on a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

from prefkit.config.schema import AdapterConfig
from prefkit.model.load import ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, config: AdapterConfig) -> PeftModel:
    """The model with a fresh adapter, whose weights are fp32 and alone trainable.

    `lora_target: all` means every linear layer but the head. Raises `ModelError` when a target is not in
    the model.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    names = linear_names(model)
    targets = sorted(names) if config.lora_target == ("all",) else list(config.lora_target)
    modules = {name for full, _ in model.named_modules() for name in (full, full.rsplit(".", 1)[-1])}
    absent = [name for name in (*targets, *config.additional_target) if name not in modules]
    if absent:
        raise ModelError(
            f"lora_target/additional_target: no module named {', '.join(absent)}; "
            f"linear layers here: {', '.join(sorted(names))}"
        )
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=list(config.additional_target) or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )
    adapted = get_peft_model(model, lora)
    assert not isinstance(adapted, tuple)
    return adapted


def base_of(model: PeftModel) -> PreTrainedModel:
    """The model under the adapter."""
    return cast("PreTrainedModel", model.get_base_model())


def linear_names(model: PreTrainedModel) -> set[str]:
    """Last part of the name of each linear layer, the head left out."""
    head = model.get_output_embeddings()
    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
