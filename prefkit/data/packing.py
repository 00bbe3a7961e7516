"""From tokenized examples to one batch, in one of two layouts.

`shared`: one row holds every example, a prompt once and its responses after it. A token sees its own
prompt and, causally, its own response; positions start anew after the prompt for each response.
`repeat`: a row for each response, its prompt before it, plain causal attention; for models that cannot
take the first. Nothing after the model can tell one from the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Label
from prefkit.data.vision import Pixels, Seen, Vision

# What a batch has besides of responses that were drawn, by name: a vector (T,) each.
DRAWN = "drawn"
# What a batch has besides that is computed, so that every rank makes as many passes, and counts nowhere.
FILLER = "filler"
Layout = Literal["shared", "repeat"]
# One prompt and its responses, as (start, end) in the row: (prompt start, prompt end, ((start, end), ...)).
Segments = tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]


@dataclass(frozen=True)
class PackedBatch:
    """B rows of L tokens with N responses of T tokens in all, in M pairs.

    `input_ids` (B, L); `position_ids` (B, L), or (3, B, L) where images are placed in time, height and width;
    `segments` describes the one row of the shared layout, `attention_mask` (B, L) the padding of the repeat
    layout; the other is None. Where there are images, `pixels` has what the model takes of them, of each
    prompt of the shared row, or of each row that repeats one.

    Of the response tokens, in order, `target` (T,) is the token id, `source` (T,) the flat position in
    (B * L) whose hidden state predicts it, `owner` (T,) its response. The last prompt token predicts the
    first token of every response. `pairs` (M, 2) has the index of chosen and rejected, `margins` and
    `weights` (M,) what the data says of each pair. Of each example, `rows` has its name as `file:row`,
    `keys` the hash of its token ids, `prompt_lengths` the tokens of its prompt, `response_counts` and
    `pair_counts` how many of the N and M are its. Of each response, `response_lengths` (N,) has its tokens
    and `labels` (N,) how it was judged, where the data says so.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments | None
    attention_mask: Tensor | None
    source: Tensor
    target: Tensor
    owner: Tensor
    num_responses: int
    pairs: Tensor
    margins: Tensor
    weights: Tensor
    rows: tuple[str, ...]
    keys: tuple[str, ...]
    prompt_lengths: tuple[int, ...]
    response_lengths: tuple[int, ...]
    response_counts: tuple[int, ...]
    pair_counts: tuple[int, ...]
    labels: tuple[Label, ...]
    pixels: tuple[Pixels, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields by name: the form that a data loader moves between devices."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def pack(examples: Sequence[TokenizedExample], layout: Layout, vision: Vision | None = None) -> PackedBatch:
    """Lay out examples as one batch; `vision` reads their images, once for each example.

    >>> from prefkit.data.examples import Pair
    >>> example = TokenizedExample([7, 8], [[1, 2], [3]], (Pair(0, 1),), "f:1")
    >>> batch = pack([example], "shared")
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[7, 8, 1, 2, 3]], [[0, 1, 2, 3, 2]])
    >>> batch.source.tolist(), batch.target.tolist(), batch.owner.tolist()
    ([1, 2, 1], [1, 2, 3], [0, 0, 1])
    """
    place = _place_shared if layout == "shared" else _place_repeat
    target, owner = [], []
    pairs: list[list[int]] = []
    num_responses = 0
    for example in examples:
        pairs += [[num_responses + pair.chosen, num_responses + pair.rejected] for pair in example.pairs]
        for ids in example.response_ids:
            target += ids
            owner += [num_responses] * len(ids)
            num_responses += 1
    return PackedBatch(
        **place([_Prompt(example, see(example, vision)) for example in examples]),
        target=torch.tensor(target),
        owner=torch.tensor(owner),
        num_responses=num_responses,
        pairs=torch.tensor(pairs, dtype=torch.long).view(-1, 2),
        margins=torch.tensor([pair.margin for example in examples for pair in example.pairs]),
        weights=torch.tensor([pair.weight for example in examples for pair in example.pairs]),
        rows=tuple(example.source for example in examples),
        keys=tuple(example.key for example in examples),
        prompt_lengths=tuple(len(example.prompt_ids) for example in examples),
        response_lengths=tuple(len(ids) for example in examples for ids in example.response_ids),
        response_counts=tuple(len(example.response_ids) for example in examples),
        pair_counts=tuple(len(example.pairs) for example in examples),
        labels=tuple(label for example in examples for label in example.labels),
    )


@dataclass(frozen=True)
class Packer:
    """Packs examples into a batch in the form that data loader and Trainer take: in `layout`, their images
    read by `vision`."""

    layout: Layout
    vision: Vision | None = None

    def __call__(self, examples: Sequence[TokenizedExample]) -> dict[str, Any]:
        """The fields of the batch by name."""
        return pack(examples, self.layout, self.vision).to_dict()


def see(example: TokenizedExample, vision: Vision | None) -> Seen:
    """The images of an example's prompt; `vision` is None where no example has any."""
    if not example.images:
        return Seen()
    assert vision is not None
    return vision.see(example.prompt_ids, example.images)


def last_positions(batch: Mapping[str, Any]) -> Tensor:
    """The flat position in (B * L) of the last token of each response of a `PackedBatch.to_dict()`, (N,).

    >>> example = TokenizedExample([7, 8], [[1, 2], [3]], (), "f:1")
    >>> [last_positions(pack([example], layout).to_dict()).tolist() for layout in ("shared", "repeat")]
    [[3, 4], [3, 6]]
    """
    ids: Tensor = batch["input_ids"]
    if batch["attention_mask"] is None:
        ends = [end for _, _, responses in batch["segments"] for _, end in responses]
        return torch.tensor(ends, device=ids.device) - 1
    rows, length = ids.shape
    lengths: Tensor = batch["attention_mask"].sum(1)
    return torch.arange(rows, device=ids.device) * length + lengths - 1


def rows_of_losses(batch: Mapping[str, Any]) -> list[str]:
    """The name of the row that each loss of a batch is of: of each pair, or of a judged row, which has none,
    or of each token of a response that was drawn. A filler has no loss that counts.

    >>> rows_of_losses({"rows": ("f:1", "f:2"), "pair_counts": (2, 1)})
    ['f:1', 'f:1', 'f:2']
    >>> rows_of_losses({"rows": ("f:1", "f:2"), "pair_counts": (0, 0)})
    ['f:1', 'f:2']
    """
    if FILLER in batch:
        return []
    if DRAWN in batch:
        names = (
            row
            for row, count in zip(batch["rows"], batch["response_counts"], strict=True)
            for _ in range(count)
        )
        return [
            row for row, count in zip(names, batch["response_lengths"], strict=True) for _ in range(count)
        ]
    counted = zip(batch["rows"], batch["pair_counts"], strict=True)
    return [row for row, count in counted for _ in range(max(count, 1))]


def counted(values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Values of a batch, (M, ...), or none of them where it is a filler."""
    return values[:0] if FILLER in batch else values


class _Prompt(NamedTuple):
    example: TokenizedExample
    seen: Seen

    def positions(self) -> Tensor:
        """Of the tokens of the prompt, (3, P)."""
        return self.seen.positions(len(self.example.prompt_ids))

    @property
    def end(self) -> int:
        """Where each response starts."""
        return self.seen.end(len(self.example.prompt_ids))


def _pixels(prompts: Sequence[_Prompt], times: Sequence[int]) -> tuple[Pixels, ...]:
    """What the model takes of each prompt, so many times; nothing where no prompt has images."""
    if not any(prompt.seen.pixels for prompt in prompts):
        return ()
    pixels = [prompt.seen.pixels for prompt in prompts]
    return tuple(it for it, number in zip(pixels, times, strict=True) for _ in range(number))


def _place_shared(prompts: Sequence[_Prompt]) -> dict[str, Any]:
    tokens: list[int] = []
    positions: list[Tensor] = []
    source: list[int] = []
    segments = []
    for prompt in prompts:
        example = prompt.example
        start, length = len(tokens), len(example.prompt_ids)
        end = start + length
        tokens += example.prompt_ids
        positions.append(prompt.positions())
        responses = []
        for ids in example.response_ids:
            first = len(tokens)
            tokens += ids
            positions.append(torch.arange(prompt.end, prompt.end + len(ids)).expand(3, -1))
            source += [end - 1, *range(first, first + len(ids) - 1)]
            responses.append((first, len(tokens)))
        segments.append((start, end, tuple(responses)))
    return {
        "input_ids": torch.tensor([tokens]),
        "position_ids": _plain(torch.cat(positions, 1)[:, None], prompts),
        "segments": tuple(segments),
        "attention_mask": None,
        "source": torch.tensor(source),
        "pixels": _pixels(prompts, [1] * len(prompts)),
    }


def _plain(positions: Tensor, prompts: Sequence[_Prompt]) -> Tensor:
    """Positions (3, B, L) as they are, or (B, L) where no prompt is placed in more than one dimension."""
    return (
        positions.contiguous() if any(it.seen.places is not None for it in prompts) else positions[0].clone()
    )


def _place_repeat(prompts: Sequence[_Prompt]) -> dict[str, Any]:
    repeated = [(prompt, ids) for prompt in prompts for ids in prompt.example.response_ids]
    rows = [(prompt.example.prompt_ids, ids) for prompt, ids in repeated]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    source: list[int] = []
    for number, (prompt, response) in enumerate(rows):
        start = number * length + len(prompt) - 1
        source += range(start, start + len(response))
    # Any token id does for padding: it is masked, and no loss reads it.
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(3, len(rows), length, dtype=torch.long)
    for row, ((prompt, response), (whole, _)) in enumerate(zip(rows, repeated, strict=True)):
        size = len(prompt) + len(response)
        ids[row, :size] = torch.tensor(prompt + response)
        mask[row, :size] = 1
        positions[:, row, : len(prompt)] = whole.positions()
        positions[:, row, len(prompt) :] = torch.arange(whole.end, whole.end + length - len(prompt))
    return {
        "input_ids": ids,
        "position_ids": _plain(positions, prompts),
        "segments": None,
        "attention_mask": mask,
        "source": torch.tensor(source),
        "pixels": _pixels(prompts, [len(prompt.example.response_ids) for prompt in prompts]),
    }
