"""A JSON Schema of the YAML, by which an editor completes and checks keys."""

from __future__ import annotations

import re
from typing import Any

from .describe import readers
from .foreign import FOREIGN, Foreign
from .key import Key
from .schema import KEYS

_REFERENCE = {"type": "string", "pattern": r"\$\{", "description": "${env:NAME} or ${other_key}"}
_NUMBER = r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*"
_YES_NO = {"enum": ["yes", "no", "on", "off"]}


def make_json_schema() -> dict[str, Any]:
    """The schema of draft 2020-12: what each value may be by itself.

    No key is required, since the command line may give it, and rules across keys are not in it.
    """
    properties = {name: _of_key(key) for name, key in KEYS.items()}
    properties |= {name: _of_foreign(row) for name, row in FOREIGN.items() if _is_barred(name, row)}
    mappings = "|".join(re.escape(name) for name, key in KEYS.items() if "dict" in key.types)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "prefkit",
        "description": "A run of prefkit, or the use of a model.",
        "type": "object",
        "properties": properties,
        "patternProperties": {rf"^({mappings})\..+": {"description": "A part of a mapping."}},
        "additionalProperties": False,
    }


def _is_barred(name: str, row: Foreign) -> bool:
    """Whether the row of `FOREIGN` holds where there is a key of that name too."""
    return name not in KEYS or row.verdict == "refuse"


def _of_key(key: Key) -> dict[str, Any]:
    variants: list[dict[str, Any]] = [
        variant for type_name in key.types for variant in _variants(key, type_name)
    ]
    if key.choices:
        variants = [{"enum": list(key.choices)}]
    described: dict[str, Any] = {"description": f"{key.help} Read by {', '.join(readers(key))}."}
    if not key.required:
        variants.append({"type": "null"})
        default = list(key.default) if isinstance(key.default, tuple) else key.default
        described |= {"default": default}
    if {"type": "string"} not in variants:
        variants.append(_REFERENCE)
    return {**described, "anyOf": variants}


def _variants(key: Key, type_name: str) -> list[dict[str, Any]]:
    """What may be written where a value of this type is wanted."""
    number: dict[str, Any] = {"type": "number", **_limits(key)}
    variants: dict[str, list[dict[str, Any]]] = {
        "int": [number | {"type": "integer"}],
        "float": [number],
        "bool": [{"type": "boolean"}, _YES_NO],
        "str": [{"type": "string"}],
        "list": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "numbers": [
            number,
            {"type": "array", "items": {"anyOf": [number, {"type": "string", "pattern": rf"^{_NUMBER}$"}]}},
            {"type": "string", "pattern": rf"^{_NUMBER}(,{_NUMBER})*$"},
        ],
        "dict": [{"type": "object"}],
    }
    return variants[type_name]


def _limits(key: Key) -> dict[str, float]:
    found = {
        "minimum": key.minimum,
        "maximum": key.maximum,
        "exclusiveMinimum": key.above,
        "exclusiveMaximum": key.below,
    }
    return {name: limit for name, limit in found.items() if limit is not None}


def _of_foreign(row: Foreign) -> dict[str, Any]:
    """A key that is not there: anything where it is ignored, else only what switches it off."""
    described: dict[str, Any] = {"description": row.hint, "deprecated": True}
    if row.verdict == "ignore":
        return described
    off = [row.default, None, *([] if row.default is True else [False, "no", "off", "", 0, []])]
    if row.default is True:
        off += ["yes", "on"]
    return {**described, "enum": [value for i, value in enumerate(off) if value not in off[:i]]}
