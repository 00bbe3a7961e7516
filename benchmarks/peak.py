"""Peak memory of tensors, counted operation by operation, and resident memory as the system sees it."""

from __future__ import annotations

import gc
import resource
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors that operations in the block made and that lived at one time.

    A storage counts once, however many tensors view it, from the operation that makes it to its release.
    Other load on the machine changes nothing. Tensors from before the block and what a kernel allocates and
    frees within one operation are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.clock = self.peak_at = 0  # operations so far, and those when the peak was reached
        self._births: dict[int, tuple[int, int]] = {}  # storage -> (clock, bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage(x)._cdata for x in _tensors_of((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self.clock += 1
        for tensor in _tensors_of(result):
            storage = _storage(tensor)
            key = storage._cdata
            if key not in before and key not in self._births:
                self._births[key] = (self.clock, storage.nbytes())
                self.live += storage.nbytes()
                weakref.finalize(storage, self._forget, key).atexit = False
        if self.live > self.peak:
            self.peak, self.peak_at = self.live, self.clock
        return result

    def _forget(self, key: int) -> None:
        self.live -= self._births.pop(key)[1]

    def restart(self) -> None:
        """Look for the peak from here on."""
        self.peak, self.peak_at = self.live, self.clock

    def births(self, tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
        """(clock when it was made, bytes) of each storage under these tensors that was made in the block."""
        keys = {_storage(tensor)._cdata for tensor in tensors}
        return [self._births[key] for key in keys if key in self._births]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages under these tensors, each counted once."""
    return sum({_storage(x)._cdata: _storage(x).nbytes() for x in tensors}.values())


def tensors_in_memory() -> list[torch.Tensor]:
    """Every tensor that Python can reach, constants of quantised weights among them."""
    gc.collect()
    return [it for it in gc.get_objects() if issubclass(type(it), torch.Tensor)]


def resident_bytes() -> int:
    """Resident set of this process now: libraries, tensors, and freed memory that was not given back."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def restart_resident_peak() -> None:
    """Make `resident_peak` forget what was before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> int:
    """Largest resident set of this process since the start or the last restart, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))


def _storage(tensor: torch.Tensor) -> Any:
    return tensor.untyped_storage()
