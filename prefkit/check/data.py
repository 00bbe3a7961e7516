"""What the data of a run looks like: lengths, truncation, length bias, duplicates, balance of classes."""

from __future__ import annotations

import math
import statistics
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Clip
from prefkit.data.partners import without_partner

_BINS = 40
_ENOUGH_PAIRS = 20
_SIGMAS = 3.0  # from an even split, before a bias counts as more than chance
_STRONG = 0.15  # and how far from half the share of longer chosen responses must be
_WHOLE = "prompt + longest"


@dataclass(frozen=True)
class Lengths:
    """Tokens of one kind of part in a data set, and how many fall in each bin of `0..DataSummary.limit`."""

    smallest: int
    median: float
    mean: float
    p95: int
    largest: int
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class LengthBias:
    """How the lengths of chosen and rejected compare over `pairs` pairs.

    `longer` is the share of pairs whose chosen response is the longer one, ties counting half;
    `difference` the mean of chosen less rejected, in tokens.
    """

    pairs: int
    longer: float
    difference: float

    @property
    def is_strong(self) -> bool:
        """Whether it is far from even, and too far for chance."""
        off = abs(self.longer - 0.5)
        return self.pairs >= _ENOUGH_PAIRS and off > max(_STRONG, _SIGMAS * 0.5 / math.sqrt(self.pairs))


@dataclass(frozen=True)
class Images:
    """Images and videos of the rows, how many rows have any, and the tokens that are places for them."""

    images: int
    videos: int
    rows: int
    tokens: int

    @property
    def mean(self) -> float:
        """Tokens of an image or video on average."""
        return self.tokens / (self.images + self.videos)


@dataclass(frozen=True)
class Duplicates:
    """Rows whose prompt, images included, or whose whole was there before, and held-out prompts that are also
    trained on."""

    prompts: int
    rows: int
    leaked: int


@dataclass(frozen=True)
class Balance:
    """Desirable and undesirable responses, and weights that balance them."""

    desirable: int
    undesirable: int

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of desirable and undesirable with (w_D n_D) / (w_U n_U) between 1 and 4/3, section 4.2 of
        https://arxiv.org/abs/2402.01306; the smaller side is weighed up.

        >>> Balance(100, 100).weights, Balance(10, 40).weights, Balance(40, 10).weights
        ((1.0, 1.0), (4.0, 1.0), (1.0, 3.0))
        """
        if not (self.desirable and self.undesirable):
            return 1.0, 1.0
        ratio = self.desirable / self.undesirable
        if ratio < 1:
            return round(1 / ratio, 4), 1.0
        return 1.0, round(ratio * 3 / 4, 4) if ratio > 4 / 3 else 1.0


@dataclass(frozen=True)
class DataSummary:
    """One data set: its examples by length and kind; histograms end at `limit`, which is cutoff_len, or less
    where all is much shorter."""

    name: str
    cutoff_len: int
    limit: int
    examples: int
    truncated: int
    lengths: dict[str, Lengths]
    bias: LengthBias | None
    balance: Balance | None


class Summary:
    """Gathers a `DataSummary`, example by example; only lengths are kept."""

    def __init__(self, name: str, cutoff_len: int) -> None:
        self.name = name
        self.cutoff_len = cutoff_len
        self._examples = self._truncated = 0
        self._tokens: dict[str, array[int]] = defaultdict(lambda: array("q"))
        self._pairs: list[tuple[int, int]] = []
        self._judged: Counter[str] = Counter()

    def add(self, example: TokenizedExample) -> None:
        """Take in an example."""
        self._examples += 1
        self._truncated += example.truncated
        sizes = [len(ids) for ids in example.response_ids]
        self._tokens["prompt"].append(len(example.prompt_ids))
        for size, kind in zip(sizes, kinds_of(example), strict=True):
            self._tokens[kind].append(size)
            self._judged[kind] += 1
        self._tokens[_WHOLE].append(len(example.prompt_ids) + max(sizes, default=0))
        self._pairs += [(sizes[chosen], sizes[rejected]) for chosen, rejected in pairs_of(example)]

    def finish(self) -> DataSummary:
        """What all examples look like."""
        tokens, judged = self._tokens, self._judged
        order = (
            "prompt",
            "chosen",
            "rejected",
            "ranked",
            "desirable",
            "undesirable",
            "partner",
            "response",
            _WHOLE,
        )
        longest = max(tokens[_WHOLE], default=0)
        limit = self.cutoff_len if 2 * longest > self.cutoff_len else longest
        counts = (judged["desirable"], judged["undesirable"])
        return DataSummary(
            self.name,
            self.cutoff_len,
            limit,
            self._examples,
            self._truncated,
            {kind: _describe(tokens[kind], limit) for kind in order if tokens[kind]},
            _bias(self._pairs),
            Balance(*counts) if any(counts) else None,
        )


def summarize(name: str, examples: Iterable[TokenizedExample], cutoff_len: int) -> DataSummary:
    """What a data set looks like."""
    summary = Summary(name, cutoff_len)
    for example in examples:
        summary.add(example)
    return summary.finish()


def pairs_of(example: TokenizedExample) -> list[tuple[int, int]]:
    """(chosen, rejected) of each pair, by index of the response."""
    return [(pair.chosen, pair.rejected) for pair in example.pairs]


def kinds_of(example: TokenizedExample) -> list[str]:
    """What each response is: as it is labelled, else by its place in a pair."""
    if example.labels:
        return list(example.labels)
    kinds = ["response"] * len(example.response_ids)
    for chosen, rejected in pairs_of(example):
        kinds[chosen], kinds[rejected] = "chosen", "rejected"
    return kinds


def count_images(examples: Iterable[TokenizedExample], seen: Collection[int]) -> Images | None:
    """The images and videos of examples, whose tokens are among `seen`; None where there are none.

    >>> from prefkit.data.examples import StoredImage
    >>> picture = StoredImage("a.png", b"", "", 8, 8)
    >>> count_images([TokenizedExample([1, 9, 9, 2], [], (), "f:1", images=(picture,))], {9})
    Images(images=1, videos=0, rows=1, tokens=2)
    """
    images = videos = rows = tokens = 0
    for example in examples:
        if not example.images:
            continue
        clips = sum(isinstance(it, Clip) for it in example.images)
        images, videos, rows = images + len(example.images) - clips, videos + clips, rows + 1
        tokens += sum(token in seen for token in example.prompt_ids)
    return Images(images, videos, rows, tokens) if rows else None


def find_duplicates(train: Iterable[TokenizedExample], held_out: Iterable[TokenizedExample]) -> Duplicates:
    """Duplicates within each part, and prompts that are in both."""
    counts = Counter[str]()
    seen = [_prompts(train, counts), _prompts(held_out, counts)]
    return Duplicates(counts["prompts"], counts["rows"], len(seen[0] & seen[1]))


def _prompts(examples: Iterable[TokenizedExample], counts: Counter[str]) -> set[int]:
    prompts: set[int] = set()
    rows: set[str] = set()
    for example in examples:
        counts["prompts"] += example.prompt_key in prompts
        row = without_partner(example).key
        counts["rows"] += row in rows
        prompts.add(example.prompt_key)
        rows.add(row)
    return prompts


def _describe(sizes: Sequence[int], limit: int) -> Lengths:
    ordered = sorted(sizes)
    bins = Counter(min(size * _BINS // (limit + 1), _BINS - 1) for size in ordered)
    return Lengths(
        ordered[0],
        statistics.median(ordered),
        round(statistics.fmean(ordered), 1),
        ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)],
        ordered[-1],
        tuple(bins[i] for i in range(_BINS)),
    )


def _bias(pairs: Sequence[tuple[int, int]]) -> LengthBias | None:
    if not pairs:
        return None
    longer = sum(1.0 if c > r else 0.5 if c == r else 0.0 for c, r in pairs) / len(pairs)
    return LengthBias(len(pairs), round(longer, 4), round(sum(c - r for c, r in pairs) / len(pairs), 2))


def as_dict(summary: DataSummary) -> dict[str, Any]:
    """The summary as JSON."""
    bias, balance = summary.bias, summary.balance
    return {
        "name": summary.name,
        "examples": summary.examples,
        "truncated": summary.truncated,
        "truncated_share": round(summary.truncated / summary.examples, 4) if summary.examples else 0.0,
        "cutoff_len": summary.cutoff_len,
        "histogram_end": summary.limit,
        "lengths": {
            kind: {
                "min": it.smallest, "median": it.median, "mean": it.mean, "p95": it.p95, "max": it.largest,
                "histogram": list(it.histogram),
            }
            for kind, it in summary.lengths.items()
        },
        "length_bias": bias and {
            "pairs": bias.pairs, "chosen_longer": bias.longer, "mean_difference": bias.difference,
            "strong": bias.is_strong,
        },
        "kto_balance": balance and {
            "desirable": balance.desirable, "undesirable": balance.undesirable,
            "kto_chosen_weight": balance.weights[0], "kto_rejected_weight": balance.weights[1],
        },
    }  # fmt: skip
