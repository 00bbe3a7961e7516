"""An example token by token: what the model reads, and which tokens are scored."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from prefkit.check.data import kinds_of
from prefkit.data.encode import TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WHITESPACE = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "␍"})
_UNFINISHED = "\ufffd"  # what decoding gives for a part of a character
_Item = TypeVar("_Item")
_LONGEST = 4  # tokens of a character: one for each byte of its UTF-8


@dataclass(frozen=True)
class Piece:
    """Text of a part of an example: a token, several that make up one character, or those of an image."""

    text: str
    num_tokens: int = 1
    is_control: bool = False
    is_image: bool = False


class Pieces:
    """Takes token ids of one tokenizer apart; `seen` are the tokens of images and videos."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seen: Collection[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.seen = seen
        added = tokenizer.added_tokens_decoder.items()
        self._control = {number for number, token in added if token.special} | set(seen)

    def of(self, ids: Sequence[int]) -> list[Piece]:
        """The pieces of token ids, in order."""
        found: list[Piece] = []
        for token, run in groupby(ids, key=lambda number: number if number in self._control else None):
            own = list(run)
            if token is None:
                found += self._text(own)
            elif token in self.seen:
                found.append(Piece(self._decode(own[:1]), len(own), is_control=True, is_image=True))
            else:
                found += [Piece(self._decode([token]), is_control=True)] * len(own)
        return found

    def _text(self, ids: Sequence[int]) -> Iterator[Piece]:
        """The pieces of tokens none of which is a control token.

        Each is decoded after the one before it, without which some tokenizers leave out a blank.
        """
        start = before = 0
        while start < len(ids):
            for end in range(start + 1, min(start + _LONGEST, len(ids)) + 1):
                text = self._decode_after(ids[before:start], ids[start:end])
                if _UNFINISHED not in text:
                    break
            else:  # bytes that are no character come one by one
                end, text = start + 1, _UNFINISHED
            yield Piece(text, end - start)
            before, start = start, end

    def _decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        known, text = self._decode(before), self._decode([*before, *ids])
        fits = bool(before) and text.startswith(known) and text != known
        return text[len(known) :] if fits else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))


@dataclass(frozen=True)
class Part:
    """A prompt or a response: its pieces as texts, whitespace visible, long parts cut in the middle.

    `kind` is `prompt`, which is not scored, or what the response is; `omitted` counts the tokens that are
    left out after the first `split` pieces; `control` are the indices of control tokens.
    """

    kind: str
    texts: tuple[str, ...]
    control: tuple[int, ...]
    split: int
    omitted: int
    num_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The part as JSON."""
        return {
            "kind": self.kind,
            "scored": self.kind != "prompt",
            "tokens": self.num_tokens,
            "head": list(self.texts[: self.split]),
            "omitted": self.omitted,
            "tail": list(self.texts[self.split :]),
        }


def render(example: TokenizedExample, pieces: Pieces, shown: int = 48) -> list[Part]:
    """The prompt and each response, at most `shown` pieces of each."""
    parts = [("prompt", example.prompt_ids)]
    parts += list(zip(kinds_of(example), example.response_ids, strict=True))
    return [_render_part(kind, pieces.of(ids), shown) for kind, ids in parts]


def _render_part(kind: str, pieces: Sequence[Piece], shown: int) -> Part:
    head, middle, tail = leave_out(pieces, shown)
    kept = [*head, *tail]
    texts = tuple(
        visible(piece.text) + (f" x {piece.num_tokens:,}" if piece.is_image else "") for piece in kept
    )
    control = tuple(i for i, piece in enumerate(kept) if piece.is_control)
    return Part(kind, texts, control, len(head), count_tokens(middle), count_tokens(pieces))


def leave_out(items: Sequence[_Item], shown: int) -> tuple[Sequence[_Item], ...]:
    """The first items, those to leave out in the middle, and the last ones: at most `shown` are left."""
    omitted = max(len(items) - shown, 0)
    split = shown // 2 if omitted else len(items)
    return items[:split], items[split : split + omitted], items[split + omitted :]


def count_tokens(pieces: Sequence[Piece]) -> int:
    """The tokens of all pieces."""
    return sum(piece.num_tokens for piece in pieces)


def visible(text: str) -> str:
    r"""The text with its whitespace to be seen, and nothing that moves a terminal's cursor.

    >>> visible("a b\n"), visible("\x1b[2J")
    ('a·b↵', '\\x1b[2J')
    """
    return show_unprintable(text.translate(_WHITESPACE))


def show_unprintable(text: str) -> str:
    """The text with an escape for each character that has no look of its own, or that moves others."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
