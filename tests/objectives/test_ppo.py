"""PPO against numbers by hand, and against loops over tokens that are written here."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from prefkit.objectives.ppo import (
    AdaptiveKL,
    Moments,
    approximate_kl,
    explained_variance,
    generalized_advantages,
    measure,
    policy_loss,
    policy_metrics,
    token_rewards,
    value_loss,
    whiten,
)

# Responses of 3, 1, 0 and 2 tokens.
OWNER = torch.tensor([0, 0, 0, 1, 3, 3])
LENGTHS = (3, 1, 0, 2)


def test_rewards_by_hand() -> None:
    """Log-ratios 0, 1, -0.5 | 2 | 0, -4 with weight 0.1; scores on the last token of each; the third
    response has no token to carry its score."""
    reference = torch.tensor([-1.0, -3.0, -1.5, -4.0, -2.0, -1.0])
    logps = reference + torch.tensor([0.0, 1.0, -0.5, 2.0, 0.0, -4.0])
    rewards = token_rewards(torch.tensor([1.0, 2.0, 99.0, -3.0]), logps, reference, OWNER, kl_coef=0.1)
    assert rewards.tolist() == pytest.approx([0.0, -0.1, 1.05, 1.8, 0.0, -2.6], abs=1e-6)


def test_rewards_carry_no_gradient() -> None:
    logps = torch.zeros(6, requires_grad=True)
    assert not token_rewards(torch.ones(4), logps, torch.zeros(6), OWNER, kl_coef=0.1).requires_grad


def test_rewards_sum_to_score_less_weighted_kl() -> None:
    torch.manual_seed(0)
    logps, reference = torch.randn(6), torch.randn(6)
    scores = torch.tensor([1.0, 2.0, 0.0, -3.0])
    rewards = token_rewards(scores, logps, reference, OWNER, kl_coef=0.3)
    sums = torch.zeros(4).index_add(0, OWNER, rewards)
    kl = torch.zeros(4).index_add(0, OWNER, logps - reference)
    torch.testing.assert_close(sums, scores - 0.3 * kl)


def test_advantages_by_hand() -> None:
    """gamma 0.5, lambda 0.5, so a quarter of the next advantage.

    Three tokens, r 0 0 4, V 1 2 2: deltas 0.5 * 2 - 1 = 0, 0.5 * 2 - 2 = -1, 4 - 2 = 2; advantages
    2, -1 + 2 / 4 = -0.5, -0.5 / 4 = -0.125. One token, r 3, V 1: 2. Two tokens, r 1 1, V 0 4: deltas 3, -3;
    advantages -3, 3 - 3 / 4 = 2.25.
    """
    rewards = torch.tensor([0.0, 0.0, 4.0, 3.0, 1.0, 1.0])
    values = torch.tensor([1.0, 2.0, 2.0, 1.0, 0.0, 4.0])
    advantages, returns = generalized_advantages(rewards, values, OWNER, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [-0.125, -0.5, 2.0, 2.0, 2.25, -3.0]
    assert returns.tolist() == [0.875, 1.5, 4.0, 3.0, 2.25, 1.0]


def loop(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """GAE of one response as the sum of its definition, Eq. 16: of (gamma lam)^l delta_{t+l}."""
    following = [*values, 0.0][1:]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [
        sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (1.0, 0.0), (0.9, 1.0)])
def test_advantages_equal_a_loop(gamma: float, lam: float) -> None:
    torch.manual_seed(0)
    lengths = [1, 7, 0, 0, 30, 2, 1, 0]
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    rewards, values = torch.randn(2, len(owner), dtype=torch.float64)
    advantages, returns = generalized_advantages(rewards, values, owner, gamma=gamma, lam=lam)
    expected: list[float] = []
    for response in range(len(lengths)):
        own = owner == response
        expected += loop(rewards[own].tolist(), values[own].tolist(), gamma, lam)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(returns, advantages + values)


def test_with_both_at_one_an_advantage_is_what_is_still_to_come_less_the_value() -> None:
    rewards, values = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([10.0, 20.0, 30.0])
    owner = torch.zeros(3, dtype=torch.long)
    advantages, returns = generalized_advantages(rewards, values, owner, gamma=1.0, lam=1.0)
    assert returns.tolist() == [7.0, 6.0, 4.0]
    assert advantages.tolist() == [-3.0, -14.0, -26.0]


def test_no_tokens_at_all() -> None:
    none, nobody = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    advantages, returns = generalized_advantages(none, none, nobody, gamma=1.0, lam=0.95)
    assert advantages.shape == returns.shape == (0,)
    assert token_rewards(torch.ones(2), none, none, nobody, kl_coef=0.1).shape == (0,)
    assert whiten(none, measure(none)).shape == (0,)


def test_one_response_does_not_reach_another() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 6)
    before, _ = generalized_advantages(rewards, values, OWNER, gamma=1.0, lam=0.95)
    rewards[3] += 100
    after, _ = generalized_advantages(rewards, values, OWNER, gamma=1.0, lam=0.95)
    assert (before != after).tolist() == [False, False, False, True, False, False]


def test_policy_loss_by_hand() -> None:
    """Clip 0.2, ratios 1, 1.5, 0.5: a gain is only counted within the bounds, a harm in full."""
    logps = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5]).log()
    advantages = torch.tensor([3.0, 2.0, 2.0, -2.0, -2.0])
    losses = policy_loss(logps, torch.zeros(5), advantages, clip=0.2)
    assert losses.tolist() == pytest.approx([-3.0, -2.4, -1.0, 3.0, 1.6])


def test_beyond_the_bounds_a_gain_has_no_gradient() -> None:
    logps = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([2.0, -2.0, -2.0, 2.0, 2.0], dtype=torch.float64)
    policy_loss(logps, torch.zeros(5, dtype=torch.float64), advantages, clip=0.2).sum().backward()
    assert logps.grad is not None
    # -A r where it is not clipped
    assert logps.grad.tolist() == pytest.approx([0.0, 0.0, 3.0, -1.0, -2.2])


def test_at_the_old_policy_the_gradient_is_that_of_the_policy_gradient() -> None:
    logps = torch.randn(4, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0])
    losses = policy_loss(logps, logps.detach(), advantages, clip=0.2)
    losses.sum().backward()
    assert losses.tolist() == (-advantages).tolist()
    assert logps.grad is not None and logps.grad.tolist() == (-advantages).tolist()


def test_value_loss_by_hand() -> None:
    """Clip 0.2 about V_old 1, R 2. V 1.1: 0.81 / 2, within. V 1.5: max(0.25, 0.8^2) / 2. V 3:
    max(1, 0.64) / 2. V 0: max(4, 1.2^2) / 2."""
    values = torch.tensor([1.1, 1.5, 3.0, 0.0])
    losses = value_loss(values, torch.ones(4), torch.full((4,), 2.0), clip=0.2)
    assert losses.tolist() == pytest.approx([0.405, 0.32, 0.5, 2.0])


def test_value_loss_has_no_gradient_where_the_clipped_error_is_the_larger() -> None:
    values = torch.tensor([1.5, 1.1, 0.0], requires_grad=True)
    value_loss(values, torch.ones(3), torch.full((3,), 2.0), clip=0.2).sum().backward()
    assert values.grad is not None and values.grad.tolist() == pytest.approx([0.0, -0.9, -2.0])


def test_metrics_by_hand() -> None:
    logps = torch.tensor([1.0, 1.25, 0.7, 1.1]).log()
    found = policy_metrics(logps, torch.zeros(4), clip=0.2)
    assert found["clip_fraction"].tolist() == [0.0, 1.0, 1.0, 0.0]
    assert found["ratio"].tolist() == pytest.approx([1.0, 1.25, 0.7, 1.1])
    # 1.25 - 1 - ln 1.25, 0.7 - 1 - ln 0.7, 1.1 - 1 - ln 1.1
    assert found["approx_kl"].tolist() == pytest.approx([0.0, 0.026856, 0.056675, 0.004690], abs=1e-6)


def test_the_estimate_of_the_kl_has_the_mean_of_the_kl() -> None:
    old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    new = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    estimates = approximate_kl(new.log(), old.log())
    assert (estimates >= 0).all()
    assert (old * estimates).sum().item() == pytest.approx((old * (old / new).log()).sum().item())


def test_moments_of_ranks_are_those_of_all_numbers() -> None:
    torch.manual_seed(0)
    numbers = torch.randn(40, dtype=torch.float64) * 3 + 1e6
    parts = (numbers[:7], numbers[7:7], numbers[7:8], numbers[8:])
    each = torch.tensor([[m.count, m.mean, m.squares] for m in map(measure, parts)], dtype=torch.float64)
    found = measure(parts[0], lambda own: torch.cat([own, each[1:]]))
    assert found.count == 40
    assert found.mean == pytest.approx(numbers.mean().item(), rel=1e-15)
    assert found.variance == pytest.approx(numbers.var().item(), rel=1e-9)


def test_moments_merge_whatever_the_order_and_survive_json() -> None:
    torch.manual_seed(0)
    rollouts = [torch.randn(n) + 5 for n in (1, 12, 0, 3)]
    running = Moments()
    for scores in rollouts:
        running = Moments(**json.loads(json.dumps(asdict(running)))).merge(measure(scores))
    whole = torch.cat(rollouts).double()
    assert running.count == 16
    assert running.mean == pytest.approx(whole.mean().item())
    assert running.variance == pytest.approx(whole.var().item())


def test_no_and_one_number_have_no_variance() -> None:
    assert measure(torch.zeros(0)) == Moments() == Moments().merge(Moments())
    one = measure(torch.tensor([4.0]))
    assert (one.mean, one.variance) == (4.0, 0.0)
    assert whiten(torch.tensor([4.0]), one).tolist() == [0.0]


def test_whitened_numbers_have_mean_zero_and_variance_one() -> None:
    """1, 2, 6 have mean 3 and variance (4 + 1 + 9) / 2 = 7."""
    numbers = torch.tensor([1.0, 2.0, 6.0])
    root = math.sqrt(7)
    moments = measure(numbers)
    assert whiten(numbers, moments).tolist() == pytest.approx([-2 / root, -1 / root, 3 / root])
    kept = whiten(numbers, moments, keep_mean=True)
    assert kept.tolist() == pytest.approx([3 - 2 / root, 3 - 1 / root, 3 + 3 / root])


@pytest.mark.parametrize("number", [0.0, 0.1, -3e7])
def test_equal_numbers_whiten_to_zero(number: float) -> None:
    numbers = torch.full((1000,), number)
    moments = measure(numbers)
    assert whiten(numbers, moments).tolist() == pytest.approx([0.0] * 1000, abs=1e-9)
    torch.testing.assert_close(whiten(numbers, moments, keep_mean=True), numbers)


def test_numbers_that_differ_by_rounding_are_not_blown_up() -> None:
    numbers = 1 + torch.tensor([0.0, 1e-7, -1e-7, 0.0])
    assert whiten(numbers, measure(numbers)).abs().max().item() < 2e-3


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full((4,), 7.0), returns) == 0.0
    # errors 1, 0, 1, 0 have variance 1/3, returns 5/3
    assert explained_variance(torch.tensor([0.0, 2.0, 2.0, 4.0]), returns) == pytest.approx(0.8)
    assert explained_variance(-returns, returns) == pytest.approx(1 - 4)
    assert explained_variance(returns, torch.ones(4)) == 0.0


def test_kl_weight_by_hand() -> None:
    """Target 6, horizon 10000, 64 responses: at KL 6 it stays; far off, it moves by 0.2 * 64 / 10000."""
    start = AdaptiveKL()
    assert start.update(6.0, 64).coefficient == 0.2
    assert start.update(6.6, 64).coefficient == pytest.approx(0.2 * (1 + 0.1 * 0.0064))
    assert start.update(100.0, 64).coefficient == pytest.approx(0.2 * (1 + 0.2 * 0.0064))
    assert start.update(0.0, 64).coefficient == start.update(-5.0, 64).coefficient
    assert start.update(0.0, 64).coefficient == pytest.approx(0.2 * (1 - 0.2 * 0.0064))


def test_kl_weight_steers_and_survives_json() -> None:
    """A plant whose KL falls as its weight grows comes to its target."""
    control, kl = AdaptiveKL(coefficient=0.2, target=3.0), 30.0
    for _ in range(2000):
        control = AdaptiveKL(**json.loads(json.dumps(asdict(control)))).update(kl, 256)
        kl = 1.5 / control.coefficient
    assert kl == pytest.approx(3.0, rel=0.01)


def step(logps: Tensor, values: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """A whole update of 6 tokens: losses of policy and value."""
    advantages, returns = generalized_advantages(rewards, values, OWNER, gamma=1.0, lam=0.95)
    advantages = whiten(advantages, measure(advantages))
    return (
        policy_loss(logps, logps.detach(), advantages, clip=0.2).mean(),
        value_loss(values, values.detach(), returns, clip=0.2).mean(),
    )


def test_equal_rewards_and_exact_values_leave_nothing_to_learn() -> None:
    """Each response scores 2 and the values know it: no advantage, no error, and a gradient of zero."""
    logps = torch.randn(6, requires_grad=True)
    values = torch.full((6,), 2.0, requires_grad=True)
    rewards = token_rewards(torch.full((4,), 2.0), logps, logps.detach(), OWNER, kl_coef=0.2)
    losses = step(logps, values, rewards)
    assert [loss.item() for loss in losses] == pytest.approx([0.0, 0.0], abs=1e-7)
    sum(losses, torch.zeros(())).backward()
    for tensor in (logps, values):
        assert tensor.grad is not None and tensor.grad.abs().max() < 1e-6
