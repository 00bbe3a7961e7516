"""PPO: rewards, advantages and losses of response tokens, and the two numbers that move between rollouts.

Of N responses with T tokens in all, `owner` (T,) names the response of each token, in order, as in
`ResponseLogps`. A response may have no token; it then has no reward and enters no loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Keeps a variance of zero from dividing.
_EPSILON = 1e-8


def token_rewards(
    scores: Tensor, logps: Tensor, reference_logps: Tensor, owner: Tensor, *, kl_coef: float
) -> Tensor:
    """-kl_coef * (log pi - log pi_ref) at each token, and the score of the response on its last, (T,).

    `scores` (N,), the others (T,). Eq. 2 of Ziegler et al., https://arxiv.org/abs/1909.08593, with the
    log-ratio taken apart into tokens. No gradient.

    >>> logps, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -3.0, -3.0])
    >>> owner = torch.tensor([0, 0, 1])
    >>> token_rewards(torch.tensor([5.0, 7.0]), logps, reference, owner, kl_coef=0.5)
    tensor([0.0000, 4.5000, 7.0000])
    """
    rewards = -kl_coef * (logps - reference_logps).detach()
    is_last = torch.ones_like(owner, dtype=torch.bool)
    is_last[:-1] = owner[1:] != owner[:-1]
    return rewards + torch.where(is_last, scores.to(rewards)[owner], 0.0)


def generalized_advantages(
    rewards: Tensor, values: Tensor, owner: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token, (T,) each, without gradient.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, which is Eq. 16 of GAE,
    https://arxiv.org/abs/1506.02438, and Eq. 11 of PPO; the return is A_t + V_t. Nothing follows the last
    token of a response, V = 0, whether it ended or was cut off.

    >>> generalized_advantages(
    ...     torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.25]), torch.tensor([0, 0]), gamma=1.0, lam=0.5
    ... )
    (tensor([0.1250, 0.7500]), tensor([0.6250, 1.0000]))
    """
    rewards, values = rewards.detach(), values.detach()
    counts = torch.bincount(owner)
    columns = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    longest = int(counts.max()) if len(owner) else 0
    # Time first, so that a step back in time reads what lies together.
    padded = rewards.new_zeros(2, longest + 1, len(counts))
    padded[:, columns, owner] = torch.stack([rewards, values])
    of_rewards, of_values = padded
    deltas = of_rewards[:-1] + gamma * of_values[1:] - of_values[:-1]
    advantage = rewards.new_zeros(len(counts))
    for step in reversed(range(longest)):
        # After its last token a response has zeros, so that nothing comes from there.
        advantage = deltas[step] = deltas[step] + gamma * lam * advantage
    advantages = deltas[columns, owner]
    return advantages, advantages + values


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """max(-A r, -A clip(r, 1 - clip, 1 + clip)) with r = pi / pi_old, of each token, (T,).

    The negative of L^CLIP, Eq. 7 of PPO, https://arxiv.org/abs/1707.06347. At r = 1 it is -A.

    >>> logps = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    >>> policy_loss(logps, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), clip=0.25)
    tensor([-1.2500,  1.5000, -0.5000,  0.7500])
    """
    ratio = (logps - old_logps).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """max((V - R)^2, (V_clip - R)^2) / 2 with V_clip = V_old + clip(V - V_old, -clip, clip), (T,).

    The squared error of Eq. 9 of PPO, https://arxiv.org/abs/1707.06347, clipped like the ratio, as in its
    authors' code (section 3 of https://arxiv.org/abs/2005.12729).

    >>> value_loss(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([3.0]), clip=0.5)
    tensor([3.1250])
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def approximate_kl(logps: Tensor, old_logps: Tensor) -> Tensor:
    """r - 1 - log r with r = pi / pi_old at each token, (T,), without gradient.

    Its mean estimates KL(pi_old || pi) without bias and is never negative: k3 of
    http://joschu.net/blog/kl-approx.html.

    >>> approximate_kl(torch.tensor([0.5]).log(), torch.zeros(1))
    tensor([0.1931])
    """
    logratio = (logps - old_logps).detach()
    return torch.expm1(logratio) - logratio


def policy_metrics(logps: Tensor, old_logps: Tensor, *, clip: float) -> dict[str, Tensor]:
    """How far the policy has gone from the one that drew the tokens, (T,) each, without gradient.

    `clip_fraction` is 1 where the ratio is beyond its bounds, `approx_kl` is `approximate_kl`, `ratio` is
    pi / pi_old, whose largest is worth a look.
    """
    ratio = (logps - old_logps).detach().exp()
    return {
        "clip_fraction": ((ratio - 1).abs() > clip).to(ratio.dtype),
        "approx_kl": approximate_kl(logps, old_logps),
        "ratio": ratio,
    }


@dataclass(frozen=True)
class Moments:
    """How many numbers there were, their mean, and the sum of the squares of what they are off from it.

    `dataclasses.asdict` makes it JSON. Merged as by Chan, Golub and LeVeque,
    https://doi.org/10.1080/00031305.1983.10483115, so that no digits are lost when a mean is far from zero.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def variance(self) -> float:
        """squares / (count - 1); 0 of fewer than two numbers."""
        return self.squares / (self.count - 1) if self.count > 1 else 0.0

    def merge(self, other: Moments) -> Moments:
        """The moments of the numbers of both.

        >>> measure(torch.tensor([1.0, 3.0])).merge(measure(torch.tensor([8.0])))
        Moments(count=3, mean=4.0, squares=26.0)
        """
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * other.count / count,
            self.squares + other.squares + apart**2 * self.count * other.count / count,
        )


def measure(values: Tensor, gather: Callable[[Tensor], Tensor] = torch.clone) -> Moments:
    """The moments of the numbers of all ranks, in fp64.

    `gather` makes (ranks, 3) of the (1, 3) of each, as `Accelerator.gather` does.

    >>> measure(torch.tensor([1.0, 3.0]))
    Moments(count=2, mean=2.0, squares=2.0)
    """
    numbers = values.detach().double().flatten()
    mean = numbers.mean() if len(numbers) else numbers.new_zeros(())
    own = torch.stack([mean.new_tensor(len(numbers)), mean, ((numbers - mean) ** 2).sum()])
    merged = Moments()
    for count, mean_of_rank, squares in gather(own[None]).tolist():
        merged = merged.merge(Moments(int(count), mean_of_rank, squares))
    return merged


def whiten(values: Tensor, moments: Moments, *, keep_mean: bool = False) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8), of the same shape, with the mean added again if it is kept.

    Equal numbers become 0, or with `keep_mean` their mean.

    >>> whiten(torch.tensor([1.0, 3.0, 5.0]), measure(torch.tensor([1.0, 3.0, 5.0])))
    tensor([-1.,  0.,  1.])
    """
    scaled = (values.double() - moments.mean) * (moments.variance + _EPSILON) ** -0.5
    return (scaled + moments.mean if keep_mean else scaled).to(values.dtype)


def explained_variance(
    values: Tensor, returns: Tensor, gather: Callable[[Tensor], Tensor] = torch.clone
) -> float:
    """1 - Var(R - V) / Var(R): 1 if values are the returns up to a constant, 0 if they know nothing of them,
    and 0 also if all returns are equal.

    >>> explained_variance(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.0, 4.0]))
    1.0
    """
    of_returns, of_errors = measure(returns, gather).variance, measure(returns - values, gather).variance
    return 1 - of_errors / of_returns if of_returns > 0 else 0.0


@dataclass(frozen=True)
class AdaptiveKL:
    """The weight of the penalty, which steers the KL to a target; `dataclasses.asdict` makes it JSON.

    Section 2.2 of Ziegler et al., https://arxiv.org/abs/1909.08593, with a gain of n / `horizon` for n
    responses.
    """

    coefficient: float = 0.2
    target: float = 6.0
    horizon: float = 10_000.0

    def update(self, kl: float, num_responses: int) -> AdaptiveKL:
        """The weight after `num_responses`, of all ranks, whose summed log-ratios had the mean `kl`:
        coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * num_responses / horizon).

        >>> AdaptiveKL().update(kl=6.6, num_responses=1000).coefficient
        0.202
        """
        error = max(-0.2, min(0.2, kl / self.target - 1))
        return replace(self, coefficient=self.coefficient * (1 + error * num_responses / self.horizon))
