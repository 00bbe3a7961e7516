"""stand-in"""

from dataclasses import dataclass
from typing import Any, Sequence


@dataclass(frozen=True)
class Answered:
    prompt: Any
    tools: Any
    prompt_ids: list
    response_ids: list
    ended: bool
    text: str


class Judge:
    name = "short"

    def score(self, answered: Sequence[Answered]) -> list[float]:
        return [-abs(len(a.text.split()) - 12) / 12 + (0.5 if a.ended else -0.5) for a in answered]


def build_judge(config, model, template, say):
    return Judge()
