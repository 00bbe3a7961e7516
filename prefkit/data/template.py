"""Chat templates: from messages to token ids, with the border between prompt and response kept.

A template is jinja: the model's own, or a named one from `templates/`. Prompt and response are encoded
separately, so that no token spans the border. A named template may write `{{ border }}` wherever else
the text is to be encoded in separate parts; elsewhere, as in a saved tokenizer, it renders as nothing.
Tools and calls reach the template in the form that transformers' `apply_chat_template` documents.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import jinja2

from prefkit.config.schema import DataConfig
from prefkit.data.examples import Clip, Example, Message
from prefkit.data.families import FAMILIES, Family, TemplateError, read_family, read_parts, read_source
from prefkit.data.messages import (
    CLIP_PLACEHOLDER,
    PLACEHOLDER,
    PLACEHOLDERS,
    Degenerate,
    RowError,
    interleave,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefkit.data.vision import Vision

# Unicode noncharacters, which no text may contain: where encoding starts anew, and inside a special
# token that the user typed, so that it stays plain text.
_BORDER, _GUARD = "\ufdd0", "\ufdd1"
# Added tokens that are not marked as special though they steer a model: `<|user|>`, `[INST]`, `<think>`.
# Others are mere text to their models, such as `<table>` or a run of spaces.
_STEERS = re.compile(
    r"<[|｜].+[|｜]>|\[/?[A-Z][A-Z_]+\]|</?(?:think|tools?|tool_\w+|arg_\w+|(?:start|end)_of_\w+)>"
)
_SOUND, _VIDEO_OR_SOUND = re.compile("<audio>"), re.compile("<video>|<audio>")


class ConversationRefused(TemplateError):
    """The template cannot write this conversation: a system turn, tools or several calls, say."""


def make_template(
    tokenizer: PreTrainedTokenizerBase, config: DataConfig, vision: Vision | None = None
) -> ChatTemplate:
    """The template that the config names, put into the tokenizer; `vision` is how the model sees, if it
    does. Raises `TemplateError`."""
    template = ChatTemplate(
        tokenizer,
        config.template,
        default_system=config.default_system,
        tool_format=config.tool_format,
        enable_thinking=config.enable_thinking,
        preserve_thinking=config.preserve_thinking,
        vision=vision,
    )
    template.install()
    return template


def has_thought(content: str) -> bool:
    """Whether an assistant's text starts with a thought, which `</think>` ends; some models are only given
    its end, since their prompt has the `<think>`."""
    head, end, _ = content.partition("</think>")
    return bool(end) and (head.lstrip().startswith("<think>") or "<think>" not in head)


class ChatTemplate:
    """How a conversation is written for one tokenizer.

    `name` is a named template or None for the tokenizer's own; `enable_thinking` true lets the model
    think (a response without a thought gets an empty, scored one), false puts the empty thought into the
    prompt, null does so unless a response has a thought of its own. `default_system` stands in where a
    conversation has no system turn; an empty one takes away that of a named template. `tool_format` is
    how a named template describes and calls functions, None for its own way. With `vision`, each `<image>` of
    a prompt stands for an image; without, it is a text.

    Raises `TemplateError` when the name is unknown, its control tokens are not tokens of the model, or
    there is no template at all.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        *,
        default_system: str | None = None,
        tool_format: str | None = None,
        enable_thinking: bool | None = True,
        preserve_thinking: bool = False,
        vision: Vision | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vision = vision
        self.default_system = default_system
        self.enable_thinking = enable_thinking
        self.preserve_thinking = preserve_thinking
        self.name: str | None = None
        self.family: Family | None = None
        if name is None:
            self._source = _own_source(tokenizer, tool_format)
        else:
            self.name, self.family = read_family(name)
            _check_tokens(tokenizer, self.name, self.family)
            self._source = read_source(self.name, tool_format)
        self._special_ids, steering = _control_tokens(tokenizer, self.family)
        self._special, self._steering = _any_of(self._special_ids), _any_of(steering)

    @property
    def saved(self) -> Any:
        """What is saved beside a model: the tokenizer, or the processor that holds it."""
        return self.tokenizer if self.vision is None else self.vision.processor

    @property
    def end_token(self) -> str | None:
        """The token that ends a turn, where the template is a named one that has its own."""
        return self.family.ends if self.family else None

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer besides the tokenizer's end token."""
        vocabulary = self.tokenizer.get_vocab()
        return (
            [vocabulary[token] for token in self.family.stops if token in vocabulary] if self.family else []
        )

    @cached_property
    def closing(self) -> list[int]:
        """What an answer ends in whatever its text is: the end of its turn."""
        answers = [Message("assistant", text) for text in ("yes", "no")]
        one, other = self.encode([Message("user", "?")], answers)[1]
        alike = takewhile(lambda ids: ids[0] == ids[1], zip(reversed(one), reversed(other), strict=False))
        return one[len(one) - sum(1 for _ in alike) :]

    def writes_as(self, other: ChatTemplate) -> bool:
        """Whether both write any conversation in the same token ids, control tokens aside that neither
        writes, such as one for padding."""
        small, large = sorted((self.tokenizer.get_vocab(), other.tokenizer.get_vocab()), key=len)
        return small.items() <= large.items() and self._manner() == other._manner()

    def _manner(self) -> dict[str, Any]:
        """What ids of a conversation depend on besides the vocabulary."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        parts = json.loads(backend.to_str()) if backend is not None else {}
        return {
            "name": self.name,
            "text": self._defaults() + self._source,
            "thinking": (self.enable_thinking, self.preserve_thinking),
            "system": self.default_system,
            "ends": (self.tokenizer.bos_token, self.end_token or self.tokenizer.eos_token),
            "tokenizer": [type(self.tokenizer) if backend is None else ""]
            + [parts.get(part) for part in ("normalizer", "pre_tokenizer", "model")],
        }

    def may_write(self, token: str) -> bool:
        """Whether the token stands in the template, or ends a turn. Text of a row never becomes a control
        token, so that of these no other is in an encoded row."""
        own = self.tokenizer
        ends = {str(it) for it in (own.bos_token, own.eos_token, own.unk_token, self.end_token)}
        ends |= set(self.family.stops) if self.family else set()
        return token in ends or token in self._source

    def install(self) -> None:
        """Make the tokenizer carry this template with its thinking mode and default system message, so
        that what is saved is what was trained, whoever reads it."""
        parts = read_parts(self.family) if self.vision is not None and self.family else ""
        self.tokenizer.chat_template = parts + self._defaults() + self._source.replace("{{ border }}", "")
        if self.end_token:
            self.tokenizer.eos_token = self.end_token
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def _defaults(self) -> str:
        """Jinja that sets what this template was told, where its reader says nothing."""
        flags = {"enable_thinking": bool(self.enable_thinking), "preserve_thinking": self.preserve_thinking}
        usual = {"enable_thinking": True, "preserve_thinking": False}
        values = {name: str(value).lower() for name, value in flags.items() if value != usual[name]}
        text = json.dumps(self.default_system, ensure_ascii=False)
        if self.name and self.default_system is not None:
            values["default_system"] = text
        lines = [
            f"{{% if {name} is not defined %}}{{% set {name} = {value} %}}{{% endif %}}"
            for name, value in values.items()
        ]
        if not self.name and self.default_system:
            lines.append(
                "{% if messages[0]['role'] != 'system' %}"
                f"{{% set messages = [{{'role': 'system', 'content': {text}}}] + messages %}}{{% endif %}}"
            )
        return "".join(line for line in lines if line not in self._source)

    def image_texts(self, example: Example) -> list[str]:
        """What is written for each image of a prompt.

        Raises `RowError` where a row has images and the model does not see, or where there is not one for
        each `<image>`; `TemplateError` where the template cannot write any.
        """
        if self.vision is None:
            if example.images:
                raise RowError(
                    f"it has images, and {self.tokenizer.name_or_path} does not see: take a model that does "
                    "(docs/images.md lists them)",
                    "images for a blind model",
                )
            return []
        if any(PLACEHOLDERS.search(response.content) for response in example.responses):
            raise RowError(
                f"a response has {PLACEHOLDER} or {CLIP_PLACEHOLDER}: images stand in the prompt",
                "image in a response",
            )
        marks = [mark for message in example.prompt for mark in PLACEHOLDERS.findall(message.content)]
        shown = [CLIP_PLACEHOLDER if isinstance(it, Clip) else PLACEHOLDER for it in example.images]
        if CLIP_PLACEHOLDER in marks and not self.vision.reads_clips:
            raise RowError(f"{CLIP_PLACEHOLDER}: {self.tokenizer.name_or_path} reads no videos", "no video")
        for mark in (PLACEHOLDER, CLIP_PLACEHOLDER):
            if marks.count(mark) != shown.count(mark):
                kind, number = mark.strip("<>"), shown.count(mark)
                raise RowError(
                    f"{mark} in the prompt: {marks.count(mark)}, {kind}s of the row: {number}",
                    "wrong number of images",
                )
        if not marks:
            return []
        if self.family and self.vision.written not in self.family.image:
            raise TemplateError(self._blind_template())
        return self.vision.read(example.images)[1]

    def _blind_template(self) -> str:
        assert self.vision is not None
        able = [name for name, family in FAMILIES.items() if self.vision.written in family.image]
        which = f"Those that do are {', '.join(able)}. " if able else ""
        return (
            f"template: {self.name} does not write the images of {self.tokenizer.name_or_path}. {which}"
            "Without the key, the model's own chat template is used."
        )

    def count_places(self, ids: Sequence[int]) -> int:
        """How many tokens take the features of images."""
        return sum(token in self.vision.token_ids for token in ids) if self.vision is not None else 0

    def encode(
        self,
        prompt: Sequence[Message],
        responses: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        images: Sequence[str] = (),
    ) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt, up to where the assistant speaks, and of each response.

        `tools` are JSON schemas of functions, bare or as `{"type": "function", "function": schema}`; `images`
        are what `image_texts` gives for those of the prompt. Raises `ConversationRefused`, and `Degenerate`
        when the text contains Unicode noncharacters that mark borders here.
        """
        thinks = self.enable_thinking
        if thinks is None:
            thinks = any(has_thought(response.content) for response in responses)
        if not self.name and self.default_system and prompt[0].role != "system":
            prompt = [Message("system", self.default_system), *prompt]
        messages = self._conversation(prompt)
        answers = [self._conversation([response])[0] for response in responses]
        functions = self._guarded([_wrapped(tool) for tool in tools]) or None
        opened = self._render(messages, functions, thinks, add_generation_prompt=True)
        full = [self._render([*messages, answer], functions, thinks) for answer in answers]
        start = min((_common_length(opened, text) for text in full), default=len(opened))
        # Some templates open an answer (with `<think>`, say) otherwise than they write one that is given:
        # then the answer starts where the two part, which must be after the prompt's last turn.
        if start < len(opened) and start < len(self._render(messages, functions, thinks)):
            raise TemplateError(
                "The model's chat template rewrites the prompt when an answer follows; choose a named "
                f"template ({', '.join(FAMILIES)})."
            )
        if not self.name:
            _check_written(opened, messages, functions or [])
            for text, answer in zip(full, answers, strict=True):
                _check_written(text[start:], [answer], [])
        asked = self._with_images(opened[:start], images)
        return self._ids(asked), [self._ids(text[start:]) for text in full]

    def _with_images(self, text: str, images: Sequence[str]) -> str:
        """The text with what is written for each image in its place."""
        if self.vision is None or not images:
            return text
        pieces = self.vision.split(text)
        if len(pieces) - 1 != len(images):
            raise ConversationRefused(
                f"The chat template writes {len(pieces) - 1} images, and the prompt has {len(images)}."
            )
        return interleave(pieces, images)

    def _conversation(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages for jinja, control tokens in their text made harmless.

        Calls and results have ids, since some models' templates insist on them.
        """
        conversation: list[dict[str, Any]] = []
        waiting: list[dict[str, Any]] = []
        for turn, message in enumerate(messages):
            entry: dict[str, Any] = {"role": message.role, "content": self._content(message)}
            if message.calls:
                entry["tool_calls"] = waiting = [
                    {
                        "type": "function",
                        "id": f"call{turn:03d}{number:02d}",
                        "function": self._guarded({"name": call.name, "arguments": call.arguments}),
                    }
                    for number, call in enumerate(message.calls)
                ]
                waiting = list(waiting)
            if message.role == "tool" and waiting:
                call = waiting.pop(0)
                entry |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
            conversation.append(entry)
        return conversation

    def _content(self, message: Message) -> str | list[dict[str, str]]:
        """The text of a message, guarded but for the marks around an assistant's own thought; for the own
        template of a model that sees as a list of parts."""
        reads_clips = self.vision is not None and self.vision.reads_clips
        unread = _SOUND if reads_clips else _VIDEO_OR_SOUND
        if self.family and self.family.image and (placeholder := unread.search(message.content)):
            raise ConversationRefused(
                f"In template {self.name}, {placeholder[0]} stands for a file, which this version "
                "cannot read."
            )
        if self.vision is None:
            return self._text(message)
        pieces = PLACEHOLDERS.split(message.content)
        texts = [self._text(replace(message, content=text)) for text in pieces[::2]]
        marks = pieces[1::2]
        if self.family:
            written = {PLACEHOLDER: self.family.image, CLIP_PLACEHOLDER: self.family.video}
            return interleave(texts, [written[mark] or mark for mark in marks])
        parts = [{"type": "text", "text": texts[0]}]
        for mark, text in zip(marks, texts[1:], strict=True):
            parts += [{"type": mark.strip("<>")}, {"type": "text", "text": text}]
        return [part for part in parts if part.get("text") != ""] or parts

    def _text(self, message: Message) -> str:
        if message.role != "assistant" or not has_thought(message.content):
            return str(self._guarded(message.content))
        thought, _, answer = message.content.partition("</think>")
        before, opening, thought = thought.partition("<think>")
        return f"{self._guarded(before)}{opening}{self._guarded(thought)}</think>{self._guarded(answer)}"

    def _guarded(self, value: Any) -> Any:
        """The value with the control tokens in its texts made harmless."""
        if isinstance(value, Mapping):
            return {self._guarded(name): self._guarded(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(item) for item in value]
        if not isinstance(value, str):
            return value
        if _BORDER in value or _GUARD in value:
            raise Degenerate("text has the Unicode noncharacters U+FDD0 or U+FDD1")
        value = self._special.sub(lambda match: match[0][0] + _GUARD + match[0][1:], value)
        # A tokenizer that is told to read special tokens as text still finds these: they are cut in two.
        return self._steering.sub(lambda match: match[0][0] + _BORDER + match[0][1:], value)

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        thinks: bool,
        add_generation_prompt: bool = False,
    ) -> str:
        variables: dict[str, Any] = {"enable_thinking": thinks, "preserve_thinking": self.preserve_thinking}
        if self.name:
            variables["border"] = _BORDER
            if self.default_system is not None:
                variables["default_system"] = self._guarded(self.default_system)
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,  # type: ignore[arg-type]
                chat_template=self._source,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **variables,
            )
        except jinja2.TemplateError as error:
            owner = f"chat template {self.name}" if self.name else "model's chat template"
            raise ConversationRefused(f"The {owner} refuses this conversation: {error}") from error
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


def _control_tokens(
    tokenizer: PreTrainedTokenizerBase, family: Family | None
) -> tuple[dict[str, int], list[str]]:
    """The special tokens with their ids, and others that steer the model or that its family writes."""
    special: dict[str, int] = {}
    steering: list[str] = []
    for number, token in tokenizer.added_tokens_decoder.items():
        text = str(token)
        if token.special or text in tokenizer.all_special_tokens:
            special[text] = number
        elif _STEERS.fullmatch(text) or (family and text in family.control):
            steering.append(text)
    return special, steering


def _any_of(tokens: Sequence[str] | Mapping[str, int]) -> re.Pattern[str]:
    """Matches each of the tokens, the longest first."""
    alternatives = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return re.compile(f"({alternatives})" if alternatives else "(?!)")


def _wrapped(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    return tool if tool.get("type") == "function" else {"type": "function", "function": tool}


def _common_length(one: str, other: str) -> int:
    """How many leading characters two texts share."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _own_source(tokenizer: PreTrainedTokenizerBase, tool_format: str | None) -> str:
    """The tokenizer's own jinja."""
    if tool_format:
        raise TemplateError(
            "tool_format changes a named template; the model's own is used here: set `template` too, or "
            "remove the key."
        )
    if not isinstance(tokenizer.chat_template, str):
        raise TemplateError(
            f"{tokenizer.name_or_path} has no chat template of its own: "
            f"set `template` to one of {', '.join(FAMILIES)}."
        )
    return tokenizer.chat_template


def _check_tokens(tokenizer: PreTrainedTokenizerBase, name: str, family: Family) -> None:
    vocabulary = tokenizer.get_vocab()
    absent = [token for token in family.control if token not in vocabulary]
    if absent:
        raise TemplateError(
            f"template: {name} writes {' and '.join(absent)}, no tokens of {tokenizer.name_or_path}. "
            "Without the key, the model's own chat template is used."
        )


def _texts(content: str | list[dict[str, str]]) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part["type"] == "text"]


def _check_written(text: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    """Refuse a model's own template that leaves out what the conversation has."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    # A description and each call has the function's name once at least.
    names = Counter(entry["function"].get("name", "") for entry in (*tools, *calls))
    told = [
        part.strip()
        for message in messages
        if message["role"] in ("system", "tool")
        for part in _texts(message["content"])
    ]
    for what, is_absent in {
        "functions or calls of them": any(text.count(name) < number for name, number in names.items()),
        "the system message or what a function returned": any(
            content not in text and json.dumps(content, ensure_ascii=False)[1:-1] not in text
            for content in told
        ),
    }.items():
        if is_absent:
            raise ConversationRefused(
                f"The model's own chat template leaves out {what}: set `template` to a named one "
                "(docs/templates.md)."
            )
