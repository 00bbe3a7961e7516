"""The named chat templates: what each writes, how it ends a turn, and its jinja text.

A family's file in `templates/` includes parts that it shares with others and the tool format, which says
how functions are described and called. Inclusion is textual, so that the whole can be saved with a model.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from prefkit.config.errors import UserError

_FOLDER = Path(__file__).parent / "templates"
_INCLUDE = re.compile(r"\{%- include (?:'([^']+)'|tool_format) -%\}\n")


class TemplateError(UserError):
    """A template that does not exist, or does not suit the model or the conversation."""


@dataclass(frozen=True)
class Family:
    """A row of the table of named templates.

    `control` are the tokens that the template writes, which must be tokens of the model; `ends` is the one
    of them that ends a turn and becomes the tokenizer's end token, None where the tokenizer's own does.
    `stops` end an answer besides, where the tokenizer has them. `tools` is the tool format. `image` is
    what is written for an image, to be filled with the tokens of its features, `video` for a video.
    """

    models: str
    control: tuple[str, ...] = ()
    ends: str | None = None
    stops: tuple[str, ...] = ()
    tools: str = "default"
    thinks: bool = False
    image: str = ""
    video: str = ""


_IM = ("<|im_start|>", "<|im_end|>")
_QWEN_IMAGE, _QWEN_VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
_TURN = ("<start_of_turn>", "<end_of_turn>")
_DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>")

FAMILIES = {
    "qwen": Family("Qwen 2.5", _IM, "<|im_end|>", tools="qwen"),
    "qwen3": Family("Qwen 3, thinking or both", _IM, "<|im_end|>", tools="qwen", thinks=True),
    "qwen3_nothink": Family("Qwen 3 Instruct 2507", _IM, "<|im_end|>", tools="qwen"),
    "qwen2_vl": Family(
        "Qwen 2 VL, Qwen 2.5 VL", _IM, "<|im_end|>", tools="qwen", image=_QWEN_IMAGE, video=_QWEN_VIDEO
    ),
    "qwen3_vl": Family(
        "Qwen 3 VL Thinking",
        _IM,
        "<|im_end|>",
        tools="qwen",
        thinks=True,
        image=_QWEN_IMAGE,
        video=_QWEN_VIDEO,
    ),
    "qwen3_vl_nothink": Family(
        "Qwen 3 VL Instruct", _IM, "<|im_end|>", tools="qwen", image=_QWEN_IMAGE, video=_QWEN_VIDEO
    ),
    "chatml": Family("any with ChatML's tokens", _IM, "<|im_end|>", ("<|im_start|>",)),
    "llama2": Family("Llama 2 Chat"),
    "llama3": Family(
        "Llama 3, 3.1, 3.2, 3.3",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        ("<|eom_id|>",),
        tools="llama3",
    ),
    "llama4": Family(
        "Llama 4",
        ("<|header_start|>", "<|header_end|>", "<|eot|>"),
        "<|eot|>",
        ("<|eom|>",),
        tools="llama3",
        image="<|image|>",
    ),
    "gemma": Family("Gemma", _TURN, "<end_of_turn>"),
    "gemma2": Family("Gemma 2", _TURN, None, ("<end_of_turn>",)),
    "gemma3": Family("Gemma 3", _TURN, "<end_of_turn>", image="<start_of_image>"),
    "mistral": Family("Mistral 7B v0.3 and its kin", tools="mistral"),
    "phi4": Family("Phi 4", ("<|im_start|>", "<|im_sep|>", "<|im_end|>"), "<|im_end|>"),
    "deepseek3": Family("DeepSeek V2.5, V3", _DEEPSEEK),
    "deepseekr1": Family("DeepSeek R1 and its distillates", _DEEPSEEK, thinks=True),
    "glm4": Family(
        "GLM 4",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        None,
        ("<|user|>", "<|observation|>"),
        tools="glm4",
    ),
    "gpt_oss": Family("GPT-OSS", ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"), thinks=True),
    "vicuna": Family("Vicuna"),
    "alpaca": Family("models tuned in Alpaca's form"),
    "default": Family("base models"),
    "empty": Family("base models; texts as they are"),
}
ALIASES = {"qwen2.5": "qwen"}


def read_family(name: str) -> tuple[str, Family]:
    """The row of a name or alias, with the name of its file. Raises `TemplateError` for other names."""
    known = ALIASES.get(name, name)
    if known in FAMILIES:
        return known, FAMILIES[known]
    others = json.loads((_FOLDER / "other.json").read_text(encoding="utf-8"))["templates"]
    if name in others:
        raise TemplateError(f"template: {name} is not one of prefkit's. {_advice(others[name])}")
    near = difflib.get_close_matches(name, [*FAMILIES, *ALIASES, *others], n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(FAMILIES)}."
    raise TemplateError(
        f"template: unknown template {name!r}; {hint} Without the key, the model's own chat template is used."
    )


def _advice(facts: dict[str, str]) -> str:
    """What to write instead of a template of LLaMA-Factory 0.9.5 that prefkit lacks."""
    media = " Images, sound and video are not read under this name." if "media" in facts else ""
    if "same_as" in facts:
        return f"Its text is that of {facts['same_as']}: write `template: {facts['same_as']}`.{media}"
    advice = (
        "Leave `template` out and the model's own chat template is used; whether the two write the same was "
        "not compared."
    )
    if "plain" in facts:
        advice = (
            "It writes no control tokens. Models of such a form often have no chat template of their own: "
            "leaving `template` out is then an error; where one has, the two need not write the same."
        )
    if "system" in facts:
        advice += (
            " It put a system message of its own where a row had none, which the model's own may not do: set "
            "default_system."
        )
    if "thinks" in facts:
        advice += " It put an empty thought where an answer had none, which the model's own may not do."
    return advice + media


def read_source(name: str, tool_format: str | None = None) -> str:
    """The whole jinja text of a family, its parts and tool format included."""
    tools = f"tools/{tool_format or FAMILIES[name].tools}.jinja"
    return _read(f"{name}.jinja", tools)


def read_parts(family: Family) -> str:
    """Jinja before the text of a family that joins a message's list of parts, as others hand over images."""
    text = (_FOLDER / "parts" / "content.jinja").read_text(encoding="utf-8").replace("\n", "")
    return text.replace("{{ image }}", family.image).replace("{{ video }}", family.video)


def _read(file: str, tools: str) -> str:
    text = (_FOLDER / file).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda match: _read(match[1] or tools, tools), text)
