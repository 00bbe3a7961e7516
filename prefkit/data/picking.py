"""Some responses of a packed batch as a batch of their own, on whatever device it is.

What comes out has those fields of a `PackedBatch` from which a model computes log-probs. Shapes are found
without a look at numbers in tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor

from prefkit.data.packing import Segments
from prefkit.data.splitting import Batch


def pick(batch: Batch, numbers: Sequence[int]) -> Batch:
    """The responses of these numbers (ascending) under their prompts, in the layout of the batch.

    >>> from prefkit.data.encode import TokenizedExample
    >>> from prefkit.data.packing import pack
    >>> batch = pack([TokenizedExample([7, 8], [[1, 2], [3, 4]], (), "f:1")], "shared").to_dict()
    >>> pick(batch, [1])["input_ids"].tolist()
    [[7, 8, 3, 4]]
    """
    targets = _targets(batch, numbers)
    place = _pick_shared if batch["attention_mask"] is None else _pick_repeat
    return {**place(batch, numbers, batch["source"][targets]), **_of_targets(batch, numbers, targets)}


def pick_continuing(batch: Batch, numbers: Sequence[int]) -> Batch:
    """The responses of these numbers (ascending) of a shared batch, to be read on from keys and values that
    are known: those of each prompt of the batch but its last token.

    The row has for each response the last token of its prompt, which predicts the first of the response, and
    the response but its last token, which predicts nothing. `segments` count the known keys before the row.

    >>> from prefkit.data.encode import TokenizedExample
    >>> from prefkit.data.packing import pack
    >>> batch = pack([TokenizedExample([7, 8, 9], [[1, 2], [3, 4]], (), "f:1")], "shared").to_dict()
    >>> found = pick_continuing(batch, [1])
    >>> found["input_ids"].tolist(), found["position_ids"].tolist(), found["segments"]
    ([[9, 3]], [[2, 3]], ((0, 2, ((2, 4),)),))
    """
    known = [0, *accumulate(end - 1 - start for start, end, _ in batch["segments"])]
    tokens: list[int] = []
    segments = []
    for number, (_, end, responses) in enumerate(_wanted(batch["segments"], numbers)):
        spans = []
        for first, last in responses:
            here = known[-1] + len(tokens)
            spans.append((here, here + last - first))
            tokens += [end - 1, *range(first, last - 1)]
        if spans:
            segments.append((known[number], known[number + 1], tuple(spans)))
    return {
        **_tokens(batch, tokens),
        "segments": tuple(segments),
        "pixels": (),
        "source": torch.arange(len(tokens), device=batch["source"].device),
        **_of_targets(batch, numbers, _targets(batch, numbers)),
    }


def _pick_shared(batch: Batch, numbers: Sequence[int], source: Tensor) -> Batch:
    tokens: list[int] = []
    segments = []
    kept = []
    for number, (start, end, responses) in enumerate(_wanted(batch["segments"], numbers)):
        if not responses:
            continue
        kept.append(number)
        here = len(tokens)
        tokens += range(start, end)
        spans = []
        for first, last in responses:
            spans.append((len(tokens), len(tokens) + last - first))
            tokens += range(first, last)
        segments.append((here, here + end - start, tuple(spans)))
    picked = _tokens(batch, tokens)
    moved = torch.zeros_like(batch["input_ids"][0])
    moved[torch.tensor(tokens, device=moved.device)] = torch.arange(len(tokens), device=moved.device)
    pixels = tuple(batch["pixels"][number] for number in kept if batch["pixels"])
    return {**picked, "segments": tuple(segments), "source": moved[source], "pixels": pixels}


def _pick_repeat(batch: Batch, numbers: Sequence[int], source: Tensor) -> Batch:
    prompts = [
        length
        for length, many in zip(batch["prompt_lengths"], batch["response_counts"], strict=True)
        for _ in range(many)
    ]
    lengths = batch["response_lengths"]
    wide, length = batch["input_ids"].shape[1], max(prompts[number] + lengths[number] for number in numbers)
    rows = torch.tensor(numbers, device=source.device)
    moved = torch.zeros(batch["num_responses"], dtype=torch.long, device=source.device)
    moved[rows] = torch.arange(len(numbers), device=source.device)
    return {
        **{
            name: batch[name][..., rows, :length].contiguous()
            for name in ("input_ids", "position_ids", "attention_mask")
        },
        "pixels": tuple(batch["pixels"][number] for number in numbers if batch["pixels"]),
        "segments": None,
        "source": moved[source // wide] * length + source % wide,
    }


def _wanted(segments: Segments, numbers: Sequence[int]) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Each prompt with those of its responses that are wanted."""
    wanted, number = set(numbers), count()
    return [
        (start, end, [span for span in responses if next(number) in wanted])
        for start, end, responses in segments
    ]


def _tokens(batch: Batch, places: Sequence[int]) -> Batch:
    """What a shared batch has of the tokens at these places of its row."""
    index = torch.tensor(places, device=batch["input_ids"].device)
    return {
        **{name: batch[name][..., index] for name in ("input_ids", "position_ids")},
        "attention_mask": None,
    }


def _targets(batch: Batch, numbers: Sequence[int]) -> Tensor:
    """Where the tokens of these responses are among all response tokens of a batch."""
    ends = [0, *accumulate(batch["response_lengths"])]
    places = [place for number in numbers for place in range(ends[number], ends[number + 1])]
    return torch.tensor(places, device=batch["target"].device)


def _of_targets(batch: Batch, numbers: Sequence[int], targets: Tensor) -> dict[str, Any]:
    """What a batch has of these responses and their tokens, the responses counted anew."""
    owner = [n for n, number in enumerate(numbers) for _ in range(batch["response_lengths"][number])]
    return {
        "target": batch["target"][targets],
        "owner": torch.tensor(owner, device=targets.device),
        "num_responses": len(numbers),
    }
