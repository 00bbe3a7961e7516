"""YAML or JSON, with `key=value` overrides, to a RunConfig: everything wrong is said at once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from .checks import find_errors, find_warnings
from .errors import ConfigError, Problem
from .foreign import FOREIGN
from .schema import GROUPS, KEYS, WARMUP_RATIO, RunConfig
from .source import Entry, read_file, read_overrides
from .suggest import SYNONYMS, nearest
from .values import convert


class LoadedConfig(NamedTuple):
    """A usable config, and what its author should hear about it."""

    config: RunConfig
    warnings: tuple[str, ...]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a config file, then `key=value` overrides; ConfigError holds all that is wrong with them.

    A key of TrainingArguments or of this project sets its value; null stands for the default where it
    has no meaning of its own. A dotted key reaches into a mapping, as in
    `lr_scheduler_kwargs.num_cycles=2`. A key that only LLaMA-Factory knows is passed over or refused, see
    `foreign`; any other is an error that names the nearest key.
    """
    path = Path(path)
    entries, problems = read_file(path)
    more_entries, more_problems = read_overrides(overrides)
    entries += more_entries
    problems += more_problems
    written = _merge(entries, problems)
    values = _convert(written, problems)
    unknown = {problem.key for problem in problems} | {_near(name) for name in written if not _is_known(name)}
    problems += _find_missing(values, unknown)
    space = _fill_in(values, written)
    problems += find_errors(space, unknown)
    problems += _find_refused(written, {problem.key for problem in problems})
    if problems:
        raise ConfigError(path, _describe(problems, entries))
    changed = {name for name, value in values.items() if _is_changed(value, KEYS[name].default)}
    warnings = find_warnings(space, changed) + _find_ignored(written)
    return LoadedConfig(_build(values), tuple(warnings))


def _merge(entries: list[Entry], problems: list[Problem]) -> dict[str, Any]:
    """One value for each key: a later entry wins, a dotted one changes a part of a mapping."""
    written: dict[str, Any] = {}
    for entry in entries:
        name, *parts = entry.key.split(".")
        if not parts or name not in KEYS:
            written[entry.key] = entry.value
            continue
        mapping = copy.deepcopy(written.get(name)) or {}
        if "dict" not in KEYS[name].types or not isinstance(mapping, dict):
            problems.append(Problem(name, f"is not a mapping that {entry.key} could be set in"))
            continue
        written[name] = inner = mapping
        for part in parts[:-1]:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                problems.append(Problem(name, f"holds no mapping that {entry.key} could be set in"))
                inner = {}
        inner[parts[-1]] = entry.value
    return written


def _convert(written: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """The values of known keys, without those that are null for want of a value."""
    values: dict[str, Any] = {}
    for name, value in written.items():
        if name in FOREIGN:
            continue
        if name not in KEYS:
            hint = f"did you mean {_near(name)}?" if _near(name) else "docs/keys.md lists all keys"
            problems.append(Problem(name, f"unknown key; {hint}"))
        elif value is None:
            if KEYS[name].nullable and KEYS[name].default is not None:
                values[name] = None
        else:
            try:
                values[name] = convert(KEYS[name], value)
            except ValueError as error:
                problems.append(Problem(name, str(error)))
    return values


def _is_known(name: str) -> bool:
    return name in KEYS or name in FOREIGN


@functools.cache
def _near(name: str) -> str:
    return SYNONYMS.get(name.lower()) or nearest(name, [*KEYS, *FOREIGN]) or ""


def _is_changed(value: object, default: object) -> bool:
    """Whether a value asks for something: not the default, and not switched off."""
    return value != default and (bool(value) or default is True)


def _find_missing(values: dict[str, Any], unknown: set[str]) -> list[Problem]:
    return [
        Problem(name, f"missing; write {name}: {key.example}")
        for name, key in KEYS.items()
        if key.required and not values.get(name) and name not in unknown
    ]


def _find_refused(written: dict[str, Any], already: set[str]) -> list[Problem]:
    """Refused keys that no check has spoken about."""
    return [
        Problem(name, row.hint)
        for name, value in written.items()
        if (row := FOREIGN.get(name)) and row.verdict == "refuse"
        if not row.is_off(value) and name not in already
    ]


def _find_ignored(written: dict[str, Any]) -> list[str]:
    hints: dict[str, list[str]] = {}
    for name, value in written.items():
        if (row := FOREIGN.get(name)) and row.verdict == "ignore" and not row.is_off(value):
            hints.setdefault(row.hint, []).append(name)
    listed = "; ".join(f"{', '.join(names)} ({hint})" for hint, names in hints.items())
    return [f"ignored: {listed}"] if hints else []


def _fill_in(values: dict[str, Any], written: dict[str, Any]) -> SimpleNamespace:
    """Every key that exists, given or default, for the checks to read."""
    foreign = {name: written.get(name, row.default) for name, row in FOREIGN.items()}
    own = {name: values.get(name, key.default) for name, key in KEYS.items()}
    return SimpleNamespace(**(foreign | own))


def _describe(problems: list[Problem], entries: list[Entry]) -> list[str]:
    """The problems in the order of the file, each with its line."""
    places = {}
    for i, entry in enumerate(entries):
        places[entry.key] = places[entry.key.partition(".")[0]] = (i, entry.where)
    last = (len(entries), "")
    ordered = sorted(problems, key=lambda problem: places.get(problem.key, last)[0])
    lines = []
    for problem in ordered:
        where = problem.where or places.get(problem.key, last)[1]
        lines.append(f"{problem.key}: {problem.text}" + (f" ({where})" if where else ""))
    return lines


def _build(values: dict[str, Any]) -> RunConfig:
    values = dict(values)
    ratio = values.pop(WARMUP_RATIO.name, 0)
    if ratio:
        values["warmup_steps"] = ratio
    owners = {
        group: owner(**{name: value for name, value in values.items() if KEYS[name].group == group})
        for group, owner in GROUPS.items()
    }
    training = {name: value for name, value in values.items() if KEYS[name].group == "training"}
    return RunConfig(training=training, **owners)
