"""Whatever a row holds, it becomes an example, is rejected for a reason, or is named, and no more."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefkit.config.schema import DataConfig
from prefkit.data.encode import TokenizedExample, encode_example
from prefkit.data.examples import Example, Message, Pair, Response
from prefkit.data.formats import make_example
from prefkit.data.ledger import Ledger
from prefkit.data.messages import Degenerate, RowError
from prefkit.data.readers import DataError
from prefkit.data.rows import Encoder, RowReader
from prefkit.data.sources import DatasetEntry
from prefkit.data.template import ChatTemplate
from tests.conftest import make_tokenizer
from tests.data.mutations import GOOD, mutate, mutate_bytes

TEMPLATE = ChatTemplate(make_tokenizer(), "qwen3")
LENGTHS = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def try_rows(number: int, seed: int) -> Counter[str]:
    """What becomes of so many changed rows of each format."""
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for _ in range(number):
        row, layout, use = rng.choice(GOOD)
        changed = mutate(row, rng)
        try:
            example = make_example(changed, layout, use, "f:1")
            encoded = encode_example(example, TEMPLATE, rng.choice([64, 256, 2000]))
        except RowError as error:
            assert str(error) and "\n" not in error.reason
            outcomes["malformed"] += 1
        except Degenerate:
            outcomes["degenerate"] += 1
        else:
            assert isinstance(encoded, TokenizedExample) and encoded.prompt_ids
            outcomes["used"] += 1
    return outcomes


def try_files(number: int, seed: int, folder: Path) -> Counter[str]:
    """What becomes of so many changed files, read as a run reads them; every ledger is exact."""
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for _ in range(number):
        row, layout, use = rng.choice(GOOD)
        rows = [row, mutate(row, rng), row]
        ending = rng.choice([".json", ".jsonl"])
        text = json.dumps(rows) if ending == ".json" else "\n".join(map(json.dumps, rows))
        file = folder / f"d{ending}"
        file.write_bytes(mutate_bytes(text.encode(), rng))
        ledger = Ledger("d")
        encoder = Encoder(TEMPLATE, DataConfig(on_bad_row="skip", cutoff_len=64), use)
        reader = RowReader(DatasetEntry("d", (file,), layout=layout), encoder, ledger, seed=0)
        try:
            used = list(reader.encoded(lambda rows, title: rows))
        except DataError as error:
            assert str(file) in str(error) or "no rows" in str(error)
            outcomes["unreadable"] += 1
            continue
        assert ledger.num_rows == len(used) + ledger.rejected.total()
        outcomes["read"] += 1
    return outcomes


@pytest.mark.parametrize("row", GOOD, ids=lambda row: f"{row[1].formatting}-{row[2]}")
def test_the_rows_are_good_before_they_are_changed(row: Any) -> None:
    assert encode_example(make_example(*row, "f:1"), TEMPLATE, 4000).prompt_ids


def test_changed_rows() -> None:
    outcomes = try_rows(400, seed=0)
    assert min(outcomes[name] for name in ("used", "malformed", "degenerate")) >= 5


def test_changed_files(tmp_path: Path) -> None:
    outcomes = try_files(100, seed=0, folder=tmp_path)
    assert min(outcomes[name] for name in ("read", "unreadable")) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_ten_thousand_changed_rows(seed: int, tmp_path: Path) -> None:
    assert try_rows(10_000, seed).total() == 10_000
    assert try_files(2_000, seed, tmp_path).total() == 2_000


@given(
    st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=4),
    st.text(max_size=80),
    st.text(max_size=80),
    st.integers(16, 120),
    st.sampled_from(["prefkit", "llamafactory"]),
)
@LENGTHS
def test_nothing_is_longer_than_cutoff_len(
    turns: list[str], chosen: str, rejected: str, cutoff_len: int, truncation: Any
) -> None:
    """And what fits is whole."""
    prompt = []
    for turn in turns[:-1]:
        prompt += [Message("user", turn), Message("assistant", "a")]
    prompt.append(Message("user", turns[-1]))
    responses = (Response(chosen, "chosen"), Response(rejected, "rejected"))
    example = Example(tuple(prompt), responses, "f:1", (Pair(0, 1),))
    try:
        encoded = encode_example(example, TEMPLATE, cutoff_len, truncation)
    except Degenerate:
        return
    lengths = [len(encoded.prompt_ids) + len(ids) for ids in encoded.response_ids]
    assert max(lengths) <= cutoff_len and all(encoded.response_ids)
    whole = encode_example(example, TEMPLATE, 100_000, truncation)
    assert encoded.truncated == (
        whole.prompt_ids != encoded.prompt_ids or whole.response_ids != encoded.response_ids
    )
