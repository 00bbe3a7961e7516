"""The folders of checkpoints: which are whole, how one comes to be, and how old ones go.

`checkpoint-N` exists only when it is whole. It is written as `.saving-N`, closed by a manifest of sizes and
sha256 sums, forced to disk, read again and only then renamed, so that a kill, a power cut, a full or a faulty
disk leaves the older ones as they were.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from prefkit.config.errors import UserError
from prefkit.files import describe, forget_cached, fsync, naming

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LEFTOVER = re.compile(r"\.saving-\d+|\.old-(checkpoint-\d+)(-deleted)?")
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
UNUSABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)


class CheckpointError(UserError):
    """A checkpoint cannot be saved or resumed from; the message names the folder and the file."""


def find_newest_checkpoint(
    output_dir: str | Path, report: Callable[[str, str], None] | None = None
) -> Path | None:
    """The whole `checkpoint-N` with the highest N, or None; every file of it is read and verified.

    `report(name, reason)` is called for each newer one that is passed over, by default to log a warning.
    Call `remove_leftovers` first: it can bring a checkpoint back.
    """
    report = report or (lambda name, reason: logger.warning("%s is passed over: %s", name, reason))
    for checkpoint in reversed(_checkpoints(Path(output_dir))):
        try:
            verify_checkpoint(checkpoint)
        except CheckpointError as error:
            report(checkpoint.name, str(error))
        else:
            return checkpoint
    return None


def verify_checkpoint(checkpoint: str | Path) -> None:
    """Compare a checkpoint with its manifest.

    Raises CheckpointError if it holds a pickle or weights the manifest does not know, has no manifest, or
    if a file is missing or not what was saved.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a folder")
    found = _files(checkpoint)
    if MANIFEST not in found:
        raise CheckpointError(f"{checkpoint} has no {MANIFEST}: its save did not end, or it is none of ours")
    with blame(checkpoint / MANIFEST):
        listed = read_json(checkpoint / MANIFEST)["files"]
        for name, entry in listed.items():
            if name not in found or describe(checkpoint / name) != entry:
                state = "was changed after it was saved" if name in found else "is missing"
                raise CheckpointError(f"{checkpoint}: {name} {state}")
    for name in found:
        if name.endswith(".safetensors") and name not in listed:
            raise CheckpointError(f"{checkpoint}: {name} is not in its {MANIFEST}")


def remove_leftovers(output_dir: str | Path) -> list[str]:
    """Clear what a killed save left behind and return the names; call it before a run looks for checkpoints.

    `.saving-N` is half a save, `.old-checkpoint-N` half a deletion. But where `checkpoint-N` is absent the
    latter is whole: its replacement never came, and it gets its name back.
    """
    leftovers = [match for path in Path(output_dir).glob(".*") if (match := LEFTOVER.fullmatch(path.name))]
    for name, checkpoint, deleted in ((match[0], match[1], match[2]) for match in leftovers):
        if checkpoint and not deleted and not Path(output_dir, checkpoint).exists():
            Path(output_dir, name).rename(Path(output_dir, checkpoint))
        else:
            shutil.rmtree(Path(output_dir, name))
    return sorted(match[0] for match in leftovers)


def _checkpoints(output_dir: Path) -> list[Path]:
    """Every `checkpoint-N`, whole or not, by rising N."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def _files(folder: Path) -> list[str]:
    """Names of all files in a folder and below. Raises CheckpointError if one of them may be a pickle."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if pickles := [path for path in files if path.suffix.lower() in PICKLES]:
        hint = "Resume from a checkpoint that prefkit saved, or start from the safetensors weights alone"
        raise CheckpointError(f"{pickles[0]} may be a pickle, which can run code, and is not opened. {hint}")
    return [path.relative_to(folder).as_posix() for path in files]


def publish(staging: Path, final: Path) -> None:
    """Turn the finished folder `staging` into `final`: manifest, fsync, read again, rename.

    Raises OSError when the disk gives back something else than it was given.
    """
    listed = {name: describe(staging / name) for name in _files(staging)}
    write_json(staging / MANIFEST, {"files": listed})
    for path in [*staging.rglob("*"), staging]:
        fsync(path)
        if path.is_file():
            forget_cached(path)
    try:
        verify_checkpoint(staging)
    except CheckpointError as error:
        raise OSError(errno.EIO, f"the disk did not keep what was written ({error})", str(final)) from error
    old = _set_aside(final)  # a folder is not replaced in one step; remove_leftovers undoes this half
    staging.rename(final)
    fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, keep: set[str]) -> None:
    """Delete the checkpoints saved first until `limit` are left, never one in `keep`."""
    checkpoints = sorted(_checkpoints(output_dir), key=lambda path: path.stat().st_mtime_ns)
    surplus = len(checkpoints) - limit if limit and limit > 0 else 0
    for checkpoint in [path for path in checkpoints if path.name not in keep][: max(surplus, 0)]:
        aside = _set_aside(checkpoint, "-deleted")
        fsync(output_dir)  # or a power cut could leave the old name on half a checkpoint
        shutil.rmtree(aside, ignore_errors=True)


def _set_aside(checkpoint: Path, suffix: str = "") -> Path:
    aside = checkpoint.with_name(f".old-{checkpoint.name}{suffix}")
    shutil.rmtree(aside, ignore_errors=True)
    if checkpoint.exists():
        checkpoint.rename(aside)
    return aside


@contextmanager
def blame(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong with the file `path` into a CheckpointError that names it."""
    try:
        yield
    except UNUSABLE as error:
        raise CheckpointError(f"{path.parent}: {path.name}: {type(error).__name__}: {error}") from error


def _pack(value: Any, tensors: dict[str, Tensor] | None = None, key: str = "") -> Any:
    """`value` for JSON: tuples are marked, tensors move to `tensors` under the path that leads to them.

    >>> _pack({"0": {"betas": (0.9, 0.999), "step": Tensor([3.0])}}, {})
    {'0': {'betas': {'__tuple__': [0.9, 0.999]}, 'step': {'__tensor__': '0/step'}}}
    """
    if isinstance(value, Tensor) and tensors is not None:
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"__tensor__": key}
    if isinstance(value, (tuple, list)):
        items = [_pack(item, tensors, f"{key}/{index}") for index, item in enumerate(value)]
        return {"__tuple__": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        if odd := [name for name in value if not isinstance(name, str)]:
            raise TypeError(f"JSON would turn the key {odd[0]!r} into a string")
        return {name: _pack(item, tensors, f"{key}/{name}".lstrip("/")) for name, item in value.items()}
    return value


def write_json(path: Path, value: Any, tensors: dict[str, Tensor] | None = None) -> None:
    with naming(path), blame(path):
        path.write_text(json.dumps(_pack(value, tensors), allow_nan=False, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path, tensors: dict[str, Tensor] | None = None) -> Any:
    def unpack(value: dict[str, Any]) -> Any:
        if value.keys() == {"__tuple__"}:
            return tuple(value["__tuple__"])
        if value.keys() == {"__tensor__"}:
            return (tensors or {})[value["__tensor__"]]
        return value

    with blame(path):
        return json.loads(path.read_text(encoding="utf-8"), object_hook=unpack)
