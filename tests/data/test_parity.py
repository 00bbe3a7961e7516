"""What the named templates write, compared with what LLaMA-Factory 0.9.5 wrote of the same conversations."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from prefkit.data.examples import Message, ToolCall
from prefkit.data.families import FAMILIES
from prefkit.data.template import ChatTemplate, ConversationRefused

FOLDER = Path(__file__).parents[2] / "benchmarks" / "parity"
sys.path.insert(0, str(FOLDER))

from cases import TOKENS, cases_of, stand_in  # noqa: E402

PINNED = json.loads((FOLDER / "templates.json").read_text(encoding="utf-8"))
# Where prefkit writes something else on purpose: families, case, reason. docs/templates.md says the same.
ALL = tuple(FAMILIES)
NOT_QWEN = tuple(name for name, family in FAMILIES.items() if family.tools != "qwen")
FORMATS = tuple(name for name in cases_of("mistral") if name.startswith("tool format"))
DIFFERENCES = [
    (ALL, ("typed control tokens",), "what a user types is text, not control tokens"),
    (
        tuple(name for name, family in FAMILIES.items() if family.thinks),
        ("a thought on one side, thinking None",),
        "an answer without a thought beside one that has a thought keeps its empty one",
    ),
    (NOT_QWEN, ("several results",), "the tags between results are Qwen's and stand in its family only"),
    (("glm4",), ("calls", "calls before"), "one error message for the other"),
    (("qwen3_nothink", "mistral"), FORMATS, "tool_format leaves the turn of the family as it is"),
    (
        ("llama3", "phi4"),
        ("tool format seed_oss",),
        "functions are described without the wrapper that only some rows have; the call's tag is closed",
    ),
]
DIFFERENT = {
    (family, case): reason for families, cases, reason in DIFFERENCES for family in families for case in cases
}


def turns(messages: list[dict[str, Any]]) -> list[Message]:
    return [
        Message(m["role"], m["content"], tuple(ToolCall(*call) for call in m.get("calls", ())))
        for m in messages
    ]


@functools.cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """One for all cases of a family: `install` makes it the same each time."""
    return stand_in(family)


def encoded(family: str, case: dict[str, Any]) -> dict[str, Any]:
    tokenizer = tokenizer_of(family)
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


def test_the_table_of_the_docs() -> None:
    """docs/templates.md lists what was compared, as the code has it."""
    text = (FOLDER.parents[1] / "docs" / "templates.md").read_text(encoding="utf-8").replace("\\|", "|")
    rows = [row.strip("| ").split(" | ") for row in re.findall(r"^\| `.*\| yes \|$", text, re.MULTILINE)]
    listed = {re.findall(r"`([^`]+)`", row[0])[0]: [cell.strip("` ") for cell in row[1:]] for row in rows}
    expected = {}
    for name, family in FAMILIES.items():
        stops = "`, `".join(family.stops)
        thinks = "yes" if family.thinks else ""
        expected[name] = [family.models, family.ends or "the end token", stops, thinks, family.tools, "yes"]
    assert listed == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family: str) -> None:
    pinned = PINNED["templates"][family]
    assert list(pinned) == list(cases_of(family))
    for name, case in cases_of(family).items():
        if (family, name) not in DIFFERENT:
            assert encoded(family, case) == pinned[name], name


@pytest.mark.parametrize(("family", "case"), DIFFERENT)
def test_differences(family: str, case: str) -> None:
    """Each difference is one, so that the list stays true; what a user typed is the same text."""
    pinned = PINNED["templates"][family][case]
    if "error" in pinned:
        with pytest.raises(ConversationRefused, match="one call in a turn"):
            encoded(family, cases_of(family)[case])
        assert "parallel" in pinned["error"]
        return
    found = encoded(family, cases_of(family)[case])
    assert found["ids"] != pinned["ids"]
    if case == "typed control tokens":
        assert found["texts"] == pinned["texts"]


def test_a_pair_with_one_thought_keeps_the_empty_one() -> None:
    case = cases_of("qwen3")["a thought on one side, thinking None"]
    prompt, *responses = encoded("qwen3", case)["texts"]
    assert prompt.endswith("<|im_start|>assistant\n")
    assert responses == [
        "<think>\nnew\n</think>\n\nyes<|im_end|>\n", "<think>\n\n</think>\n\nyes<|im_end|>\n"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "results"),
    [
        ("qwen", "<tool_response>\n7\n</tool_response>\n<tool_response>\nnoon\n</tool_response><|im_end|>"),
        ("mistral", '[TOOL_RESULTS] {"content": 7}[/TOOL_RESULTS][TOOL_RESULTS] {"content": noon}'),
        ("llama3", "\n\n7<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\nnoon<|eot_id|>"),
        ("vicuna", "USER: 7\nnoon ASSISTANT:"),
        ("glm4", "<|observation|>\n7<|observation|>\nnoon<|assistant|>"),
    ],
)
def test_several_results(family: str, results: str) -> None:
    case = cases_of(family)["several results"]
    if family == "glm4":
        case = {**case, "prompt": [{**m, "calls": m.get("calls", [])[:1]} for m in case["prompt"]]}
    assert results in encoded(family, case)["texts"][0]


def test_tool_format_keeps_the_turn() -> None:
    case = cases_of("qwen3_nothink")["tool format default"]
    prompt, response = encoded("qwen3_nothink", case)["texts"]
    assert "> Tool Name: weather\n" in prompt and "<tools>" not in prompt
    assert response.startswith("Action: weather\nAction Input: {") and response.endswith("<|im_end|>\n")
    assert "Action: clock\nAction Input: {}" in response


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_template_writes_the_same(family: str) -> None:
    """transformers alone, with nothing said but messages and tools."""
    case = cases_of(family)["call before"]
    tokenizer = stand_in(family)
    template = ChatTemplate(tokenizer, family, default_system='Be "kind".\nAlways.')
    template.install()
    prompt, _ = template.encode(turns(case["prompt"]), [], case["tools"])
    messages = [
        {
            "role": m["role"],
            "content": m["content"],
            "tool_calls": [{"function": {"name": n, "arguments": a}} for n, a in m.get("calls", ())],
        }
        for m in case["prompt"]
    ]
    tools = [t if "function" in t else {"type": "function", "function": t} for t in case["tools"]]
    text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    assert text == tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
    assert 'Be "kind".\nAlways.' in text
