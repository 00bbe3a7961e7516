"""What the named templates write, compared with what LLaMA-Factory 0.9.5 wrote of the same conversations."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from prefkit.data.examples import Message, ToolCall
from prefkit.data.families import FAMILIES
from prefkit.data.template import ChatTemplate

FOLDER = Path(__file__).parents[2] / "benchmarks" / "parity"
sys.path.insert(0, str(FOLDER))

from cases import TOKENS, cases_of, stand_in  # noqa: E402

PINNED = json.loads((FOLDER / "templates.json").read_text(encoding="utf-8"))
DIFFERENT: dict[tuple[str, str], str] = {}


def turns(messages: list[dict[str, Any]]) -> list[Message]:
    return [
        Message(m["role"], m["content"], tuple(ToolCall(*call) for call in m.get("calls", ())))
        for m in messages
    ]


def encoded(family: str, case: dict[str, Any]) -> dict[str, Any]:
    tokenizer = stand_in(family)
    template = ChatTemplate(tokenizer, family, **case["options"])
    template.install()
    prompt, responses = template.encode(turns(case["prompt"]), turns(case["responses"]), case["tools"])
    parts = [prompt, *responses]
    return {
        "texts": [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in parts],
        "ids": hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16],
    }


def test_every_named_template_was_compared() -> None:
    assert list(PINNED["templates"]) == list(TOKENS)
    assert set(TOKENS) == set(FAMILIES)
    assert PINNED["program"] == "llamafactory 0.9.5"


@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family: str) -> None:
    pinned = PINNED["templates"][family]
    assert list(pinned) == list(cases_of(family))
    for name, case in cases_of(family).items():
        if (family, name) not in DIFFERENT:
            assert encoded(family, case) == pinned[name], name
