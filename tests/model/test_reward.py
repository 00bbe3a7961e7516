"""Reward models: what transformers scores, in both layouts, with a head that is new, saved or foreign."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from prefkit.config import ModelConfig
from prefkit.config.schema import TuningConfig
from prefkit.data.packing import Layout, pack
from prefkit.model.adapter import add_lora, linear_names, start_from_adapters
from prefkit.model.attention import use_shared_prompts
from prefkit.model.errors import ModelError
from prefkit.model.load import load_causal_lm
from prefkit.model.reward import (
    HEAD_WEIGHT,
    VALUE_HEAD,
    attach_scores_forward,
    is_reward_model,
    load_reward_base,
    read_value_head,
    response_scores,
    write_value_head,
)
from tests.conftest import SMALL, make_model
from tests.model.test_policy import EXAMPLES, SHARING, gradients, loss_of

FAMILIES = ["llama", "llama tied", "mistral window", "mixtral", "qwen2", "qwen3", "gemma2", "phi3", "glm"]


def make_reward_model(model_type: str = "llama", **changes: Any) -> Any:
    """A random reward model in fp32, the same for the same arguments; no token pads."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, "num_labels": 1, "pad_token_id": 0, **changes})
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


def make_policy(name: str, layout: Layout) -> Any:
    model = make_reward_model(name.split()[0], **SHARING[name])
    if layout == "shared":
        use_shared_prompts(model)
    torch.manual_seed(1)
    targets = sorted(linear_names(model))
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets, init_lora_weights=False)
    policy = get_peft_model(model, lora)
    attach_scores_forward(model)
    return policy


def plain_scores(policy: Any) -> Tensor:
    """Scores of each response from the model's own forward, one plain sequence at a time."""
    rows = [[*example.prompt_ids, *ids] for example in EXAMPLES for ids in example.response_ids]
    return torch.stack([policy(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # peft, of adapted experts
@pytest.mark.parametrize("name", FAMILIES)
def test_shared_equals_repeat_equals_plain(name: str) -> None:
    plain_policy = make_policy(name, "repeat")
    plain = plain_scores(plain_policy)
    expected = gradients(plain_policy, loss_of(plain))
    assert any(HEAD_WEIGHT.split(".")[0] in parameter for parameter in expected)
    layouts: tuple[Layout, ...] = ("shared", "repeat")
    for layout in layouts:
        policy = make_policy(name, layout)
        scores = response_scores(policy, pack(EXAMPLES, layout).to_dict())
        torch.testing.assert_close(scores, plain, atol=1e-5, rtol=1e-5)
        found = gradients(policy, loss_of(scores))
        assert found.keys() == expected.keys()
        for parameter, gradient in expected.items():
            assert (found[parameter] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7


def test_no_logits_of_the_vocabulary_are_made() -> None:
    model = make_reward_model()
    attach_scores_forward(model)
    shapes: list[int] = []
    for module in model.modules():
        module.register_forward_hook(
            lambda module, given, output: shapes.append(getattr(output, "shape", [0])[-1])
        )
    scores = response_scores(model, pack(EXAMPLES, "repeat").to_dict())
    assert scores.shape == (6,) and 1 in shapes and SMALL["vocab_size"] not in shapes


def test_a_score_is_fp32_under_mixed_precision() -> None:
    model = make_reward_model()
    attach_scores_forward(model)
    batch = pack(EXAMPLES, "repeat").to_dict()
    hidden: list[Tensor] = []
    model.score.register_forward_hook(lambda module, given, output: hidden.append(given[0]))
    with torch.autocast("cpu", torch.bfloat16):
        scores = response_scores(model, batch)
    assert scores.dtype == torch.float32
    # Exact in the head: a bfloat16 product would have three digits.
    assert torch.equal(scores, torch.nn.functional.linear(hidden[0], model.score.weight)[:, 0])
    assert not torch.equal(scores, scores.bfloat16().float())


def test_a_wrapper_that_casts_is_noticed() -> None:
    with pytest.raises(TypeError, match=r"scores arrived as torch.bfloat16"):
        response_scores(
            lambda **given: {"scores": torch.zeros(6, dtype=torch.bfloat16)},  # type: ignore[arg-type]
            pack(EXAMPLES, "repeat").to_dict(),
        )


def config(path: object, **keys: Any) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(path), **keys)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a reward model."""
    make_reward_model().save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


def lose(file: Path, name: str) -> None:
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})


def test_a_new_head_is_small_and_of_the_seed(tiny_model: Path) -> None:
    one, same, other = (load_reward_base(config(tiny_model), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)
    assert one.score.weight.shape == (1, 32) and one.score.bias is None
    assert 0.5 < one.score.weight.std() / SMALL["initializer_range"] < 1.5
    torch.testing.assert_close(
        one.model.embed_tokens.weight, load_causal_lm(config(tiny_model)).model.embed_tokens.weight
    )


def test_a_saved_reward_model_goes_on_with_its_head(saved: Path) -> None:
    model = load_reward_base(config(saved), seed=1)
    assert torch.equal(model.score.weight, make_reward_model().score.weight)


def test_a_head_that_must_be_there_and_is_not(saved: Path) -> None:
    lose(saved / "model.safetensors", HEAD_WEIGHT)
    for seed in (None, 1):
        with pytest.raises(ModelError, match=r"the weights lack score.weight \(1 such\)"):
            load_reward_base(config(saved), seed=seed)


def test_other_missing_weights_and_several_scores(saved: Path, tiny_model: Path, tmp_path: Path) -> None:
    lose(saved / "model.safetensors", "model.norm.weight")
    with pytest.raises(ModelError, match=r"the weights lack model.norm.weight"):
        load_reward_base(config(saved), seed=1)
    make_reward_model(num_labels=2).save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match="gives 2 scores; a reward is one"):
        load_reward_base(config(tmp_path / "two"), seed=1)


def test_a_reward_model_writes_no_text(saved: Path) -> None:
    with pytest.raises(ModelError, match="is a reward model, which gives scores and writes no text"):
        load_causal_lm(config(saved))


def put_value_head(folder: Path, bias: float = 0.0, size: int = 32) -> Tensor:
    """What LLaMA-Factory writes beside a model or adapter; its weight."""
    weight = torch.linspace(-1, 1, size).view(1, -1)
    tensors = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([bias])}
    save_file(tensors, folder / VALUE_HEAD)
    return weight


def test_the_head_of_llamafactory_beside_a_model(tmp_path: Path, caplog: Any) -> None:
    make_model().save_pretrained(tmp_path)
    weight = put_value_head(tmp_path, bias=0.5)
    with caplog.at_level(logging.WARNING):
        model = load_reward_base(config(tmp_path))
    assert torch.equal(model.score.weight, weight)
    assert "its bias, 0.5, is the same for every score" in caplog.text
    put_value_head(tmp_path, size=16)
    with pytest.raises(ModelError, match="is for another hidden size, 16"):
        load_reward_base(config(tmp_path))
    (tmp_path / VALUE_HEAD).write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="is no value head of LLaMA-Factory"):
        load_reward_base(config(tmp_path))
    (tmp_path / VALUE_HEAD).rename(tmp_path / "value_head.bin")
    with pytest.raises(ModelError, match="is a pickle, which is not opened"):
        load_reward_base(config(tmp_path))


def test_a_written_value_head_is_read_again(tmp_path: Path) -> None:
    weight = torch.linspace(-1, 1, 8, dtype=torch.bfloat16, requires_grad=True).view(1, -1)
    write_value_head(tmp_path, weight, 0.1)
    found = read_value_head(tmp_path)
    assert found is not None and found[1] == pytest.approx(0.1)
    assert found[0].dtype == torch.float32 and torch.equal(found[0], weight.detach().float())
    assert load_file(tmp_path / VALUE_HEAD)["v_head.summary.bias"].shape == (1,)


def test_the_head_of_llamafactory_beside_an_adapter(tiny_model: Path, tmp_path: Path) -> None:
    policy = add_lora(make_model(), TuningConfig(lora_rank=2))
    policy.save_pretrained(str(tmp_path))
    given = config(tiny_model, adapter_name_or_path=(str(tmp_path),))
    with pytest.raises(ModelError, match="brings no head for scores: write create_new_adapter: true"):
        start_from_adapters(load_reward_base(given, seed=1), given, create_new=False)
    weight = put_value_head(tmp_path)
    model: Any = start_from_adapters(load_reward_base(given, seed=1), given, create_new=False)
    assert torch.equal(model.get_base_model().score.weight, weight)
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    assert model.peft_config["default"].modules_to_save == ["score"]
    merged: Any = start_from_adapters(load_reward_base(given, seed=1), given, create_new=True)
    assert is_reward_model(merged) and torch.equal(merged.score.weight, weight)


def test_an_adapter_with_a_head_upon_a_language_model(tiny_model: Path, tmp_path: Path) -> None:
    base = load_reward_base(config(tiny_model), seed=1)
    add_lora(base, TuningConfig(lora_rank=2)).save_pretrained(str(tmp_path))
    given = config(tiny_model, adapter_name_or_path=(str(tmp_path),))
    with pytest.raises(ModelError, match="is a reward model, which writes no text"):
        start_from_adapters(load_causal_lm(given), given, create_new=False)
    lose(tmp_path / "adapter_model.safetensors", "base_model.model.score.weight")
    with pytest.raises(ModelError, match=r"lacks base_model.model.score.weight"):
        start_from_adapters(load_reward_base(given, seed=1), given, create_new=False)
