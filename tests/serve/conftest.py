"""Assistants made of tiny random models, and a way to make one say a given text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from prefkit.config.uses import SCORING
from prefkit.data.examples import Message
from prefkit.data.template import ChatTemplate
from prefkit.model.adapter import base_of
from prefkit.model.scorer import Scorer, open_scorer
from prefkit.runs.use import read_use_config
from prefkit.serve.assistant import Assistant
from tests.conftest import make_model, make_tokenizer
from tests.model.test_reward import make_reward_model


@pytest.fixture
def plain() -> Assistant:
    """A model without an adapter."""
    return Assistant(make_model().eval(), ChatTemplate(make_tokenizer()), "tiny", compares=False)


@pytest.fixture
def tuned() -> Assistant:
    """A model with an adapter that changes its answers."""
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(make_model(), lora).eval()
    return Assistant(model, ChatTemplate(make_tokenizer()), "tuned", compares=True)


def expected(assistant: Assistant, messages: Sequence[Message], max_new_tokens: int) -> tuple[str, int]:
    """The greedy answer straight from transformers, and its number of tokens."""
    ids = torch.tensor([assistant.template.encode(messages, [])[0]])
    output = assistant.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
    )
    response = output[0, ids.shape[1] :]
    return assistant.template.tokenizer.decode(response, skip_special_tokens=True), len(response)


def script(assistant: Assistant, text: str, at_token: Callable[[int], Any] = lambda number: None) -> None:
    """Make the model say `text` and end; `at_token` is called before each of its tokens, from 0 on."""
    ids = [*assistant.template.tokenizer.encode(text, add_special_tokens=False), 2]
    number = 0

    def speak(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal number
        number = 0 if kwargs["past_key_values"].get_seq_length() == kwargs["input_ids"].shape[1] else number
        at_token(number)
        output.logits[:] = -1e9
        output.logits[..., ids[min(number, len(ids) - 1)]] = 0
        number += 1

    base_of(assistant.model).register_forward_hook(speak, with_kwargs=True)


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "rater"
    make_reward_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scorer(reward_folder: Path) -> Scorer:
    """The same, open."""
    config = read_use_config(str(reward_folder), ["cutoff_len=256"], SCORING).config
    return open_scorer(config.model, config.data)


def alone(scorer: Scorer, text: str) -> float:
    """The score of a templated text by transformers alone."""
    ids = torch.tensor([scorer.template.tokenizer.encode(text, add_special_tokens=False)])
    model: Any = AutoModelForSequenceClassification.from_pretrained(base_of(scorer.model.model).name_or_path)
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        return float(model.score(hidden[:, -1])[0, 0])
