"""Peak memory of a block of code: what torch's allocator gave out, and the resident set of the process."""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# The profiler tells each start and each release of older memory.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

_TAG = "peak memory: tag"


class PeakMemory:
    """The most bytes that torch's CPU allocator had given out at one time within the block.

    Every allocation and release that torch's profiler saw is replayed, so that scratch memory of kernels
    counts, other load on the machine does not, and the code runs as it does unmeasured. What was
    allocated before the block does not count, nor does what a library gets by itself (oneDNN, MKL).
    """

    def __init__(self) -> None:
        self.peak = 0  # bytes
        self.tagged = 0  # bytes, at the peak, of the tensors given to `tag`
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._tagged: set[int] = set()

    def __enter__(self) -> PeakMemory:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        self._replay()

    def tag(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tell these tensors, which live now, apart from others at the peak. Once in a block."""
        self._tagged = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        with record_function(_TAG):
            pass

    def _replay(self) -> None:
        live: dict[int, tuple[int, int]] = {}  # address -> (event, bytes)
        total = peak_at = 0
        tagged: list[tuple[int, int]] = []
        for number, event in enumerate(_events(self._profile)):
            if event.tag != _EventType.Allocation:
                tagged = [live[address] for address in self._tagged if address in live]
                continue
            address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
            if size > 0:
                live[address] = number, size
                total += size
            else:
                total -= live.pop(address, (0, 0))[1]
            if total > self.peak:
                self.peak, peak_at = total, number
        self.tagged = sum(size for number, size in tagged if number <= peak_at)


def _events(profiled: profile) -> list[Any]:
    """Allocations, releases (of negative size) and tags, in order."""
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    found, nodes = [], list(profiled.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.tag == _EventType.Allocation or node.name == _TAG:
            found.append(node)
    return sorted(found, key=lambda node: node.start_time_ns)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages under these tensors, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def tensors_in_memory() -> Iterator[torch.Tensor]:
    """Every tensor that Python can reach, the constants of quantised weights among them."""
    gc.collect()
    return (it for it in gc.get_objects() if issubclass(type(it), torch.Tensor))


def resident_bytes() -> int:
    """Resident set of this process now: libraries, tensors, and freed memory that was not given back."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def restart_resident_peak() -> None:
    """Make `resident_peak` forget what was before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> int:
    """Largest resident set of this process since its start or the last restart, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
