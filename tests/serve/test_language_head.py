"""A reward model's decoder under a language model's head is that language model, if it was not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefkit.config.schema import DataConfig, ExportConfig, GenerationConfig, ModelConfig, UseConfig
from prefkit.model.errors import ModelError
from prefkit.model.reward import load_reward_base
from prefkit.serve.language_head import under_language_head
from tests.conftest import make_model
from tests.model.test_policy import SHARING
from tests.model.test_reward import FAMILIES, make_reward_model

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def use(folder: Path, **keys: Any) -> UseConfig:
    model = ModelConfig(model_name_or_path=str(folder), **keys)
    return UseConfig(model=model, data=DataConfig(), export=ExportConfig(), generation=GenerationConfig())


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_language_model(name: str, tmp_path: Path) -> None:
    base = make_model(name.split()[0], **SHARING[name]).eval()
    base.save_pretrained(tmp_path / "base")
    config = use(tmp_path / "base")
    reward = load_reward_base(config.model, seed=1)
    reward.config.get_text_config().pad_token_id = 3
    language = under_language_head(reward, config)
    assert language.base_model is reward.base_model
    language.save_pretrained(tmp_path / "language")
    read: Any
    read, info = AutoModelForCausalLM.from_pretrained(tmp_path / "language", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert read.config.num_labels != 1 and read.config.pad_token_id == 3
    with torch.no_grad():
        torch.testing.assert_close(read.eval()(IDS).logits, base(IDS).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_and_another_format(tied: bool, tmp_path: Path) -> None:
    make_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    config = use(tmp_path, dtype="bfloat16")
    reward = load_reward_base(use(tmp_path).model, seed=1)
    reward.resize_token_embeddings(270)
    language: Any = under_language_head(reward, config)
    assert language.lm_head.weight.shape == (270, 32) and language.config.vocab_size == 270
    assert {it.dtype for it in language.parameters()} == {torch.float32}
    assert (language.lm_head.weight is language.model.embed_tokens.weight) is tied


def test_another_decoder_and_a_record_that_names_itself(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "llama")
    with pytest.raises(ModelError, match="the decoder of LlamaForCausalLM is not that of Qwen2For"):
        under_language_head(make_reward_model("qwen2"), use(tmp_path / "llama"))
    reward = make_reward_model()
    reward.save_pretrained(tmp_path / "reward")
    (tmp_path / "reward" / "prefkit.json").write_text(f'{{"base_model": "{tmp_path / "reward"}"}}')
    with pytest.raises(ModelError, match=r"there is none in \S+reward: export without the key"):
        under_language_head(reward, use(tmp_path / "reward"))
