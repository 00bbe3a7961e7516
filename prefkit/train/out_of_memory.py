"""What happens when memory runs out: a batch is computed in pieces, or the run ends with advice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import TrainingArguments

from prefkit.config.errors import UserError, show
from prefkit.config.savings import savings
from prefkit.config.schema import RunConfig
from prefkit.data.splitting import Batch, split
from prefkit.model.reference import FrozenModel, Reference

T = TypeVar("T")
# What torch says besides the messages that accelerate knows.
_SAID = ("not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_SHOWN_ROWS = 8


class OutOfMemory(UserError):
    """Memory does not suffice, and smaller pieces do not help."""

    of_one_rank = True


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, of the accelerator or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


@contextmanager
def naming_memory_faults(config: RunConfig, args: TrainingArguments) -> Iterator[None]:
    """Turn what says that memory ran out elsewhere, as in loading a model, into an `OutOfMemory`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        ways = Pieces(config, args, None, lambda text: None).advise()
        raise OutOfMemory(f"Out of memory outside of the steps, as in loading a model. {ways}") from error


@dataclass
class Pieces:
    """The pieces that batches are computed in: `number` for each, 1 until memory runs out, or as many as it
    has examples. `say` tells the user of a change, `learns` whether batches are trained on.

    The number stays: what did not fit once does not fit again, and a resumed run computes the same bits.
    """

    config: RunConfig
    args: TrainingArguments
    reference: Reference | None
    say: Callable[[str], None]
    learns: bool = True
    number: int = 1
    _in_hand: Batch = field(default_factory=dict, init=False)

    def cut(self, batch: Batch) -> list[Batch]:
        """The pieces of a packed batch."""
        self._in_hand = batch
        return split(batch, self.number)

    def each(self, pieces: Iterable[Batch]) -> Iterator[Batch]:
        """The pieces one by one, so that the one that does not fit is known."""
        for piece in pieces:
            self._in_hand = piece
            yield piece

    def fit(self, attempt: Callable[[], T], undo: Callable[[], None], when: str) -> T:
        """What `attempt` gives, which computes `each` of the pieces it `cut`.

        When memory runs out, `undo` takes back what was done, and all is done again in twice as many pieces.
        Raises `OutOfMemory` when a single example does not fit, or where nothing can be done again: among
        several processes, which wait for each other. Other errors pass.
        """
        while True:
            try:
                return attempt()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self._obstacle() or len(self._in_hand["rows"]) == 1:
                    raise OutOfMemory(self._refuse(when)) from error
            # Not within the block above, since its error holds the tensors of the attempt.
            undo()
            _release()
            self.number *= 2
            self.say(
                f"{when}: out of memory; {'micro-batches' if self.learns else 'batches'} are now computed in "
                f"{self.number} pieces, with {self._sameness()}"
            )

    def _sameness(self) -> str:
        if not self.learns:
            return "the same results"
        if self.config.model.moe_aux_loss_coef:
            return "the same gradients but for those of the router loss, which is taken over each piece"
        return "the same gradients"

    def _obstacle(self) -> str | None:
        """Why a batch that failed cannot be computed again, if so."""
        if AcceleratorState().distributed_type != DistributedType.NO:
            return "other processes, or an engine, are in the midst of the same step"
        optimizer = self.args.optim
        if self.learns and ("lomo" in optimizer or "layerwise" in optimizer):
            return "this optimiser updates weights in the midst of a backward"
        return None

    def _refuse(self, when: str) -> str:
        rows = self._in_hand["rows"]
        total, longest = _count_tokens(self._in_hand)
        obstacle = self._obstacle()
        more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
        rank = f", process {self.args.process_index}" if self.args.world_size > 1 else ""
        what = "a single row does not fit" if len(rows) == 1 else f"{len(rows)} rows do not fit together"
        why = f" Smaller pieces cannot be tried: {obstacle}." if obstacle else ""
        return (
            f"{when}{rank}: out of memory: {what}: {', '.join(rows[:_SHOWN_ROWS])}{more} ({total:,} tokens, "
            f"the longest prompt with a response {longest:,}).{why} {self.advise(len(rows), longest)}"
        )

    def advise(self, num_rows: int = 1, longest: int | None = None) -> str:
        """The ways out, cheapest first, as keys to write; `longest` is the length of a row that did not fit
        among `num_rows`."""
        ways = []
        for keys, cost in savings(self.config):
            if self._helps(keys, num_rows):
                spelled = (f"{name}: {show(name, value)}" for name, value in self._spell(keys, longest))
                ways.append(f"  {', '.join(spelled)}  ({cost})")
        kept = (
            "\nCheckpoints are whole: the same command goes on from the last one. With other keys it is "
            "another run, which begins anew."
        )
        return "\n".join(
            [
                "What helps, the cheapest first:",
                *ways,
                "`prefkit check FILE --memory 24GB` tells what would fit into 24 GB.",
            ]
        ) + (kept if self.learns else "")

    def _helps(self, keys: dict[str, Any], num_rows: int) -> bool:
        """Whether a change would save memory where it ran out."""
        if "ref_cache" in keys:
            return isinstance(self.reference, FrozenModel)
        if "disable_gradient_checkpointing" in keys:
            return self.learns and not self.args.activation_checkpointing
        if "per_device_train_batch_size" in keys:
            return self.learns and num_rows > 1
        return self.learns or "finetuning_type" not in keys

    def _spell(self, keys: dict[str, Any], longest: int | None) -> Iterator[tuple[str, Any]]:
        for name, value in keys.items():
            if name == "disable_gradient_checkpointing" and self.config.value(name) is None:
                yield "gradient_checkpointing", True
            elif name == "cutoff_len" and longest is not None:
                yield name, min(value, longest // 2)
            else:
                yield name, value


def _release() -> None:
    """Give back the memory of a failed attempt, but for what still refers to it."""
    # What waited in autograd's queue when a backward failed stays there until the thread's next backward.
    with torch.enable_grad():
        torch.zeros((), requires_grad=True).sum().backward()
    clear_device_cache(garbage_collection=True)


def _count_tokens(batch: Batch) -> tuple[int, int]:
    """Tokens that a batch computes, and those of its longest prompt with a response."""
    if batch["attention_mask"] is not None:
        lengths = batch["attention_mask"].sum(1)
        return int(lengths.sum()), int(lengths.max())
    longest = max(
        stop - start + max((last - first for first, last in responses), default=0)
        for start, stop, responses in batch["segments"]
    )
    return batch["input_ids"].numel(), longest
