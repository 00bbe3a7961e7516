"""Tokens that are drawn, against transformers' own processors and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import prefkit.model.sampling
from prefkit.config.schema import GenerationConfig
from prefkit.model.sampling import draw_tokens, penalise_repetition, random_numbers

# What `random_numbers(1, 2, 3, 4, 3)` are, times 2^32.
PINNED = [2155729354.5, 4116124277.5, 3047931268.5]
# Ids 0 to 4 with probabilities 0.1, 0.4, 0.05, 0.3, 0.15.
FIVE = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]]).log()
ALL: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def draw(logits: Tensor, uniform: list[float], **keys: Any) -> list[int]:
    """Tokens of one row of logits for each number."""
    numbers = torch.tensor(uniform, dtype=torch.float64)
    return draw_tokens(logits.expand(len(uniform), -1), numbers, GenerationConfig(**keys)).tolist()


@pytest.mark.parametrize(
    ("keys", "bounds"),
    [
        # the ids by which the probability, summed up in the order of ids, passes the number
        ({}, {0.05: 0, 0.15: 1, 0.49: 1, 0.51: 2, 0.56: 3, 0.84: 3, 0.86: 4, 0.999: 4}),
        # 1 and 3 remain, 4/7 and 3/7
        ({"top_k": 2}, {0.01: 1, 0.57: 1, 0.58: 3, 0.99: 3}),
        # 0.4 + 0.3 < 0.75: 4 is needed too; 8/17, 6/17, 3/17
        ({"top_p": 0.75}, {0.01: 1, 0.47: 1, 0.48: 3, 0.82: 3, 0.83: 4, 0.99: 4}),
        # of three tokens 8/17 + 6/17 pass 0.8: two remain
        ({"top_k": 3, "top_p": 0.8}, {0.01: 1, 0.57: 1, 0.58: 3, 0.99: 3}),
        ({"top_p": 0.1}, {0.01: 1, 0.99: 1}),
        ({"top_k": 1}, {0.01: 1, 0.99: 1}),
        # squares: 0.01, 0.16, 0.0025, 0.09, 0.0225 of 0.285
        ({"temperature": 0.5}, {0.03: 0, 0.04: 1, 0.59: 1, 0.6: 2, 0.61: 3, 0.92: 3, 0.93: 4}),
        ({"top_k": 500}, {0.05: 0, 0.999: 4}),
    ],
)
def test_draws_by_hand(keys: dict[str, Any], bounds: dict[float, int]) -> None:
    assert draw(FIVE, list(bounds), **{**ALL, **keys}) == list(bounds.values())


@pytest.mark.parametrize(
    "keys", [{"temperature": 0}, {"temperature": 1e-6}, {"do_sample": False, "temperature": 5.0}]
)
def test_greedy_takes_the_likeliest(keys: dict[str, Any]) -> None:
    assert draw(FIVE, [0.01, 0.99], **{**ALL, **keys}) == [1, 1]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 50},
        {"top_k": 50, "top_p": 0.7, "temperature": 0.95},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"top_p": 0.5, "temperature": 4.0},  # nearly flat: hundreds of tokens are needed
        {"top_k": 3000},
    ],
)
def test_frequencies_are_those_of_transformers(keys: dict[str, Any]) -> None:
    """Numbers at equal distances count a token as often as its probability says, within one."""
    torch.manual_seed(0)
    logits = torch.randn(3, 2000) * 3
    generation = GenerationConfig(**{**ALL, **keys})
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(generation.temperature))])
    if generation.top_k:
        warpers.append(TopKLogitsWarper(generation.top_k))
    if generation.top_p < 1:
        warpers.append(TopPLogitsWarper(generation.top_p))
    expected = warpers(torch.zeros(3, 1, dtype=torch.long), logits.clone()).softmax(1)
    number = 4000
    uniform = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    for row in range(3):
        tokens = draw_tokens(logits[row].expand(number, -1), uniform, generation)
        counted = torch.bincount(tokens, minlength=2000) / number
        assert (counted - expected[row]).abs().max() <= 1.001 / number
        assert not counted[expected[row] == 0].any()


def test_few_tokens_are_put_in_order_where_few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    topk = Tensor.topk
    monkeypatch.setattr(Tensor, "topk", lambda self, k: sizes.append(k) or topk(self, k))
    torch.manual_seed(0)
    draw(torch.randn(1, 5000) * 5, [0.5], **{**ALL, "top_p": 0.9})
    draw(torch.zeros(1, 5000), [0.5], **{**ALL, "top_p": 0.9})
    first = prefkit.model.sampling._NUCLEUS
    assert sizes == [first, first, first * 8, 5000]


def test_which_of_two_nearly_equal_tokens_leads_changes_no_draw() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 0.0]])
    nearly = logits + torch.tensor([[0.0, 1e-6, 0.0, -1e-6, 0.0]])
    uniform = [0.1, 0.3, 0.5, 0.7, 0.9]
    for keys in ({}, {"top_k": 3}, {"top_p": 0.9}):
        settings = {**ALL, **keys}
        assert draw(logits, uniform, **settings) == draw(nearly, uniform, **settings)
        assert draw(logits, uniform, **settings) == draw(2 * logits - nearly, uniform, **settings)


@pytest.mark.parametrize("number", [2.0**-33, 1 - 2.0**-33])
def test_the_outermost_numbers_draw_a_token_that_is_possible(number: float) -> None:
    logits = torch.full((1, 50_000), -torch.inf)
    logits[0, 100:49_000] = torch.randn(48_900)
    for keys in ({}, {"top_k": 50}, {"top_p": 0.9}):
        (token,) = draw(logits, [number], **{**ALL, **keys})
        assert 100 <= token < 49_000


@pytest.mark.parametrize("keys", [{}, {"top_k": 2}, {"top_p": 0.9}, {"temperature": 0}])
@pytest.mark.parametrize("logits", [[[0.0, float("nan"), 1.0]], [[-torch.inf] * 3], [[0.0, torch.inf, 1.0]]])
def test_logits_that_are_not_finite_are_an_error(keys: dict[str, Any], logits: list[list[float]]) -> None:
    with pytest.raises(FloatingPointError, match="no token can be drawn"):
        draw(torch.tensor(logits), [0.5], **{**ALL, **keys})


def test_repetition_is_penalised_as_by_transformers() -> None:
    torch.manual_seed(0)
    logits, seen = torch.randn(4, 30), torch.randint(30, (4, 12))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(seen, logits.clone())
    assert penalise_repetition(logits, seen, 1.3).tolist() == expected.tolist()


def test_each_number_of_a_stream_matters_and_nothing_else() -> None:
    base = random_numbers(1, 2, 3, 4, 100)
    assert base.tolist() == random_numbers(1, 2, 3, 4, 100).tolist()
    others = [(5, 2, 3, 4), (1, 5, 3, 4), (1, 2, 5, 4), (1, 2, 3, 5), (4, 3, 2, 1), (0, 0, 0, 0)]
    for other in others:
        assert not set(base) & set(random_numbers(*other, 100))
    assert base.min() > 0 and base.max() < 1
    # Pinned: another numpy must not change the samples of a run that is resumed.
    assert (base[:3] * 2**32).round(1).tolist() == PINNED


def test_numbers_are_spread_evenly() -> None:
    numbers = torch.tensor(np.stack([random_numbers(0, 0, prompt, 0, 50) for prompt in range(200)])).flatten()
    counts = torch.histc(numbers, 10, 0.0, 1.0)
    assert (counts - 1000).abs().max() < 4 * (1000 * 0.9) ** 0.5
    assert abs(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]) < 0.05
