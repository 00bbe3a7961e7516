"""Some responses of a batch equal the batch of rows with these responses alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import Layout, pack
from prefkit.data.picking import pick, pick_continuing
from tests.data.test_splitting import make_example

COMPUTED_FROM = (
    *("input_ids", "position_ids", "segments", "attention_mask", "pixels"),
    *("source", "target", "owner", "num_responses"),
)


def with_responses(examples: Sequence[TokenizedExample], numbers: Sequence[int]) -> list[TokenizedExample]:
    """Rows with the responses of these numbers, counted over all rows; rows without any are left out."""
    found, number = [], 0
    for example in examples:
        kept = [ids for n, ids in enumerate(example.response_ids, start=number) if n in numbers]
        number += len(example.response_ids)
        if kept:
            found.append(replace(example, response_ids=kept, pairs=()))
    return found


def draw_case(seed: int) -> tuple[list[TokenizedExample], list[int]]:
    draw = random.Random(seed)
    examples = [make_example(i, draw) for i in range(draw.randint(1, 5))]
    total = sum(len(example.response_ids) for example in examples)
    return examples, sorted(draw.sample(range(total), draw.randint(1, total)))


@pytest.mark.parametrize("layout", ["shared", "repeat"])
@pytest.mark.parametrize("seed", range(20))
def test_what_is_picked_is_what_pack_gives(layout: Layout, seed: int) -> None:
    examples, numbers = draw_case(seed)
    found = pick(pack(examples, layout).to_dict(), numbers)
    expected: dict[str, Any] = pack(with_responses(examples, numbers), layout).to_dict()
    assert found.keys() == set(COMPUTED_FROM)
    for name in COMPUTED_FROM:
        if isinstance(expected[name], torch.Tensor):
            assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), (
                name
            )
            assert found[name].is_contiguous(), name
        else:
            assert found[name] == expected[name], name


@pytest.mark.parametrize("seed", range(20))
def test_a_continuing_row_has_what_predicts_its_responses(seed: int) -> None:
    examples, numbers = draw_case(seed)
    found = pick_continuing(pack(examples, "shared").to_dict(), numbers)
    tokens, positions, target, owner, segments = [], [], [], [], []
    known = sum(len(example.prompt_ids) - 1 for example in examples)
    before, number, response = 0, 0, 0
    for example in examples:
        prompt, spans = example.prompt_ids, []
        for ids in example.response_ids:
            if number in numbers:
                spans.append((known + len(tokens), known + len(tokens) + len(ids)))
                tokens += [prompt[-1], *ids[:-1]]
                positions += range(len(prompt) - 1, len(prompt) - 1 + len(ids))
                target += ids
                owner += [response] * len(ids)
                response += 1
            number += 1
        if spans:
            segments.append((before, before + len(prompt) - 1, tuple(spans)))
        before += len(prompt) - 1
    assert found["input_ids"].tolist() == [tokens] and found["position_ids"].tolist() == [positions]
    assert found["target"].tolist() == target and found["owner"].tolist() == owner
    assert found["source"].tolist() == list(range(len(tokens)))
    assert found["segments"] == tuple(segments) and found["num_responses"] == len(numbers)
