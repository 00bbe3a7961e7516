"""Large data takes no more memory than small data: 100,000 pairs, a million rows, a row of 10 MB."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefkit.config import load_config
from prefkit.data.dataset import load_data
from prefkit.data.readers import read_rows
from prefkit.data.template import ChatTemplate

pytestmark = pytest.mark.slow
MB = 2**20


def anonymous_memory() -> int:
    """Bytes of this process that are no pages of files: what a memory map of the store does not count in."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


class Watch:
    """Memory after each thousandth item."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, items: Iterable[Any], title: str = "") -> Iterator[Any]:
        for number, item in enumerate(items):
            if number % 1000 == 0:
                self.seen.append(anonymous_memory())
            yield item

    @property
    def growth(self) -> int:
        """How much more than after a tenth of the items."""
        return max(self.seen) - self.seen[len(self.seen) // 10]


def write_pairs(file: Path, number: int) -> None:
    with file.open("w") as stream:
        for i in range(number):
            text = f"answer number {i} " * 8
            row = {"instruction": f"Question {i}?", "chosen": text, "rejected": text[::-1]}
            stream.write(json.dumps(row) + "\n")


def test_a_hundred_thousand_pairs_are_encoded_in_constant_memory(
    tmp_path: Path, tokenizer, write_config
) -> None:
    write_pairs(tmp_path / "many.jsonl", 100_000)
    config = load_config(write_config(dataset=str(tmp_path / "many.jsonl"), cutoff_len=512), []).config
    watch = Watch()
    data = load_data(config, ChatTemplate(tokenizer, "chatml"), 0, lambda text: None, watch)
    assert len(data.train) == 100_000  # type: ignore[arg-type]
    assert watch.growth < 40 * MB
    before = anonymous_memory()
    for i in range(0, 100_000, 7):
        assert data.train[i].pairs  # type: ignore[index]
    assert anonymous_memory() - before < 20 * MB


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_a_million_rows_are_read_in_constant_memory(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"many{ending}"
    with file.open("w") as stream:
        stream.write("[" if ending == ".json" else "")
        for i in range(1_000_000):
            stream.write("," if ending == ".json" and i else "")
            stream.write(json.dumps({"instruction": f"Question {i}", "chosen": "a", "rejected": "b"}) + "\n")
        stream.write("]" if ending == ".json" else "")
    watch = Watch()
    assert sum(1 for _ in watch(read_rows(file))) == 1_000_000
    assert watch.growth < 20 * MB


def test_a_row_of_ten_megabytes_is_cut_and_used(tmp_path: Path, tokenizer, write_config) -> None:
    row = {"instruction": "Q", "chosen": "word " * 2_000_000, "rejected": "no"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    config = load_config(write_config(dataset=str(tmp_path / "long.jsonl"), cutoff_len=512), []).config
    data = load_data(
        config, ChatTemplate(tokenizer, "chatml"), 0, lambda text: None, lambda rows, title: rows
    )
    assert data.ledgers[0].truncated == 1
    assert sum(map(len, (data.train[0].prompt_ids, data.train[0].response_ids[0]))) <= 512  # type: ignore[index]
