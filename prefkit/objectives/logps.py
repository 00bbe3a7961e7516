"""Log-probabilities of responses, and of pairs of responses: what every objective reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probs and token counts of M pairs of responses; every field has shape (M,)."""

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @property
    def mean_chosen(self) -> Tensor:
        """Log-prob per token of the chosen responses, (M,)."""
        return self.chosen / self.chosen_lengths

    @property
    def mean_rejected(self) -> Tensor:
        """Log-prob per token of the rejected responses, (M,)."""
        return self.rejected / self.rejected_lengths


@dataclass(frozen=True)
class ResponseLogps:
    """Log-probs of N responses with T tokens in all.

    `token_logps` (T,) is the log-prob of each response token in nats, `owner` (T,) the response it
    belongs to, in order; `logps` (N,) are the sums, `lengths` (N,) the token counts. `router_loss` () is the
    load-balancing loss of a mixture of experts, where one was asked for, `values` (T,) what a value head says
    before each token, where there is one, and `entropies` (T,) those of the distributions that the tokens are
    of, in nats, where they were asked for.
    """

    token_logps: Tensor
    owner: Tensor
    logps: Tensor
    lengths: Tensor
    router_loss: Tensor | None = None
    values: Tensor | None = None
    entropies: Tensor | None = None

    @property
    def mean_logps(self) -> Tensor:
        """Log-prob per token of each response, (N,)."""
        return self.logps / self.lengths

    def pair(self, pairs: Tensor) -> PairLogps:
        """The responses as pairs; `pairs` (M, 2) holds the index of chosen and rejected."""
        chosen, rejected = pairs.unbind(1)
        return PairLogps(
            self.logps[chosen], self.logps[rejected], self.lengths[chosen], self.lengths[rejected]
        )


def sum_by_response(token_logps: Tensor, owner: Tensor, num_responses: int) -> ResponseLogps:
    """Sum token log-probs over their responses, in fp32 or in fp64 if given that.

    >>> sum_by_response(torch.tensor([-1., -2., -4.]), torch.tensor([0, 0, 1]), 2).logps
    tensor([-3., -4.])
    """
    token_logps = token_logps.to(torch.promote_types(token_logps.dtype, torch.float32))
    zeros = token_logps.new_zeros(num_responses)
    lengths = zeros.index_add(0, owner, torch.ones_like(token_logps))
    return ResponseLogps(token_logps, owner, zeros.index_add(0, owner, token_logps), lengths.detach())


def desensitize_length(responses: ResponseLogps, pairs: Tensor, alpha: float) -> ResponseLogps:
    """LD-DPO: weigh with `alpha` the tokens of a response beyond the length of its partner.

    log p(front) + alpha * log p(tail), front = the first min(|chosen|, |rejected|) tokens, Eq. 10 of
    https://arxiv.org/abs/2409.06411. `lengths` stay the true token counts. alpha = 1 changes nothing.
    A response may be in one pair only, since its weights depend on its partner.

    >>> r = sum_by_response(torch.tensor([-1., -2., -4.]), torch.tensor([0, 0, 1]), 2)
    >>> desensitize_length(r, torch.tensor([[0, 1]]), alpha=0.5).logps
    tensor([-2., -4.])
    """
    lengths = responses.lengths
    shared = lengths.clone()
    shared[pairs] = lengths[pairs].min(dim=1, keepdim=True).values.expand(-1, 2)
    starts = lengths.cumsum(0) - lengths
    owner = responses.owner
    position = torch.arange(len(owner), device=owner.device) - starts[owner]
    weights = torch.ones_like(responses.token_logps).masked_fill(position >= shared[owner], alpha)
    weighted = sum_by_response(responses.token_logps * weights, owner, len(lengths))
    return replace(weighted, router_loss=responses.router_loss)
