"""An example token by token: what the model reads, and which tokens are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefkit.check.data import kinds_of
from prefkit.data.encode import TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WHITESPACE = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "␍"})


@dataclass(frozen=True)
class Part:
    """A prompt or a response: its tokens as texts, whitespace visible, long ones cut in the middle.

    `kind` is `prompt`, which is not scored, or what the response is; `omitted` counts the tokens that are
    left out after the first `split`; `control` are the indices of control tokens.
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


def render(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase, shown: int = 48) -> list[Part]:
    """The prompt and each response, at most `shown` tokens of each."""
    parts = [("prompt", example.prompt_ids)]
    parts += list(zip(kinds_of(example), example.response_ids, strict=True))
    return [_render_part(kind, ids, tokenizer, shown) for kind, ids in parts]


def _render_part(kind: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, shown: int) -> Part:
    omitted = max(len(ids) - shown, 0)
    split = len(ids) if not omitted else shown // 2
    kept = [*ids[:split], *ids[split + omitted :]]
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts = tuple(visible(str(tokenizer.decode([number]))) for number in kept)
    control = tuple(i for i, number in enumerate(kept) if number in special)
    return Part(kind, texts, control, split, omitted, len(ids))


def visible(text: str) -> str:
    r"""The text with its whitespace to be seen, and nothing that moves a terminal's cursor.

    >>> visible("a b\n"), visible("\x1b[2J")
    ('a·b↵', '\\x1b[2J')
    """
    shown = text.translate(_WHITESPACE)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
