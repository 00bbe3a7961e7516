"""Which weights are these? A name for the contents of a model or adapter folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from prefkit.model.errors import ModelError

# Blocks of 1 MB that are read of one file: a file of up to 1 GB is read whole, a larger one at equal
# distances, which any training of it changes somewhere.
_BLOCK, _BLOCKS = 1 << 20, 1024
# What a config says of itself and not of the weights.
_INCIDENTAL = {
    *("_name_or_path", "transformers_version"),
    *("base_model_name_or_path", "inference_mode", "peft_version"),
}


def fingerprint(folder: Path) -> str:
    """sha256, in hex, of the weights and the config in a folder, whatever the folder's own name.

    Raises `ModelError` when there are no weights.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no safetensors weights")
    digest = hashlib.sha256()
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            digest.update(_config_text(folder / name).encode())
    for file in files:
        digest.update(file.name.encode())
        _add_file(digest, file)
    return digest.hexdigest()


def _config_text(file: Path) -> str:
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is damaged: {error}") from error
    kept = {key: _sorted(value) for key, value in config.items() if key not in _INCIDENTAL}
    return json.dumps(kept, sort_keys=True)


def _sorted(value: Any) -> Any:
    """A list of names in alphabetical order: peft writes sets."""
    names = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return sorted(value) if names else value


def _add_file(digest: Any, file: Path) -> None:
    size = file.stat().st_size
    digest.update(str(size).encode())
    number = -(-size // _BLOCK)
    with file.open("rb") as stream:
        for i in range(min(number, _BLOCKS)):
            stream.seek(i * number // min(number, _BLOCKS) * _BLOCK)
            digest.update(stream.read(_BLOCK))
