"""A packed batch cut into smaller ones, on whatever device it is."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from prefkit.data.packing import DRAWN, Segments

Batch = dict[str, Any]


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a `PackedBatch.to_dict()` into `parts` of consecutive whole examples, or into single examples where
    it has fewer; sizes differ by one at most, the larger come first.

    Each part is what `pack` gives for its examples.

    >>> from prefkit.data.encode import TokenizedExample
    >>> from prefkit.data.packing import pack
    >>> example = TokenizedExample([7, 8], [[1, 2], [3]], (), "f:1")
    >>> parts = split(pack([example] * 3, "shared").to_dict(), 2)
    >>> [part["input_ids"].tolist() for part in parts]
    [[[7, 8, 1, 2, 3, 7, 8, 1, 2, 3]], [[7, 8, 1, 2, 3]]]
    """
    number = len(batch["rows"])
    parts = min(parts, number)
    if parts == 1:
        return [batch]
    size, larger = divmod(number, parts)
    ends = list(accumulate(size + (part < larger) for part in range(parts)))
    return [_cut(batch, start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _cut(batch: Batch, start: int, end: int) -> Batch:
    """The examples from `start` to `end`, as a batch."""
    responses = _span(batch["response_counts"], start, end)
    targets = _span(batch["response_lengths"], responses.start, responses.stop)
    pairs = _span(batch["pair_counts"], start, end)
    place = _cut_shared if batch["attention_mask"] is None else _cut_repeat
    own = ("rows", "keys", "prompt_lengths", "response_counts", "pair_counts")
    return {
        **place(batch, slice(start, end), responses, batch["source"][targets]),
        "target": batch["target"][targets],
        "owner": batch["owner"][targets] - responses.start,
        "num_responses": responses.stop - responses.start,
        "pairs": batch["pairs"][pairs] - responses.start,
        "margins": batch["margins"][pairs],
        "weights": batch["weights"][pairs],
        **{name: batch[name][responses] for name in ("labels", "response_lengths")},
        **{name: batch[name][start:end] for name in own},
        **{name: {k: it[targets] for k, it in batch[name].items()} for name in (DRAWN,) if name in batch},
    }


def _span(counts: tuple[int, ...], start: int, end: int) -> slice:
    """Where that which each example, or response, has `counts` of lies for those from `start` to `end`."""
    first = sum(counts[:start])
    return slice(first, first + sum(counts[start:end]))


def _cut_shared(batch: Batch, examples: slice, responses: slice, source: Any) -> Batch:
    segments: Segments = batch["segments"][examples]
    first = segments[0][0]
    _, prompt_end, last_responses = segments[-1]
    end = last_responses[-1][1] if last_responses else prompt_end
    return {
        "input_ids": batch["input_ids"][:, first:end],
        "position_ids": batch["position_ids"][..., first:end],
        "pixels": batch["pixels"][examples],
        "segments": tuple(
            (start - first, stop - first, tuple((a - first, b - first) for a, b in inner))
            for start, stop, inner in segments
        ),
        "attention_mask": None,
        "source": source - first,
    }


def _cut_repeat(batch: Batch, examples: slice, responses: slice, source: Any) -> Batch:
    mask = batch["attention_mask"][responses]
    wide = mask.shape[1]
    # Padding goes by the longest response of the part.
    length = int(mask.sum(1).max())
    return {
        "input_ids": batch["input_ids"][responses, :length].contiguous(),
        "position_ids": batch["position_ids"][..., responses, :length].contiguous(),
        "pixels": batch["pixels"][responses],
        "segments": None,
        "attention_mask": mask[:, :length].contiguous(),
        "source": (source // wide - responses.start) * length + source % wide,
    }
