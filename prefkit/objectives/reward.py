"""The loss of a reward model on pairs."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, center: float = 0.0) -> Tensor:
    """`-log sigmoid(s_c - s_r - margin) + center * (s_c + s_r)^2` for scores of M pairs, (M,).

    The first term is Eq. 1 of https://arxiv.org/abs/2203.02155 with the margin of Eq. 2 of
    https://arxiv.org/abs/2307.09288. It does not change with a constant added to all scores; the second term,
    Eq. 2 of https://arxiv.org/abs/2312.09244, holds their mean near 0.

    >>> import torch
    >>> one, two = torch.tensor([1.0]), torch.tensor([-1.0])
    >>> bradley_terry_loss(one, two, margins=torch.tensor([2.0]))
    tensor([0.6931])
    >>> bradley_terry_loss(one, one, margins=torch.tensor([0.0]), center=0.5)
    tensor([2.6931])
    """
    losses = -F.logsigmoid(chosen - rejected - margins)
    return losses + center * (chosen + rejected) ** 2 if center else losses
