"""What is judged, and what a judge is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prefkit.config.errors import UserError
from prefkit.data.examples import Medium, Message


class JudgeFailed(UserError):
    """A score that could not be had: none is ever put in its place.

    The responses of a rollout are not learnt from then, so that a run goes on from its last checkpoint as if
    it had not been stopped.
    """

    of_one_rank = True


class JudgeOfAnotherFailed(JudgeFailed):
    """It was another process whose responses could not be judged, which says why."""

    of_another_rank = True


@dataclass(frozen=True)
class Answered:
    """A prompt with a response that was drawn.

    `prompt` is the whole conversation before the response; `prompt_ids` are its tokens as the policy read
    them, cut to `cutoff_len`. `response_ids` include the token that ended the response if it has `ended`, and
    `text` is the response without control tokens. `images` are those of the prompt, one for each `<image>`.
    """

    prompt: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    prompt_ids: list[int]
    response_ids: list[int]
    ended: bool
    text: str
    images: tuple[Medium, ...] = ()


class Judge(Protocol):
    """What says how good responses are; `name` is what messages call it."""

    name: str

    def score(self, answered: Sequence[Answered]) -> list[float]:
        """A finite number for each response, the higher the better. Raises `JudgeFailed`."""
