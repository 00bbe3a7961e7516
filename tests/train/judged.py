"""Responses to judge, for the tests of judges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefkit.data.examples import Message
from prefkit.data.template import ChatTemplate
from prefkit.train.answered import Answered
from tests.conftest import make_tokenizer

TEXTS = ("one", "two three", "", "no " * 9, "é <|im_end|>")


def make_answered(
    template: ChatTemplate | None = None,
    texts: Sequence[str] = TEXTS,
    prompt: Sequence[Message] = (Message("user", "Say one"),),
    tools: Sequence[dict[str, Any]] = (),
    unfinished: Sequence[int] = (),
) -> list[Answered]:
    """A response for each text, drawn as the policy's template ends it with `<|im_end|>`."""
    template = template or ChatTemplate(make_tokenizer(), "chatml")
    prompt_ids, _ = template.encode(prompt, [], tools)
    found = []
    for number, text in enumerate(texts):
        ids = template.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        ended = number not in unfinished
        found.append(
            Answered(tuple(prompt), tuple(tools), prompt_ids, [*ids, 2] if ended else ids, ended, text)
        )
    return found
