"""The padding token of a reward model ends no row."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefkit.config import ModelConfig
from prefkit.data.examples import Message
from prefkit.data.template import ChatTemplate
from prefkit.model.errors import ModelError
from prefkit.model.padding import ADDED, choose_pad_token, set_pad_token
from tests.conftest import SPECIAL, make_tokenizer

PROMPT = [Message("user", " ".join(SPECIAL))]


def encode(template: ChatTemplate) -> list[int]:
    prompt, (response,) = template.encode(PROMPT, [Message("assistant", " ".join([*SPECIAL, ADDED]))])
    return prompt + response


def with_specials(*tokens: str):
    """A tokenizer whose control tokens are these alone."""
    tokenizer = make_tokenizer()
    tokenizer._special_tokens_map = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    for number, token in list(tokenizer.added_tokens_decoder.items()):
        token.special = str(token) in tokens
        tokenizer._tokenizer.add_tokens([token])
        assert tokenizer.added_tokens_decoder[number].special is token.special
    return tokenizer


def test_a_padding_token_of_its_own_stays(tokenizer) -> None:
    assert choose_pad_token(tokenizer, ChatTemplate(tokenizer, "chatml"), 264) == "<|endoftext|>"


@pytest.mark.parametrize("template", ["chatml", "llama3", None])
def test_where_it_ends_a_turn_another_control_token_takes_its_place(template: str | None) -> None:
    tokenizer = make_tokenizer()
    chat = ChatTemplate(tokenizer, template)
    tokenizer.pad_token = tokenizer.eos_token
    pad = choose_pad_token(tokenizer, chat, 264)
    assert pad in SPECIAL and not chat.may_write(pad)
    assert tokenizer.convert_tokens_to_ids(pad) not in encode(chat)


def test_one_that_is_named_for_it_is_preferred() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|reserved_1|>", "<|other|>"], special_tokens=True)
    tokenizer.pad_token = tokenizer.eos_token
    assert choose_pad_token(tokenizer, ChatTemplate(tokenizer, "chatml"), 300) == "<|reserved_1|>"


def test_a_new_one_where_the_embedding_has_room_and_none_where_it_has_not(tiny_model: Path) -> None:
    tokenizer = with_specials("<|im_start|>", "<|im_end|>")
    chat = ChatTemplate(tokenizer)
    size = len(tokenizer)
    assert choose_pad_token(tokenizer, chat, size + 1) == ADDED
    assert choose_pad_token(tokenizer, chat, size, grows=True) == ADDED
    with pytest.raises(ModelError, match=r"no token that could pad .* add_special_tokens"):
        choose_pad_token(tokenizer, chat, size)
    set_pad_token(tokenizer, chat, ModelConfig(model_name_or_path=str(tiny_model)))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (ADDED, size)
    assert tokenizer.pad_token_id not in encode(ChatTemplate(tokenizer))
