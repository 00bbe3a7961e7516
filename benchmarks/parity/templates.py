"""Run the cases through LLaMA-Factory's templates and write what it makes of them.

Runs in an environment of its own (README.md): python templates.py
Writes templates.json beside itself, and what prefkit says of templates that it lacks.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from cases import TOKENS, cases_of, stand_in
from llamafactory.data import tool_utils
from llamafactory.data.template import TEMPLATES, ReasoningTemplate, get_template_and_fix_tokenizer

HERE = Path(__file__).parent
OTHERS = HERE.parents[1] / "prefkit" / "data" / "templates" / "other.json"


class FixedDate(datetime):
    """The day that Llama 3's own template writes where it is told none."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return cls(2024, 7, 26)


def messages_of(turns: list[dict[str, Any]], thought_words: tuple[str, str]) -> list[dict[str, str]]:
    """Turns in LLaMA-Factory's roles, the results of several calls joined as its converter joins them."""
    messages: list[dict[str, str]] = []
    for turn in turns:
        content = turn["content"]
        if turn["role"] == "tool" and messages[-1]["role"] == "observation":
            messages[-1]["content"] += "\n</tool_response>\n<tool_response>\n" + content
            continue
        content = content.replace("<think>\n", thought_words[0]) if turn["role"] == "assistant" else content
        content = content.replace("\n</think>\n\n", thought_words[1])
        if turn.get("calls"):
            calls = [{"name": name, "arguments": arguments} for name, arguments in turn["calls"]]
            content += json.dumps(calls, ensure_ascii=False)
        role = "function" if turn.get("calls") else {"tool": "observation"}.get(turn["role"], turn["role"])
        messages.append({"role": role, "content": content})
    return messages


def encoded(family: str, case: dict[str, Any]) -> dict[str, Any]:
    """Text and hash of the ids of prompt and responses, as for a pair: the prompt is that of the first."""
    options = {
        "default_system": None,
        "tool_format": None,
        "enable_thinking": True,
        "preserve_thinking": False,
    }
    arguments = SimpleNamespace(template=family, train_on_prompt=False, **(options | case["options"]))
    tokenizer = stand_in(family)
    template = get_template_and_fix_tokenizer(tokenizer, arguments)
    turns = case["prompt"]
    system = turns[0]["content"] if turns[0]["role"] == "system" else None
    turns = turns[1:] if system is not None else turns
    tools = json.dumps(case["tools"], ensure_ascii=False) if case["tools"] else None
    parts = []
    for response in case["responses"]:
        messages = messages_of([*turns, response], template.thought_words)
        prompt_ids, response_ids = template.encode_oneturn(tokenizer, messages, system, tools)
        if template.efficient_eos:  # as its processor of pairs does
            response_ids = [*response_ids, tokenizer.eos_token_id]
        parts += [response_ids] if parts else [prompt_ids, response_ids]
    return {
        "texts": [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in parts],
        "ids": hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16],
    }


def main() -> None:
    tool_utils.datetime = FixedDate
    results: dict[str, Any] = {}
    for family in TOKENS:
        results[family] = {}
        for name, case in cases_of(family).items():
            kept = copy.deepcopy(TEMPLATES[family])
            try:
                results[family][name] = encoded(family, case)
            except Exception as error:  # noqa: BLE001  (that it fails is the result)
                results[family][name] = {"error": f"{type(error).__name__}: {error}"}
            TEMPLATES[family] = kept
    _write(HERE / "templates.json", results)
    _write(OTHERS, {name: facts(name) for name in sorted(set(TEMPLATES) - set(TOKENS))})


def _write(file: Path, templates: dict[str, Any]) -> None:
    content = {"program": f"llamafactory {version('llamafactory')}", "templates": templates}
    file.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def facts(name: str) -> dict[str, str]:
    """What of a template that prefkit lacks can be said from its definition."""
    template = TEMPLATES[name]
    found = {"media": "yes"} if type(template.mm_plugin).__name__ != "BasePlugin" else {}
    for family in TOKENS:
        if definition(TEMPLATES[family]) == definition(template):
            return {"same_as": family, **found}
    written = str([getattr(template, f"format_{part}").slots for part in ("user", "assistant", "prefix")])
    if not re.search(r"<[^>]+>|\[\|?\w+\|?\]|\]~|reserved_", written.replace("{{content}}", "")):
        found["plain"] = "yes"
    if template.default_system:
        found["system"] = "yes"
    if isinstance(template, ReasoningTemplate):
        found["thinks"] = "yes"
    return found


def definition(template: Any) -> tuple[Any, ...]:
    """All that decides what a template writes of a text."""
    parts = ("user", "assistant", "system", "function", "observation", "tools", "prefix")
    formats = [getattr(template, f"format_{part}") for part in parts]
    return (
        type(template),
        [(str(part.slots), part.tool_format) for part in formats],
        (template.default_system, template.thought_words, template.efficient_eos),
        (template.stop_words, template.replace_eos),
    )


if __name__ == "__main__":
    main()
