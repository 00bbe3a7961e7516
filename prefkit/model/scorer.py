"""A reward model with the template of its training: from texts to scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefkit.config.errors import UserError
from prefkit.config.schema import DataConfig, ModelConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Message
from prefkit.data.messages import Degenerate
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
        return whole_row(ids[: self._checked(len(ids) if max_length is None else min(len(ids), max_length))])

    def encode_answer(
        self,
        prompt: Sequence[Message],
        answer: Message,
        tools: Sequence[Mapping[str, Any]] = (),
        has_ended: bool = True,
    ) -> TokenizedExample:
        """A prompt and the assistant's answer, as the template writes them; nothing is cut. The turn of an
        answer that was cut off before its end is left open.

        Raises `RowTooLong`, and `UserError` for a conversation that the template refuses.
        """
        prompt_ids, (ids,) = self.template.encode(prompt, [answer], tools)
        ids = ids if has_ended else self._opened(ids)
        self._checked(len(prompt_ids) + len(ids))
        if not ids:
            raise UserError("the answer has no token to score")
        return TokenizedExample(prompt_ids, [ids], (), "")

    def fit_answer(
        self,
        prompt: Sequence[Message],
        answer: Message,
        tools: Sequence[Mapping[str, Any]] = (),
        has_ended: bool = True,
    ) -> TokenizedExample:
        """The same in at most `max_length` tokens, see `fit_row`, and for any answer: one that the template
        refuses, since it holds what stands for a file, say, is plain text.

        Raises `UserError` for a prompt that the template refuses.
        """
        try:
            prompt_ids, (ids,) = self.template.encode(prompt, [answer], tools)
        except (Degenerate, ConversationRefused):
            prompt_ids, _ = self.template.encode(prompt, [], tools)
            text = self.template.tokenizer(
                answer.content, add_special_tokens=False, split_special_tokens=True
            )
            ids = [*text["input_ids"], *self.template.closing]
        return fit_row(prompt_ids, ids if has_ended else self._opened(ids), self.max_length)

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


def fit_row(prompt_ids: Sequence[int], response_ids: Sequence[int], max_length: int) -> TokenizedExample:
    """A prompt and a response, which may be empty, in at most `max_length` tokens.

    As where rows are encoded for training, a response is kept up to 3/4 of them, or as far as the prompt
    leaves room, and loses its tail; the prompt loses its head.

    >>> row = fit_row([1, 2, 3, 4, 5, 6], [7, 8, 9, 10], 8)
    >>> row.prompt_ids, row.response_ids
    ([3, 4, 5, 6], [[7, 8, 9, 10]])
    """
    kept = list(response_ids[: max(max_length - len(prompt_ids), max_length * 3 // 4)])
    prompt = list(prompt_ids[-(max_length - len(kept)) :]) if len(kept) < max_length else []
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
