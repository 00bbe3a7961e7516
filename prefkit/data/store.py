"""Encoded rows on disk: written once, then read through memory maps, so that a data set of any size fits.

A folder holds one data set as one run reads it; its name ends in the hash of all that its rows depend on.
`rows.arrow` has the rows, `ledger.json` what became of every row of the source, and `facts.json` says in
words what the hash is of. A folder is written aside and renamed: it is whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefkit.data.encode import TokenizedExample, prompt_key
from prefkit.data.examples import Clip, Medium, Pair, StoredImage
from prefkit.data.ledger import Ledger
from prefkit.data.readers import DataError

ROWS, LEDGER, FACTS = "rows.arrow", "ledger.json", "facts.json"
_BATCH = 64  # rows that are read from disk together
_PAIR = pa.struct(
    {"chosen": pa.int32(), "rejected": pa.int32(), "margin": pa.float64(), "weight": pa.float64()}
)
_IMAGE = pa.struct(
    {
        "path": pa.string(),
        "content": pa.binary(),
        "digest": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "clip": pa.int32(),  # of a frame, the place of its video among the images; null for an image
    }
)
_SCHEMA = pa.schema(
    {
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.list_(pa.int32())),
        "pairs": pa.list_(_PAIR),
        "source": pa.string(),
        "truncated": pa.bool_(),
        "labels": pa.list_(pa.string()),
        "question": pa.string(),
        "conversation": pa.string(),
        "images": pa.list_(_IMAGE),
        "times": pa.int32(),
    }
)


class EncodedRows(Sequence[TokenizedExample]):
    """The rows of one file, read from disk when they are asked for."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._open()

    def _open(self) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(self.file)))
        self._cached: tuple[int, Any] = (-1, None)
        sizes = self._reader.num_record_batches
        last = self._reader.get_batch(sizes - 1).num_rows if sizes else 0
        self._length = max(sizes - 1, 0) * _BATCH + last

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process opens the file anew."""
        return {"file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.file = state["file"]
        self._open()

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, place = divmod(index, _BATCH)
        if self._cached[0] != number:
            self._cached = (number, self._reader.get_batch(number))
        row = self._cached[1].slice(place, 1).to_pylist()[0]
        row["pairs"] = tuple(Pair(**pair) for pair in row["pairs"])
        row["labels"] = tuple(row["labels"])
        row["images"] = _read_media(row["images"])
        del row["times"]
        return TokenizedExample(**row)

    def num_pairs(self) -> np.ndarray:
        """The number of pairs of each row, (rows,)."""
        return self._column(lambda batch: batch.column("pairs").value_lengths())

    def pair_members(self) -> np.ndarray:
        """Of each pair of all rows, one after the other, which responses of its row are chosen and rejected,
        (pairs, 2)."""

        def members(name: str) -> np.ndarray:
            return self._column(lambda batch: batch.column("pairs").flatten().field(name))

        return np.stack([members("chosen"), members("rejected")], 1)

    def lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each row the tokens of its prompt and the number of its responses, (rows,) each; and of each
        response of all rows, one after the other, its tokens."""
        prompts = self._column(lambda batch: batch.column("prompt_ids").value_lengths())
        numbers = self._column(lambda batch: batch.column("response_ids").value_lengths())
        responses = self._column(lambda batch: batch.column("response_ids").flatten().value_lengths())
        return prompts, numbers, responses

    def prompt_keys(self) -> np.ndarray:
        """The `prompt_key` of each row, (rows,)."""

        def keys(batch: Any) -> Any:
            prompts, images = batch.column("prompt_ids"), batch.column("images")
            ids, ends = prompts.values.to_numpy(), prompts.offsets.to_numpy()
            digests, stops = images.values.field("digest").to_pylist(), images.offsets.to_numpy()
            spans = zip(pairwise(ends), pairwise(stops), strict=True)
            return pa.array(
                [prompt_key(ids[a:b].tolist(), digests[c:d]) for (a, b), (c, d) in spans], pa.uint64()
            )

        return self._column(keys)

    def num_images(self) -> np.ndarray:
        """The number of images of each row, (rows,)."""
        return self._column(lambda batch: batch.column("images").value_lengths())

    def image_digests(self) -> Iterator[str]:
        """The hash of the content of each image and frame, in the order of the rows."""
        for number in range(self._reader.num_record_batches):
            images = self._reader.get_batch(number).column("images")
            yield from images.values.field("digest").to_pylist()

    def changed_image(self) -> str | None:
        """The path of an image that is gone or was written after the rows were; None where there is none."""
        kept_at = self.file.stat().st_mtime_ns
        for number in range(self._reader.num_record_batches):
            images = self._reader.get_batch(number).column("images")
            for path in dict.fromkeys(images.values.field("path").to_pylist()):
                try:
                    if path and Path(path).stat().st_mtime_ns > kept_at:
                        return str(path)
                except OSError:
                    return str(path)
        return None

    def first_labels(self) -> np.ndarray:
        """The label of the first response of each row, (rows,); every row has one."""
        return self._column(lambda batch: pc.list_element(batch.column("labels"), 0))

    def column(self, name: str) -> np.ndarray:
        """The numbers or flags of a column, (rows,)."""
        return self._column(lambda batch: batch.column(name))

    def _column(self, pick: Callable[[Any], Any]) -> np.ndarray:
        batches = (self._reader.get_batch(i) for i in range(self._reader.num_record_batches))
        parts = [pick(batch).to_numpy(zero_copy_only=False) for batch in batches]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _write_media(media: Sequence[Medium]) -> list[dict[str, Any]]:
    """Images and frames of videos, one after the other, for `_read_media`."""
    return [
        {**vars(image), "clip": place if isinstance(medium, Clip) else None}
        for place, medium in enumerate(media)
        for image in (medium.frames if isinstance(medium, Clip) else (medium,))
    ]


def _read_media(written: Sequence[dict[str, Any]]) -> tuple[Medium, ...]:
    media: list[Medium] = []
    for place, group in groupby(written, lambda image: image.pop("clip")):
        images = tuple(StoredImage(**image) for image in group)
        media += images if place is None else (Clip(images),)
    return tuple(media)


class RowWriter:
    """Writes a folder of encoded rows; nothing is there until `finish`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        except OSError as error:
            raise DataError(
                f"encoded rows cannot be kept in {folder.parent} ({error.strerror}): set tokenized_path"
            ) from error
        self._writer = pa.ipc.new_file(str(self._scratch / ROWS), _SCHEMA)
        self._rows: list[dict[str, Any]] = []
        self.num_rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def append(self, example: TokenizedExample, times: int = 1) -> None:
        """Add a row, which is used so many times in an epoch."""
        pairs, images = [asdict(pair) for pair in example.pairs], _write_media(example.images)
        self._rows.append({**vars(example), "pairs": pairs, "images": images, "times": times})
        self.num_rows += 1
        if len(self._rows) == _BATCH:
            self._write()

    def _write(self) -> None:
        try:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=_SCHEMA))
        except OSError as error:
            raise DataError(f"encoded rows cannot be kept in {self.folder.parent}: {error}") from error
        self._rows = []

    def finish(self, ledger: Ledger, facts: dict[str, Any]) -> None:
        """Put the folder where it belongs, in place of one that is there."""
        if self._rows:
            self._write()
        self._writer.close()
        for name, content in ((LEDGER, vars(ledger)), (FACTS, facts)):
            (self._scratch / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        self._scratch.chmod(0o755)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self._scratch.rename(self.folder)


def store_root(tokenized_path: str | None, cache_dir: str | None) -> Path:
    """The folder of all encoded data sets: the one asked for, or below the user's caches."""
    if tokenized_path:
        return Path(tokenized_path).expanduser()
    if cache_dir:
        return Path(cache_dir).expanduser() / "prefkit-encoded"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "prefkit" / "encoded"


def folder_name(name: str, facts: dict[str, Any]) -> str:
    """The name of the folder of a data set: its own, made harmless, and the hash of the facts."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in Path(name).name).strip(".")
    return f"{plain[:60]}-{digest[:24]}"


def load_folder(folder: Path) -> tuple[EncodedRows, Ledger] | None:
    """The rows and the ledger of a folder; None where it is not there or is damaged."""
    try:
        content = json.loads((folder / LEDGER).read_text(encoding="utf-8"))
        for name in ("not_sampled", "rejected"):
            content[name] = Counter(content[name])
        content["places"] = tuple(content["places"])
        return EncodedRows(folder / ROWS), Ledger(**content)
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
        return None
