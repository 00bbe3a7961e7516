"""What a step reports for each pair; the trainer averages over pairs, steps and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from prefkit.objectives.logps import PairLogps
from prefkit.objectives.pairwise import Rewards

NO_PARTS: Mapping[str, Callable[[PairLogps], Tensor]] = {}


def pairwise_metrics(
    policy: PairLogps, rewards: Rewards, parts: Mapping[str, Callable[[PairLogps], Tensor]] = NO_PARTS
) -> dict[str, Tensor]:
    """Rewards, margins, accuracies and log-probs of M pairs, (M,) each, without gradient.

    `rewards/accuracies` is 1 where the chosen reward is strictly above the rejected one, so a tie is 0:
    a policy that still equals its reference scores 0, not 1/2. `parts` are those of the `Loss` row.

    >>> import torch
    >>> policy = PairLogps(*torch.tensor([[-4.0], [-9.0], [2.0], [3.0]]))
    >>> metrics = pairwise_metrics(policy, Rewards(torch.tensor([0.5]), torch.tensor([-0.25])))
    >>> metrics["rewards/margins"], metrics["rewards/accuracies"], metrics["logps/rejected"]
    (tensor([0.7500]), tensor([1.]), tensor([-9.]))
    """
    values = {
        **reward_metrics(rewards),
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
        **{name: part(policy) for name, part in parts.items()},
    }
    return {name: value.detach() for name, value in values.items()}


def reward_metrics(rewards: Rewards) -> dict[str, Tensor]:
    """Rewards, margins and accuracies of M pairs, (M,) each, without gradient; a tie is no success."""
    chosen, rejected = rewards
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards/margins": chosen - rejected,
    }
    return {name: value.detach() for name, value in values.items()}
