"""From an example to token ids; all truncation happens here."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal

from prefkit.data.examples import Example, Label, Medium, Message, Pair, StoredImage
from prefkit.data.messages import PLACEHOLDERS, Degenerate, interleave
from prefkit.data.template import ChatTemplate

Truncation = Literal["prefkit", "llamafactory"]


def prompt_key(prompt_ids: Iterable[int], images: Iterable[str] = ()) -> int:
    """A number of 64 bits for the token ids of a prompt and the digests of its images: equal prompts have the
    same."""
    digest = hashlib.blake2b(array("q", prompt_ids).tobytes(), digest_size=8)
    digest.update("".join(images).encode())
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids of a prompt and of the responses under it.

    `labels` say how each response was judged and `pairs` which are compared, by index; `truncated` says
    that a part was cut. `question` is the last turn of the user, to be shown. `conversation` is the whole
    prompt as text (`read_conversation`), also where its ids are cut; rows that are read for anything but
    their prompts have none. `images` are those of the prompt, all of which its ids have places for.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    pairs: tuple[Pair, ...]
    source: str
    truncated: bool = False
    labels: tuple[Label, ...] = ()
    question: str = ""
    conversation: str = ""
    images: tuple[Medium, ...] = ()

    @cached_property
    def key(self) -> str:
        """A name for token ids and images: two rows with equal ones have equal log-probs under any model."""
        content = [self.prompt_ids, self.response_ids] + ([self.digests] if self.images else [])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def prompt_key(self) -> int:
        """The `prompt_key` of its prompt."""
        return prompt_key(self.prompt_ids, self.digests)

    @property
    def digests(self) -> list[str]:
        """The hash of the content of each image."""
        return [image.digest for image in self.images]

    @property
    def picture_files(self) -> tuple[str, ...]:
        """The files of its images, of those that have one."""
        return tuple(it.path for it in self.images if isinstance(it, StoredImage) and it.path)

    @property
    def num_tokens(self) -> int:
        """Tokens in all, the prompt counted once."""
        return len(self.prompt_ids) + sum(map(len, self.response_ids))

    def split(self) -> Iterator[TokenizedExample]:
        """An example for each pair, with its two responses only."""
        if len(self.pairs) == 1 and len(self.response_ids) == 2:
            yield self
            return
        for pair in self.pairs:
            kept = (pair.chosen, pair.rejected)
            yield replace(
                self,
                response_ids=[self.response_ids[i] for i in kept],
                pairs=(replace(pair, chosen=0, rejected=1),),
                labels=tuple(self.labels[i] for i in kept),
            )


def encode_example(
    example: Example, template: ChatTemplate, cutoff_len: int, truncation: Truncation = "prefkit"
) -> TokenizedExample:
    """Encode an example so that the prompt with any response has at most `cutoff_len` tokens.

    Images are never cut. Raises `Degenerate` when no two responses that are compared differ, when a response
    has no token, or when no prompt fits; `RowError` where the model cannot take the images.
    """
    messages = [response.message for response in example.responses]
    texts = template.image_texts(example)
    prompt_ids, response_ids = template.encode(example.prompt, messages, example.tools, texts)
    if not prompt_ids:
        raise Degenerate("empty prompt")
    if not all(response_ids):
        raise Degenerate("a response without a token to score")
    num_places = template.count_places(prompt_ids)
    cut_prompt, cut = _TRUNCATE[truncation](example, template, texts, prompt_ids, response_ids, cutoff_len)
    if template.count_places(cut_prompt) != num_places:
        raise Degenerate("no room for the images of the prompt")
    if not all(cut):
        raise Degenerate("no room for a response beside the prompt")
    pairs = tuple(pair for pair in example.pairs if cut[pair.chosen] != cut[pair.rejected])
    if example.pairs and not pairs:
        as_written = all(response_ids[p.chosen] == response_ids[p.rejected] for p in example.pairs)
        raise Degenerate(f"chosen equals rejected after {'templating' if as_written else 'truncation'}")
    return TokenizedExample(
        cut_prompt,
        cut,
        pairs,
        example.source,
        truncated=cut_prompt != prompt_ids or cut != response_ids,
        labels=tuple(response.label for response in example.responses),
        question=next((turn.content for turn in reversed(example.prompt) if turn.role == "user"), ""),
        images=example.images,
    )


Ids = tuple[list[int], list[list[int]]]


def _keep_ends(
    example: Example,
    template: ChatTemplate,
    texts: Sequence[str],
    prompt_ids: list[int],
    response_ids: list[list[int]],
    cutoff: int,
) -> Ids:
    """A response is kept up to 3/4 of `cutoff` (more, if the prompt leaves more) and loses its tail, with it
    the end token. The prompt gets the rest: whole early exchanges without images go first, then the head of
    the first user turn that is left; system turn and images stay."""
    longest = max(cutoff - len(prompt_ids), cutoff * 3 // 4)
    cut = [ids[:longest] for ids in response_ids]
    room = cutoff - max(map(len, cut), default=0)
    if len(prompt_ids) > room:
        prompt_ids = _shorten_prompt(example, template, texts, room)
    return prompt_ids, cut


def _cut_in_proportion(
    example: Example,
    template: ChatTemplate,
    texts: Sequence[str],
    prompt_ids: list[int],
    response_ids: list[list[int]],
    cutoff: int,
) -> Ids:
    """LLaMA-Factory's rule, on token ids: prompt and responses lose their ends, each in proportion to its
    length, unless one of them takes less than half of `cutoff` and is kept whole.

    >>> [_share_room(*lengths, 2048) for lengths in ((3000, 1000), (1000, 3000), (30, 3000))]
    [(1048, 1000), (1000, 1048), (30, 2018)]
    """
    for_prompt, for_responses = _share_room(len(prompt_ids), max(map(len, response_ids), default=0), cutoff)
    return prompt_ids[:for_prompt], [ids[:for_responses] for ids in response_ids]


def _share_room(prompt: int, response: int, cutoff: int) -> tuple[int, int]:
    """Tokens of `cutoff` for a prompt and a response of these lengths."""
    if 2 * response < cutoff:
        most = cutoff
    elif 2 * prompt < cutoff:
        most = cutoff - prompt
    else:
        most = int(cutoff * (response / (prompt + response)))
    kept = min(response, most)
    return min(prompt, max(cutoff - kept, 0)), kept


_TRUNCATE: dict[Truncation, Callable[..., Ids]] = {
    "prefkit": _keep_ends,
    "llamafactory": _cut_in_proportion,
}


def _shorten_prompt(example: Example, template: ChatTemplate, texts: Sequence[str], room: int) -> list[int]:
    """Token ids of the prompt without as many early exchanges, and then tokens of the first question that is
    left, as do not fit.

    The responses are encoded along, since a template may open the answer by what follows.
    """
    messages = [response.message for response in example.responses]
    system = [message for message in example.prompt[:1] if message.role == "system"]
    turns = list(example.prompt[len(system) :])

    def encode() -> list[int]:
        return template.encode([*system, *turns], messages, example.tools, texts)[0]

    while (start := _next_question(turns)) is not None:
        if texts and any(PLACEHOLDERS.search(turn.content) for turn in turns[:start]):
            break
        turns = turns[start:]
        if len(ids := encode()) <= room:
            return ids
    ids = encode()
    while len(ids) > room:
        shorter = _drop_head(turns[0].content, len(ids) - room, template, bool(texts))
        if not shorter:
            what = "images of the prompt" if texts else "prompt beside what cannot be cut"
            raise Degenerate(f"no room for the {what}")
        turns[0] = Message("user", shorter)
        ids = encode()
    return ids


def _next_question(turns: Sequence[Message]) -> int | None:
    """Where the second user turn is: what stands before it can go as a whole."""
    return next((i for i, turn in enumerate(turns) if i and turn.role == "user"), None)


def _drop_head(text: str, num_tokens: int, template: ChatTemplate, has_images: bool) -> str:
    """The text without its first tokens, but with its images."""
    if has_images and PLACEHOLDERS.search(text):
        parts = PLACEHOLDERS.split(text)
        pieces, marks = parts[::2], parts[1::2]
        shorter = _drop_head("".join(pieces), num_tokens, template, has_images=False)
        dropped = sum(map(len, pieces)) - len(shorter)
        before = accumulate(map(len, pieces), initial=0)
        kept = [piece[max(dropped - start, 0) :] for piece, start in zip(pieces, before, strict=False)]
        return interleave(kept, marks) if shorter else ""
    encoded = template.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
    )
    starts = [start for start, _ in encoded["offset_mapping"]]
    if num_tokens >= len(starts):
        return ""
    # A character of several tokens goes as a whole.
    return text[max(starts[num_tokens], 1) :]
