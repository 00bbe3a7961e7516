"""From the config of a use to the model that was trained, with its template and thinking mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from prefkit.config.uses import TALKING
from prefkit.data.examples import Message
from prefkit.model.errors import ModelError
from prefkit.runs.use import read_use_config
from prefkit.serve.load import load_assistant, load_model
from tests.conftest import make_model, make_tokenizer
from tests.train.runs import run

USER = [Message("user", "Hello")]


def read(source: Any, *overrides: str):
    return read_use_config(str(source), overrides, TALKING).config


@pytest.fixture
def trained(write_config, tmp_path: Path) -> Path:
    """A run with settings of its own."""
    keys = {"template": "qwen3", "enable_thinking": False, "default_system": "Be kind.", "dtype": "float32"}
    run(write_config(**keys))
    return tmp_path / "out"


def test_the_template_is_the_one_of_the_training(trained: Path) -> None:
    template = load_model(read(trained)).template
    text = template.tokenizer.decode(template.encode(USER, [])[0])
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_plain_transformers_reads_the_same_template(trained: Path) -> None:
    """The saved tokenizer knows the thinking mode and the system message without being told."""
    from transformers import AutoTokenizer

    ours = load_model(read(trained)).template.encode(USER, [])[0]
    tokenizer = AutoTokenizer.from_pretrained(trained)
    messages = [{"role": "user", "content": "Hello"}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert theirs == ours
    own = [{"role": "system", "content": "Be rude."}, *messages]
    assert "kind" not in tokenizer.apply_chat_template(own, tokenize=False)


def test_a_chain_of_runs_is_put_together_again(write_config, tmp_path: Path, tiny_model: Path) -> None:
    run(write_config(output_dir=str(tmp_path / "a")))
    keys = {"adapter_name_or_path": str(tmp_path / "a"), "create_new_adapter": True}
    run(write_config(output_dir=str(tmp_path / "b"), **keys))
    config = read(tmp_path / "b")
    assert config.model.adapter_name_or_path == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert load_model(config).proof == pytest.approx(0, abs=1e-4)
    keys = {"adapter_name_or_path": str(tmp_path / "a")}
    run(write_config(output_dir=str(tmp_path / "c"), **keys))
    assert read(tmp_path / "c").model.adapter_name_or_path == (str(tmp_path / "c"),)


def test_a_model_tuned_in_full_is_a_model(write_config, tmp_path: Path) -> None:
    keys = {"finetuning_type": "full", "learning_rate": 1e-3, "rope_scaling": "yarn", "cutoff_len": 1000}
    run(write_config(template="qwen3_nothink", **keys))
    config = read(tmp_path / "out")
    assert config.model.adapter_name_or_path == () and config.model.rope_scaling is None
    assert config.data.template == "qwen3_nothink"
    assistant = load_assistant(config)
    assert not assistant.compares and assistant.name == "out"
    assert assistant.model.config.max_position_embeddings == 1024


def test_a_base_that_changed_since_training_is_refused(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = make_model()
    model.model.layers[0].mlp.up_proj.weight.data *= 1.05
    model.save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    with pytest.raises(ModelError, match="not the model that was trained"):
        load_model(read(trained, f"model_name_or_path={other}"))


def test_weights_that_changed_since_training_are_refused(write_config, tmp_path: Path) -> None:
    run(write_config(finetuning_type="full", learning_rate=1e-3))
    file = tmp_path / "out" / "model.safetensors"
    tensors = {name: tensor * 1.02 for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match="not the model that was trained"):
        load_model(read(tmp_path / "out"))
