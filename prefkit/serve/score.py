"""Score the rows of a file with a reward model: a line for each row, in order.

Lines are added to the output as they come, so that after a kill the same command goes on behind the last
whole one. What they were made from stands beside it, in `OUTPUT.about.json`.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from prefkit import __version__
from prefkit.config.errors import UserError
from prefkit.config.schema import ModelConfig, UseConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.formats import make_example
from prefkit.data.messages import Degenerate, RowError
from prefkit.data.rows import Encoder, Rejected, describe_layout
from prefkit.data.sources import DatasetEntry, find_datasets
from prefkit.files import DiskError, find_fault, free_bytes, fsync, replace_text, show_bytes
from prefkit.model.adapter import find_adapter
from prefkit.model.fingerprint import fingerprint
from prefkit.model.load import find_model
from prefkit.model.scorer import Scorer
from prefkit.model.vision import load_template
from prefkit.runs.report import count_of
from prefkit.serve.load import load_scorer

ABOUT_SUFFIX = ".about.json"
_WINDOW = 16  # rows that are sorted by their length and written together
_TOLD = 10  # how often a run without a terminal says how far it is


def score_file(config: UseConfig, data: str, output: Path, console: Console) -> None:
    """Write the scores of each row of `data`, a file or a data set of `dataset_info.json`, to `output`.

    A line has `row` as `file:row`, and `score`; or `chosen` and `rejected`; or `scores` of a list of
    responses; or `error`, why the row has none. `truncated` marks a row that was cut to `cutoff_len`.
    Raises `UserError` when `output` holds something else or is being written, `DataError` for data that
    cannot be read, `ModelError` for what is no reward model, and `DiskError` for a disk that takes no more.
    """
    _check_place(output)
    (entry,) = find_datasets(config.data.dataset_dir, [data], "scored", config.model.cache_dir)
    if any(file.resolve() == output.resolve() for file in entry.files):
        raise UserError(f"{output} is the file that is scored: write another after -o")
    if entry.layout is None:
        entry = entry.recognised()
        console.print(f"{data}: read as {describe_layout(entry)}.")
    encoder = Encoder(load_template(config.model, config.data), config.data, "scored")
    facts = {"models": _fingerprints(config.model), **_of_rows(encoder, entry)}
    total = sum(1 for _ in entry.rows())
    try:
        with _Lines(output, facts) as lines:
            if lines.finished:
                console.print(f"{output} is finished: {lines.number:,} rows. Remove it to score them again.")
                return
            if lines.number:
                console.print(f"{lines.number:,} of {total:,} rows are in {output}; going on behind them.")
            console.print(f"Loading {config.model.trained_last} ...")
            scorer = load_scorer(config)
            if scorer.model.proof is not None:
                apart = f"within {scorer.model.proof:.0e}" if scorer.model.proof else "exactly"
                console.print(f"Its scores are those of its training, {apart}.")
            _score(entry, encoder, scorer, lines, total, console)
            console.print(lines.finish())
    except KeyboardInterrupt:
        console.print(f"\nStopped. What is scored stays in {output}; the same command goes on behind it.")
        raise
    except OSError as error:
        fault = find_fault(error)
        if fault is None:
            raise
        raise DiskError(
            f"{output}: {fault.strerror}. The disk has {show_bytes(free_bytes(output))} free now. "
            "Whole lines stay, and once the disk takes files again the same command goes on behind them."
        ) from error


def _check_place(output: Path) -> None:
    """Raises `UserError` where a file cannot be written."""
    if output.is_dir():
        raise UserError(f"-o {output}: that is a folder: name a file, such as {output / 'scores.jsonl'}")
    if not output.parent.is_dir():
        raise UserError(f"-o {output}: there is no folder {output.parent}: make it, or write another path")


def _fingerprints(config: ModelConfig) -> dict[str, str]:
    """sha256 of the base and of each adapter."""
    folders = [find_model(config), *(find_adapter(path, config) for path in config.adapter_name_or_path)]
    return {path.name: fingerprint(path) for path in folders}


def _of_rows(encoder: Encoder, entry: DatasetEntry) -> dict[str, Any]:
    """What the tokens of the rows depend on, wherever their file lies; and where images are, for a model that
    sees."""
    unread = {"files", "max_samples", "on_bad_row", "duplicate_prompts", "num_samples", "seed"}
    if encoder.template.vision is None:
        unread.add("images")
    facts = encoder.facts(entry, seed=0)
    return {name: value for name, value in facts.items() if name not in unread}


def _score(
    entry: DatasetEntry, encoder: Encoder, scorer: Scorer, lines: _Lines, total: int, console: Console
) -> None:
    """Score the rows behind those that are done, and show how far it is."""
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    rows = islice(entry.rows(), lines.number, None)
    told = lines.number * _TOLD // max(total, 1)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("score", total=total, completed=lines.number)
        while window := list(islice(rows, _WINDOW)):
            lines.add(_lines_of(window, encoder, entry, scorer))
            bar.update(task, completed=lines.number)
            if not console.is_terminal and lines.number * _TOLD // total > told:
                told = lines.number * _TOLD // total
                console.print(f"{lines.number:,} of {total:,} rows done")


def _lines_of(
    rows: list[tuple[str, Any]], encoder: Encoder, entry: DatasetEntry, scorer: Scorer
) -> list[dict[str, Any]]:
    encoded = [_encode(source, row, encoder, entry) for source, row in rows]
    usable = [row for row in encoded if isinstance(row, TokenizedExample)]
    scores = iter(scorer.score(usable))
    found = []
    for (source, _), row in zip(rows, encoded, strict=True):
        line: dict[str, Any] = {"row": source}
        if isinstance(row, TokenizedExample):
            line |= _named(row, next(scores))
            if row.truncated:
                line["truncated"] = True
        else:
            line["error"] = row
        found.append(line)
    return found


def _encode(source: str, row: Any, encoder: Encoder, entry: DatasetEntry) -> TokenizedExample | str:
    """The tokens of a row, or why it has none."""
    assert entry.layout is not None
    if isinstance(row, RowError):
        return str(row)
    try:
        found = encoder.encode(make_example(row, entry.layout, "scored", source, encoder.media(entry)))
    except (RowError, Degenerate) as error:
        return str(error)
    if isinstance(found, Rejected):
        return found.refusal or found.reason
    return found


def _named(example: TokenizedExample, scores: list[float]) -> dict[str, Any]:
    """The scores of a row by what its responses are."""
    if example.labels == ("chosen", "rejected"):
        return dict(zip(example.labels, scores, strict=True))
    return {"scores": scores} if "ranked" in example.labels else {"score": scores[0]}


@dataclass
class _Summary:
    """What the lines of an output say in all."""

    rows: int = 0
    truncated: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    pairs: int = 0
    right: int = 0
    total: float = 0.0
    number: int = 0

    def add(self, line: dict[str, Any]) -> None:
        self.rows += 1
        self.truncated += bool(line.get("truncated"))
        if "error" in line:
            self.errors[line["error"]] += 1
        scores = [line[name] for name in ("score", "chosen", "rejected") if name in line]
        scores += line.get("scores", [])
        self.total += sum(scores)
        self.number += len(scores)
        if "chosen" in line:
            self.pairs += 1
            self.right += line["chosen"] > line["rejected"]

    def __str__(self) -> str:
        parts = [f"{count_of(self.rows, 'row')}, {count_of(self.number, 'score')}"]
        if self.number:
            parts.append(f"on average {self.total / self.number:.4f}")
        if self.pairs:
            parts.append(f"chosen above rejected in {self.right / self.pairs:.1%} of {self.pairs:,} pairs")
        if self.truncated:
            parts.append(f"{count_of(self.truncated, 'row')} cut to cutoff_len")
        text = "; ".join(parts) + "."
        if self.errors:
            most = "; ".join(f"{reason} ({count:,})" for reason, count in self.errors.most_common(5))
            text += f"\nNo score for {count_of(self.errors.total(), 'row')}; `error` says why: {most}."
        return text


class _Lines:
    """The output of a scoring, locked while it is open: `number` lines are whole, and more are added.

    Raises `UserError` when it is another's, or made from something else.
    """

    def __init__(self, output: Path, facts: dict[str, Any]) -> None:
        self.output = output
        self.facts = facts
        self.about = output.with_name(output.name + ABOUT_SUFFIX)
        self.finished = False
        self.number = 0

    def __enter__(self) -> _Lines:
        self._stream: IO[bytes] = self.output.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check()
        except BlockingIOError:
            self._stream.close()
            raise UserError(
                f"{self.output}: another process is writing it: wait for it, or write another after -o"
            ) from None
        except BaseException:
            self._stream.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file, and remove one that nothing was written to."""
        self._stream.close()
        if not self.number and not self.finished:
            self.output.unlink()
            self.about.unlink(missing_ok=True)

    def _check(self) -> None:
        """Find what is done, and drop half a line at the end."""
        is_new = not self._stream.seek(0, os.SEEK_END)
        if is_new:
            self._describe(finished=False)
            return
        way_out = "remove it, or write another after -o"
        if not self.about.is_file():
            raise UserError(f"{self.output} is there already, and not from a scoring: {way_out}")
        before = json.loads(self.about.read_text(encoding="utf-8"))
        changed = [name for name, value in self._plain().items() if before["made_from"].get(name) != value]
        if changed:
            raise UserError(
                f"{self.output} was made from something else ({', '.join(sorted(changed))} differ): {way_out}"
            )
        self.finished = before["finished"]
        self._stream.seek(0)
        end = 0
        for line in self._stream:
            if line.endswith(b"\n"):
                self.number += 1
                end += len(line)
        self._stream.truncate(end)

    def _plain(self) -> dict[str, Any]:
        """The facts as JSON gives them back."""
        plain: dict[str, Any] = json.loads(json.dumps(self.facts, default=str))
        return plain

    def _describe(self, finished: bool) -> None:
        about = {"finished": finished, "prefkit": __version__, "made_from": self._plain()}
        replace_text(self.about, json.dumps(about, indent=2, ensure_ascii=False) + "\n")

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Add lines, so that another program sees them."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._stream.write(text.encode(errors="surrogatepass"))
        self._stream.flush()
        self.number += len(lines)

    def finish(self) -> str:
        """Force all to the disk and call it finished; what it says in all."""
        fsync(self.output)
        self._describe(finished=True)
        self.finished = True
        summary = _Summary()
        self._stream.seek(0)
        for line in self._stream:
            summary.add(json.loads(line))
        return f"{summary}\nWritten to {self.output}; {self.about.name} says what from."
