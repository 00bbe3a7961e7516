"""The rows of one data set, read, checked and encoded, each with what became of it in the ledger."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from prefkit.config.schema import DataConfig
from prefkit.data.conversation import write_conversation
from prefkit.data.encode import TokenizedExample, encode_example
from prefkit.data.examples import Example
from prefkit.data.formats import Use, make_example
from prefkit.data.images import MediaSource
from prefkit.data.ledger import MAX_REPORTED, Ledger
from prefkit.data.messages import Degenerate, RowError
from prefkit.data.mixing import sample_rows
from prefkit.data.readers import DataError
from prefkit.data.sources import DatasetEntry
from prefkit.data.store import EncodedRows, RowWriter, folder_name, load_folder
from prefkit.data.template import ChatTemplate, ConversationRefused

Track = Callable[[Iterable[Any], str], Iterable[Any]]  # (items, title) -> the items, shown as they go by
Say = Callable[[str], None]
_CHUNK = 64  # rows that go to another process together


class Rejected(NamedTuple):
    """A row that can teach nothing, and why; or one that the template refuses, with its words for it."""

    source: str
    reason: str
    refusal: str = ""


@dataclass(frozen=True)
class Encoder:
    """How the rows of a run become tokens. It can be sent to another process."""

    template: ChatTemplate
    config: DataConfig
    use: Use

    def encode(self, example: Example) -> TokenizedExample | Rejected:
        """The tokens of an example, or why it has none."""
        config = self.config
        try:
            found = encode_example(example, self.template, config.cutoff_len, config.truncation)  # type: ignore[arg-type]
        except Degenerate as reason:
            return Rejected(example.source, str(reason))
        except ConversationRefused as refusal:
            return Rejected(example.source, "refused by the chat template", str(refusal))
        except RowError as error:
            hint = "" if example.images else "; is their column named in dataset_info.json?"
            return Rejected(example.source, error.reason, f"{error}{hint}")
        if self.use != "prompts":
            return found
        # What judges a response may write the conversation in another way.
        return replace(found, conversation=write_conversation(example.prompt, example.tools))

    def encode_all(self, examples: Iterable[Example]) -> Iterator[TokenizedExample | Rejected]:
        """Each example in order, by as many processes as `preprocessing_num_workers` says."""
        num_workers = self.config.preprocessing_num_workers or 1
        if num_workers == 1:
            yield from map(self.encode, examples)
            return
        context = multiprocessing.get_context("spawn")
        items = iter(examples)
        with ProcessPoolExecutor(num_workers, context, _set_encoder, (self,)) as pool:
            waiting: deque[Future[list[TokenizedExample | Rejected]]] = deque()
            while chunk := list(islice(items, _CHUNK)):
                waiting.append(pool.submit(_encode_chunk, chunk))
                if len(waiting) > 2 * num_workers:  # so that no more rows than these are in memory
                    yield from waiting.popleft().result()
            for future in waiting:
                yield from future.result()

    def facts(self, entry: DatasetEntry, seed: int) -> dict[str, Any]:
        """All that the encoded rows of a data set depend on."""
        assert entry.layout is not None
        config = self.config
        names = ("cutoff_len", "truncation", "max_samples", "on_bad_row", "duplicate_prompts")
        return {
            **{name: getattr(config, name) for name in names},
            "files": [str(file) for file in entry.files] or asdict(entry)["hub"],
            "content": entry.digest(),
            "format": asdict(entry.layout),
            "read for": self.use,
            "num_samples": entry.num_samples,
            "seed": seed if entry.num_samples else None,
            "tool_format": config.tool_format,
            "images": [str(self.media(entry).folder), list(config.media_hosts)],
            **template_facts(self.template),
        }

    def media(self, entry: DatasetEntry) -> MediaSource:
        """Where the images of a data set may be: in `media_dir`, else in `dataset_dir` where it holds the
        data set, else in the folder of its file."""
        config = self.config
        folder = Path(config.media_dir or config.dataset_dir).expanduser()
        if not config.media_dir and entry.files:
            file = entry.files[0].resolve()
            folder = folder if file.is_relative_to(folder.resolve()) else file.parent
        if config.media_dir and not folder.is_dir():
            raise DataError(f"media_dir: there is no folder {config.media_dir}")
        return MediaSource(folder.resolve(), config.media_hosts)


def template_facts(template: ChatTemplate) -> dict[str, Any]:
    """All that the token ids of a conversation depend on besides the conversation."""
    tokenizer = template.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return {
        "chat template": _hash(str(tokenizer.chat_template)),
        "enable_thinking": template.enable_thinking,
        "vision": template.vision.facts if template.vision is not None else None,
        "tokenizer": _hash(words + repr(sorted(tokenizer.special_tokens_map.items()))),
        "prefkit's own encoding": _code_hash(),
    }


_encoder: Encoder | None = None  # of a process that encodes for another


def _set_encoder(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _encode_chunk(examples: list[Example]) -> list[TokenizedExample | Rejected]:
    assert _encoder is not None
    return [_encoder.encode(example) for example in examples]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:24]


@cache
def _code_hash() -> str:
    """A hash of the code that rows go through, so that rows of another version are never taken for ours."""
    folder = Path(__file__).parent
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".jinja", ".json"))
    return _hash("".join(path.read_text(encoding="utf-8") for path in files))


class RowReader:
    """One pass over the rows of a data set as examples; what happens to each goes to the ledger.

    `on_bad_row` decides whether a bad row stops the pass: then no more examples come, the rest is only
    looked through, and `finish` raises.
    """

    def __init__(self, entry: DatasetEntry, encoder: Encoder, ledger: Ledger, seed: int) -> None:
        self.entry = entry
        self.encoder = encoder
        self.ledger = ledger
        self.times: dict[str, int] = {}  # of rows that num_samples has drawn more than once
        self.problems: list[str] = []
        self.num_problems = 0
        self.stopped = False  # encoding, at the first problem
        self._prompts: set[bytes] = set()
        self._drawn = None
        if entry.num_samples:
            self._drawn = sample_rows(sum(1 for _ in entry.rows()), entry.num_samples, seed)

    def examples(self, track: Track) -> Iterator[Example]:
        """The examples that are to be encoded."""
        assert self.entry.layout is not None
        media = self.encoder.media(self.entry)
        num_read = 0
        for number, (source, row) in enumerate(track(self.entry.rows(), f"encode {self.entry.name}")):
            self.ledger.num_rows += 1
            times = self._drawn[number] if self._drawn is not None else 1
            limit = self.encoder.config.max_samples
            if not times or (limit is not None and num_read >= limit):
                self.ledger.not_sampled["max_samples" if times else "num_samples"] += 1
                continue
            num_read += 1
            try:
                if isinstance(row, RowError):
                    raise row
                example = make_example(row, self.entry.layout, self.encoder.use, source, media)
            except Degenerate as reason:
                self.reject(source, str(reason))
                continue
            except RowError as error:
                self._reject_malformed(source, error)
                continue
            if not self.num_problems:
                if times > 1:
                    self.times[source] = times
                yield example

    def encoded(self, track: Track) -> Iterator[TokenizedExample]:
        """The rows that can be used. Raises `DataError` where a row stops the run."""
        for result in self.encoder.encode_all(self.examples(track)):
            before = self.num_problems
            if isinstance(result, Rejected) and result.refusal:
                self._reject_malformed(result.source, RowError(result.refusal, result.reason))
            elif isinstance(result, Rejected):
                self.reject(result.source, result.reason)
            elif self._is_repeated(result):
                self.ledger.reject(result.source, "duplicated prompt")
            else:
                yield result
            self.stopped |= self.num_problems > before
        self.finish()

    def reject(self, source: str, reason: str) -> None:
        """A row that can teach nothing: counted, or a reason to stop."""
        if self.encoder.config.on_bad_row == "stop":
            self._add_problem(source, reason)
        self.ledger.reject(source, reason)

    def _reject_malformed(self, source: str, error: RowError) -> None:
        if self.encoder.config.on_bad_row != "skip":
            self._add_problem(source, str(error))
        self.ledger.reject(source, error.reason, str(error))

    def _add_problem(self, source: str, text: str) -> None:
        self.num_problems += 1
        if len(self.problems) < MAX_REPORTED:
            self.problems.append(f"{source}: {text}")

    def _is_repeated(self, example: TokenizedExample) -> bool:
        if self.encoder.config.duplicate_prompts == "keep":
            return False
        content = repr((example.prompt_ids, example.digests)).encode()
        prompt = hashlib.blake2b(content, digest_size=12).digest()
        is_known = prompt in self._prompts
        self._prompts.add(prompt)
        return is_known

    def finish(self) -> None:
        """Raises `DataError` with up to 20 `file:row: reason` lines where rows stop the run."""
        name = self.entry.name
        if self.problems:
            more = self.num_problems - len(self.problems)
            word = "row" if self.num_problems == 1 else "rows"
            head = f"data set {name!r} has {self.num_problems} malformed {word}"
            rest = ", and perhaps more: encoding stopped there" if self.stopped else ""
            lines = [f"{head}{rest}:", *self.problems]
            lines += [f"... and {more} more"] if more else []
            raise DataError("\n".join([*lines, "on_bad_row: skip leaves such rows out and counts them."]))
        if not self.ledger.num_rows:
            raise DataError(f"data set {name!r}: {', '.join(self.entry.places)} has no rows")


def load_rows(
    entry: DatasetEntry,
    encoder: Encoder,
    seed: int,
    root: Path,
    say: Say,
    track: Track,
    *,
    must_fit: bool,
    overwrite: bool,
) -> tuple[EncodedRows, Ledger]:
    """The encoded rows of a data set, from `root` where they were kept, else encoded now and kept there.

    `must_fit` says that `root` is the user's own: rows there that were encoded otherwise are an error
    rather than left alone. Raises `DataError` for rows that cannot be used.
    """
    recognised = entry.recognised()
    if entry.layout is None:
        say(f"Data set {entry.name}: read as {describe_layout(recognised)}.")
    facts = encoder.facts(recognised, seed)
    folder = root / folder_name(entry.name, facts)
    if must_fit and not overwrite:
        _check_root(root, folder, entry.name, facts)
    found = None if overwrite else load_folder(folder)
    if found is not None and (changed := found[0].changed_image()):
        say(f"Data set {entry.name}: encoded again, since {changed} has changed.")
        found = None
    if found is not None:
        say(f"Data set {entry.name}: encoded rows read from {folder}.")
        return found
    ledger = Ledger(entry.name, entry.places, facts["content"])
    reader = RowReader(recognised, encoder, ledger, seed)
    with RowWriter(folder) as writer:
        for example in reader.encoded(track):
            writer.append(example, reader.times.get(example.source, 1))
        writer.finish(ledger, facts)
    found = load_folder(folder)
    assert found is not None
    return found


def describe_layout(entry: DatasetEntry) -> str:
    """The format of a data set in words."""
    assert entry.layout is not None
    named = ", ".join(f"{ours} in column {theirs!r}" for ours, theirs in entry.layout.columns.items())
    return f"{entry.layout.formatting} rows" + (f" ({named})" if named else "")


def _check_root(root: Path, folder: Path, name: str, facts: dict[str, Any]) -> None:
    """Raises `DataError` when `tokenized_path` has the rows of a data set, and not as they are wanted."""
    if any((root / file).exists() for file in ("dataset_dict.json", "state.json", "dataset_info.json")):
        raise DataError(
            f"tokenized_path: {root} holds rows encoded by another tool, whose meaning cannot be checked: "
            "name a new folder"
        )
    stem = folder.name.rpartition("-")[0]
    others = [path for path in root.glob(f"{stem}-*") if path.name.rpartition("-")[0] == stem]
    if folder in others or not others:
        return
    before = json.loads((others[0] / "facts.json").read_text(encoding="utf-8"))
    changed = [key for key in facts if facts[key] != before.get(key)]
    shown = [
        f"{key}: {before.get(key)} -> {facts[key]}"
        if not isinstance(facts[key], dict | list) and len(str(facts[key])) < 24
        else key
        for key in changed
    ]
    raise DataError(
        f"tokenized_path: {root} has rows of {name!r} that were encoded otherwise ({'; '.join(shown)}). "
        "overwrite_cache: true encodes them again; or name a new folder."
    )
