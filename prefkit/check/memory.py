"""Peak memory of a training by part, from the config of a model and the lengths of its data.

Weights, adapter, reference and optimiser are counted from the tensors that a run makes. Gradients,
activations and logits are those that live at the fullest moment of a rehearsed step (`rehearsal.py`). None of
these has a coefficient. On a CPU come two terms of the process, measured on a random Llama of 4 layers
(`benchmarks/memory_estimate.py --fit` computes them from `benchmarks/results/memory.json`):

- `process`: what libraries and the interpreter take beyond their imports.
- `kept`: freed memory that the C library keeps. Blocks up to 32 MiB come from a heap whose holes are seldom
  filled again. What piles up goes with the activations of all layers, whether checkpointing keeps them or
  not.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from prefkit.check.models import Models
from prefkit.config.errors import UserError
from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import Layout, pack
from prefkit.data.partners import without_partner

if TYPE_CHECKING:
    from transformers import TrainingArguments

PROCESS = 89_000_000  # bytes
KEPT = 0.62  # bytes kept for a byte of activations in blocks up to HEAP_LIMIT
HEAP_LIMIT = 32 * 2**20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX: larger blocks go back to the system


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a training, by part; they add up to `total`."""

    weights: int
    adapter: int
    reference: int
    optimiser: int
    gradients: int
    activations: int
    logits: int
    process: int
    kept: int

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by the name of the part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def estimate_memory(models: Models, args: TrainingArguments, rows: Sequence[TokenizedExample]) -> Estimate:
    """The peak of a training whose largest micro-batch is `rows`, whose images are tokens alone."""
    unseen = [replace(row, images=()) for row in rows]

    def batch() -> dict[str, Any]:
        return pack(unseen, models.layout).to_dict()

    moment = models.rehearsal.run(batch, HEAP_LIMIT)
    is_on_cpu = args.device.type == "cpu"
    spread = moment
    if is_on_cpu and models.rehearsal.checkpointing:
        spread = replace(models.rehearsal, checkpointing=False).run(batch, HEAP_LIMIT)
    return Estimate(
        **models.sizes,
        gradients=moment.gradients,
        activations=moment.activations,
        logits=moment.logits,
        process=PROCESS if is_on_cpu else 0,
        kept=int(KEPT * spread.small) if is_on_cpu else 0,
    )


def largest_batch(
    examples: Iterable[TokenizedExample], number: int, layout: Layout
) -> list[TokenizedExample]:
    """The `number` examples that take most room together: the micro-batch that sets the peak.

    Partners do not count: they leave nothing for the backward.

    >>> from prefkit.data.examples import Pair
    >>> short, long = (TokenizedExample([1], [[2] * n, [3]], (Pair(0, 1),), f"f:{n}") for n in (1, 9))
    >>> [row.source for row in largest_batch([short, long], 1, "shared")]
    ['f:9']
    """
    return heapq.nlargest(number, examples, key=lambda row: batch_tokens([without_partner(row)], layout))


def batch_tokens(examples: Sequence[TokenizedExample], layout: Layout) -> int:
    """Tokens of a micro-batch: prompts once where they are shared, padding included where they are not."""
    if layout == "shared":
        return sum(example.num_tokens for example in examples)
    longest = max(len(ex.prompt_ids) + len(ids) for ex in examples for ids in ex.response_ids)
    return longest * sum(len(example.response_ids) for example in examples)


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Bytes of a size such as 24GB or 16GiB. Raises `UserError` for anything else.

    >>> parse_size("24GB"), parse_size("1.5 GiB")
    (24000000000, 1610612736)
    """
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        size = float(digits) * _UNITS[unit]
    except (ValueError, KeyError):
        raise UserError(f"--memory {text}: write a size such as 24GB or 512MB") from None
    if not (size > 0 and math.isfinite(size)):
        raise UserError(f"--memory {text}: must be more than nothing")
    return int(size)
