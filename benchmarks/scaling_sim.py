"""Time of a DPO step against the number of ranks, simulated, with rows of real lengths dealt and in order.

A cost model, not a measurement: floating point operations at a share of the peak, the bytes of
scaling_formulas.py at the bandwidth of a ring, hops that each take their time, and ranks that wait for the
slowest. Rows are dealt by prefkit's own `deal`. Each rank has `--micro-batch` x `--accumulation` pairs a
step, so that a step grows with the ranks. Whether a run fits into memory is said by a column, without
activations, and stops nothing.

    python benchmarks/scaling_sim.py [--model llama-70b] [--tuning lora] [--engines zero3 fsdp] [--quick]
        [--data FILE...] [--output FILE.png]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scaling_formulas import ENGINES, SHAPES, Run, Shape

from prefkit.data.lengths import Lengths
from prefkit.train.dealing import Cells, costs_of, deal

HERE = Path(__file__).parent
CHARACTERS = 4.56  # of a token, in the set that preference_lengths.json is of
EACH_MICRO_STEP = ("zero2", "zero3", "fsdp")  # engines whose ranks wait for each other in each micro-step
COLOURS = {"ddp": "#1f5a93", "zero1": "#6a8f3c", "zero2": "#c8a2c8", "zero3": "#c8553d", "fsdp": "#333333"}


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes. By default H100: dense bf16 peak and NVLink of its data sheet, 400 Gb/s for each GPU.

    `use` is the share of the peak that kernels reach, `link` that of a bandwidth that collectives reach,
    `overlap` how much of a transfer runs beside the computation: assumptions, to be measured on the real one.
    """

    node: int = 8
    peak: float = 989e12  # FLOP/s
    nvlink: float = 450e9  # bytes/s in one direction
    network: float = 50e9  # bytes/s of a GPU
    use: float = 0.4
    link: float = 0.8
    overlap: float = 0.8
    hop: float = 2.5e-6  # seconds

    def bandwidth(self, ranks: int) -> float:
        """Bytes per second that each rank of a ring sends. Among nodes as many rings as a node has GPUs run,
        each over its own network card, so that they add up."""
        within, among = self.nvlink, self.network * self.node
        return self.link * (within if ranks <= self.node else min(within, among))

    def together(self, computing: float, sending: float) -> float:
        """Seconds of both, of which a part runs at the same time."""
        return max(computing, sending) + (1 - self.overlap) * min(computing, sending)


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and what a rank has of a step."""

    shape: Shape
    engine: str
    lora_rank: int  # 0: all weights
    micro_batch: int
    accumulation: int
    reference: str
    checkpointing: bool

    def run(self, ranks: int) -> Run:
        """The run on so many ranks."""
        whole = self.shape.weights
        frozen, trained = (whole, self.shape.lora(self.lora_rank)) if self.lora_rank else (0, whole)
        return Run(self.engine, ranks, frozen, trained, self.reference, self.accumulation, self.checkpointing)

    def sending(self, ranks: int, cluster: Cluster) -> float:
        """Seconds that the collectives of a step take."""
        if ranks == 1:
            return 0.0
        sent = self.run(ranks).traffic()
        return sum(sent.values()) / cluster.bandwidth(ranks) + self._hops(ranks) * cluster.hop

    def _hops(self, ranks: int) -> float:
        """One after the other, in a step."""
        if self.engine not in ("zero3", "fsdp"):
            return 2 * math.log2(ranks) * self.shape.layers
        # ZeRO-3 gathers each module of a layer, FSDP2 the layer.
        passes = 4 if self.engine == "zero3" else 3
        each = 7 if self.engine == "zero3" else 1
        return (ranks - 1) * passes * each * self.shape.layers * self.accumulation

    def seconds(self, lengths: Lengths, cluster: Cluster) -> np.ndarray:
        """Of each row (n,) the time it takes: the policy's forward and backward, the reference's forward."""
        prompts, _, totals, squares = (it.astype(float) for it in lengths)
        tokens, seen = prompts + totals, prompts**2 / 2 + prompts * totals + squares / 2
        full = not self.lora_rank
        operations = self.shape.flops(tokens, seen, True, full, self.checkpointing)  # type: ignore[arg-type]
        if self.reference != "none":
            operations += self.shape.flops(tokens, seen, False, full, False)  # type: ignore[arg-type]
        found: np.ndarray = operations / (cluster.peak * cluster.use)
        return found


def in_order(number: int, ranks: int, size: int) -> Cells:
    """Rows as they come: to each rank a micro-batch in turn.

    >>> in_order(4, 2, 1)
    [[[0], [1]], [[2], [3]]]
    """
    cells = [list(range(first, min(first + size, number))) for first in range(0, number, size)]
    return [cells[first : first + ranks] for first in range(0, len(cells), ranks)]


def step_time(case: Case, cluster: Cluster, ranks: int, seconds: np.ndarray, cells: Cells) -> float:
    """Seconds of a step whose rows take so long, dealt so."""
    of_ranks = np.array([[seconds[rows].sum() for rows in micro] for micro in cells])
    sending = case.sending(ranks, cluster)
    if case.engine in EACH_MICRO_STEP:
        return sum(cluster.together(most, sending / len(cells)) for most in of_ranks.max(1))
    # The gradients are sent beside the backward of the last micro-step.
    last = of_ranks[-1].mean()
    return float(of_ranks.sum(0).max() - last + cluster.together(last, sending))


def simulate(case: Case, cluster: Cluster, ranks: int, rows: np.ndarray, steps: int) -> dict[str, float]:
    """Means over steps of rows that are drawn from `rows` (n, 3): tokens of prompt, chosen and rejected."""
    rng = np.random.default_rng(ranks)
    number = ranks * case.micro_batch * case.accumulation
    found: dict[str, list[float]] = {"dealt": [], "in order": [], "ideal": []}
    for _ in range(steps):
        drawn = rows[rng.integers(len(rows), size=number)]
        prompts, responses = drawn[:, 0], drawn[:, 1:]
        lengths = Lengths(prompts, np.full(number, 2), responses.sum(1), (responses**2).sum(1))
        seconds = case.seconds(lengths, cluster)
        costs = costs_of(lengths, "shared", case.shape.hidden).tolist()
        dealt = deal(costs, ranks, case.micro_batch)
        plain = in_order(number, ranks, case.micro_batch)
        found["dealt"].append(step_time(case, cluster, ranks, seconds, dealt))
        found["in order"].append(step_time(case, cluster, ranks, seconds, plain))
        found["ideal"].append(seconds.sum() / ranks)
    run = case.run(ranks)
    return {name: float(np.mean(values)) for name, values in found.items()} | {
        "sending": case.sending(ranks, cluster),
        "memory": sum(run.held().values()) + run.gradients(),
    }


def read_lengths(files: Sequence[Path], cutoff: int) -> np.ndarray:
    """(n, 3) tokens of prompt, chosen and rejected, cut to `cutoff`; of files by their characters."""
    if files:
        rows = [_lengths_of(row) for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    else:
        rows = json.loads((HERE / "preference_lengths.json").read_text(encoding="utf-8"))["rows"]
    table = np.array(rows)
    table[:, 1:] = np.minimum(table[:, 1:], cutoff // 2)
    table[:, 0] = np.minimum(table[:, 0], cutoff - table[:, 1:].max(1))
    return np.maximum(table, 1)


def _lengths_of(row: dict[str, Any]) -> list[int]:
    """Of a pair in the formats alpaca and sharegpt."""
    prompt = row.get("conversations") or [row.get("instruction", ""), row.get("input", "")]
    texts = ("".join(map(_text_of, prompt)), _text_of(row["chosen"]), _text_of(row["rejected"]))
    return [max(1, round(len(text) / CHARACTERS)) for text in texts]


def _text_of(message: Any) -> str:
    return (
        str(message.get("value", message.get("content", ""))) if isinstance(message, dict) else str(message)
    )


def draw(results: dict[str, dict[int, dict[str, float]]], title: str, file: Path) -> None:
    """Write the picture: step time and efficiency against ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for engine, by_ranks in results.items():
        for name, look in (("dealt", "-"), ("in order", "--")):
            times = [it[name] for it in by_ranks.values()]
            shares = [it["ideal"] / it[name] for it in by_ranks.values()]
            style = {"color": COLOURS[engine], "linestyle": look, "marker": "o", "markersize": 3}
            left.plot(list(by_ranks), times, label=f"{engine}, {name}", **style)
            right.plot(list(by_ranks), shares, **style)
    left.set(ylabel="seconds of a step (simulated)", ylim=(0, None))
    right.set(ylabel="share of the time that ranks compute", ylim=(0, 1))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("ranks")
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=80)
    pyplot.close(figure)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-70b")
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["zero3", "fsdp"])
    parser.add_argument("--reference", choices=("off", "copy", "none"), help="off with lora, copy with full")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--cutoff", type=int, default=2048)
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--data", nargs="*", type=Path, default=[], help="JSON lists of pairs")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--most", type=int, default=512, help="ranks")
    parser.add_argument("--quick", action="store_true", help="two steps, up to 16 ranks")
    parser.add_argument(
        "--output", type=Path, default=Path("scaling.png"), help="the picture; a .json beside it"
    )
    cluster = parser.add_argument_group("cluster")
    for name, value in vars(Cluster()).items():
        cluster.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()


def _line(engine: str, ranks: int, found: dict[str, float]) -> str:
    shares = [found["ideal"] / found[name] for name in ("dealt", "in order")]
    seconds = "".join(f"{found[name]:9.2f}" for name in ("ideal", "sending", "dealt", "in order"))
    return f"{engine:8}{ranks:6}{found['memory'] / 1e9:9.1f}{seconds}{shares[0]:7.0%}{shares[1]:9.0%}"


def main() -> None:
    """Simulate, print, draw."""
    args = _parse()
    cluster = Cluster(**{name: getattr(args, name) for name in vars(Cluster())})
    rows = read_lengths(args.data, args.cutoff)
    most, steps = (16, 2) if args.quick else (args.most, args.steps)
    reference = args.reference or ("off" if args.tuning == "lora" else "copy")
    lora_rank = args.lora_rank if args.tuning == "lora" else 0
    results: dict[str, dict[int, dict[str, float]]] = {}
    print(f"{'engine':8}{'ranks':>6}{'GB/rank':>9}{'ideal s':>9}{'sending':>9}{'dealt s':>9}{'in order':>9}"
          f"{'eff.':>7}{'in order':>9}")  # fmt: skip
    for engine in args.engines:
        case = Case(
            SHAPES[args.model], engine, lora_rank, args.micro_batch, args.accumulation, reference,
            not args.no_checkpointing,
        )  # fmt: skip
        results[engine] = {}
        for ranks in (2**power for power in range(int(math.log2(most)) + 1)):
            found = results[engine][ranks] = simulate(case, cluster, ranks, rows, steps)
            print(_line(engine, ranks, found), flush=True)
    each = f"{args.micro_batch} x {args.accumulation} pairs for each rank"
    draw(results, f"{args.model}, {args.tuning}: a step of {each}, simulated", args.output)
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
