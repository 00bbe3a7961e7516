"""`stage: dpo`: pairs, any of `LOSSES`, and the terms that can be added."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from prefkit.config.schema import MethodConfig
from prefkit.data.packing import counted
from prefkit.model.policy import response_logps
from prefkit.model.reference import Reference
from prefkit.objectives.kto import kl_estimate
from prefkit.objectives.logps import PairLogps, ResponseLogps, desensitize_length
from prefkit.objectives.metrics import pairwise_metrics
from prefkit.objectives.pairwise import LOSSES, RunningMean, bco_loss, mix_bco, rewards, sft_loss
from prefkit.train.stages import StageOutput, check_first_losses, check_identity


class DpoStage:
    """Direct preference optimisation with any of `LOSSES`, and the terms that can be added.

    `gather` joins a vector from all ranks; `expects_identity` asks for the first batch to be checked
    against `IDENTITY_TOLERANCE[dtype]`.
    """

    def __init__(
        self,
        method: MethodConfig,
        reference: Reference | None,
        dtype: torch.dtype,
        router_loss_weight: float = 0.0,
    ) -> None:
        self.name = f"{method.stage} ({method.pref_loss})"
        self.loss = LOSSES[method.pref_loss]
        self.joins_ranks = self.loss.needs_batch_kl
        self.reference = reference
        self.dtype = dtype
        self.router_loss_weight = router_loss_weight
        self.method = method
        self.expects_identity = False
        self.gather: Callable[[Tensor], Tensor] = lambda values: values
        self.reward_mean = RunningMean()
        self._step_rewards: list[Tensor] = []
        numbers = {
            "beta": method.pref_beta,
            "label_smoothing": method.dpo_label_smoothing,
            "average": method.ipo_average,
            "gamma": method.simpo_gamma,
        }
        self.numbers = {name: numbers[name] for name in self.loss.params}

    def compute(self, model: nn.Module, batch: dict[str, Any]) -> StageOutput:
        """Losses and metrics of a packed batch.

        Where it is a piece of a micro-batch, its `statistics` are those of the whole. The router loss alone
        is taken over the piece, as it would be in a smaller micro-batch: it is no sum over examples.

        Raises `IdentityError` when the first batch shows that the reference is not what it should be.
        """
        responses = response_logps(model, batch)
        reference = self.reference.logps(model, batch) if self.reference else None
        if self.expects_identity and reference is not None:
            assert self.reference is not None
            check_identity(responses, reference, self.reference, self.dtype, batch["rows"])
        plain = responses.pair(batch["pairs"])
        policy, reference_pair = self._weighed_pairs(responses, reference, batch["pairs"])
        given = batch.get("statistics")
        statistics = self._batch_kl(policy, reference_pair, batch) if given is None else given
        numbers: dict[str, Any] = {**self.numbers, **statistics}
        if self.loss.takes_offset:
            numbers["offset"] = batch["margins"]
        losses = self.loss.fn(policy, reference_pair, **numbers)
        if self.expects_identity and reference_pair is not None:
            self._check_loss(losses, reference_pair, numbers)
        self.expects_identity = False
        if model.training:
            self._note_rewards(policy, reference_pair, batch)
        losses = self._add_terms(losses, policy, plain, reference_pair)
        losses = losses * batch["weights"]
        pair_rewards = self.loss.rewards(policy, reference_pair, **numbers)
        metrics = pairwise_metrics(plain, pair_rewards, self.loss.parts)
        if responses.router_loss is not None:
            losses = losses + self.router_loss_weight * responses.router_loss
            metrics["router_loss"] = responses.router_loss.detach().expand(len(losses))
        named = {} if reference is None else _named(reference.pair(batch["pairs"]))
        return StageOutput(losses, metrics, named)

    def statistics(self, model: nn.Module, pieces: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
        """What the losses of a micro-batch take from all of it, () each, when it is computed in pieces.

        Costs a pass over the pieces, to be made without gradient; none where the loss has no such number.
        """
        if not self.loss.needs_batch_kl:
            return {}
        logratios = []
        for piece in pieces:
            assert self.reference is not None
            responses, reference = response_logps(model, piece), self.reference.logps(model, piece)
            found = _logratios(*self._weighed_pairs(responses, reference, piece["pairs"]))
            logratios.append(counted(found, piece))
        return self._mean_kls(torch.cat(logratios))

    def forget_step(self) -> None:
        """Drop what the optimiser step has gathered so far, since it is computed anew."""
        self._step_rewards = []

    def end_step(self) -> None:
        """After an optimiser step: the rewards seen in it, on all ranks, join their running mean.

        Within the step the mean stays, so that the loss does not depend on how it is cut in micro-batches.
        """
        if self._step_rewards:
            seen = torch.cat(self._step_rewards)
            total, count = (
                self.gather(torch.stack([seen.sum(), seen.new_tensor(len(seen))])).view(-1, 2).sum(0)
            )
            self.reward_mean = self.reward_mean.update(total.item(), int(count))
            self._step_rewards = []

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides weights, as JSON."""
        return {"reward_mean": asdict(self.reward_mean)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.reward_mean = RunningMean(**state["reward_mean"])

    def _weighed_pairs(
        self, policy: ResponseLogps, reference: ResponseLogps | None, pairs: Tensor
    ) -> tuple[PairLogps, PairLogps | None]:
        """Policy and reference as the loss reads them."""
        alpha = self.method.ld_alpha
        weighed = self._weigh(policy, pairs, alpha).pair(pairs)
        if reference is None:
            return weighed, None
        return weighed, self._weigh(reference, pairs, alpha if self.method.ld_alpha_reference else None).pair(
            pairs
        )

    @staticmethod
    def _weigh(responses: ResponseLogps, pairs: Tensor, alpha: float | None) -> ResponseLogps:
        return responses if alpha is None else desensitize_length(responses, pairs, alpha)

    def _batch_kl(
        self, policy: PairLogps, reference: PairLogps | None, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """KL of either side, from all ranks' micro-batches, where the loss has such a term."""
        if not self.loss.needs_batch_kl:
            return {}
        return self._mean_kls(counted(_logratios(policy, reference), batch))

    def _mean_kls(self, logratios: Tensor) -> dict[str, Tensor]:
        """Those of log-ratios (m, 2), whose number m differs between ranks."""
        own = torch.cat([logratios.sum(0), logratios.new_tensor([len(logratios)])])
        chosen, rejected, number = self.gather(own).view(-1, 3).sum(0)
        return {"kl_chosen": kl_estimate(chosen, number), "kl_rejected": kl_estimate(rejected, number)}

    def _note_rewards(self, policy: PairLogps, reference: PairLogps | None, batch: dict[str, Any]) -> None:
        """Gather what the classifier loss compares the rewards of later steps with."""
        if self.method.pref_bco_weight and reference is not None:
            seen = rewards(policy, reference, beta=self.method.pref_beta)
            self._step_rewards += [counted(side.detach(), batch) for side in seen]

    def _add_terms(
        self, losses: Tensor, policy: PairLogps, plain: PairLogps, reference: PairLogps | None
    ) -> Tensor:
        """Mix in the classifier loss and add the likelihood of chosen, each where it has a weight."""
        if self.method.pref_bco_weight and reference is not None:
            bco = bco_loss(policy, reference, beta=self.method.pref_beta, shift=self.reward_mean.mean)
            losses = mix_bco(losses, bco, self.method.pref_bco_weight)
        if self.method.pref_ftx:
            losses = losses + self.method.pref_ftx * sft_loss(plain)
        return losses

    def _check_loss(self, losses: Tensor, reference: PairLogps, numbers: dict[str, Any]) -> None:
        """The loss must be what its own formula gives where policy and reference are equal."""
        if self.method.ld_alpha is not None and not self.method.ld_alpha_reference:
            return  # one side is weighed and the other is not, so they do not start equal
        expected = self.loss.fn(reference, reference, **numbers)
        check_first_losses(losses, expected, self.dtype)


def _named(reference: PairLogps) -> dict[str, Tensor]:
    return {"reference logps/chosen": reference.chosen, "reference logps/rejected": reference.rejected}


def _logratios(policy: PairLogps, reference: PairLogps | None) -> Tensor:
    """Of chosen and rejected, (M, 2), without gradient."""
    assert reference is not None
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    return torch.stack([chosen, rejected], 1).detach()
