"""Models and adapters: read, refused, and free of dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from prefkit.config import ModelConfig, TuningConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.template import ChatTemplate
from prefkit.model.adapter import add_lora, linear_names
from prefkit.model.generate import generate_responses
from prefkit.model.load import ModelError, load_causal_lm, load_tokenizer
from tests.conftest import make_model


def config(path: object, **keys: object) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(path), **keys)  # type: ignore[arg-type]


def test_dtype_is_that_of_the_checkpoint_unless_given(tiny_model: Path) -> None:
    assert load_causal_lm(config(tiny_model)).dtype == torch.float32
    assert load_causal_lm(config(tiny_model, dtype="bfloat16")).dtype == torch.bfloat16


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What transformers is asked for when a model is read."""
    options: dict[str, Any] = {}

    def read(path: object, **given: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
        options.update(given, path=path)
        return make_model(), {"missing_keys": set()}

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda path, **given: LlamaConfig())
    return options


def test_what_is_fetched_is_what_was_asked_for(asked: dict[str, Any]) -> None:
    keys = {"model_revision": "v2", "cache_dir": "/models", "trust_remote_code": True}
    load_causal_lm(config("me/mine", **keys))
    assert (asked["path"], asked["revision"]) == ("me/mine", "v2")
    assert (asked["cache_dir"], asked["trust_remote_code"]) == ("/models", True)
    load_causal_lm(config("me/mine"))
    assert (asked["revision"], asked["cache_dir"], asked["trust_remote_code"]) == ("main", None, False)


@pytest.mark.parametrize(("quantization_type", "double_quantization"), [("nf4", True), ("fp4", False)])
def test_how_weights_are_quantised(
    asked: dict[str, Any], quantization_type: str, double_quantization: bool
) -> None:
    keys = {"quantization_type": quantization_type, "double_quantization": double_quantization}
    load_causal_lm(config("me/mine", quantization_bit=4, **keys))
    wanted = asked["quantization_config"]
    assert (wanted.bnb_4bit_quant_type, wanted.bnb_4bit_use_double_quant) == tuple(keys.values())
    assert (wanted.load_in_4bit, wanted.load_in_8bit) == (True, False)


@pytest.mark.parametrize(
    ("path", "message"),
    [("./nowhere", "does not exist"), ("/nowhere", "does not exist"), ("a/b/c", "does not exist")],
)
def test_missing_folder(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_tokenizer(config(path))


def test_an_empty_folder_and_a_name_that_is_not_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_causal_lm(config(tmp_path))
    with pytest.raises(ModelError, match=r"looked for on the Hugging Face hub"):
        load_causal_lm(config("nobody/nothing"))


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    make_model().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(ModelError, match="safetensors"):
        load_causal_lm(config(tmp_path))


def test_the_base_models_dropout_is_off(tmp_path: Path) -> None:
    make_model(attention_dropout=0.5).save_pretrained(tmp_path)
    model = load_causal_lm(config(tmp_path)).train()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_fresh_adapter_changes_nothing_and_is_fp32() -> None:
    model = make_model().to(torch.bfloat16)
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    policy = add_lora(model, TuningConfig())
    assert torch.equal(policy(input_ids=ids).logits, before)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert "lm_head" not in linear_names(model)


def test_generation_pads_left_and_stops_at_the_end_token(tokenizer) -> None:
    """A batch of unequal prompts gives what each gives alone."""
    policy = add_lora(make_model(), TuningConfig())
    template = ChatTemplate(tokenizer, "chatml")
    prompts = [TokenizedExample(ids, [], (), "") for ids in ([7, 8, 9, 10, 11], [12])]
    batches: list[None] = []
    together = generate_responses(policy, template, prompts, 6, lambda: batches.append(None))
    assert len(batches) == 1
    assert together == [generate_responses(policy, template, [prompt], 6)[0] for prompt in prompts]
