"""Conversations, and a stand-in tokenizer for each family of templates, to compare two programs with.

Needs tokenizers and transformers only, so that it runs beside either program.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

IM = ("<|im_start|>", "<|im_end|>")
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
QWEN = {"eos": "<|endoftext|>", "pad": "<|endoftext|>", "special": IM, "plain": MARKS}
SENTENCE = {"bos": "<s>", "eos": "</s>"}
GEMMA = {
    "bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "special": ("<start_of_turn>", "<end_of_turn>"),
}  # fmt: skip
DEEPSEEK = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "special": ("<｜User｜>", "<｜Assistant｜>"),
    "plain": ("<think>", "</think>"),
}
LLAMA = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"}
# The tokens of the models that a family is for: `special` ones, and `plain` ones that are not marked so.
TOKENS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen", "qwen3", "qwen3_nothink", "qwen2_vl", "qwen3_vl", "qwen3_vl_nothink"), QWEN),
    "chatml": {**QWEN, "plain": ()},
    "llama2": SENTENCE,
    "llama3": {
        **LLAMA,
        "special": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    },
    "llama4": {**LLAMA, "special": ("<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>")},
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), GEMMA),
    "mistral": {
        **SENTENCE,
        "special": (
            *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
    },
    "phi4": {
        **dict.fromkeys(("bos", "eos", "pad"), "<|endoftext|>"),
        "special": (*IM, "<|im_sep|>"),
    },
    **dict.fromkeys(("deepseek3", "deepseekr1"), DEEPSEEK),
    "glm4": {
        "eos": "<|endoftext|>",
        "pad": "<|endoftext|>",
        "special": ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    },
    "gpt_oss": {
        "bos": "<|startoftext|>",
        "eos": "<|return|>",
        "pad": "<|endoftext|>",
        "special": ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"),
    },
    **dict.fromkeys(("vicuna", "alpaca", "default", "empty"), SENTENCE),
}  # fmt: skip


@functools.cache
def _byte_pairs() -> Tokenizer:
    """Bytes, and every pair of ASCII characters as one token: the ids tell where encoding starts anew."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ascii_chars = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    pairs = [(a, b) for a in ascii_chars for b in ascii_chars]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def stand_in(family: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens of a family's models."""
    tokens = TOKENS[family]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(_byte_pairs()))
    tokenizer.add_special_tokens(
        {f"{name}_token": tokens[name] for name in ("bos", "eos", "pad") if name in tokens}
    )
    for kind in ("special", "plain"):
        tokenizer.add_tokens(
            [AddedToken(text, special=kind == "special", normalized=False) for text in tokens.get(kind, ())]
        )
    return tokenizer


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def assistant(content: str, *calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "calls": [*calls]}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def thought(text: str, answer: str = "") -> str:
    return f"<think>\n{text}\n</think>\n\n{answer}"


WEATHER = {
    "name": "weather",
    "description": "The weather of a day.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Name of the città"},
            "day": {"type": "string", "description": "Which day", "enum": ["today", "tomorrow"]},
            "hours": {"type": "array", "description": "Which hours", "items": {"type": "integer"}},
        },
        "required": ["city"],
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {}},
    },
}
ASK = user("Is it warm?")
WARM = ("weather", {"city": "Malmö", "hours": [1, 2], "note": 'say "hi"', "deep": {"a": None, "b": True}})
TIME = ("clock", {})
CALLED = [ASK, assistant("", WARM), tool('{"degrees": 7}')]
PAST = [user("q1"), assistant(thought("old", "a1")), user("q2")]
TOOLS = {"tools": [WEATHER, CLOCK]}
THOUGHT, PLAIN = [assistant(thought("new", "yes"))], [assistant("yes")]


def case(
    prompt: list[dict[str, Any]], responses: list[dict[str, Any]] = PLAIN, **more: Any
) -> dict[str, Any]:
    """`options` are default_system, tool_format, enable_thinking and preserve_thinking."""
    tools = more.pop("tools", [])
    return {"prompt": prompt, "responses": responses, "tools": tools, "options": more}


CASES: dict[str, dict[str, Any]] = {
    "single": case([ASK]),
    "system": case([system("Be brief."), ASK]),
    "default_system": case([ASK], default_system='Be\n"kind" & it\'s fine.'),
    "default_system and system": case([system("Be brief."), ASK], default_system="Be kind."),
    "no default_system": case([ASK], default_system=""),
    "turns": case([system("S"), user("q1"), assistant("a1"), user("q2"), assistant("a2"), ASK]),
    "unicode": case([system("Ünï"), user("日本語 🙂\n\n a\u0301 ")], [assistant(" Ελλάδα ")]),
    "empty content": case([user("")], [assistant("")]),
    "typed control tokens": case(
        [user("a <|im_end|> [INST] </s><end_of_turn><|eot_id|><think><｜User｜><|user|><|end|><|eot|>")]
    ),
    "pair": case([ASK], [assistant("yes"), assistant("no,\nnot at all")]),
    **{
        f"{name}, thinking {mode}": case(prompt, responses, enable_thinking=mode, **more)
        for mode in (True, False, None)
        for name, prompt, responses, more in (
            ("no thoughts", [user("q1"), assistant("a1"), user("q2")], PLAIN, {}),
            ("a thought", PAST, THOUGHT, {}),
            ("a thought before", PAST, PLAIN, {}),
            ("thoughts kept", PAST, THOUGHT, {"preserve_thinking": True}),
            ("a thought on one side", [ASK], THOUGHT + PLAIN, {}),
            ("a call", [ASK], [assistant("", WARM)], {}),
            ("a call after a thought", [ASK], [assistant(thought("new"), WARM)], {}),
        )
    },
    "tools": case([system("S"), ASK], **TOOLS),
    "tools without system": case([ASK], **TOOLS),
    "call": case([ASK], [assistant("", WARM)], **TOOLS),
    "calls": case([ASK], [assistant("", WARM, TIME)], **TOOLS),
    "call before": case(CALLED, **TOOLS),
    "calls before": case([ASK, assistant("", WARM, TIME), tool("7")], **TOOLS),
    "several results": case([ASK, assistant("", WARM, TIME), tool("7"), tool("noon")], **TOOLS),
    "call after a result": case(CALLED, [assistant("", TIME)], **TOOLS),
    **{
        f"tool format {name}": case(CALLED, [assistant("", WARM, TIME)], tool_format=name, **TOOLS)
        for name in (
            *("default", "qwen", "llama3", "mistral", "glm4_moe", "qwen3_5", "seed_oss", "ling"),
            *("minimax1", "minimax2", "lfm2"),
        )
    },
    "tool format glm4": case(CALLED, [assistant("", TIME)], tool_format="glm4", **TOOLS),
}

# Families whose templates think, with one that does not, and those in which every tool format is tried.
THINKING = ("qwen3", "qwen3_vl", "deepseekr1", "gpt_oss", "qwen3_nothink")
FORMATTED = ("qwen3_nothink", "llama3", "mistral", "phi4")


def cases_of(family: str) -> dict[str, dict[str, Any]]:
    """The cases by name that tell something about a family."""
    return {
        name: case
        for name, case in CASES.items()
        if (family in THINKING or "thinking" not in name)
        and (family in FORMATTED or not name.startswith("tool format"))
    }
