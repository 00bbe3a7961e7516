"""What truncation took from rows: they are read again, and encoded without a limit."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefkit.check.material import Material
from prefkit.data.dataset import USES
from prefkit.data.encode import TokenizedExample
from prefkit.data.formats import make_example
from prefkit.data.partners import without_partner
from prefkit.data.rows import Encoder
from prefkit.data.sources import find_datasets


@dataclass(frozen=True)
class Cut:
    """Tokens that were taken from a part, which has `start` tokens before them."""

    start: int
    ids: Sequence[int]


def find_whole(material: Material, rows: Iterable[TokenizedExample]) -> dict[str, TokenizedExample]:
    """Those of the rows that were cut as they were before, by `file:row`.

    Files are read up to the last of them. Raises `DataError` as reading them the first time would.
    """
    wanted = {row.source for row in rows if row.truncated}
    data = replace(material.config.data, cutoff_len=sys.maxsize)
    encoder = Encoder(material.template, data, USES[material.config.method.stage])
    found: dict[str, TokenizedExample] = {}
    for source, encoded in _encode_again(material, encoder, wanted):
        if isinstance(encoded, TokenizedExample):
            found[source] = encoded
        if found.keys() == wanted:
            break
    return found


def _encode_again(material: Material, encoder: Encoder, wanted: set[str]) -> Iterable[tuple[str, Any]]:
    if not wanted:
        return
    data = encoder.config
    names = [*data.dataset, *data.eval_dataset]
    for entry in find_datasets(data.dataset_dir, names, encoder.use, material.config.model.cache_dir):
        recognised = entry.recognised()
        assert recognised.layout is not None
        media = encoder.media(recognised)
        for source, row in recognised.rows():
            if source in wanted:
                yield source, encoder.encode(make_example(row, recognised.layout, encoder.use, source, media))


def find_cuts(row: TokenizedExample, whole: TokenizedExample | None) -> list[list[Cut]]:
    """What was cut from the prompt of a row and from each of its responses; nothing where it cannot be told.

    >>> row, whole = (TokenizedExample(ids, [[7, 8]], (), "f:1") for ids in ([1, 4, 5], [1, 2, 3, 4, 5]))
    >>> find_cuts(row, whole)
    [[Cut(start=1, ids=[2, 3])], []]
    """
    found: list[list[Cut]] = [[] for _ in range(1 + len(row.response_ids))]
    if whole is None:
        return found
    own = without_partner(row)
    same = (it for it in (whole, *whole.split()) if _holds(it, own))
    response_ids = next((it.response_ids for it in same), own.response_ids)
    parts = zip([row.prompt_ids, *own.response_ids], [whole.prompt_ids, *response_ids], strict=True)
    for number, (ids, full) in enumerate(parts):
        found[number] = _find_cuts(ids, full)
    return found


def _holds(whole: TokenizedExample, row: TokenizedExample) -> bool:
    """Whether the responses of a row are the starts of these."""
    return len(whole.response_ids) == len(row.response_ids) and all(
        full[: len(ids)] == ids for full, ids in zip(whole.response_ids, row.response_ids, strict=True)
    )


def _find_cuts(ids: Sequence[int], whole: Sequence[int]) -> list[Cut]:
    """What `whole` has besides `ids`, of which the first are at its start and the rest as late as can be."""
    pairs = zip(ids, whole, strict=False)
    head = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(whole)))
    cuts = []
    end = len(whole)
    for place in reversed(range(head, len(ids))):
        at = next((i for i in reversed(range(head, end)) if whole[i] == ids[place]), None)
        if at is None:
            return []
        cuts += [Cut(place + 1, whole[at + 1 : end])]
        end = at
    cuts += [Cut(head, whole[head:end])]
    return [cut for cut in reversed(cuts) if cut.ids]
