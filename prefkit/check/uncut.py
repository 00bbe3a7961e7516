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


def find_cuts(row: TokenizedExample, whole: TokenizedExample | None) -> tuple[Cut | None, list[Cut | None]]:
    """What was cut from the prompt and from each response of a row; None where nothing was, or where it is
    not one run of tokens.

    >>> cut, whole = (TokenizedExample(ids, [[7, 8]], (), "f:1") for ids in ([1, 4, 5], [1, 2, 3, 4, 5]))
    >>> find_cuts(cut, whole)
    (Cut(start=1, ids=[2, 3]), [None])
    """
    own = without_partner(row)
    none: list[Cut | None] = [None] * len(row.response_ids)
    if whole is None:
        return None, none
    same = (it for it in (whole, *whole.split()) if _holds(it, own))
    response_ids = next((it.response_ids for it in same), own.response_ids)
    cuts = [_find_cut(*pair) for pair in zip(own.response_ids, response_ids, strict=True)]
    return _find_cut(row.prompt_ids, whole.prompt_ids), [*cuts, *none[len(cuts) :]]


def _holds(whole: TokenizedExample, row: TokenizedExample) -> bool:
    """Whether the responses of a row are the starts of these."""
    return len(whole.response_ids) == len(row.response_ids) and all(
        full[: len(ids)] == ids for full, ids in zip(whole.response_ids, row.response_ids, strict=True)
    )


def _find_cut(ids: Sequence[int], whole: Sequence[int]) -> Cut | None:
    head = _common(ids, whole)
    if len(ids) >= len(whole) or _common(ids[::-1], whole[::-1]) < len(ids) - head:
        return None
    return Cut(head, whole[head : head + len(whole) - len(ids)])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many items two lists start with in common."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
