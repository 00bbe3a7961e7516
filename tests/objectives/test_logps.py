"""Sums over responses, pairs, and the length weights of LD-DPO."""

import pytest
import torch

from prefkit.objectives.logps import ResponseLogps, desensitize_length, sum_by_response
from prefkit.objectives.pairwise import sigmoid_loss

# Three responses of 3, 1 and 2 tokens.
TOKENS = [-1.0, -2.0, -4.0, -8.0, -16.0, -32.0]
OWNER = [0, 0, 0, 1, 2, 2]


def make_responses(tokens=TOKENS, dtype=torch.float64) -> ResponseLogps:
    return sum_by_response(torch.tensor(tokens, dtype=dtype), torch.tensor(OWNER), 3)


def test_sums_lengths_and_means():
    responses = make_responses()
    assert responses.logps.tolist() == [-7.0, -8.0, -48.0]
    assert responses.lengths.tolist() == [3.0, 1.0, 2.0]
    assert responses.mean_logps.tolist() == [-7 / 3, -8.0, -24.0]


def test_pairs_pick_chosen_then_rejected():
    pairs = make_responses().pair(torch.tensor([[2, 0], [1, 2]]))
    assert pairs.chosen.tolist() == [-48.0, -8.0]
    assert pairs.rejected.tolist() == [-7.0, -48.0]
    assert pairs.chosen_lengths.tolist() == [2.0, 1.0]
    assert pairs.mean_chosen.tolist() == [-24.0, -8.0]
    assert pairs.mean_rejected.tolist() == [-7 / 3, -24.0]


@pytest.mark.parametrize(
    ("dtype", "summed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_sums_are_at_least_fp32(dtype, summed):
    # 300 tokens of -1: bf16 itself would stop counting at 256
    responses = sum_by_response(torch.full((300,), -1.0, dtype=dtype), torch.zeros(300, dtype=torch.long), 1)
    assert responses.logps.dtype == responses.lengths.dtype == summed
    assert responses.logps.item() == -300.0


def test_gradient_reaches_every_token():
    tokens = torch.tensor(TOKENS, dtype=torch.float64, requires_grad=True)
    sum_by_response(tokens, torch.tensor(OWNER), 3).mean_logps.sum().backward()
    torch.testing.assert_close(
        tokens.grad, torch.tensor([1 / 3] * 3 + [1.0] + [1 / 2] * 2, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        # pair (0, 1): 1 token in common; response 2 is in no pair and keeps its sum
        (0.0, [-1.0, -8.0, -48.0]),
        (0.5, [-1.0 - 0.5 * 6.0, -8.0, -48.0]),
        (0.1, [-1.0 - 0.1 * 6.0, -8.0, -48.0]),
        (1.0, [-7.0, -8.0, -48.0]),
    ],
)
def test_length_weights_by_hand(alpha, expected):
    weighted = desensitize_length(make_responses(), torch.tensor([[0, 1]]), alpha)
    torch.testing.assert_close(
        weighted.logps, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14
    )
    assert weighted.lengths.tolist() == [3.0, 1.0, 2.0]


def test_length_weights_do_not_care_which_side_is_longer():
    one, other = (desensitize_length(make_responses(), torch.tensor([p]), 0.25) for p in ([0, 2], [2, 0]))
    assert one.logps.tolist() == other.logps.tolist() == [-4.0, -8.0, -48.0]


def test_alpha_weighs_the_gradient_of_the_tail():
    tokens = torch.tensor(TOKENS, dtype=torch.float64, requires_grad=True)
    responses = sum_by_response(tokens, torch.tensor(OWNER), 3)
    desensitize_length(responses, torch.tensor([[0, 2]]), 0.25).logps.sum().backward()
    assert tokens.grad.tolist() == [1.0, 1.0, 0.25, 1.0, 1.0, 1.0]


def test_weighing_both_sides_keeps_the_first_loss_at_ln_2():
    pairs = torch.tensor([[0, 1]])
    plain = make_responses()
    weighted = desensitize_length(plain, pairs, 0.5)
    both = sigmoid_loss(weighted.pair(pairs), weighted.pair(pairs), beta=0.1)
    policy_only = sigmoid_loss(weighted.pair(pairs), plain.pair(pairs), beta=0.1)
    assert both.item() == pytest.approx(0.69314718, abs=1e-8)
    # margin -4 + 7 = 3: ln(1 + e^-0.3)
    assert policy_only.item() == pytest.approx(0.55435524, abs=1e-8)
