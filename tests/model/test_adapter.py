"""Adapters: to go on from, to merge, and those that are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from prefkit.config import ModelConfig, TuningConfig
from prefkit.model.adapter import (
    add_lora,
    freeze_initial,
    initial_adapter,
    load_adapter,
    merge_adapters,
    save_as_plain_lora,
    save_without_head,
    start_from_adapters,
    without_lora,
)
from prefkit.model.errors import ModelError
from prefkit.model.load import fit_vocabulary
from tests.conftest import SMALL, make_model, make_tokenizer
from tests.model.test_policy import REPEATING, SHARING

IDS = torch.tensor([[5, 6, 7, 8, 9]])
CONFIG = ModelConfig(model_name_or_path="m")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def randomise(policy, seed: int = 0, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weights in policy.parameters():
        if weights.requires_grad:
            weights.data = torch.randn(weights.shape, generator=generator) * scale


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Saves an adapter of the tiny Llama with random weights."""

    def make(name: str = "a", seed: int = 0, **tuning) -> Path:
        policy = add_lora(make_model(), TuningConfig(**tuning))
        randomise(policy, seed)
        policy.save_pretrained(str(tmp_path / name))
        return tmp_path / name

    return make


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def test_a_loaded_adapter_is_the_saved_one_and_trains_on(make_adapter) -> None:
    folder = make_adapter()
    expected = logits(PeftModel.from_pretrained(make_model(), folder))
    policy = load_adapter(make_model(), str(folder), CONFIG, is_trainable=True)
    assert torch.equal(logits(policy), expected)
    trained = [name for name, weights in policy.named_parameters() if weights.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_all_adapters_but_the_last_are_merged(make_adapter) -> None:
    first, second = make_adapter("one", 1), make_adapter("two", 2)
    config = ModelConfig(model_name_or_path="m", adapter_name_or_path=(str(first), str(second)))
    merged = PeftModel.from_pretrained(make_model(), first).merge_and_unload()
    assert not torch.allclose(logits(merged), logits(make_model()), atol=1e-3)
    expected = logits(PeftModel.from_pretrained(merged, second))
    on_top = start_from_adapters(make_model(), config, create_new=False)
    assert isinstance(on_top, PeftModel)
    torch.testing.assert_close(logits(on_top), expected)
    whole = start_from_adapters(make_model(), config, create_new=True)
    assert not isinstance(whole, PeftModel)
    torch.testing.assert_close(logits(whole), expected, atol=1e-5, rtol=1e-4)


def test_an_adapter_that_is_not_finite_is_not_merged(make_adapter) -> None:
    folder = make_adapter()
    edit(folder, lambda tensors: tensors[next(iter(tensors))].fill_(float("nan")))
    with pytest.raises(ModelError, match="cannot be merged"):
        merge_adapters(make_model(), [str(folder)], CONFIG)


def drop_half(tensors: dict) -> None:
    for name in list(tensors)[::2]:
        del tensors[name]


def shrink_rank(tensors: dict) -> None:
    for name in tensors:
        tensors[name] = tensors[name][:4] if "lora_A" in name else tensors[name][:, :4]


def rename_layer(tensors: dict) -> None:
    for name in list(tensors):
        tensors[name.replace("layers.1", "layers.7")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_half, "adapter_model.safetensors lacks base_model"),
        (shrink_rank, "has rank 4, but adapter_config.json says r: 8"),
        (rename_layer, "not an adapter of .*no place for .*layers.7"),
    ],
)
def test_wrong_tensors_are_named(make_adapter, change, message: str) -> None:
    folder = make_adapter()
    edit(folder, change)
    with pytest.raises(ModelError, match=message):
        load_adapter(make_model(), str(folder), CONFIG)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden_size": 64, "head_dim": 16}, "not an adapter of .*size mismatch"),
        ({"num_hidden_layers": 1}, "not an adapter of .*no place for"),
        ({"num_hidden_layers": 3}, "lacks"),
    ],
)
def test_an_adapter_of_another_base_is_refused(make_adapter, model: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_adapter(make_model(**model), str(make_adapter()), CONFIG)


def test_missing_pieces_are_named(make_adapter, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the folder .*nowhere does not exist"):
        load_adapter(make_model(), str(tmp_path / "nowhere"), CONFIG)
    folder = make_adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model.safetensors \(a pickle is not opened\)"):
        load_adapter(make_model(), str(folder), CONFIG)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(ModelError, match=r"no adapter_config\.json and no adapter_model\.safetensors"):
        load_adapter(make_model(), str(folder), CONFIG)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "damaged"), ('{"peft_type": "IA3"}', "peft_type IA3 is not known here"), ("[]", "damaged")],
)
def test_other_adapter_configs_are_refused(make_adapter, text: str, message: str) -> None:
    folder = make_adapter()
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load_adapter(make_model(), str(folder), CONFIG)


def test_an_adapter_of_a_base_that_only_its_run_had_is_refused(make_adapter) -> None:
    folder = make_adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ModelError, match="pissa_niter_4 took the start of this adapter out"):
        load_adapter(make_model(), str(folder), CONFIG)


def test_truncated_weights_are_refused(make_adapter) -> None:
    folder = make_adapter()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is damaged"):
        load_adapter(make_model(), str(folder), CONFIG)


@pytest.mark.parametrize("tuning", [{}, {"use_dora": True}, {"additional_target": ("lm_head",)}])
def test_the_initial_copy_stays_while_the_adapter_moves(make_adapter, tuning: dict) -> None:
    policy = load_adapter(make_model(), str(make_adapter(**tuning)), CONFIG, is_trainable=True)
    before = logits(policy)
    freeze_initial(policy)
    trainable = {name for name, weights in policy.named_parameters() if weights.requires_grad}
    assert torch.equal(logits(policy), before)
    randomise(policy, seed=3)
    moved = logits(policy)
    assert not torch.allclose(moved, before, atol=1e-3)
    with initial_adapter(policy):
        assert torch.equal(logits(policy), before)
        assert not any(
            weights.requires_grad for name, weights in policy.named_parameters() if "initial" in name
        )
    assert torch.equal(logits(policy), moved)
    assert {name for name, weights in policy.named_parameters() if weights.requires_grad} == trainable
    assert all("initial" not in name for name in trainable)


@pytest.mark.parametrize(
    "tuning", [{"pissa_iter": -1}, {"pissa_iter": 4}, {"use_rslora": True, "pissa_iter": 4}]
)
def test_pissa_starts_at_the_base_and_is_saved_as_plain_lora(tmp_path: Path, tuning: dict) -> None:
    torch.manual_seed(0)
    policy = add_lora(make_model(), TuningConfig(pissa_init=True, lora_rank=4, **tuning))
    torch.testing.assert_close(logits(policy), logits(make_model()), atol=1e-4, rtol=1e-4)
    with policy.disable_adapter():
        assert not torch.allclose(logits(policy), logits(make_model()), atol=1e-2)
    for name, weights in policy.named_parameters():
        if weights.requires_grad:
            torch.manual_seed(len(name))
            weights.data += 0.05 * torch.randn(weights.shape)
    save_as_plain_lora(policy, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    plain = PeftModel.from_pretrained(make_model(), tmp_path)
    assert not torch.allclose(logits(policy), logits(make_model()), atol=1e-2)
    torch.testing.assert_close(logits(plain), logits(policy), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_get_rows_that_are_trained_and_come_back(tmp_path: Path, tied: bool) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(9)])
    config = ModelConfig(model_name_or_path="m", resize_vocab=True)
    model = make_model(tie_word_embeddings=tied)
    assert fit_vocabulary(model, tokenizer, config)
    policy = add_lora(model, TuningConfig(), resized=True)
    randomise(policy)
    assert logits(policy).shape[-1] == len(tokenizer)
    policy.save_pretrained(str(tmp_path), save_embedding_layers=False)
    loaded = load_adapter(make_model(tie_word_embeddings=tied), str(tmp_path), config)
    torch.testing.assert_close(logits(loaded), logits(policy))
    merged = merge_adapters(make_model(tie_word_embeddings=tied), [str(tmp_path)], config)
    torch.testing.assert_close(logits(merged), logits(policy), atol=1e-5, rtol=1e-4)


def test_a_vocabulary_that_is_too_small_is_refused_unless_it_may_grow() -> None:
    tokenizer = make_tokenizer()
    assert not fit_vocabulary(make_model(), tokenizer, CONFIG)
    tokenizer.add_tokens([f"<new{i}>" for i in range(9)])
    with pytest.raises(
        ModelError, match=f"{len(tokenizer)} tokens and the model 264 rows: write resize_vocab"
    ):
        fit_vocabulary(make_model(), tokenizer, CONFIG)


@pytest.mark.parametrize("name", [*SHARING, *REPEATING])
def test_all_linear_layers_of_every_architecture_learn(name: str) -> None:
    """Each adapter that `lora_target: all` makes gets a gradient, and peft warns of nothing."""
    model = make_model(name.split()[0], **{**SHARING, **REPEATING}[name])
    policy = add_lora(model, TuningConfig())
    policy(input_ids=IDS).logits.square().sum().backward()
    without = [
        name
        for name, weights in policy.named_parameters()
        if "lora_B" in name and weights.grad is None and "vision" not in name
    ]
    assert any("lora_B" in name for name, _ in policy.named_parameters()) and not without


@pytest.mark.parametrize("keys", [{}, {"additional_target": ("embed_tokens",)}], ids=str)
def test_the_adapter_of_a_reward_model_is_written_without_its_head(keys, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoConfig.for_model("llama", **{**SMALL, "num_labels": 1})
    policy = add_lora(AutoModelForSequenceClassification.from_config(base), TuningConfig(lora_rank=2, **keys))
    randomise(policy)
    save_without_head(policy, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["modules_to_save"] == (["embed_tokens"] if keys else None)
    language = load_adapter(make_model(), str(tmp_path), CONFIG)  # refuses what it has no place for
    wanted = {name: it for name, it in policy.named_parameters() if it.requires_grad and "score" not in name}
    found = dict(language.named_parameters())
    assert wanted and all(torch.equal(found[name], it) for name, it in wanted.items())


def test_matrices_are_off_and_the_head_is_not() -> None:
    torch.manual_seed(0)
    base = AutoConfig.for_model("llama", **{**SMALL, "num_labels": 1})
    model = AutoModelForSequenceClassification.from_config(base)
    policy = add_lora(model, TuningConfig(lora_rank=2))
    with torch.no_grad():
        for name, weights in policy.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                weights.fill_(0.05)
        head = policy.base_model.model.score.weight.clone()
        hidden = model.model(IDS).last_hidden_state
        tuned = logits(policy)
        with without_lora(policy):
            off = logits(policy)
            plain = model.model(IDS).last_hidden_state[0, -1] @ head[0]
        assert torch.equal(logits(policy), tuned)
    assert off.item() == pytest.approx(plain.item(), abs=1e-5)
    assert tuned.item() == pytest.approx((hidden[0, -1] @ head[0]).item(), abs=1e-5)
    assert abs(off - tuned) > 1e-3
