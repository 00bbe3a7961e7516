"""Where a config comes from: a YAML or JSON file, and `key=value` overrides, read strictly.

YAML here is what the page looks like: `5e-6` is a number, `12:30`, `1_000`, `017` and `2024-01-01` are
text, a key stands once, and `yes`, `no`, `on`, `off` wait for a key that says what they mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .errors import ConfigError, Problem, show

MAX_BYTES = 200_000
_MAX_VALUES = 10_000
_MAX_DEPTH = 20
_YES_NO = "tag:prefkit:yes-no"
_STANDARD = "tag:yaml.org,2002:"
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")


class YesNo(str):
    """`yes`, `no`, `on` or `off` without quotes: a truth value to some YAML readers, text to others."""

    __slots__ = ()

    def __bool__(self) -> bool:
        """The truth value it stands for where one is wanted."""
        return self.lower() in ("yes", "on")


class Entry(NamedTuple):
    """One key and its value as written; `where` is `line 3` or `command line`."""

    key: str
    value: Any
    where: str


class _Loader(yaml.SafeLoader):
    """Resolves plain words by the rules of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that `_Loader` would read as something else."""


for _tag, _pattern, _first in (
    (_STANDARD + "null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    (_STANDARD + "bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    (_YES_NO, re.compile(r"(yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$"), list("yYnNoO")),
    (_STANDARD + "int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789")),
    (_STANDARD + "float", _FLOAT, list("-+.0123456789")),
    (_STANDARD + "float", re.compile(r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"), list("-+.")),
):
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)

_SCALARS: dict[str, Callable[[str], Any]] = {
    _STANDARD + "null": lambda text: None,
    _STANDARD + "bool": lambda text: text.lower() == "true",
    _STANDARD + "int": int,
    _STANDARD + "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    _STANDARD + "str": str,
    _YES_NO: YesNo,
}


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML text that `load_config` reads back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000)


def read_file(path: Path) -> tuple[list[Entry], list[Problem]]:
    """The keys of a YAML or JSON file; ConfigError where it cannot be read as a mapping at all."""
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise ConfigError(path, ["a config is a .yaml, .yml or .json file"])
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(path, [f"cannot be read: {error.strerror}"]) from None
    if len(content) > MAX_BYTES:
        raise ConfigError(path, [f"{len(content):,} bytes are too many for a config"])
    try:
        return _read_json(content) if path.suffix.lower() == ".json" else _read_yaml(content)
    except yaml.YAMLError as error:
        hint = '; inside [ ] and { } write "${...}" in quotes' if _is_unquoted(content) else ""
        raise ConfigError(path, [f"is not valid YAML: {_explain(error)}{hint}"]) from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(path, [f"is not valid JSON: {error.msg} ({place})"]) from None
    except RecursionError:
        raise ConfigError(path, ["is nested too deeply"]) from None
    except ValueError as error:
        raise ConfigError(path, [str(error)]) from None


def read_overrides(arguments: Sequence[str]) -> tuple[list[Entry], list[Problem]]:
    """`key=value` arguments of the command line; the value is typed as in YAML.

    >>> read_overrides(["run_name=a: b", "save_steps=5e2", "--bf16"])[0][1].value
    500.0
    """
    entries, problems = [], []
    for name, text in _pair_up(list(arguments)):
        key = name.strip().lstrip("-")
        if name.startswith("-") or text is None:
            written = "value" if text is None else show(key, text).strip('"')
            dashes = ", without dashes" if name.startswith("-") else ""
            problems.append(Problem(key, f"write {key}={written}{dashes}", "command line"))
            continue
        try:
            entries.append(Entry(key, _read_value(text.strip()), "command line"))
        except (ValueError, yaml.YAMLError, RecursionError):
            problems.append(Problem(key, "its value is not valid YAML", "command line"))
    return entries, problems


def _pair_up(arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """Split at the first `=`; `--key value` comes out as one pair too, so that it is named once."""
    while arguments:
        name, equals, text = arguments.pop(0).partition("=")
        if equals:
            yield name, text
        elif name.startswith("-") and arguments and not re.match(r"--|[\w.]+=", arguments[0]):
            yield name, arguments.pop(0)
        else:
            yield name, None


def _read_value(text: str) -> Any:
    if text[:1] in ("[", "{", '"', "'"):
        return _Builder().build(yaml.compose(text, Loader=_Loader))
    return read_scalar(text)


def read_scalar(text: str) -> Any:
    """A text as YAML reads a plain word: a number, truth value, null or text.

    >>> read_scalar("1e-6"), read_scalar("12:30"), read_scalar("true")
    (1e-06, '12:30', True)
    """
    tag = _Loader("").resolve(yaml.ScalarNode, text, (True, False))
    return _SCALARS[tag](text)


def _read_yaml(content: bytes) -> tuple[list[Entry], list[Problem]]:
    root = yaml.compose(content, Loader=_Loader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("is not a mapping of keys to values, such as `stage: dpo`")
    entries: list[Entry] = []
    problems: list[Problem] = []
    builder = _Builder()
    for key_node, value_node in root.value:
        where = f"line {key_node.start_mark.line + 1}"
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
        try:
            value = builder.build(value_node)
        except ValueError as error:
            value = None
            problems.append(Problem(key, str(error)))
        entries.append(Entry(key, value, where))
    return entries, problems + _find_repeated(entries)


def _read_json(content: bytes) -> tuple[list[Entry], list[Problem]]:
    root = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_Pairs)
    if not isinstance(root, _Pairs):
        raise ValueError('is not an object of keys and values, such as {"stage": "dpo"}')
    entries: list[Entry] = []
    problems: list[Problem] = []
    for key, value in root:
        try:
            value = _unpair(value)
        except ValueError as error:
            value = None
            problems.append(Problem(key, str(error)))
        entries.append(Entry(key, value, ""))
    return entries, problems + _find_repeated(entries)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object whose repeated keys are still there to be seen."""


def _unpair(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return _mapping((key, _unpair(item)) for key, item in value)
    return [_unpair(item) for item in value] if isinstance(value, list) else value


def _mapping(pairs: Iterator[tuple[Any, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ValueError("the keys of its mapping must be text: put quotes around them")
        if key in result:
            raise ValueError(f"{key} is given twice in its mapping")
        result[key] = value
    return result


def _find_repeated(entries: list[Entry]) -> list[Problem]:
    places: dict[str, list[str]] = {}
    for entry in entries:
        places.setdefault(entry.key, []).append(entry.where.removeprefix("line "))
    return [
        Problem(key, "given more than once", f"lines {' and '.join(lines)}" if any(lines) else "")
        for key, lines in places.items()
        if len(lines) > 1
    ]


class _Builder:
    """Plain values out of YAML nodes, at most `_MAX_VALUES` of them however often an alias repeats."""

    def __init__(self) -> None:
        self.num_values = 0

    def build(self, node: yaml.Node | None, depth: int = 0) -> Any:
        self.num_values += 1
        if self.num_values > _MAX_VALUES or depth > _MAX_DEPTH:
            raise ValueError("is too large or too deep, or an alias in it repeats without end")
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            return _mapping((self.build(k, depth + 1), self.build(v, depth + 1)) for k, v in node.value)
        if node is None or node.tag == _STANDARD + "null":
            return None
        if node.tag not in _SCALARS:
            raise ValueError(f"the tag {node.tag} is not supported")
        try:
            return _SCALARS[node.tag](node.value)
        except ValueError:
            raise ValueError("is not a number that can be read") from None


def _is_unquoted(content: bytes) -> bool:
    """Whether a `${` stands within brackets without quotes, where YAML reads `{` as a mapping."""
    return bool(re.search(rb"[\[,{:]\s*\$\{[^\n]*[\]}]\s*$", content, re.MULTILINE)) and b"[" in content


def _explain(error: yaml.YAMLError) -> str:
    """What the parser met and where; not the line itself, which may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{getattr(error, 'problem', None) or getattr(error, 'reason', 'unreadable')}{place}"
