"""What can be wrong with a config, and the one error that says all of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_SECRET_WORDS = {"token", "password", "passwd", "secret", "key", "apikey", "credentials"}
_SECRET_VALUE = re.compile(r"(hf|sk|gh[a-z]|glpat|xox[a-z])[-_][\w-]{8,}")
_SURE = re.compile(
    r"(?<![A-Za-z0-9])(hf_|sk-([a-z]+-)?|gh[a-z]_|glpat-|xox[a-z]-)[A-Za-z0-9]{16}"
    r"|://[^/\s@:]*:[^/\s@]+@|https?://[^/\s@]+@|[?&][\w-]*(token|secret|password|key)=[^&\s]",
    re.IGNORECASE,
)


class Problem(NamedTuple):
    """One thing that is wrong: its key, what to write instead, and the place where that is not the key's."""

    key: str
    text: str
    where: str = ""


class UserError(Exception):
    """Something that the person who runs prefkit can mend; the message says what and how.

    `exit_code` is that of a command which it ends; docs/reliability.md lists them. `of_one_rank` is true of
    what a rank may meet alone: then it reports it, whichever it is, and otherwise the first does for all.
    """

    exit_code = 1
    of_one_rank = False
    of_another_rank = False


class ConfigError(UserError):
    """A config that cannot be used; `problems` names everything that is wrong with it."""

    exit_code = 2

    def __init__(self, path: str | Path, problems: list[str]) -> None:
        super().__init__(path, problems)
        self.path = Path(path)
        self.problems = problems

    def __str__(self) -> str:
        """The problems as a block, one line each, under the name of the file."""
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        return "\n".join([f"{self.path}: {count}", *(f"  {problem}" for problem in self.problems)])


def is_secret(name: str) -> bool:
    """Whether a key of this name holds a token, password or key.

    >>> is_secret("hf_hub_token"), is_secret("max_new_tokens")
    (True, False)
    """
    return name.lower().rpartition("_")[2] in _SECRET_WORDS


def looks_secret(text: str) -> bool:
    """Whether a text holds a token of a known form, or an address with a password or token in it.

    >>> looks_secret("https://me:pass@host/data"), looks_secret("https://host/data"), looks_secret("task-1")
    (True, False, False)
    """
    return bool(_SURE.search(text))


def show(name: str, value: object) -> str:
    """A value as YAML would spell it, for a message: short, and never a secret.

    >>> show("bf16", True), show("hub_token", "hf_1234"), show("stage", "dpo")
    ('true', '***', '"dpo"')
    """
    if is_secret(name) or (isinstance(value, str) and (_SECRET_VALUE.search(value) or looks_secret(value))):
        return "***"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple | dict):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = str(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f'"{text}"' if isinstance(value, str) else text
