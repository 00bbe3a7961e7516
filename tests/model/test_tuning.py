"""Which weights are trained, and in which numbers."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefkit.config import ModelConfig, TuningConfig, load_config
from prefkit.model.errors import ModelError
from prefkit.model.tuning import freeze_names, prepare_for_training
from prefkit.runs.report import make_console
from prefkit.train.run import train
from tests.conftest import make_model
from tests.model.test_policy import SHARING

MODEL = ModelConfig(model_name_or_path="m")
IDS = torch.tensor([[5, 6, 7, 8]])
FP32, BF16 = torch.float32, torch.bfloat16
ATTENTION = [f"self_attn.{name}_proj" for name in "koqv"]
MLP = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
LAYER = ["input_layernorm", *MLP, "post_attention_layernorm", *ATTENTION]


def freeze(**keys) -> TuningConfig:
    return TuningConfig(finetuning_type="freeze", **keys)


def weights(number: int, names: list[str]) -> list[str]:
    """Names of the weights of modules in one layer."""
    return [f"model.layers.{number}.{name}.weight" for name in names]


def trained(model: torch.nn.Module) -> list[str]:
    return sorted(name for name, weight in model.named_parameters() if weight.requires_grad)


def dtypes(model: torch.nn.Module) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """(those of trained, those of frozen weights)"""
    return tuple(
        {w.dtype for w in model.parameters() if w.requires_grad is wanted} for wanted in (True, False)
    )


def prepare(config: TuningConfig, mixed_precision: bool = False, dtype: torch.dtype = BF16):
    return prepare_for_training(make_model().to(dtype), MODEL, config, False, mixed_precision)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({}, weights(1, LAYER) + weights(2, LAYER)),
        ({"freeze_trainable_layers": 1}, weights(2, LAYER)),
        ({"freeze_trainable_layers": -1}, weights(0, LAYER)),
        ({"freeze_trainable_layers": -2}, weights(0, LAYER) + weights(1, LAYER)),
        ({"freeze_trainable_layers": 1, "freeze_trainable_modules": ("mlp",)}, weights(2, MLP)),
        (
            {"freeze_trainable_layers": 2, "freeze_trainable_modules": ("q_proj", "input_layernorm")},
            weights(1, ["input_layernorm", "self_attn.q_proj"])
            + weights(2, ["input_layernorm", "self_attn.q_proj"]),
        ),
        (
            {"freeze_trainable_layers": 0, "freeze_extra_modules": ("lm_head", "norm")},
            ["lm_head.weight", "model.norm.weight"],
        ),
        (
            {
                "freeze_trainable_layers": -1,
                "freeze_trainable_modules": ("up_proj",),
                "freeze_extra_modules": ("embed_tokens",),
            },
            ["model.embed_tokens.weight", *weights(0, ["mlp.up_proj"])],
        ),
    ],
)
def test_freeze_names_what_it_trains(keys: dict, names: list[str]) -> None:
    assert sorted(freeze_names(make_model(num_hidden_layers=3), freeze(**keys))) == names


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"freeze_trainable_layers": 4}, "freeze_trainable_layers: the model has 3 layers, not 4"),
        ({"freeze_trainable_layers": -4}, "freeze_trainable_layers: the model has 3 layers, not 4"),
        (
            {"freeze_trainable_modules": ("mlp", "attention")},
            "freeze_trainable_modules: no module named attention; there are down_proj, gate_proj, "
            "input_layernorm, k_proj, mlp, o_proj, post_attention_layernorm, q_proj, self_attn, up_proj, "
            "v_proj",
        ),
        (
            {"freeze_trainable_layers": 0, "freeze_extra_modules": ("weight",)},  # no module
            "freeze_extra_modules: no module named weight; there are embed_tokens, lm_head, model, norm",
        ),
        (
            {"freeze_extra_modules": ("q_proj",)},  # inside the layers
            "freeze_extra_modules: no module named q_proj; there are embed_tokens, lm_head, model, norm",
        ),
    ],
)
def test_freeze_lists_what_the_model_has(keys: dict, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        freeze_names(make_model(num_hidden_layers=3), freeze(**keys))
    assert str(caught.value) == message


def test_freeze_needs_a_list_of_layers() -> None:
    model = make_model()
    model.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match="freeze finds no list of 5 layers in LlamaForCausalLM"):
        freeze_names(model, freeze())


def test_layers_of_a_composite_model_are_those_of_its_language_model() -> None:
    names = freeze_names(make_model("gemma3", **SHARING["gemma3"]), freeze(freeze_trainable_layers=1))
    assert len(names) == 13
    assert all(name.startswith("model.language_model.layers.1.") for name in names)


def test_layers_of_a_vision_tower_are_not_taken_for_those_of_the_language_model() -> None:
    changes = SHARING["gemma3"]
    vision = {**changes["vision_config"], "num_hidden_layers": 2}
    names = freeze_names(make_model("gemma3", **{**changes, "vision_config": vision}), freeze())
    assert {name.split(".layers.")[0] for name in names} == {"model.language_model"}


@pytest.mark.parametrize(
    ("config", "mixed_precision", "expected"),
    [
        (TuningConfig(finetuning_type="full"), False, ({FP32}, set())),
        (TuningConfig(finetuning_type="full"), True, ({FP32}, set())),
        (TuningConfig(finetuning_type="full", pure_bf16=True), True, ({BF16}, set())),
        (freeze(freeze_trainable_layers=1), False, ({FP32}, {FP32})),
        (freeze(freeze_trainable_layers=1), True, ({FP32}, {BF16})),
        (freeze(freeze_trainable_layers=1, pure_bf16=True), False, ({BF16}, {BF16})),
        (TuningConfig(), False, ({FP32}, {BF16})),
        (TuningConfig(), True, ({FP32}, {BF16})),
        (TuningConfig(pure_bf16=True), False, ({BF16}, {BF16})),
    ],
)
def test_numbers_of_trained_and_frozen_weights(config, mixed_precision: bool, expected) -> None:
    policy = prepare(config, mixed_precision)
    assert dtypes(policy) == expected
    with torch.autocast("cpu", BF16, enabled=mixed_precision):
        policy(input_ids=IDS).logits.float().sum().backward()
    assert all(weight.grad is not None for weight in policy.parameters() if weight.requires_grad)


def test_pure_bf16_casts_an_fp32_model_too() -> None:
    assert dtypes(prepare(TuningConfig(pure_bf16=True), dtype=FP32)) == ({BF16}, {BF16})


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "norm"])
@pytest.mark.parametrize(("mixed_precision", "dtype"), [(False, BF16), (True, FP32)])
def test_modules_beside_an_adapter_run_with_and_without_mixed_precision(
    target: str, mixed_precision: bool, dtype: torch.dtype
) -> None:
    policy = prepare(TuningConfig(additional_target=(target,)), mixed_precision)
    with torch.autocast("cpu", BF16, enabled=mixed_precision):
        policy(input_ids=IDS)
    found = {"lora_" in n: w.dtype for n, w in policy.named_parameters() if w.requires_grad}
    assert found == {True: FP32, False: dtype}


def test_full_trains_every_weight() -> None:
    policy = prepare(TuningConfig(finetuning_type="full"))
    assert trained(policy) == sorted(name for name, _ in make_model().named_parameters())


def test_freeze_trains_what_it_names() -> None:
    policy = prepare(freeze(freeze_trainable_layers=1, freeze_extra_modules=("norm",)))
    assert trained(policy) == [*weights(1, LAYER), "model.norm.weight"]


def test_lora_trains_the_adapter_and_what_is_beside_it() -> None:
    config = TuningConfig(lora_rank=2, lora_target=("q_proj",), additional_target=("lm_head",))
    prefix = "base_model.model."
    assert trained(prepare(config)) == [
        f"{prefix}lm_head.modules_to_save.default.weight",
        *(
            f"{prefix}model.layers.{layer}.self_attn.q_proj.lora_{matrix}.default.weight"
            for layer in (0, 1)
            for matrix in "AB"
        ),
    ]


def test_casting_changes_no_value() -> None:
    before = make_model().to(BF16).state_dict()
    after = prepare(TuningConfig(finetuning_type="full")).state_dict()
    assert all(torch.equal(after[name], weight.float()) for name, weight in before.items())


def test_a_freeze_run_moves_exactly_the_chosen_weights(
    write_config, tmp_path: Path, tiny_model: Path
) -> None:
    config = write_config(
        finetuning_type="freeze",
        freeze_trainable_layers=1,
        freeze_trainable_modules="self_attn",
        freeze_extra_modules="lm_head",
    )
    train(load_config(config).config, make_console(io.StringIO()))
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "out"))
    assert before.keys() == after.keys()
    moved = sorted(name for name in before if not torch.equal(before[name], after[name]))
    assert moved == ["lm_head.weight", *weights(1, ATTENTION)]
