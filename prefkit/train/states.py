"""Weights and states of the optimiser put together from the parts that processes hold, and taken apart again.

One weight is whole at a time, on its way to the CPU of the process that writes; files are closed when they
have a few GB. What is written does not depend on how many processes there were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prefkit.files import naming
from prefkit.train.strategy import MASTER, Masters, States

STATES = "states.json"  # which file has which tensor
_FILE_BYTES = 4 * 2**30


def gather_weights(masters: Masters, model: nn.Module, keeps: bool) -> States:
    """The weights of a model by name, whole: of an adapter what is trained, of others all. Nothing on a
    process that does not keep them. All processes have to ask for it."""
    kept = model.state_dict().keys()
    only_trained = isinstance(model, PeftModel)
    named = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    found = {}
    for name, weights in named.items():
        if name in kept and (weights.requires_grad or not only_trained):
            whole = masters.whole(weights)
            if keeps:
                found[name] = whole
    return found


def save_states(masters: Masters, trained: Mapping[str, nn.Parameter], folder: Path, writes: bool) -> None:
    """Write the weights that are trained, as the optimiser has them, with its states; `writes` says which
    process does, and all have to call it."""
    files = _Files(folder)
    for name, weights in trained.items():
        states = masters.read_states(weights)
        if writes:
            for kind, tensor in states.items():
                files.add(f"{name}/{kind}", tensor)
    if writes:
        files.close()


def load_states(
    masters: Masters, trained: Mapping[str, nn.Parameter], folder: Path, weights_only: bool = False
) -> None:
    """Take back what `save_states` wrote; `weights_only` leaves the optimiser as it is. All processes have to
    call it. Raises `LookupError` for a weight that is not there."""
    places: dict[str, str] = json.loads((folder / STATES).read_text(encoding="utf-8"))
    kinds: dict[str, list[str]] = {}
    for key in places:
        name, _, kind = key.rpartition("/")
        kinds.setdefault(name, []).append(kind)
    if absent := [name for name in trained if MASTER not in kinds.get(name, ())]:
        raise LookupError(f"{', '.join(absent[:3])} is missing ({len(absent)} in all)")
    with ExitStack() as opened:
        files = {
            name: opened.enter_context(safe_open(str(folder / name), "pt")) for name in {*places.values()}
        }
        for name, weights in trained.items():
            keys = {kind: f"{name}/{kind}" for kind in ([MASTER] if weights_only else kinds[name])}
            states = {kind: files[places[key]].get_tensor(key) for kind, key in keys.items()}
            masters.write_states(weights, states)


class _Files:
    """Files of tensors in a folder, of a few GB each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, str] = {}
        self._tensors: States = {}
        self._bytes = 0
        self._number = 0

    def add(self, key: str, tensor: Tensor) -> None:
        """Take a tensor, and write those that fill a file."""
        self._tensors[key] = tensor.contiguous()
        self._bytes += tensor.nbytes
        if self._bytes >= _FILE_BYTES:
            self._flush()

    def close(self) -> None:
        """Write the rest, and which file has what."""
        self._flush()
        with naming(path := self.folder / STATES):
            path.write_text(json.dumps(self.places, indent=1) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        if not self._tensors:
            return
        self._number += 1
        file = self.folder / f"states-{self._number:05}.safetensors"
        with naming(file):
            save_file(self._tensors, file)
        self.places |= dict.fromkeys(self._tensors, file.name)
        self._tensors, self._bytes = {}, 0
