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
from prefkit.data.template import ChatTemplate, make_template
from prefkit.model.load import load_tokenizer
from prefkit.model.reward_model import RewardModel, open_reward_model, whole_row


class RowTooLong(UserError):
    """A text with more tokens than the reward model is to read."""


@dataclass(frozen=True)
class Scorer:
    """What scores texts: those of `prefkit score` and of the server, and the rollouts of a training.

    A row has at most `max_length` tokens.
    """

    model: RewardModel
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
        self, prompt: Sequence[Message], answer: Message, tools: Sequence[Mapping[str, Any]] = ()
    ) -> TokenizedExample:
        """A prompt and the assistant's answer, as the template writes them; nothing is cut.

        Raises `RowTooLong`, and `UserError` for a conversation that the template refuses.
        """
        prompt_ids, responses = self.template.encode(prompt, [answer], tools)
        self._checked(len(prompt_ids) + len(responses[0]))
        if not responses[0]:
            raise UserError("the answer has no token to score")
        return TokenizedExample(prompt_ids, responses, (), "")

    def _checked(self, length: int) -> int:
        if length > self.max_length:
            raise RowTooLong(f"it has {length} tokens, and at most {self.max_length} are read (cutoff_len)")
        return length

    def score(self, examples: Sequence[TokenizedExample]) -> list[list[float]]:
        """The scores of the responses of each example, as `RewardModel.score` says."""
        return self.model.score(examples)


def open_scorer(model: ModelConfig, data: DataConfig) -> Scorer:
    """Read the reward model that base and adapters are. Raises `ModelError` when it is none, or another."""
    template = make_template(load_tokenizer(model), data)
    return Scorer(
        open_reward_model(model, data.cutoff_len), template, Path(model.trained_last).name, data.cutoff_len
    )
