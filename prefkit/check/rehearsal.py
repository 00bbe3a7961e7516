"""A training step without numbers: the code of a run on tensors that have shapes alone.

torch's fake tensors run every operation for its shapes and number formats. What is written down is each block
of memory that torch's allocator would give out and when it would come back, so that nothing about an
architecture, an adapter or mixed precision has to be known beforehand.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefkit.model.adapter import base_of
from prefkit.model.attention import forget_masks
from prefkit.model.policy import LogpsOf, response_logps
from prefkit.model.reward import is_reward_model, response_scores

Batch = dict[str, Any]
# Of these, exp(x - max) stands beside the input while the kernel works; torch tells nobody of it.
_COPIES_ITS_INPUT = {torch.ops.aten.logsumexp.default}


class Block(NamedTuple):
    """A block of memory: its number, its bytes, and whether logits lie in it."""

    number: int
    size: int
    is_logits: bool


@dataclass(frozen=True)
class Moment:
    """The blocks that live when a step holds most. Sizes are bytes."""

    gradients: int = 0
    logits: int = 0
    activations: int = 0
    small: int = 0  # activations and logits in blocks up to the limit that was asked for

    @property
    def total(self) -> int:
        """All of them."""
        return self.gradients + self.logits + self.activations


class Recorder(TorchDispatchMode):
    """Writes down each block that an operation makes and the moment when it dies."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.changes: list[tuple[Block, int]] = []  # (block, 1 or -1), in order
        self._known: dict[int, int] = {}  # storages that live -> number
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _COPIES_ITS_INPUT:
            block = self._block(args[0].untyped_storage().nbytes(), args[0])
            self.changes += [(block, 1), (block, -1)]
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._meet(leaf)
        return output

    def pass_over(self, tensors: Iterable[Tensor]) -> None:
        """Tensors from before the step: they are not written down."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()._cdata] = -1

    def numbers(self, tensors: Iterable[Tensor | None]) -> set[int]:
        """The blocks of tensors that live."""
        return {self._known[it.untyped_storage()._cdata] for it in tensors if it is not None}

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        block = self._block(storage.nbytes(), tensor)
        self._known[storage._cdata] = block.number
        self.changes.append((block, 1))
        weakref.finalize(storage, self._release, storage._cdata, block)

    def _block(self, size: int, tensor: Tensor) -> Block:
        self._count += 1
        return Block(self._count, size, tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary)

    def _release(self, storage: int, block: Block) -> None:
        if self._known.pop(storage, None) is not None:
            self.changes.append((block, -1))


def fullest_moment(changes: Sequence[tuple[Block, int]], gradients: set[int], limit: int) -> Moment:
    """What lives when the sum is largest; `limit` bounds the blocks that count as small."""
    total = largest = position = 0
    for number, (block, sign) in enumerate(changes):
        total += sign * block.size
        if total > largest:
            largest, position = total, number + 1
    live: set[Block] = set()
    for block, sign in changes[:position]:
        live.add(block) if sign > 0 else live.discard(block)
    own = [block for block in live if block.number not in gradients]
    return Moment(
        gradients=sum(block.size for block in live if block.number in gradients),
        logits=sum(block.size for block in own if block.is_logits),
        activations=sum(block.size for block in own if not block.is_logits),
        small=sum(block.size for block in own if block.size <= limit),
    )


@contextmanager
def without_numbers(*models: nn.Module | None) -> Iterator[None]:
    """Within the block tensors have no numbers; the weights of `models`, made on torch's meta device, take
    places on the CPU."""
    # Masks are kept between calls: neither real ones nor those without numbers may cross the border.
    forget_masks()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for model in models:
                if model is not None:
                    _place(model)
            yield
    finally:
        forget_masks()


def _place(model: nn.Module) -> None:
    """Put tensors on the CPU in place of those on the meta device; what was shared stays shared."""
    placed: dict[int, tuple[Tensor, Tensor]] = {}  # the old one is held, so that its id stays its own
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in placed:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, nn.Parameter)
                    new = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
                    placed[id(tensor)] = tensor, new
                tensors[name] = placed[id(tensor)][1]  # type: ignore[assignment]


@dataclass(frozen=True)
class Rehearsal:
    """The models of a step, on the meta device, and how it runs.

    `reference` is None where the policy with its adapter off is it, or where nothing is computed;
    `policy_logps` computes the policy's log-probs; `reads_reference` says that the forward of the reference
    happens in the step. `dtype` is that of mixed precision.
    """

    policy: nn.Module
    policy_logps: LogpsOf
    reference: nn.Module | None
    reads_reference: bool
    dtype: torch.dtype | None
    checkpointing: bool
    accumulates: bool
    learns: bool

    def run(self, batch: Callable[[], Batch], limit: int) -> Moment:
        """The fullest moment of a step on a batch, blocks up to `limit` bytes counted as small ones.

        Where gradients are accumulated, the second micro-batch finds those of the first.
        """
        policy, reference = copy.deepcopy((self.policy, self.reference))
        base: Any = base_of(policy)
        with without_numbers(policy, reference):
            policy.train(self.learns)
            if self.checkpointing:
                base.activation_checkpointing_enable({"use_reentrant": False})
            recorder = Recorder(base.config.get_text_config().vocab_size)
            recorder.pass_over(_tensors(policy))
            if reference is not None:
                recorder.pass_over(_tensors(reference))
            with recorder:
                for _ in range(2 if self.accumulates else 1):
                    self._step(policy, reference, batch())
                gradients = recorder.numbers(weights.grad for weights in policy.parameters())
        return fullest_moment(recorder.changes, gradients, limit)

    def _step(self, policy: Any, second: nn.Module | None, batch: Batch) -> None:
        with self._autocast(), nullcontext() if self.learns else torch.no_grad():
            if is_reward_model(base_of(policy)):
                logps = response_scores(policy, batch)
            else:
                logps = self.policy_logps(policy, batch).logps
        if self.reads_reference:
            model = policy if second is None else second
            off = policy.disable_adapter() if second is None else nullcontext()
            with torch.no_grad(), self._autocast(), off:
                reference = response_logps(model, batch).logps
            logps = logps - reference
        if self.learns:
            logps.sum().backward()

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype is None else torch.autocast("cpu", self.dtype)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
