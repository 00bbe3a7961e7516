"""Chat templates: from messages to token ids, with the border between prompt and response kept.

A template is jinja: the model's own, or a named one from `templates/`. Prompt and response are encoded
separately, so that no token spans the border. A named template may write `{{ border }}` wherever else
the text is to be encoded in separate parts; elsewhere, as in a saved tokenizer, it renders as nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefkit.config.errors import UserError
from prefkit.config.schema import DataConfig
from prefkit.data.examples import Message
from prefkit.data.formats import Degenerate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FOLDER = Path(__file__).parent / "templates"
# Unicode noncharacters, which no text may contain: where encoding starts anew, and inside a control
# token that the user typed, so that it stays plain text.
_BORDER, _GUARD = "\ufdd0", "\ufdd1"

# The tokens that a named template writes; the last one ends a turn. They must be tokens of the model.
CONTROL_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "default": (),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "qwen3_nothink": ("<|im_start|>", "<|im_end|>"),
}


class TemplateError(UserError):
    """A template that does not exist or does not suit the model."""


def make_template(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> ChatTemplate:
    """The template that the config names, put into the tokenizer. Raises `TemplateError`."""
    template = ChatTemplate(
        tokenizer,
        config.template,
        default_system=config.default_system,
        enable_thinking=config.enable_thinking,
        preserve_thinking=config.preserve_thinking,
    )
    template.install()
    return template


class ChatTemplate:
    """How a conversation is written for one tokenizer.

    `name` is a named template or None for the tokenizer's own; `enable_thinking` true lets the model
    think (a response without a thought gets an empty, scored one), false puts the empty thought into the
    prompt, null does so unless a response has a thought of its own. `default_system` stands in where a
    conversation has no system turn.

    Raises `TemplateError` when the name is unknown, its control tokens are not tokens of the model, or
    there is no template at all.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        *,
        default_system: str | None = None,
        enable_thinking: bool | None = True,
        preserve_thinking: bool = False,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.default_system = default_system
        self.enable_thinking = enable_thinking
        self.preserve_thinking = preserve_thinking
        self._source = _load_source(tokenizer, name)
        self._special_ids = {
            str(token): number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or str(token) in tokenizer.all_special_tokens
        }
        alternatives = "|".join(
            re.escape(token) for token in sorted(self._special_ids, key=len, reverse=True)
        )
        self._special = re.compile(f"({alternatives})" if alternatives else "(?!)")

    @property
    def end_token(self) -> str | None:
        """The token that ends a turn, where the template is a named one that has its own."""
        return CONTROL_TOKENS[self.name][-1] if self.name and CONTROL_TOKENS[self.name] else None

    def install(self) -> None:
        """Make the tokenizer carry this template with its thinking mode and default system message, so
        that what is saved is what was trained, whoever reads it."""
        self.tokenizer.chat_template = self._defaults() + self._source.replace("{{ border }}", "")
        if self.end_token:
            self.tokenizer.eos_token = self.end_token
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def _defaults(self) -> str:
        """Jinja that sets what this template was told, where its reader says nothing."""
        flags = {"enable_thinking": bool(self.enable_thinking), "preserve_thinking": self.preserve_thinking}
        usual = {"enable_thinking": True, "preserve_thinking": False}
        lines = [
            f"{{% if {name} is not defined %}}{{% set {name} = {str(value).lower()} %}}{{% endif %}}"
            for name, value in flags.items()
            if value != usual[name]
        ]
        if self.default_system:
            system = f"{{'role': 'system', 'content': {json.dumps(self.default_system, ensure_ascii=False)}}}"
            lines.append(
                "{% if messages[0]['role'] != 'system' %}"
                f"{{% set messages = [{system}] + messages %}}{{% endif %}}"
            )
        return "".join(line for line in lines if line not in self._source)

    def encode(
        self, prompt: Sequence[Message], responses: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt, up to where the assistant speaks, and of each response.

        Raises `Degenerate` when the text contains Unicode noncharacters that mark borders here.
        """
        messages = [self._guarded(message) for message in self._with_system(prompt)]
        answers = [self._guarded(response) for response in responses]
        thinks = self.enable_thinking
        if thinks is None:
            thinks = any("<think>" in answer["content"] for answer in answers)
        opened = self._render(messages, thinks, add_generation_prompt=True)
        full = [self._render([*messages, answer], thinks) for answer in answers]
        start = self._response_start(opened, full, messages, thinks)
        return self._ids(opened[:start]), [self._ids(text[start:]) for text in full]

    def _response_start(
        self, opened: str, full: list[str], messages: list[dict[str, str]], thinks: bool
    ) -> int:
        """Where the responses start: after what the template puts before any answer.

        Some templates open an answer (with `<think>`, say) otherwise than they write one that is given:
        then the answer starts where the two part, which must be after the prompt's last turn.
        """
        start = min((_common_length(opened, text) for text in full), default=len(opened))
        if start < len(opened) and start < len(self._render(messages, thinks)):
            raise TemplateError(
                "The model's chat template rewrites the prompt when an answer follows; choose a named "
                f"template ({', '.join(CONTROL_TOKENS)})."
            )
        return start

    def _with_system(self, prompt: Sequence[Message]) -> Sequence[Message]:
        if self.default_system and prompt[0].role != "system":
            return [Message("system", self.default_system), *prompt]
        return prompt

    def _guarded(self, message: Message) -> dict[str, str]:
        """The message for jinja, control tokens in its text made harmless."""
        if _BORDER in message.content or _GUARD in message.content:
            raise Degenerate("text has the Unicode noncharacters U+FDD0 or U+FDD1")
        content = self._special.sub(lambda match: match[0][0] + _GUARD + match[0][1:], message.content)
        return {"role": message.role, "content": content}

    def _render(
        self, messages: list[dict[str, str]], thinks: bool, add_generation_prompt: bool = False
    ) -> str:
        variables: dict[str, Any] = {"enable_thinking": thinks, "preserve_thinking": self.preserve_thinking}
        if self.name:
            variables["border"] = _BORDER
        text = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self._source,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **variables,
        )
        assert isinstance(text, str)
        return text

    def _ids(self, text: str) -> list[int]:
        return [token for part in text.split(_BORDER) if part for token in self._part_ids(part)]

    def _part_ids(self, text: str) -> Iterator[int]:
        """Token ids of a text in which guarded control tokens are plain text."""
        if _GUARD not in text:
            yield from self.tokenizer.encode(text, add_special_tokens=False)
            return
        for piece in self._special.split(text):
            if self._special.fullmatch(piece):
                yield self._special_ids[piece]
            elif piece:
                plain = piece.replace(_GUARD, "")
                yield from self.tokenizer.encode(plain, add_special_tokens=False, split_special_tokens=True)


def _common_length(one: str, other: str) -> int:
    """How many leading characters two texts share."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _load_source(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """The jinja text of a named template, or of the tokenizer's own."""
    if name is None:
        if not isinstance(tokenizer.chat_template, str):
            raise TemplateError(
                f"{tokenizer.name_or_path} has no chat template of its own: "
                f"set `template` to one of {', '.join(CONTROL_TOKENS)}."
            )
        return tokenizer.chat_template
    if name not in CONTROL_TOKENS:
        raise TemplateError(
            f"template: unknown template {name!r}; known: {', '.join(CONTROL_TOKENS)}. "
            "Without the key, the model's own chat template is used."
        )
    vocabulary = tokenizer.get_vocab()
    absent = [token for token in CONTROL_TOKENS[name] if token not in vocabulary]
    if absent:
        raise TemplateError(
            f"template: {name} writes {' and '.join(absent)}, no tokens of {tokenizer.name_or_path}. "
            "Without the key, the model's own chat template is used."
        )
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
