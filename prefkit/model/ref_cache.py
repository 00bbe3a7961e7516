"""Log-probs of the reference kept on disk, so that a row is computed once for all epochs, runs and losses.

A folder holds the log-probs under one reference: its name is the hash of all that they depend on but the
row, `facts.json` says it in words. A row's key is the hash of its token ids, in which template and
truncation have had their say. A file of rows is written once and named by the hash of what is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import Packer
from prefkit.files import naming
from prefkit.model.errors import ModelError
from prefkit.model.reference import Reference
from prefkit.objectives.logps import ResponseLogps, sum_by_response

if TYPE_CHECKING:
    from prefkit.data.rows import Track

Say = Callable[[str], None]
_BATCHES_A_FILE = 500  # a kill loses no more while log-probs are computed beforehand


def cache_root(cache_dir: str | None) -> Path:
    """The folder of all caches: below `cache_dir`, else where the user's caches are."""
    if cache_dir:
        return Path(cache_dir).expanduser() / "prefkit-reference"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "prefkit" / "reference"


class LogpsStore:
    """Token log-probs of rows, by key, on disk and in memory; `say` tells the user what is wrong with it.

    Several processes may write to one folder: each file is written aside and renamed.
    """

    def __init__(self, root: Path, facts: dict[str, Any], say: Say) -> None:
        text = json.dumps(facts, sort_keys=True, indent=1)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:24]
        self.say = say
        self._rows: dict[str, Tensor] = {}
        self._fresh: set[str] = set()
        self._read: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "facts.json").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ModelError(
                f"the reference cache cannot be written to {self.folder} ({error.strerror}): set cache_dir, "
                "or ref_cache: false"
            ) from error
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def get(self, key: str) -> Tensor:
        """Log-probs of the response tokens of a row, (T,) in fp32."""
        return self._rows[key]

    def put(self, key: str, token_logps: Tensor) -> None:
        """Keep a row; `flush` writes it. Raises `ModelError` for log-probs that are not finite."""
        if not token_logps.isfinite().all():
            raise ModelError("the reference gives log-probs that are not finite: a wider dtype may help")
        self._rows[key] = token_logps.detach().to("cpu", torch.float32, copy=True)
        self._fresh.add(key)

    def flush(self) -> None:
        """Write the rows put since the last time."""
        if not self._fresh:
            return
        keys = sorted(self._fresh)
        rows = [self._rows[key] for key in keys]
        ends = torch.tensor([len(row) for row in rows]).cumsum(0)
        raw_keys = torch.tensor([list(bytes.fromhex(key)) for key in keys], dtype=torch.uint8)
        tensors = {"keys": raw_keys, "ends": ends, "token_logps": torch.cat(rows)}
        digest = _digest(tensors)
        file = self.folder / f"{digest[:24]}.safetensors"
        scratch = file.with_name(f".{file.name}.{os.getpid()}")
        with naming(file):
            save_file(tensors, scratch, {"sha256": digest})
            scratch.replace(file)
        self._read.add(file.name)
        self._fresh = set()

    def refresh(self) -> None:
        """Read the files that came since the last time; a damaged one is removed, its rows come anew."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name in self._read:
                continue
            self._read.add(file.name)
            try:
                tensors = _load(file)
            except (SafetensorError, ValueError, KeyError) as error:
                self.say(f"Reference cache: {file} is damaged ({error}); its rows are computed again.")
                file.unlink(missing_ok=True)
                continue
            starts = [0, *tensors["ends"].tolist()]
            for number, key in enumerate(tensors["keys"].tolist()):
                self._rows[bytes(key).hex()] = tensors["token_logps"][starts[number] : starts[number + 1]]


def _load(file: Path) -> dict[str, Tensor]:
    with safe_open(str(file), "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in ("keys", "ends", "token_logps")}
        promised = (stored.metadata() or {}).get("sha256")
    if _digest(tensors) != promised:
        raise ValueError("wrong hash")
    return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


class CachedReference:
    """A reference that is asked once for each row.

    `reference` computes what the store lacks; None where everything was computed beforehand, and the
    reference is not in memory. `lacks` makes of the number of rows that the store lacks of a batch the most
    of all processes, where these have to call the reference equally often.
    """

    def __init__(
        self,
        store: LogpsStore,
        reference: Reference | None,
        description: str,
        is_initial_policy: bool,
        lacks: Callable[[int], int] = int,
    ) -> None:
        self.store = store
        self.reference = reference
        self.description = description
        self.is_initial_policy = is_initial_policy
        self.lacks = lacks

    def describe(self) -> str:
        """Which weights the reference is, in words for the log."""
        return self.description

    def logps(self, model: nn.Module, batch: dict[str, Any]) -> ResponseLogps:
        """Log-probs of the batch's responses: those of the store, or computed and put there."""
        keys = batch["keys"]
        if not self.lacks(sum(key not in self.store for key in keys)):
            token_logps = torch.cat([self.store.get(key) for key in keys]).to(batch["owner"].device)
            return sum_by_response(token_logps, batch["owner"], batch["num_responses"])
        if self.reference is None:
            missing = next(row for row, key in zip(batch["rows"], keys, strict=True) if key not in self.store)
            raise RuntimeError(f"the reference cache has no log-probs of {missing}")
        responses = self.reference.logps(model, batch)
        _put(self.store, batch, responses)
        return responses


def _put(store: LogpsStore, batch: dict[str, Any], responses: ResponseLogps) -> None:
    """Store each example's part of the batch's token log-probs."""
    lengths = iter(batch["response_lengths"])
    parts = responses.token_logps.split([sum(islice(lengths, n)) for n in batch["response_counts"]])
    for key, part in zip(batch["keys"], parts, strict=True):
        if key not in store:
            store.put(key, part)


def fill(
    store: LogpsStore,
    examples: Sequence[TokenizedExample],
    compute: Callable[[dict[str, Any]], ResponseLogps],
    packer: Packer,
    max_tokens: int,
    track: Track,
    most: Callable[[int], int] = int,
) -> None:
    """Compute and write what the store lacks of the examples, at most `max_tokens` at a time or one row.

    `most` makes of the number of batches the most of all processes, where these have to compute equally
    often: the last batch is then computed again. There must be an example.
    """
    missing = {example.key: example for example in examples if example.key not in store}
    batches = list(_by_tokens(list(missing.values()), max_tokens))
    batches += [batches[-1] if batches else list(examples[:1])] * (most(len(batches)) - len(batches))
    for number, batch in enumerate(track(batches, "reference log-probs"), start=1):
        packed = packer(batch)
        _put(store, packed, compute(packed))
        if number % _BATCHES_A_FILE == 0:
            store.flush()
    store.flush()


def _by_tokens(examples: Sequence[TokenizedExample], max_tokens: int) -> Iterator[list[TokenizedExample]]:
    batch: list[TokenizedExample] = []
    total = 0
    for example in sorted(examples, key=lambda example: example.num_tokens):
        if batch and total + example.num_tokens > max_tokens:
            yield batch
            batch, total = [], 0
        batch.append(example)
        total += example.num_tokens
    if batch:
        yield batch
