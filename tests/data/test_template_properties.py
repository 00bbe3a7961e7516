"""Whatever a conversation says, no part of it becomes a control token, and all of it is written."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from prefkit.data.examples import Message, ToolCall
from prefkit.data.families import FAMILIES
from prefkit.data.template import ChatTemplate

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "parity"))

from cases import stand_in


@functools.cache
def tokenizer_of(family: str | None) -> PreTrainedTokenizerFast:
    tokenizer = stand_in(family or "qwen3")
    if family is None:
        ChatTemplate(tokenizer, "qwen3").install()
    return tokenizer


def texts(tokenizer: PreTrainedTokenizerFast) -> st.SearchStrategy[str]:
    """Texts of control tokens, whole and in halves, amid other characters."""
    tokens = sorted(map(str, tokenizer.added_tokens_decoder.values()))
    halves = [half for token in tokens for half in (token[: len(token) // 2], token[len(token) // 2 :])]
    pieces = st.sampled_from([*tokens, *halves, " ", "\n", "é", '"', "\\", "{{", "%}", "'"])
    return st.lists(pieces, min_size=1, max_size=6).map(lambda parts: "x" + "".join(parts) + "x")


@pytest.mark.parametrize("family", [None, *FAMILIES])
# No shrinking: the texts are short, and an encoding is slow enough for it to take minutes.
@settings(max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(data=st.data())
def test_no_text_becomes_a_control_token(family: str | None, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(family)
    text = texts(tokenizer)
    # In an assistant's text the end of a thought is one, and what stands before it may be dropped.
    spoken = text.filter(lambda written: "</think>" not in written)
    drawn = [data.draw(kind) for kind in (text, text, spoken, text, text, text, text, spoken)]
    control = set(tokenizer.added_tokens_decoder)

    def controls(system: str, user: str, said: str, argument: str, result: str, about: str, *rest: str):
        default, answer = rest
        prompt = [
            Message("system", system),
            Message("user", user),
            Message("assistant", said, (ToolCall("f", {"a": argument, "b": [argument]}),)),
            Message("tool", result),
        ]
        schema = {"name": "f", "description": about, "parameters": {"properties": {"a": {"type": about}}}}
        template = ChatTemplate(tokenizer, family, default_system=default)
        prompt_ids, (ids,) = template.encode(prompt, [Message("assistant", answer)], [schema])
        alone = template.encode([Message("user", user)], [])[0]
        decoded = tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False)
        assert all(written in decoded for written in (system, user, said, result))
        assert answer in tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert default in tokenizer.decode(alone, clean_up_tokenization_spaces=False)
        return [Counter(i for i in part if i in control) for part in (prompt_ids, ids, alone)]

    assert controls(*drawn) == controls(*["harmless"] * len(drawn))
