"""Curves of a run as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefkit.files import naming

CURVES = {
    "training_loss.png": ("loss", "training loss"),
    "training_eval_loss.png": ("eval_loss", "held-out loss"),
    "training_rewards_accuracies.png": ("rewards/accuracies", "reward accuracy"),
    "training_rewards_chosen.png": ("rewards/chosen", "reward of chosen responses"),
    "training_reward.png": ("ppo/score", "mean score"),
    "training_eval_reward.png": ("eval_score", "held-out score of greedy answers"),
    "training_kl.png": ("ppo/kl", "KL to the reference"),
    "training_response_length.png": ("ppo/response_length", "tokens of a response"),
    "training_rewards_margins.png": ("rewards/margins", "reward margin"),
}
OVERVIEW = "training_curves.png"
_OF_PAIRS = ("loss", "rewards/accuracies", "rewards/margins")
_OF_ROLLOUTS = ("ppo/score", "ppo/kl", "ppo/response_length")


def plot_curves(log_history: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw each of `CURVES` that the log has at least two points of, and `OVERVIEW`, three beside another.

    The log is that of `trainer_state.json`; a held-out curve joins its own. Returns the files written.
    """
    import matplotlib

    matplotlib.use("Agg")
    titles = dict(CURVES.values())
    drawn_in_rollouts = any("ppo/score" in line for line in log_history)
    overview = _OF_ROLLOUTS if drawn_in_rollouts else _OF_PAIRS
    files = {name: (key,) for name, (key, _) in CURVES.items()} | {OVERVIEW: overview}
    for key in _losses_of_parts(log_history):
        files[f"training_{key}.png"] = (key,)
        titles[key] = f"held-out loss, {key.removeprefix('eval_').removesuffix('_loss')}"
    drawable = {
        name: keys
        for name, keys in files.items()
        if all(len(_points(log_history, key)[0]) >= 2 for key in keys)
    }
    for name, keys in drawable.items():
        _draw(log_history, {key: titles[key] for key in keys}, folder / name)
    return [folder / name for name in drawable]


def _losses_of_parts(log_history: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the losses of data sets that are evaluated by themselves."""
    marked = {key for line in log_history for key in line if key.endswith("_rewards/margins")}
    return sorted(key.removesuffix("rewards/margins") + "loss" for key in marked if key.startswith("eval_"))


def _draw(log_history: Sequence[dict[str, Any]], titles: dict[str, str], file: Path) -> None:
    """One panel for each key."""
    from matplotlib import pyplot

    size = (7, 4) if len(titles) == 1 else (4 * len(titles), 3.2)
    figure, panels = pyplot.subplots(1, len(titles), figsize=size, layout="constrained", squeeze=False)
    for axes, (key, title) in zip(panels[0], titles.items(), strict=True):
        steps, values = _points(log_history, key)
        held_out = (steps, values)
        if not key.startswith("eval_"):
            axes.plot(steps, values, color="#9bb8d3", linewidth=1, label="each log line")
            axes.plot(steps, smooth(values), color="#1f5a93", linewidth=2, label="smoothed")
            held_out = _points(log_history, f"eval_{key.removeprefix('ppo/')}")
        if held_out[0]:
            axes.plot(*held_out, "o-", color="#c8553d", linewidth=1.5, label="held out")
        axes.set(xlabel="step", title=title.capitalize())
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    with naming(file):
        figure.savefig(file, dpi=120)
    pyplot.close(figure)


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average, corrected for its start.

    >>> smooth([1.0, 1.0, 1.0])
    [1.0, 1.0, 1.0]
    """
    smoothed, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(round(mean / (1 - weight**count), 10))
    return smoothed


def _points(log_history: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    lines = [line for line in log_history if key in line]
    return [line["step"] for line in lines], [line[key] for line in lines]
