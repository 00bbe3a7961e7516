"""A value as written -> the value a key wants, or what to write instead."""

from __future__ import annotations

import math
import re
from typing import Any

from .errors import is_secret, looks_secret, show
from .key import Key
from .source import YesNo
from .suggest import VALUE_SYNONYMS, nearest

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_HOLDS_SECRET = "holds what looks like a secret: put it into the environment, never into a config"
_NAMES = {
    "int": ("a whole number", "8"),
    "float": ("a number", "0.1"),
    "bool": ("true or false", ""),
    "str": ("text", ""),
    "list": ("a list of names", "a,b"),
    "numbers": ("a list of numbers", "0.7,0.3"),
    "dict": ("a mapping", "{num_cycles: 2}"),
}


def convert(key: Key, value: object) -> Any:
    """`value` as `key` wants it; ValueError says what is wrong and what to write instead.

    >>> from prefkit.config.schema import KEYS
    >>> convert(KEYS["dataset"], "pairs, more"), convert(KEYS["save_steps"], 500.0)
    (('pairs', 'more'), 500)
    >>> convert(KEYS["interleave_probs"], "0.7,0.3")
    (0.7, 0.3)
    """
    result = _to_numbers(key, value) if key.types == ("numbers",) else _to_type(key, value)
    if isinstance(result, str):
        _check_text(key, result)
    elif isinstance(result, int | float) and not isinstance(result, bool):
        _check_number(key, result)
    return result


def _to_type(key: Key, value: object) -> Any:
    if isinstance(value, YesNo) and "bool" in key.types:
        return bool(value)
    if isinstance(value, YesNo) and str(value) not in key.choices:
        if key.choices:
            raise ValueError(_wanted(key, value))
        raise ValueError(f'{value} may mean a truth value or text: write "{value}" in quotes if it is text')
    if isinstance(value, bool):
        return _same(key, "bool", value)
    if isinstance(value, int | float):
        return _to_number(key, value)
    if isinstance(value, dict):
        _check_nested(value)
        return _same(key, "dict", value)
    if isinstance(value, list | tuple):
        return _to_list(key, list(value))
    if "str" in key.types:
        return str(value)
    return _to_list(key, str(value).split(","))


def _to_numbers(key: Key, value: object) -> tuple[float, ...]:
    """The numbers of a list, of `0.7,0.3`, or the one number that is there."""
    items = (
        value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    )
    numbers = []
    for item in items:
        text = item.strip() if isinstance(item, str) else item
        if isinstance(text, str) and _NUMBER.match(text):
            text = float(text)
        if isinstance(text, bool) or not isinstance(text, int | float) or not math.isfinite(text):
            raise ValueError(_wanted(key, value))
        _check_number(key, text)
        numbers.append(float(text))
    return tuple(numbers)


def _to_number(key: Key, value: float) -> float:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be a finite number, not {value}")
    if "int" in key.types and value == int(value):
        return int(value)
    if "float" not in key.types:
        raise ValueError(_wanted(key, value))
    if abs(value) > 1e300:
        raise ValueError("is too large a number")
    return float(value)


def _to_list(key: Key, value: list[Any]) -> Any:
    if "list" not in key.types:
        raise ValueError(_wanted(key, ",".join(value) if all(isinstance(x, str) for x in value) else value))
    _check_nested(value)
    if not all(isinstance(item, str) for item in value):
        raise ValueError(f"{_wanted(key, value)} with something else than text in it")
    names = [item.strip() for item in value if item.strip()]
    for name in names:
        _check_text(key, name)
    return names if key.group == "training" else tuple(names)


def _same(key: Key, type_name: str, value: Any) -> Any:
    if type_name not in key.types:
        raise ValueError(_wanted(key, value))
    return value


def _check_nested(value: object) -> None:
    """Refuse inside a list or mapping what would be refused outside, and secrets."""
    if isinstance(value, YesNo):
        raise ValueError(f'holds {value}: write true or false, or "{value}" in quotes if it is text')
    if isinstance(value, str) and looks_secret(value):
        raise ValueError(_HOLDS_SECRET)
    if isinstance(value, dict):
        for name in value:
            if is_secret(name) and value[name]:
                raise ValueError(f"{name} is a secret: put it into the environment, never into a config")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_nested(item)


def _check_text(key: Key, text: str) -> None:
    if looks_secret(text):
        raise ValueError(_HOLDS_SECRET)
    if not key.choices or text in key.choices:
        return
    if text in key.later:
        raise ValueError(f"{text} is not in this version of prefkit: write {' or '.join(key.choices)}")
    synonym = VALUE_SYNONYMS.get(text)
    near = synonym if synonym in key.choices else nearest(text, key.choices)
    hint = f"; did you mean {near}?" if near else f": write one of {_spell(key.choices)}"
    raise ValueError(f"{show(key.name, text)} is not one of its values{hint}")


def _check_number(key: Key, number: float) -> None:
    if not key.admits(number):
        reason = f": {key.reason}" if key.reason else ""
        raise ValueError(f"must be in the range {key.limits}, not {show(key.name, number)}{reason}")


def _spell(choices: tuple[str, ...]) -> str:
    return ", ".join('"no"' if choice == "no" else choice for choice in choices)


def _wanted(key: Key, value: object) -> str:
    """`a number is wanted, such as 0.1, not "much"`."""
    if key.choices:
        return f"one of {_spell(key.choices)} is wanted, not {show(key.name, value)}"
    types = [t for t in key.types if not (t == "int" and "float" in key.types)]
    wanted = " or ".join(_NAMES[t][0] for t in types)
    examples = [str(key.default)] if isinstance(key.default, int | float) else [_NAMES[types[0]][1]]
    if isinstance(value, str) and _NUMBER.match(value.replace("_", "")) and {"int", "float"} & {*types}:
        return f"{wanted} is wanted: write {value.replace('_', '')}, plain and without quotes"
    if isinstance(value, str) and value.lower() in ("true", "false") and "bool" in types:
        return f"{wanted} is wanted: write {value.lower()}, without quotes"
    if "str" in types and not isinstance(value, dict | list):
        return f'{wanted} is wanted: write "{show(key.name, value)}" in quotes if it is text'
    such_as = f", such as {examples[0]}," if examples[0] and "bool" not in types else ","
    return f"{wanted} is wanted{such_as} not {show(key.name, value)}"
