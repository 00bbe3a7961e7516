"""Held-out prompts answered by the reference and by the tuned model, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefkit.files import replace_text


@dataclass(frozen=True)
class Sample:
    """One prompt and both greedy answers; `source` is `file:row`, `pictures` are the files of its images."""

    source: str
    prompt: str
    before: str
    after: str
    pictures: tuple[str, ...] = ()


def write_samples(samples: Sequence[Sample], folder: Path) -> list[Path]:
    """Write `samples.md`, to read, and `samples.jsonl`, for machines."""
    parts = ["# Held-out prompts, before and after training\n"]
    for sample in samples:
        heading = " ".join(sample.prompt.split()).replace("<", "\\<")
        parts.append(f"## {heading}\n\n*{sample.source}*\n")
        parts += [f"![{Path(picture).name}](<{picture}>)\n" for picture in sample.pictures]
        parts.append(f"**before**\n\n{_quote(sample.before)}\n\n**after**\n\n{_quote(sample.after)}\n")
    markdown, lines = folder / "samples.md", folder / "samples.jsonl"
    replace_text(markdown, "\n".join(parts))
    text = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    replace_text(lines, text)
    return [markdown, lines]


def print_samples(console: Console, samples: Sequence[Sample], total: int) -> None:
    """Prompts with both answers side by side, long ones cut; `total` is how many there are in all."""
    title = f"Held-out prompts, {len(samples)} of {total} (all in samples.md)"
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    for name, ratio in (("prompt", 2), ("before", 5), ("after", 3)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for sample in samples:
        table.add_row(
            *(
                Text(shorten(text, 240, placeholder=" ..."))
                for text in (sample.prompt, sample.before, sample.after)
            )
        )
    console.print(table, soft_wrap=False)


def _quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines()) or "> (nothing)"
