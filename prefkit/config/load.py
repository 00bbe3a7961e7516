"""YAML or JSON, with `key=value` overrides, to a config: everything wrong is said at once."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, NamedTuple, TypeVar

from .checks import TRAINING
from .errors import ConfigError, Problem, is_secret
from .foreign import FOREIGN
from .interpolate import Filled, fill_in
from .rules import Rules, find_errors, find_warnings
from .schema import GROUPS, KEYS, RunConfig, UseConfig, keys_of
from .source import Entry, read_file, read_overrides, read_scalar
from .suggest import SYNONYMS, nearest
from .training import WARMUP_RATIO
from .values import convert

Config = TypeVar("Config", RunConfig, UseConfig)


class LoadedConfig(NamedTuple, Generic[Config]):
    """A usable config, and what its author should hear about it."""

    config: Config
    warnings: tuple[str, ...]


def load_config(
    path: str | Path, overrides: Sequence[str] = (), rules: Rules = TRAINING
) -> LoadedConfig[RunConfig]:
    """Read a config file, then `key=value` overrides; ConfigError holds all that is wrong with them.

    A key of TrainingArguments or of this project sets its value; null stands for the default where it
    has no meaning of its own. `${env:NAME}` and `${other_key}` are filled in, see `interpolate`. A dotted
    key reaches into a mapping, as in `lr_scheduler_kwargs.num_cycles=2`. A key that only LLaMA-Factory knows
    is passed over or refused, see `foreign`; any other is an error that names the nearest key. `rules` say
    what the config is for: `checks.TRAINING`, or one of `uses`.
    """
    return _load(Path(path), overrides, {}, rules, RunConfig)


def load_use_config(
    path: str | Path | None, overrides: Sequence[str], defaults: Mapping[str, Any], rules: Rules
) -> LoadedConfig[UseConfig]:
    """The same for a model that is exported or talked to; `defaults` hold where nothing else is written.

    Keys that only concern training are not read, and named as not used.
    """
    return _load(Path(path) if path else None, overrides, defaults, rules, UseConfig)


def _load(
    path: Path | None,
    overrides: Sequence[str],
    defaults: Mapping[str, Any],
    rules: Rules,
    wanted: type[Config],
) -> LoadedConfig[Config]:
    entries, problems = read_file(path) if path else ([], [])
    more_entries, more_problems = read_overrides(overrides)
    entries += more_entries
    problems += more_problems
    merged = _merge(entries, problems)
    unread = set(merged) & _unread_keys(wanted)
    filled = _fill_references(merged, [name for name in merged if name not in unread], defaults)
    problems += filled.problems
    written = {**defaults, **merged, **filled.values}
    written = {name: value for name, value in written.items() if name not in filled.unknown}
    values = _convert({name: value for name, value in written.items() if name not in unread}, problems)
    used = set(keys_of(wanted)).difference(rules.unused)
    unknown = filled.unknown | {problem.key for problem in problems}
    unknown |= {_near(name) for name in written if not _is_known(name)}
    missing = _find_missing(values, unknown, used)
    problems += missing
    unknown |= {problem.key for problem in missing}
    space = _complete(values, written)
    problems += find_errors(rules, space, unknown)
    if wanted is RunConfig:
        problems += _find_refused(written, {problem.key for problem in problems})
    if problems:
        raise ConfigError(path or "command line", _describe(problems, entries))
    changed = {name for name, value in values.items() if _is_changed(value, KEYS[name].default)}
    changed |= {name for name in unread if _is_changed(written[name], KEYS[name].default)}
    rank = written.get("lora_rank", KEYS["lora_rank"].default)
    if isinstance(rank, int) and written.get("lora_alpha") == 2 * rank:
        changed.discard("lora_alpha")  # as a saved config spells its default
    warnings = find_warnings(rules, space, changed & used)
    unused = changed - used
    if wanted is UseConfig:
        unused |= {name for name, value in written.items() if _is_foreign(name, value)}
    warnings += _find_unused(unused) + (_find_ignored(written) if wanted is RunConfig else [])
    return LoadedConfig(_build(values, wanted), tuple(warnings))


def _unread_keys(wanted: type[Config]) -> set[str]:
    """Keys of training that a use does not even convert; a secret is looked at always."""
    if wanted is RunConfig:
        return set()
    return {name for name in KEYS if name not in keys_of(wanted) and not is_secret(name)}


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


def _fill_references(merged: dict[str, Any], wanted: list[str], given: Mapping[str, Any]) -> Filled:
    """The `wanted` values without their `${...}`; `given` are values for keys that are not written."""
    defaults = {name: row.default for name, row in FOREIGN.items()}
    defaults |= {name: None if key.required else key.default for name, key in KEYS.items()}
    verbatim = {name for name, key in KEYS.items() if key.verbatim} | {n for n in merged if not _is_known(n)}
    return fill_in(merged, wanted, defaults | dict(given), verbatim, read_scalar)


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
    value = tuple(value) if isinstance(value, list) else value
    return value != default and (bool(value) or default is True)


def _find_missing(values: dict[str, Any], unknown: set[str], used: set[str]) -> list[Problem]:
    return [
        Problem(name, f"missing; write {name}: {key.example}")
        for name, key in KEYS.items()
        if key.required and name in used and not values.get(name) and name not in unknown
    ]


def _find_unused(names: set[str]) -> list[str]:
    if not names:
        return []
    hint = "; to use what this file trains, name its output_dir" if "output_dir" in names else ""
    return [f"not used here: {', '.join(sorted(names))}{hint}"]


def _is_foreign(name: str, value: object) -> bool:
    """Whether a key of `FOREIGN` asks for something."""
    return name in FOREIGN and not FOREIGN[name].is_off(value)


def _find_refused(written: dict[str, Any], already: set[str]) -> list[Problem]:
    """Refused keys that no check has spoken about."""
    return [
        Problem(name, FOREIGN[name].hint)
        for name, value in written.items()
        if _is_foreign(name, value) and FOREIGN[name].verdict == "refuse" and name not in already
    ]


def _find_ignored(written: dict[str, Any]) -> list[str]:
    hints: dict[str, list[str]] = {}
    for name, value in written.items():
        if _is_foreign(name, value) and FOREIGN[name].verdict == "ignore":
            hints.setdefault(FOREIGN[name].hint, []).append(name)
    listed = "; ".join(f"{', '.join(names)} ({hint})" for hint, names in hints.items())
    return [f"ignored: {listed}"] if hints else []


def _complete(values: dict[str, Any], written: dict[str, Any]) -> SimpleNamespace:
    """Every key that exists, given or default, for the checks to read."""
    foreign = {name: written.get(name, row.default) for name, row in FOREIGN.items()}
    own = {name: values.get(name, key.default) for name, key in KEYS.items()}
    return SimpleNamespace(**(own | foreign))


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


def _build(values: dict[str, Any], wanted: type[Config]) -> Config:
    values = dict(values)
    ratio = values.pop(WARMUP_RATIO.name, 0)
    if ratio:
        values["warmup_steps"] = ratio
    parts: dict[str, Any] = {
        field.name: {name: value for name, value in values.items() if KEYS[name].group == field.name}
        for field in dataclasses.fields(wanted)
    }
    return wanted(
        **{name: GROUPS[name](**given) if name in GROUPS else given for name, given in parts.items()}
    )
