"""What a step reports for each pair or judged response, and how the trainer averages it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
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


def judged_metrics(logps: Tensor, rewards: Tensor, desirable: Tensor, kl: Tensor) -> dict[str, Tensor]:
    """Log-probs, rewards and labels of M judged responses, and the KL of their batch, (M,) each, without
    gradient."""
    values = {
        "rewards": rewards,
        "logps": logps,
        "desirable": desirable.to(logps.dtype),
        "kl": kl.expand_as(logps),
    }
    return {name: value.detach() for name, value in values.items()}


def by_label(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Metrics as they are averaged: those of judged responses apart by label, those of ppo without the tokens
    of answers that were not drawn, which alone have a `ppo/ptx_loss`; (m,) each with m <= M.

    >>> of_rows = {"rewards": torch.tensor([1.0, 2.0, 5.0]), "desirable": torch.tensor([1.0, 0.0, 1.0])}
    >>> by_label(of_rows)
    {'rewards/chosen': tensor([1., 5.]), 'rewards/rejected': tensor([2.])}
    """
    if "is_answer" in values:
        is_answer = values["is_answer"] > 0
        drawn = {name: it[~is_answer] for name, it in values.items() if name.startswith("ppo/")}
        own = {name: it for name, it in values.items() if name not in drawn and name != "is_answer"}
        return own | drawn | {"ppo/ptx_loss": values["ppo/ptx_loss"][is_answer]}
    if "desirable" not in values:
        return dict(values)
    is_chosen = values["desirable"] > 0
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if name in ("rewards", "logps"):
            found |= {f"{name}/chosen": value[is_chosen], f"{name}/rejected": value[~is_chosen]}
        elif name != "desirable":
            found[name] = value
    return found


def means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Means from (sum, count) of what `by_label` gives; what nothing was counted of is left out.

    Of judged responses also how many of either label were counted, and how far the mean rewards are apart.

    >>> found = means({"loss": (3.0, 6), "rewards/chosen": (4.0, 2), "rewards/rejected": (-2.0, 4)})
    >>> found["loss"], found["rewards/margins"], found["count/chosen"], found["count/rejected"]
    (0.5, 2.5, 2, 4)
    >>> means({"rewards/chosen": (4.0, 2), "rewards/rejected": (0.0, 0)})
    {'rewards/chosen': 2.0, 'count/chosen': 2, 'count/rejected': 0}
    """
    found = {name: total / count for name, (total, count) in sums.items() if count}
    sides = ("rewards/chosen", "rewards/rejected")
    if "rewards/margins" in sums or not sums.keys() >= {*sides}:
        return found
    if found.keys() >= {*sides}:
        found["rewards/margins"] = found[sides[0]] - found[sides[1]]
    return found | {name.replace("rewards", "count"): sums[name][1] for name in sides}


def held_out_metrics(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics of held-out rows from the values of each, (M,), in fp64; of judged ones with `rewards/auc`."""
    parts = by_label({name: value.double() for name, value in values.items()})
    found = means({name: (part.sum().item(), len(part)) for name, part in parts.items()})
    if "desirable" in values and found.keys() >= {"rewards/margins"}:
        found["rewards/auc"] = auc(parts["rewards/chosen"], parts["rewards/rejected"])
    return found


def auc(higher: Tensor, lower: Tensor) -> float:
    """The share of all pairs, one from each vector, of which the first number is above, ties counting half:
    the area under the ROC curve.

    >>> auc(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0, 2.0]))
    0.75
    """
    ordered = lower.sort().values.contiguous()
    below = torch.searchsorted(ordered, higher.contiguous())
    up_to = torch.searchsorted(ordered, higher.contiguous(), right=True)
    return (below + up_to).double().mean().item() / 2 / len(lower)
