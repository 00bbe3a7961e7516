"""Rows as a model sees them: one HTML file that needs no other, whose rows cannot run anything in it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import count, groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

from prefkit.check.data import kinds_of
from prefkit.check.material import Material
from prefkit.check.pictures import Picture, encode_png, read_pictures
from prefkit.check.tokens import Piece, Pieces, leave_out, show_unprintable
from prefkit.check.uncut import Cut, find_cuts, find_whole
from prefkit.config.errors import UserError
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair
from prefkit.data.streaming import StreamedRows
from prefkit.files import replace_text
from prefkit.runs.report import count_of

_MOST_PIECES = 4000  # of a part that are shown
_MOST_FRAMES = 16  # of a video
_Item = TypeVar("_Item")
_SMALL = 128  # pixels of a picture's longer side, under which it is shown larger
# The class of each kind of response in the style.
_CLASSES = {"desirable": "chosen", "undesirable": "rejected", "chosen": "chosen", "rejected": "rejected"}
_NO_RESPONSES = "The model draws the responses to it; those of the data are not read."


def check_target(file: Path) -> None:
    """Raises `UserError` where no page can be written to `file`."""
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--page {file}: write the name of a file that ends in .html")
    if file.is_dir():
        raise UserError(f"--page {file}: is a folder; write the name of a file in it")
    if not file.parent.is_dir():
        raise UserError(f"--page {file}: there is no folder {file.parent}")


def write_page(material: Material, file: Path, number: int) -> None:
    """Write a page of `number` rows. Raises `DataError` for an image that is gone, `UserError` where the file
    cannot be written."""
    try:
        replace_text(file, make_page(material, number))
    except OSError as error:
        raise UserError(f"--page {file} cannot be written: {error.strerror or error}") from error


def make_page(material: Material, number: int) -> str:
    """A page of `number` rows. Raises `DataError` for an image that is gone."""
    rows = _spread(material.shown, number)
    whole = find_whole(material, rows)
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'sha256-{allowed}'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Rows as the model sees them</title>\n<style>{style}</style>\n</head>\n<body>\n<main>",
        *_introduction(material, len(rows)),
        *(part for row in rows for part in _article(material, row, whole.get(row.source))),
        "</main>\n</body>\n</html>\n",
    ])  # fmt: skip


def _spread(items: Sequence[_Item], number: int) -> list[_Item]:
    """So many of the items, evenly from all of them.

    >>> _spread("abcdef", 3)
    ['a', 'c', 'e']
    """
    number = min(number, len(items))
    return [items[i * len(items) // number] for i in range(number)]


def _introduction(material: Material, number: int) -> Iterator[str]:
    config = material.config
    which = "that are trained on" if material.rows else "that are held out"
    if isinstance(material.data.train, StreamedRows) and material.rows:
        which = "at the start of the stream"
    template = f"chat template {config.data.template}" if config.data.template else "its own chat template"
    yield "<h1>Rows as the model sees them</h1>"
    yield (
        f"<p>{number:,} of {count_of(len(material.shown), 'row')} {which}, for "
        f"{escape(config.model.model_name_or_path)} with {escape(template)}; stage {config.method.stage}, "
        f"cutoff_len {config.data.cutoff_len:,}.</p>"
    )
    scored = "Coloured tokens are scored"
    if config.method.stage == "rm":
        scored = "The score of a response is read at its last token, which is coloured"
    yield (
        f'<p class="note">{scored}; the others are only read. Control tokens are grey, ↵ is the end of a '
        "line, and what was cut is struck through.</p>"
    )


def _article(material: Material, row: TokenizedExample, whole: TokenizedExample | None) -> Iterator[str]:
    yield f"<article>\n<h2>{_text(row.source)}</h2>"
    vision = material.template.vision
    if vision is not None and row.images:
        yield '<div class="pictures">'
        yield from map(_figure, count(1), read_pictures(vision, row.images))
        yield "</div>"
    prompt_cuts, *cuts = find_cuts(row, whole)
    if row.truncated and not prompt_cuts and not any(cuts):
        yield '<p class="note">Something was cut that has no one place here.</p>'
    prompt = _take_apart(material.pieces, row.prompt_ids, prompt_cuts, range(0))
    yield _section("Prompt", _size(row.prompt_ids, prompt_cuts, "not scored"), prompt)
    kinds, is_reward = kinds_of(row), material.config.method.stage == "rm"
    for i, (kind, ids, own_cuts) in enumerate(zip(kinds, row.response_ids, cuts, strict=True)):
        scored = range(len(ids) - 1 if is_reward else 0, len(ids))
        name = kind.capitalize() + (f" {i + 1}" if kinds.count(kind) > 1 else "")
        facts = [
            _size(ids, own_cuts, "scored at its last token" if is_reward else "scored"),
            *_remarks(row, i),
        ]
        parts = _take_apart(material.pieces, ids, own_cuts, scored)
        yield _section(name, "; ".join(facts), parts, _CLASSES.get(kind, ""))
    if not row.response_ids:
        yield f'<p class="note">{_NO_RESPONSES}</p>'
    yield "</article>"


def _size(ids: Sequence[int], cuts: Sequence[Cut], how: str) -> str:
    lost = sum(len(cut.ids) for cut in cuts)
    return f"{count_of(len(ids), 'token')}, {how}" + (f", {lost:,} more were cut" if lost else "")


def _remarks(row: TokenizedExample, response: int) -> Iterator[str]:
    """What else is to be said of a response."""
    kind = kinds_of(row)[response]
    if kind == "partner":
        yield "the response to another prompt, for the KL term"
    better = [pair for pair in row.pairs if pair.chosen == response]
    if kind == "ranked" and better:
        yield "better than " + ", ".join(str(pair.rejected + 1) for pair in better)
    for name in ("margin", "weight"):
        values = {getattr(pair, name) for pair in better} - {getattr(Pair, name)}
        if values:
            yield f"{name} " + ", ".join(f"{value:g}" for value in sorted(values))


def _figure(number: int, picture: Picture) -> str:
    """The tiles of a picture, small ones larger than they are, with what became of its size. Of the frames of
    a video some are shown."""
    images = []
    kind, word = ("Video", "frames") if picture.is_video else ("Image", "tiles")
    shown = _spread(picture.tiles, _MOST_FRAMES) if picture.is_video else picture.tiles
    for tile in shown:
        times = max(_SMALL // max(tile.size), 1)
        data = base64.b64encode(encode_png(tile)).decode()
        images.append(
            f'<img src="data:image/png;base64,{data}" alt="{kind} {number} of the row as the model gets it" '
            f'width="{tile.width * times}" height="{tile.height * times}"'
            + (' class="larger">' if times > 1 else ">")
        )
    steps = [_pixels(picture.stored)]
    if picture.scaled != picture.stored:
        which = "max" if picture.scaled < picture.stored else "min"
        steps.append(f"{_pixels(picture.scaled)} by {kind.lower()}_{which}_pixels")
    sizes = [tile.size for tile in picture.tiles]
    steps.append(f"{len(sizes)} {word} of {_pixels(sizes[0])}" if len(sizes) > 1 else _pixels(sizes[0]))
    less = f", of which {len(shown)} are here" if len(shown) < len(sizes) else ""
    return (
        f"<figure><div>{''.join(images)}</div><figcaption>{kind} {number}, {_text(picture.name)}: "
        f"{' → '.join(steps)}{less}, {count_of(picture.num_tokens, 'token')}</figcaption></figure>"
    )


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def _section(name: str, facts: str, parts: Sequence[tuple[Piece, str]], style: str = "") -> str:
    """A prompt or response under its heading."""
    head, middle, tail = leave_out(parts, _MOST_PIECES)
    tokens = _tokens(head) + _tokens(tail)
    if middle:
        left_out = count_of(sum(piece.num_tokens for piece, _ in middle), "token")
        tokens = f"{_tokens(head)}<em> … {left_out} more … </em>{_tokens(tail)}"
    opened = f'<section class="{style}">' if style else "<section>"
    # What a row says may be in any language, and run from right to left.
    return (
        f"{opened}\n<h3>{name} <small>{facts}</small></h3>\n"
        f'<div class="tokens" lang="" dir="auto">{tokens}</div>\n</section>'
    )


def _take_apart(
    pieces: Pieces, ids: Sequence[int], cuts: Sequence[Cut], scored: range
) -> list[tuple[Piece, str]]:
    """The pieces of a part, each with the element that it is to be in; `scored` are the places of tokens."""
    lost = {cut.start: cut.ids for cut in cuts}
    bounds = sorted({0, *lost, scored.start, scored.stop, len(ids)})
    found = []
    for start, end in pairwise([*bounds, len(ids)]):
        found += [(piece, "del") for piece in pieces.of(lost.get(start, ()))]
        found += [(piece, "mark" if start in scored else "") for piece in pieces.of(ids[start:end])]
    return found


def _tokens(parts: Iterable[tuple[Piece, str]]) -> str:
    """Pieces as HTML: each scored token in an element of its own, what was cut in one together."""
    html = []
    for element, run in groupby(parts, key=itemgetter(1)):
        texts = [_piece(piece) for piece, _ in run]
        if element == "mark":
            html += [f"<mark>{text}</mark>" for text in texts]
        else:
            html.append(f"<{element}>{''.join(texts)}</{element}>" if element else "".join(texts))
    return "".join(html)


def _piece(piece: Piece) -> str:
    text = _text(piece.text)
    if piece.is_image:
        return f"<b>{text} × {piece.num_tokens:,}</b><wbr>"
    return f"<i>{text}</i><wbr>" if piece.is_control else text


def _text(text: str) -> str:
    """A text of a row for HTML, nothing of it markup, each end of a line to be seen."""
    lines = (escape(show_unprintable(line)) for line in text.split("\n"))
    return '<i aria-hidden="true">↵</i>\n'.join(lines)
