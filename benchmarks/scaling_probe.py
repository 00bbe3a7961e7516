"""What a step of a run among several processes sends and holds, watched from within each process."""

from __future__ import annotations

import ctypes
import gc
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from prefkit.train import run
from prefkit.train.trainer import PrefTrainer

# Which argument of an operation holds what is whole on each rank, and how often a rank of a ring sends it,
# times (N - 1) / N.
_COLLECTIVES = {
    "allreduce_": ("all-reduce", 0, 2),
    "allreduce_coalesced_": ("all-reduce", 0, 2),
    "_allgather_base_": ("all-gather", 0, 1),
    "allgather_into_tensor_coalesced_": ("all-gather", 0, 1),
    "allgather_": ("all-gather", 0, 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1, 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1, 1),
    "reduce_scatter_": ("reduce-scatter", 1, 1),
    "broadcast_": ("broadcast", 0, 1),
    "reduce_": ("reduce", 0, 1),
}
_NAMESPACE, _FUNCTIONAL = "c10d", "_c10d_functional"
_NO_COLLECTIVES = ("barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")
_FUNCTIONS = {"all_reduce": ("all-reduce", 2), "all_gather_into_tensor": ("all-gather", 1)}


class Traffic(TorchDispatchMode):
    """Within it, bytes that a rank of a ring would send are counted by collective, divided by (N - 1) / N."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.sent: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(it, DTensor) for it in types):
            return NotImplemented  # it is asked again for what lies below
        namespace, _, name = func._schema.name.partition("::")
        if namespace == _NAMESPACE and name in _COLLECTIVES:
            kind, place, times = _COLLECTIVES[name]
            self.sent[kind] += times * _bytes_of(args[place])
        elif namespace == _FUNCTIONAL and name in _FUNCTIONS:
            kind, times = _FUNCTIONS[name]
            grows = self.ranks if kind == "all-gather" else 1
            self.sent[kind] += times * grows * _bytes_of(args[0])
        elif namespace in (_NAMESPACE, _FUNCTIONAL) and name not in _NO_COLLECTIVES:
            raise NotImplementedError(f"{func}: how much it sends is not known here")
        return func(*args, **(kwargs or {}))


def _bytes_of(value: Any) -> int:
    return sum(it.nbytes for it in tree_leaves(value) if isinstance(it, torch.Tensor))


_LIBC = ctypes.CDLL(None)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h


def return_what_is_freed() -> None:
    """Let the C library keep no memory that was freed, so that what is resident is what is held."""
    for name, value in ((_MMAP_THRESHOLD, 1 << 14), (_TRIM_THRESHOLD, 1 << 14), (_ARENA_MAX, 1)):
        _LIBC.mallopt(name, value)


def resident() -> tuple[int, int]:
    """(bytes of this process that are resident now, the most that were since `forget_peak`)."""
    gc.collect()
    _LIBC.malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {name: line.split() for name, _, line in (it.partition(":") for it in lines)}
    return 1024 * int(found["VmRSS"][0]), 1024 * int(found["VmHWM"][0])


def forget_peak() -> None:
    """Let the peak of `resident` be what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def bytes_of_tensors() -> int:
    """Bytes of all tensors that Python knows, memory that several share once."""
    found = {}
    for it in gc.get_objects():
        if issubclass(type(it), torch.Tensor) and not isinstance(it, DTensor | FakeTensor):
            storage = it.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


class Watch(TrainerCallback):
    """Writes down what a step sends and holds, from its first micro-batch to that of the next."""

    def __init__(self, trainer: PrefTrainer, before: int) -> None:
        self.trainer, self.before = trainer, before
        self.traffic = Traffic(trainer.args.world_size)
        self.steps: list[dict[str, Any]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Between two steps."""
        now, _ = resident()
        self.held, self.tensors = now - self.before, bytes_of_tensors()
        self.sent = dict(self.traffic.sent)
        forget_peak()
        self.from_here = resident()[1] - now

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The update is done."""
        sent = {kind: n - self.sent.get(kind, 0) for kind, n in self.traffic.sent.items()}
        _, most = resident()
        self.steps.append(
            {
                "sent": {kind: n for kind, n in sent.items() if n},
                "tensors": self.tensors,
                "held": self.held,
                "peak": most - self.from_here - self.before,
            }
        )


def watch(file: Path) -> None:
    """Let the next run of this process write what each of its steps sends and holds to a file."""
    return_what_is_freed()
    build, train, before = run.build_policy, PrefTrainer.train, []

    def build_policy(*args: Any, **kwargs: Any) -> Any:
        before.append(resident()[0])
        return build(*args, **kwargs)

    def watched(trainer: PrefTrainer, *args: Any, **kwargs: Any) -> Any:
        watch = Watch(trainer, before[0])
        trainer.add_callback(watch)
        with watch.traffic:
            result = train(trainer, *args, **kwargs)
        file.write_text(json.dumps(watch.steps))
        return result

    run.build_policy, PrefTrainer.train = build_policy, watched  # type: ignore[method-assign]
