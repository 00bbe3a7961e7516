"""What a rule across keys is, and how rules are applied to a config."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import NamedTuple

from .errors import Problem

Rule = Callable[[SimpleNamespace], object]


class Check(NamedTuple):
    """A row: which keys it reads, when it is broken, what to say; a message may name any value, or be made of
    them."""

    name: str
    keys: tuple[str, ...]
    is_broken: Rule
    message: str | Callable[[SimpleNamespace], str]


class Needs(NamedTuple):
    """A key that says something only where `holds`."""

    key: str
    holds: Rule
    condition: str


class Rules(NamedTuple):
    """What one use of a config is held to; it does not read the `unused` of its keys."""

    errors: tuple[Check, ...]
    warnings: tuple[Check, ...]
    needs: tuple[Needs, ...]
    unused: tuple[str, ...] = ()


def is_quantized(v: SimpleNamespace) -> bool:
    """Whether the weights of the model are quantised."""
    return v.quantization_bit is not None


def adds_tokens(v: SimpleNamespace) -> bool:
    """Whether the vocabulary may become another one."""
    return bool(v.resize_vocab or v.add_tokens or v.add_special_tokens)


def is_lora(v: SimpleNamespace) -> bool:
    """Whether an adapter is trained."""
    return v.finetuning_type == "lora"


def find_errors(rules: Rules, values: SimpleNamespace, unknown: Collection[str]) -> list[Problem]:
    """The errors that hold; rows that read a key of `unknown` value are left out."""
    return _find(rules.errors, values, unknown)


def find_warnings(rules: Rules, values: SimpleNamespace, changed: Collection[str]) -> list[str]:
    """What is allowed but hardly meant; `changed` are the keys given with another value than the default."""
    found = [f"{problem.key}: {problem.text}" for problem in _find(rules.warnings, values, ())]
    idle: dict[str, str] = {}  # of several reasons the first is said
    for row in rules.needs:
        if row.key in changed and not row.holds(values):
            idle.setdefault(row.key, row.condition)
    if idle:
        found.append("without effect: " + ", ".join(f"{key} (needs {why})" for key, why in idle.items()))
    return found


def _find(rows: tuple[Check, ...], values: SimpleNamespace, unknown: Collection[str]) -> list[Problem]:
    return [
        Problem(row.keys[0], _say(row, values))
        for row in rows
        if not any(key in unknown for key in row.keys) and row.is_broken(values)
    ]


def _say(row: Check, values: SimpleNamespace) -> str:
    return row.message.format_map(vars(values)) if isinstance(row.message, str) else row.message(values)
