"""KTO: single responses that are judged desirable or undesirable, against an estimate of the KL."""

from __future__ import annotations

import torch
from torch import Tensor


def kto_loss(
    logratios: Tensor,
    desirable: Tensor,
    *,
    kl: Tensor | float,
    beta: float,
    chosen_weight: float = 1.0,
    rejected_weight: float = 1.0,
) -> Tensor:
    """What the value of each response lacks to its greatest, (M,).

    `logratios` (M,) are log-prob of a response under the policy less that under the reference, `desirable`
    (M,) of bool; `kl` is the `kl_estimate` of the batch, without gradient. A desirable response costs
    chosen_weight * (1 - s(beta (logratio - kl))), an undesirable one
    rejected_weight * (1 - s(beta (kl - logratio))), Eq. 8 of https://arxiv.org/abs/2402.01306 with
    lambda_y - v(x, y), computed by 1 - s(x) = s(-x). Half the weight at the reference.

    >>> kto_loss(torch.tensor([3.0, 1.0]), torch.tensor([True, False]), kl=1.0, beta=0.5).round(decimals=4)
    tensor([0.2689, 0.5000])
    """
    lead = beta * (logratios - kl)
    return torch.where(desirable, chosen_weight * torch.sigmoid(-lead), rejected_weight * torch.sigmoid(lead))


def kl_estimate(total: Tensor, count: Tensor) -> Tensor:
    """max(0, mean log-ratio) of responses to other prompts, (), without gradient.

    `total` is the sum of their log-ratios over the batches of all ranks, `count` their number. Estimates
    KL(policy || reference) as in section 4.1 of https://arxiv.org/abs/2402.01306.

    >>> kl_estimate(torch.tensor(3.0), torch.tensor(2)), kl_estimate(torch.tensor(-3.0), torch.tensor(2))
    (tensor(1.5000), tensor(0.))
    """
    return (total / count).detach().clamp(min=0)
