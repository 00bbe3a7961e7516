"""Pictures and tables of what `memory.py` measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

Row = dict[str, Any]
Curve = dict[str, list[tuple[Any, float]]]
PARTS = {
    "weights": ("weights", "#9bb8d3"),
    "second_copy": ("second copy (reference)", "#d9c6a5"),
    "optimiser": ("optimiser state", "#c8a2c8"),
    "gradients": ("gradients at the peak", "#c8553d"),
    "activations": ("activations and temporaries", "#1f5a93"),
}
COLOURS = {"shared": "#1f5a93", "repeat": "#c8553d", "accumulated": "#6a8f3c"}
COLOURS |= {"prefkit": "#1f5a93", "all logits": "#c8553d", "gradients": "#888888"}
# Of each series, the look of its second kind.
DASHED = ("checkpointing", "full", "all weights")


def draw(curve: str, rows: list[Row], folder: Path) -> None:
    """Write the picture of a curve."""
    figure, axes = pyplot.subplots(figsize=(8.5, 4.6), layout="constrained")
    _DRAWERS[curve](axes, rows)
    axes.grid(alpha=0.3)
    figure.savefig(folder / f"memory_{curve}.png", dpi=80)
    pyplot.close(figure)


def table(curve: str, rows: list[Row]) -> str:
    """The figures of a curve in MB, as Markdown."""
    if curve == "finetuning":
        names = [*PARTS, "peak", "all_gradients", "resident"]
        head = ["", *(name.replace("_", " ") for name in names)]
        body = [[_flat(row["x"]), *(_mb(row[name]) for name in names)] for row in rows]
    else:
        lines = _by_series(rows, _step)
        head = [{"length": "tokens", "vocabulary": "vocabulary", "batch": "pairs"}[curve], *lines]
        xs = [x for x, _ in next(iter(lines.values()))]
        body = [[f"{x:,}", *(f"{dict(points)[x]:,.0f}" for points in lines.values())] for x in xs]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f}"


def _flat(name: str) -> str:
    return " ".join(name.split())


def _step(row: Row) -> float:
    """MB that a step allocates at its peak, activations and gradients."""
    return (row["activations"] + row["gradients"]) / 1e6


def _by_series(rows: list[Row], value: Callable[[Row], float]) -> Curve:
    lines: Curve = {}
    for row in rows:
        lines.setdefault(row["series"], []).append((row["x"], value(row)))
    return lines


def _draw_lines(axes: Axes, lines: Curve, label: str) -> None:
    for name, points in lines.items():
        look = "--" if name.endswith(DASHED) else "-"
        colour = COLOURS[name.partition(",")[0]]
        axes.plot(*zip(*points, strict=True), look, marker="o", markersize=4, color=colour, label=name)
    axes.set(xlabel=label, ylabel="allocated by a step, MB", ylim=(0, None))
    axes.legend(frameon=False)


def _draw_length(axes: Axes, rows: list[Row]) -> None:
    lines = _by_series(rows, _step)
    last = {name: points[-1][1] for name, points in lines.items()}
    _draw_lines(axes, lines, "tokens of the prompt with its chosen response")
    kept = last["shared"] / last["repeat"]
    saved = last["shared, checkpointing"] / last["shared"]
    axes.set_title(
        f"At {rows[-1]['x']:,} tokens a shared prompt takes {kept:.0%} of a repeated one,\n"
        f"and checkpointing {saved:.0%} of that"
    )


def _draw_vocabulary(axes: Axes, rows: list[Row]) -> None:
    lines = _by_series(rows, _step)
    full = [row for row in rows if row["series"] == "prefkit, full"]
    lines["gradients, all weights"] = [(row["x"], row["all_gradients"] / 1e6) for row in full]
    _draw_lines(axes, lines, "vocabulary, tokens")
    growth = {name: points[-1][1] - points[0][1] for name, points in lines.items()}
    axes.set_title(
        f"From {rows[0]['x']:,} to {rows[-1]['x']:,} tokens LoRA takes {growth['prefkit, LoRA']:,.0f} MB "
        f"more in chunks,\n{growth['all logits, LoRA']:,.0f} MB more with all logits"
    )


def _draw_batch(axes: Axes, rows: list[Row]) -> None:
    lines = _by_series(rows, _step)
    _draw_lines(axes, lines, "pairs in a step: at once, or accumulated one by one")
    growth = {
        name: (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
        for name, points in lines.items()
    }
    axes.set_title(
        f"Another pair takes {growth['shared']:.0f} MB shared, {growth['repeat']:.0f} MB repeated, "
        f"{growth['shared, checkpointing']:.0f} MB\nshared with checkpointing, "
        f"{growth['accumulated']:.0f} MB accumulated"
    )


def _draw_finetuning(axes: Axes, rows: list[Row]) -> None:
    names = [row["x"] for row in rows]
    below = [0.0] * len(rows)
    for part, (label, colour) in PARTS.items():
        sizes = [row[part] / 1e6 for row in rows]
        axes.bar(names, sizes, bottom=below, color=colour, label=label, width=0.6)
        below = [b + s for b, s in zip(below, sizes, strict=True)]
    libraries = rows[0]["libraries"] / 1e6
    label = f"resident set (libraries: {libraries:,.0f} MB)"
    axes.plot(names, [row["resident"] / 1e6 for row in rows], "k_", markersize=16, label=label)
    axes.set(ylabel="MB", axisbelow=True)
    axes.legend(frameon=False, loc="upper left")
    peak = {_flat(row["x"]): row["peak"] / 1e6 for row in rows}
    saved = peak["full, second copy"] - peak["full, ref_cache"]
    axes.set_title(
        f"LoRA takes {peak['LoRA']:,.0f} MB, full tuning {peak['full, second copy']:,.0f} MB;\n"
        f"a reference cache saves {saved:,.0f} MB of that"
    )


_DRAWERS = {
    "length": _draw_length,
    "vocabulary": _draw_vocabulary,
    "batch": _draw_batch,
    "finetuning": _draw_finetuning,
}
