"""The cheapest change of a config whose training fits into some memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from prefkit.config.savings import Keys, savings
from prefkit.config.schema import KEYS, RunConfig


@dataclass(frozen=True)
class Advice:
    """Keys to write, what that costs, and the bytes of the peak with it."""

    keys: Keys
    cost: str
    total: int


def find_advice(config: RunConfig, budget: int, peak_with: Callable[[RunConfig], int]) -> Advice | None:
    """The change that fits into `budget` bytes and costs least, or None where nothing suffices.

    Changes are tried in the order of what they cost, each by itself and upon all before it that lower the
    peak. `peak_with` gives the bytes of a config.
    """
    together: Keys = {}
    costs: list[str] = []
    lowest = peak_with(config)
    tried: list[Keys] = []
    # What is possible depends on what was changed: a batch can be made smaller again.
    while step := next((it for it in savings(change(config, together)) if it[0] not in tried), None):
        keys, cost = step
        tried.append(keys)
        total = peak_with(change(config, keys))
        if total <= budget:
            return Advice(keys, cost, total)
        if together:
            total = peak_with(change(config, together | keys))
        if total < lowest:
            together, lowest = together | keys, total
            costs = [*costs, cost] if cost not in costs else costs
        if lowest <= budget:
            return Advice(together, "; ".join(costs), lowest)
    return None


def change(config: RunConfig, keys: Keys) -> RunConfig:
    """The config with other values for some keys."""
    if "disable_gradient_checkpointing" in keys:  # the other names of this key would win
        others = ("gradient_checkpointing", "activation_checkpointing")
        kept = {name: value for name, value in config.training.items() if name not in others}
        config = replace(config, training=kept)
    for name, value in keys.items():
        group = KEYS[name].group
        if group == "training":
            config = replace(config, training={**config.training, name: value})
        else:
            config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return config
