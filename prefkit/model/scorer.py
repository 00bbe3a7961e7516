"""A reward model with the template of its training: from texts to scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefkit.config.errors import UserError
from prefkit.config.schema import DataConfig, ModelConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Example, Medium, Message, Response
from prefkit.data.messages import PLACEHOLDER, Degenerate
from prefkit.data.template import ChatTemplate, ConversationRefused
from prefkit.model.reward_adapter import RewardAdapter
from prefkit.model.reward_model import RewardModel, open_reward_model, whole_row
from prefkit.model.vision import load_template


class RowTooLong(UserError):
    """A text with more tokens than the reward model is to read."""


@dataclass(frozen=True)
class Scorer:
    """What scores texts: those of `prefkit score` and of the server, and the rollouts of a training.

    A row has at most `max_length` tokens.
    """

    model: RewardModel | RewardAdapter
    template: ChatTemplate
    name: str
    max_length: int

    def encode_text(self, text: str, max_length: int | None = None) -> TokenizedExample:
        """A text that the template was applied to already: what is written as a control token is one, and
        none is added.

        Its end is cut off at `max_length` tokens. Raises `RowTooLong` where that is None and the text has
        more than the scorer's, and `UserError` for a text without a token.
        """
        ids: list[int] = self.template.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError("there is no token to score")
        if self.template.count_places(ids):
            raise UserError("it has the token of an image, and a text brings none: score messages instead")
        return whole_row(ids[: self._checked(len(ids) if max_length is None else min(len(ids), max_length))])

    def encode_answer(
        self,
        prompt: Sequence[Message],
        answer: Message,
        tools: Sequence[Mapping[str, Any]] = (),
        has_ended: bool = True,
        images: Sequence[Medium] = (),
    ) -> TokenizedExample:
        """A prompt with its images and the assistant's answer, as the template writes them; nothing is cut.
        The turn of an answer that was cut off before its end is left open.

        Raises `RowTooLong`, `UserError` for a conversation that the template refuses, and `RowError` where
        images are not for this model or not one for each `<image>`.
        """
        texts = self._texts(prompt, answer, images)
        prompt_ids, (ids,) = self.template.encode(prompt, [answer], tools, texts)
        ids = ids if has_ended else self._opened(ids)
        self._checked(len(prompt_ids) + len(ids))
        if not ids:
            raise UserError("the answer has no token to score")
        return TokenizedExample(prompt_ids, [ids], (), "", images=tuple(images))

    def fit_answer(
        self,
        prompt: Sequence[Message],
        answer: Message,
        tools: Sequence[Mapping[str, Any]] = (),
        has_ended: bool = True,
        images: Sequence[Medium] = (),
    ) -> TokenizedExample:
        """The same in at most `max_length` tokens, see `fit_row`, and for any answer: one that the template
        refuses, since it holds what stands for a file, say, is plain text.

        Raises `UserError` for a prompt that the template refuses or whose images have no room, and `RowError`
        as above.
        """
        texts = self._texts(prompt, Message("assistant", ""), images)
        try:
            _check_answer(answer, self.template)
            prompt_ids, (ids,) = self.template.encode(prompt, [answer], tools, texts)
        except (Degenerate, ConversationRefused):
            prompt_ids, _ = self.template.encode(prompt, [], tools, texts)
            text = self.template.tokenizer(
                answer.content, add_special_tokens=False, split_special_tokens=True
            )
            ids = [*text["input_ids"], *self.template.closing]
        return self.fit(prompt_ids, ids if has_ended else self._opened(ids), images)

    def fit(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], images: Sequence[Medium] = ()
    ) -> TokenizedExample:
        """The tokens of a prompt with its images and of a response in at most `max_length`, see `fit_row`."""
        vision = self.template.vision
        places = vision.token_id if vision is not None and images else None
        return replace(fit_row(prompt_ids, response_ids, self.max_length, places), images=tuple(images))

    def _texts(self, prompt: Sequence[Message], answer: Message, images: Sequence[Medium]) -> list[str]:
        """What is written for each image."""
        response = Response(answer.content, "answer", answer.calls)
        return self.template.image_texts(Example(tuple(prompt), (response,), "", images=tuple(images)))

    def _opened(self, ids: list[int]) -> list[int]:
        """The ids of an answer without the end of its turn."""
        closing = self.template.closing
        return ids[: -len(closing)] if closing and ids[-len(closing) :] == closing else ids

    def _checked(self, length: int) -> int:
        if length > self.max_length:
            raise RowTooLong(f"it has {length} tokens, and at most {self.max_length} are read (cutoff_len)")
        return length

    def score(self, examples: Sequence[TokenizedExample]) -> list[list[float]]:
        """The scores of the responses of each example, as `RewardModel.score` says."""
        return self.model.score(examples)


def _check_answer(answer: Message, template: ChatTemplate) -> None:
    """Raises `ConversationRefused` for an answer in which a template of a model that sees would find an
    image."""
    if template.vision is not None and PLACEHOLDER in answer.content:
        raise ConversationRefused(f"The answer has {PLACEHOLDER}.")


def fit_row(
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    max_length: int,
    image_token: int | None = None,
) -> TokenizedExample:
    """A prompt and a response, which may be empty, in at most `max_length` tokens.

    As where rows are encoded for training, a response is kept up to 3/4 of them, or as far as the prompt
    leaves room, and loses its tail; the prompt loses its head, but no `image_token` and none beside it.
    Raises `UserError` where these leave no room.

    >>> row = fit_row([1, 2, 3, 4, 5, 6], [7, 8, 9, 10], 8)
    >>> row.prompt_ids, row.response_ids
    ([3, 4, 5, 6], [[7, 8, 9, 10]])
    """
    is_place = [token == image_token for token in prompt_ids]
    near = zip(is_place, [False, *is_place], [*is_place[1:], False], strict=False)
    fixed = [any(it) for it in near]
    room = max_length - sum(fixed)
    if any(fixed) and room < 1:
        raise UserError(f"the images of its prompt leave no room in {max_length} tokens (cutoff_len)")
    kept = list(response_ids[: min(max(max_length - len(prompt_ids), max_length * 3 // 4), room)])
    free = [i for i, stays in enumerate(fixed) if not stays]
    gone = set(free[: max(len(prompt_ids) + len(kept) - max_length, 0)])
    prompt = [token for i, token in enumerate(prompt_ids) if i not in gone]
    return TokenizedExample(prompt, [kept], (), "") if prompt and kept else whole_row([*prompt, *kept])


def open_scorer(model: ModelConfig, data: DataConfig) -> Scorer:
    """Read the reward model that base and adapters are. Raises `ModelError` when it is none, or another."""
    template = load_template(model, data)
    return Scorer(
        open_reward_model(model, data.cutoff_len, vision=template.vision),
        template,
        Path(model.trained_last).name,
        data.cutoff_len,
    )
