"""Rows that once were good, changed at random: what people's files hold sooner or later."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from prefkit.data.formats import RowFormat, Use

CALL = json.dumps({"name": "f", "arguments": {"x": 1}})
TOOLS = json.dumps([{"name": "f", "parameters": {}}])
SHAREGPT: dict[str, Any] = {
    "conversations": [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": CALL},
        {"from": "observation", "value": "1"},
    ],
    "chosen": {"from": "gpt", "value": "good"},
    "rejected": {"from": "gpt", "value": "bad"},
    "tools": TOOLS,
}
OPENAI: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": "A", "reasoning_content": "hm"},
        {"role": "user", "content": "R"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
        },
    ],
    "kto_tag": True,
}
HH = {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"}
GOOD: list[tuple[dict[str, Any], RowFormat, Use]] = [
    ({"instruction": "Q", "input": "I", "history": [["a", "b"]], "chosen": "g", "rejected": "b"},
     RowFormat("alpaca"), "pairs"),
    ({"instruction": "Q", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]}, RowFormat("alpaca"), "pairs"),
    ({"instruction": "Q", "output": "A", "kto_tag": False}, RowFormat("alpaca"), "judged"),
    ({"instruction": "Q", "chosen": "g", "rejected": "b", "m": 1.5, "w": 2},
     RowFormat("alpaca", {"margin": "m", "weight": "w"}), "pairs"),
    (SHAREGPT, RowFormat("sharegpt"), "pairs"),
    (SHAREGPT, RowFormat("sharegpt"), "prompts"),
    (OPENAI, RowFormat("openai"), "judged"),
    (OPENAI, RowFormat("openai"), "prompts"),
    ({"prompt": "Q", "chosen": OPENAI["messages"][:2], "rejected": "b"}, RowFormat("trl"), "pairs"),
    ({"prompt": "Q", "completion": "A", "label": True}, RowFormat("trl"), "judged"),
    (HH, RowFormat("hh"), "pairs"),
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 1.5, 1e400, "", " ", "x", "true", "<|im_end|>", "<think>", "</think>\n\n",
    "\ud800", "\u0000", "\ufdd0", "\u202eabc", "👩‍👩‍👧", "e" + "\u0301" * 50, "\n\nHuman: ", "{", "[]", "{}",
    [], [None], [[]], [1, "a"], {}, {"from": "human"}, {"role": "user", "content": 1}, [{"role": "x"}],
]  # fmt: skip


def mutate(row: Any, rng: random.Random) -> Any:
    """The row with one to three places changed, dropped, doubled or moved."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        row = _mutate_once(row, rng)
    return row


def _mutate_once(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        what = rng.random()
        if what < 0.1:
            del value[key]
        elif what < 0.2:
            value[rng.choice(["x", key + "s", key.upper()])] = value.pop(key)
        else:
            value[key] = _mutate_once(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        what = rng.random()
        if what < 0.15:
            del value[place]
        elif what < 0.3:
            value.insert(place, copy.deepcopy(value[place]))
        else:
            value[place] = _mutate_once(value[place], rng)
        return value
    if isinstance(value, str) and rng.random() < 0.3:
        cut = rng.randint(0, len(value))
        odd = rng.choice([text for text in ODD if isinstance(text, str)])
        return value[:cut] + odd + value[cut:]
    return copy.deepcopy(rng.choice(ODD))


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """A file with some bytes changed, dropped or doubled."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed) + 1)
        what = rng.random()
        if what < 0.4:
            changed[place : place + 1] = bytes([rng.randrange(256)])
        elif what < 0.7:
            del changed[place : place + rng.randint(1, 20)]
        else:
            changed[place:place] = changed[place : place + rng.randint(1, 20)]
    return bytes(changed)
