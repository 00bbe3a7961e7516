"""`${env:NAME}` and `${other_key}` in the values of a config.

A value that is nothing else takes what it names as it is: a number stays one, and a variable of the
environment is read as YAML reads a plain word. Inside a longer text both are text. `$${` is a `${` that
stands for itself. LLaMA-Factory fills nothing in, so that no config of its own changes its meaning here
without an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from .errors import Problem, is_secret, looks_secret
from .suggest import nearest

_ENV = "env:"
_MARK = re.compile(r"\$(\$\{)|\$\{([^${}]*)\}|(\$\{)")


class Filled(NamedTuple):
    """Values with nothing left to fill in, what was wrong, and the keys whose value is not known for it."""

    values: dict[str, Any]
    problems: list[Problem]
    unknown: set[str]


def escape(value: Any) -> Any:
    """A resolved value as YAML wants it: tuples as lists, and `${` so that it stands for itself.

    >>> escape(("a", "${x}"))
    ['a', '$${x}']
    """
    if isinstance(value, str):
        return value.replace("${", "$${")
    if isinstance(value, dict):
        return {name: escape(item) for name, item in value.items()}
    return [escape(item) for item in value] if isinstance(value, list | tuple) else value


def fill_in(
    written: Mapping[str, Any],
    wanted: Collection[str],
    defaults: Mapping[str, Any],
    verbatim: Collection[str],
    read_scalar: Callable[[str], Any],
) -> Filled:
    """The `wanted` of the `written` values, with every `${...}` replaced.

    `defaults` are the values of keys that are not written, and the names that `${...}` may use at all;
    `verbatim` keys and secrets are left as they are. `read_scalar` reads a variable of the environment.
    """
    filler = _Filler(written, defaults, verbatim, read_scalar)
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    for name in wanted:
        try:
            values[name] = filler.value(name)
        except _Unfilled as error:
            filler.failed.add(name)
            if error.text:
                problems.append(Problem(name, error.text))
    return Filled(values, problems, filler.failed)


class _Unfilled(Exception):
    """A `${...}` that names nothing; without text where that was said of another key already."""

    def __init__(self, text: str = "") -> None:
        super().__init__(text)
        self.text = text


class _Filler:
    """Follows names from key to key; `path` is the way that led to the key at hand."""

    def __init__(
        self,
        written: Mapping[str, Any],
        defaults: Mapping[str, Any],
        verbatim: Collection[str],
        read_scalar: Callable[[str], Any],
    ) -> None:
        self.written = written
        self.defaults = defaults
        self.verbatim = verbatim
        self.read_scalar = read_scalar
        self.failed: set[str] = set()
        self.done: dict[str, Any] = {}
        self.path: list[str] = []

    def value(self, name: str) -> Any:
        """The value of a written key."""
        if name in self.verbatim or is_secret(name):
            return self.written[name]
        if name not in self.done:
            self.path.append(name)
            try:
                self.done[name] = self._fill(self.written[name])
            finally:
                self.path.pop()
        return self.done[name]

    def _fill(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: item if is_secret(name) else self._fill(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self._fill(item) for item in value]
        if not isinstance(value, str) or "${" not in value:
            return value
        whole = _MARK.fullmatch(value)
        if whole and whole[2] is not None:
            name = whole[2].strip()
            return self.read_scalar(_variable(name)) if name.startswith(_ENV) else self._look_up(name)
        return _MARK.sub(self._replace, value)

    def _replace(self, match: re.Match[str]) -> str:
        """The text of one `${...}` within a longer one."""
        if match[1]:
            return match[1]
        if match[3]:
            raise _Unfilled("a ${ without its }: write ${env:NAME}, ${other_key}, or $${ for the text itself")
        name = match[2].strip()
        return _variable(name) if name.startswith(_ENV) else _as_text(name, self._look_up(name))

    def _look_up(self, name: str) -> Any:
        """The value of the key that `${name}` means."""
        if name not in self.defaults:
            raise _Unfilled(_unknown(name, self.defaults))
        if is_secret(name):
            raise _Unfilled(f"${{{name}}} is a secret, which no config holds: remove it")
        if name in self.path:
            if len(self.path) == 1:
                raise _Unfilled("${" + name + "} is the key itself: write a value")
            way = " -> ".join([*self.path[self.path.index(name) :], name])
            raise _Unfilled(f"leads back to itself ({way}): write the value of one of them")
        if name not in self.written:
            default = self.defaults[name]
            return list(default) if isinstance(default, tuple) else default
        if name in self.failed:
            raise _Unfilled
        return self.value(name)


def _variable(name: str) -> str:
    """The text of `env:NAME`."""
    variable = name.removeprefix(_ENV).strip()
    if is_secret(variable):
        raise _Unfilled(
            f"${{{name}}} would write a secret into the saved config: remove it; what needs {variable} "
            "reads it from the environment"
        )
    text = os.environ.get(variable)
    if text is None:
        raise _Unfilled(
            f"${{{name}}} is not set in the environment: export {variable or 'NAME'}=..., or write the value"
        )
    if looks_secret(text):
        raise _Unfilled(f"${{{name}}} holds what looks like a secret, which no config may: remove it")
    return text


def _unknown(name: str, known: Collection[str]) -> str:
    plain = name.removeprefix("oc.env:")
    if plain in os.environ or name != plain or plain.isupper():
        return f"${{{name}}} names no key: a variable of the environment is written ${{env:{plain}}}"
    near = nearest(name, list(known)) if name else None
    hint = f"did you mean ${{{near}}}?" if near else "write a key of docs/keys.md, or ${env:NAME}"
    return f"${{{name}}} names no key; {hint} ($${{ is the text itself)"


def _as_text(name: str, value: Any) -> str:
    if value is None or isinstance(value, dict):
        what = "has no value" if value is None else "is a mapping"
        raise _Unfilled(f"${{{name}}} {what}, which cannot stand within a text: write the text itself")
    if isinstance(value, list):
        return ",".join(_as_text(name, item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
