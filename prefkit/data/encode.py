"""From an example to token ids; all truncation happens here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from prefkit.data.examples import Example, Message
from prefkit.data.formats import Degenerate
from prefkit.data.template import ChatTemplate


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids of a prompt and of the responses under it.

    `pairs` holds (chosen, rejected) as indices of responses; `truncated` says that a part was cut.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    pairs: list[tuple[int, int]]
    source: str
    truncated: bool = False

    @cached_property
    def key(self) -> str:
        """A name for the token ids: two rows with equal ids have equal log-probs under any model."""
        ids = json.dumps([self.prompt_ids, self.response_ids])
        return hashlib.sha256(ids.encode()).hexdigest()

    @property
    def num_tokens(self) -> int:
        """Tokens in all, the prompt counted once."""
        return len(self.prompt_ids) + sum(map(len, self.response_ids))


def encode_example(example: Example, template: ChatTemplate, cutoff_len: int) -> TokenizedExample:
    """Encode a pair so that the prompt with either response has at most `cutoff_len` tokens.

    Where the whole does not fit, a response is kept up to 3/4 of `cutoff_len` (more, if the prompt leaves
    more) and loses its tail, with it the end token. The prompt gets the rest: whole early turns go first,
    then the head of the last turn; the system turn stays.

    Raises `Degenerate` when both responses come out equal, or when no prompt fits.
    """
    answers = [response.message for response in example.responses]
    prompt_ids, response_ids = template.encode(example.prompt, answers, example.tools)
    longest = max(cutoff_len - len(prompt_ids), cutoff_len * 3 // 4)
    cut = [ids[:longest] for ids in response_ids]
    room = cutoff_len - max(map(len, cut))
    truncated = cut != response_ids or len(prompt_ids) > room
    if len(prompt_ids) > room:
        prompt_ids = _shorten_prompt(example, template, room)
    if cut[0] == cut[1]:
        equal_before = response_ids[0] == response_ids[1]
        raise Degenerate(f"chosen equals rejected after {'templating' if equal_before else 'truncation'}")
    labels = [response.label for response in example.responses]
    pair = (labels.index("chosen"), labels.index("rejected"))
    return TokenizedExample(prompt_ids, cut, [pair], example.source, truncated)


def _shorten_prompt(example: Example, template: ChatTemplate, room: int) -> list[int]:
    """Token ids of the prompt without as many early turns, and then tokens of its last, as do not fit.

    The responses are encoded along, since a template may open the answer by what follows.
    """
    system = [message for message in example.prompt[:1] if message.role == "system"]
    turns = list(example.prompt[len(system) :])
    answers = [response.message for response in example.responses]
    while len(turns) > 1:
        turns = turns[2:]  # a question and its answer
        ids = template.encode([*system, *turns], answers, example.tools)[0]
        if len(ids) <= room:
            return ids
    last = turns[0]
    ids = template.encode([*system, last], answers, example.tools)[0]
    while len(ids) > room:
        shorter = _drop_head(last.content, len(ids) - room, template)
        if not shorter:
            raise Degenerate("no room for the prompt beside the system turn")
        last = Message("user", shorter)
        ids = template.encode([*system, last], answers, example.tools)[0]
    return ids


def _drop_head(text: str, num_tokens: int, template: ChatTemplate) -> str:
    """The text without its first tokens."""
    encoded = template.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
    )
    starts = [start for start, _ in encoded["offset_mapping"]]
    if num_tokens >= len(starts):
        return ""
    # A character of several tokens goes as a whole.
    return text[max(starts[num_tokens], 1) :]
