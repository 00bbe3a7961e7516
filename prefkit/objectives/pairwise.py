"""Losses of a pair of responses to one prompt: DPO and its relatives, one value for each pair, (M,).

Notation: c, r are the summed log-probs of chosen and rejected under the policy, c^, r^ under the
reference; c', r' are means over the tokens of the response; s is the sigmoid. The margin of a pair is
(c - c^) - (r - r^). What differs between papers and tools is told in docs/objectives.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from prefkit.objectives.logps import PairLogps


class Rewards(NamedTuple):
    """Implicit rewards of chosen and rejected, (M,) each."""

    chosen: Tensor
    rejected: Tensor


def rewards(policy: PairLogps, reference: PairLogps | None, *, beta: float, average: bool = False) -> Rewards:
    """beta * log-ratio to the reference, or beta * log-prob where there is none.

    Eq. 5 of https://arxiv.org/abs/2305.18290 without its log Z(x), which is the same for both
    responses. `average` takes log-probs per token, Eq. 4 of https://arxiv.org/abs/2405.14734.

    >>> policy = PairLogps(*torch.tensor([[-4.0], [-9.0], [2.0], [3.0]]))
    >>> rewards(policy, None, beta=0.5, average=True)
    Rewards(chosen=tensor([-1.]), rejected=tensor([-1.5000]))
    """
    chosen, rejected = _logps(policy, average)
    if reference is not None:
        reference_chosen, reference_rejected = _logps(reference, average)
        chosen, rejected = chosen - reference_chosen, rejected - reference_rejected
    return Rewards(beta * chosen, beta * rejected)


def sigmoid_loss(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    offset: Tensor | float = 0.0,
) -> Tensor:
    """DPO: the log-loss of preferring chosen, where a share `label_smoothing` of labels is wrong.

    -(1 - e) log s(beta * margin) - e log s(-beta * margin): Eq. 7 of https://arxiv.org/abs/2305.18290
    for e = 0, Eq. 3 of https://ericmitchell.ai/cdpo.pdf for e in (0, 0.5). ln 2 at the reference.
    `offset` (M,) is the reward by which chosen is to lead: it is taken from beta * margin, as in ODPO,
    https://arxiv.org/abs/2402.10571.
    """
    logits = beta * margins(policy, reference) - offset
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def hinge_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """Hinge on the DPO margin: max(0, 1 - beta * margin), zero once the margin reaches 1 / beta.

    Eq. 10 (hinge-norm) of https://arxiv.org/abs/2309.06657, whose gamma is beta. 1 at the reference.
    """
    return relu(1 - beta * margins(policy, reference))


def ipo_loss(policy: PairLogps, reference: PairLogps, *, beta: float, average: bool = True) -> Tensor:
    """IPO: regress the margin to 1 / (2 * beta).

    (margin - 1 / (2 beta))^2, Eq. 17 of https://arxiv.org/abs/2310.12036, whose tau is beta. The
    margin is of per-token means, as its authors ran it; `average=False` takes sums, as the equation is
    written. 1 / (4 beta^2) at the reference.

    >>> policy = PairLogps(*torch.tensor([[-4.0], [-6.0], [2.0], [2.0]]))
    >>> reference = PairLogps(*torch.tensor([[-4.0], [-4.0], [2.0], [2.0]]))
    >>> ipo_loss(policy, reference, beta=0.5)
    tensor([0.])
    """
    return (margins(policy, reference, average=average) - 1 / (2 * beta)) ** 2


def kto_pair_loss(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    kl_chosen: Tensor | float,
    kl_rejected: Tensor | float,
) -> Tensor:
    """KTO on pairs: each response is valued against the KL estimated from the other side of the batch.

    Mean of 1 - s(beta ((c - c^) - kl_rejected)) and 1 - s(beta (kl_chosen - (r - r^))), Eq. 7 of
    https://arxiv.org/abs/2402.01306v1, computed by 1 - s(x) = s(-x). The KLs are statistics of the
    batch, from `objectives.kto.kl_estimate`, without gradient. 1/2 at the reference.
    """
    chosen, rejected = rewards(policy, reference, beta=beta)
    return (torch.sigmoid(beta * kl_rejected - chosen) + torch.sigmoid(rejected - beta * kl_chosen)) / 2


def orpo_loss(policy: PairLogps, reference: PairLogps | None = None, *, beta: float) -> Tensor:
    """ORPO: likelihood of chosen plus beta times the log-loss of the odds ratio; no reference.

    -c' + beta * -log s(log_odds(c') - log_odds(r')), Eq. 6 and 7 of https://arxiv.org/abs/2403.07691,
    whose lambda is beta. Both terms are means over the response, one value for each pair.
    """
    return sft_loss(policy) + beta * odds_ratio_loss(policy)


def simpo_loss(policy: PairLogps, reference: PairLogps | None = None, *, beta: float, gamma: float) -> Tensor:
    """SimPO: the log-loss of chosen leading by `gamma`, on log-probs per token; no reference.

    -log s(beta (c' - r') - gamma), Eq. 6 of https://arxiv.org/abs/2405.14734. `gamma` is a difference
    of rewards: in nats per token the target lead is gamma / beta.
    """
    return -logsigmoid(beta * (policy.mean_chosen - policy.mean_rejected) - gamma)


def sft_loss(policy: PairLogps) -> Tensor:
    """-c': negative log-likelihood per token of the chosen response."""
    return -policy.mean_chosen


def odds_ratio_loss(policy: PairLogps) -> Tensor:
    """-log s(log_odds(c') - log_odds(r')), Eq. 7 of https://arxiv.org/abs/2403.07691."""
    return -logsigmoid(log_odds(policy.mean_chosen) - log_odds(policy.mean_rejected))


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) for p = exp(logps); finite, with a finite gradient, for every finite input.

    In log(1 - p), p is at most 1 - eps of the dtype. There the log-odds are about -log(eps) and keep
    the gradient of `logps` itself, so a certain response still trains.

    >>> log_odds(torch.tensor([-20.0, -0.6931472, 0.0]))
    tensor([-20.0000,   0.0000,  15.9424])
    """
    below_one = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - torch.log(-torch.expm1(below_one))


def bco_loss(policy: PairLogps, reference: PairLogps, *, beta: float, shift: float) -> Tensor:
    """BCO: classify chosen as good and rejected as bad, `shift` being the reward in between.

    -log s(beta (c - c^) - shift) - log s(-(beta (r - r^) - shift)), Eq. 11 of
    https://arxiv.org/abs/2404.04656v1 with density ratio 1, since both share the prompt. `shift` is the
    `RunningMean` of the `rewards` of both sides. 2 ln 2 at the reference with shift 0.
    """
    chosen, rejected = rewards(policy, reference, beta=beta)
    return -logsigmoid(chosen - shift) - logsigmoid(shift - rejected)


def mix_bco(loss: Tensor, bco: Tensor, weight: float) -> Tensor:
    """(loss + weight * bco) / (1 + weight), after MPO, https://arxiv.org/abs/2411.10442.

    >>> mix_bco(torch.tensor([1.0]), torch.tensor([2.0]), weight=0.25)
    tensor([1.2000])
    """
    return (loss + weight * bco) / (1 + weight)


@dataclass(frozen=True)
class RunningMean:
    """Mean of all numbers seen so far, 0 before the first; `dataclasses.asdict` makes it JSON.

    >>> RunningMean().update(3.0, 2).update(-1.0, 2)
    RunningMean(total=2.0, count=4)
    >>> _.mean
    0.5
    """

    total: float = 0.0
    count: int = 0

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    def update(self, total: float, count: int) -> RunningMean:
        """The mean after `count` more numbers that sum to `total`."""
        return RunningMean(self.total + total, self.count + count)


def margins(policy: PairLogps, reference: PairLogps, *, average: bool = False) -> Tensor:
    """(c - c^) - (r - r^), or the same of per-token means; zero at the reference."""
    chosen, rejected = rewards(policy, reference, beta=1.0, average=average)
    return chosen - rejected


def _logps(pairs: PairLogps, average: bool) -> tuple[Tensor, Tensor]:
    return (pairs.mean_chosen, pairs.mean_rejected) if average else (pairs.chosen, pairs.rejected)


@dataclass(frozen=True)
class Loss:
    """A loss and the facts about it, so that nobody else compares loss names.

    `fn(policy, reference, **numbers)` gives (M,); `params` are the names of its numbers, besides
    `kl_chosen` and `kl_rejected` when `needs_batch_kl`. `uses_means` says that it reads log-probs per
    token, unless its own number `average` says otherwise; `takes_offset` that `fn` takes the `offset` of
    each pair. `parts` are terms to report by themselves.
    """

    fn: Callable[..., Tensor]
    needs_reference: bool
    params: tuple[str, ...]
    uses_means: bool = False
    needs_batch_kl: bool = False
    takes_offset: bool = False
    parts: Mapping[str, Callable[[PairLogps], Tensor]] = field(default_factory=dict)

    def rewards(
        self,
        policy: PairLogps,
        reference: PairLogps | None,
        *,
        beta: float,
        average: bool | None = None,
        **_: Tensor | float,
    ) -> Rewards:
        """The rewards whose order this loss trains; takes the same numbers as `fn`."""
        average = self.uses_means if average is None else average
        return rewards(policy, reference if self.needs_reference else None, beta=beta, average=average)


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(
        sigmoid_loss, needs_reference=True, params=("beta", "label_smoothing"), takes_offset=True
    ),
    "hinge": Loss(hinge_loss, needs_reference=True, params=("beta",)),
    "ipo": Loss(ipo_loss, needs_reference=True, params=("beta", "average"), uses_means=True),
    "kto_pair": Loss(kto_pair_loss, needs_reference=True, params=("beta",), needs_batch_kl=True),
    "orpo": Loss(
        orpo_loss,
        needs_reference=False,
        params=("beta",),
        uses_means=True,
        parts={"sft_loss": sft_loss, "odds_ratio_loss": odds_ratio_loss},
    ),
    "simpo": Loss(simpo_loss, needs_reference=False, params=("beta", "gamma"), uses_means=True),
}
