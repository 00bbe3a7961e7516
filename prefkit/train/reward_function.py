"""A Python function that judges: `reward_function: path/to/file.py:name`."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefkit.config.errors import UserError
from prefkit.data.conversation import as_chat
from prefkit.train.answered import Answered, JudgeFailed

_MODULE = "prefkit_reward_function"


class FunctionJudge:
    """The function of a file, which is run as it is named, once, in this process.

    It is called with a list of prompts, each a list of chat messages (`{"role": ..., "content": ...}`), and
    a list of as many responses, each a text, and with `images=` those of each prompt, if it has a parameter
    of this name; it returns a list, an array or a tensor of as many numbers. Raises `UserError` when the file
    or the function is not there or fails to load.
    """

    def __init__(self, reference: str) -> None:
        self.name = reference
        path, _, function = reference.rpartition(":")
        self.file = Path(path).expanduser().resolve()
        self.function = _load(self.file, function, reference)
        self.takes_images = _takes_images(self.function)

    def score(self, answered: Sequence[Answered]) -> list[float]:
        """The number that the function returns for each response. Raises `JudgeFailed`, with the line of the
        file when it raises, and with the response when its number is none or not finite."""
        prompts = [as_chat(one.prompt) for one in answered]
        responses = [one.text for one in answered]
        more = {"images": [list(one.images) for one in answered]} if self.takes_images else {}
        try:
            found = self.function(prompts, responses, **more)
            if found is None:
                raise TypeError(f"it returned None, and a list of {len(answered)} numbers is wanted")
            values = list(found.tolist() if hasattr(found, "tolist") else found)
        except Exception as error:
            raise JudgeFailed(
                f"reward_function {self.name}: {_describe(error, self.file)}; it was given {len(prompts)} "
                "prompts and as many responses"
            ) from error
        if len(values) != len(answered):
            raise JudgeFailed(
                f"reward_function {self.name} returned {len(values)} numbers for {len(answered)} responses"
            )
        return [
            self._number(value, f"response {number} of {len(values)}", one)
            for number, (value, one) in enumerate(zip(values, answered, strict=True), 1)
        ]

    def _number(self, value: Any, which: str, one: Answered) -> float:
        is_text = isinstance(value, str | bytes)
        try:
            number = math.nan if is_text else float(value)
        except (TypeError, ValueError, RuntimeError):
            number, is_text = math.nan, True
        if not math.isfinite(number):
            what = f"{_short(value)}, no number," if is_text else f"{number}, which is not finite,"
            raise JudgeFailed(f"reward_function {self.name} returned {what} for {which}: {_short(one.text)}")
        return number


def fingerprint_function(file: Path) -> str:
    """sha256 of the file of a function. Raises `UserError` when it cannot be read."""
    try:
        return hashlib.sha256(file.expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"reward_function: {file} cannot be read: {error.strerror or error}") from error


def _load(file: Path, function: str, reference: str) -> Callable[..., Any]:
    if not file.is_file():
        raise UserError(f"reward_function: {reference}: the file {file} does not exist")
    spec = importlib.util.spec_from_file_location(_MODULE, file)
    assert spec is not None and spec.loader is not None  # a file that ends in .py has both
    module = sys.modules[_MODULE] = importlib.util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"reward_function: {file} does not load: {_describe(error, file)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        defined = [name for name, it in vars(module).items() if callable(it) and not name.startswith("_")]
        what = "is no function" if hasattr(module, function) else "is not there"
        raise UserError(
            f"reward_function: {function} {what} in {file}, which has {', '.join(defined) or 'none'}"
        )
    loaded: Callable[..., Any] = found
    return loaded


def _takes_images(function: Callable[..., Any]) -> bool:
    try:
        return "images" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a function that says nothing of its parameters
        return False


def check_function_file(reference: str) -> None:
    """Raises `UserError` when the file of a function is not there or is no Python."""
    file = Path(reference.rpartition(":")[0]).expanduser()
    if not file.is_file():
        raise UserError(f"reward_function: {file} is not there")
    try:
        ast.parse(file.read_text(encoding="utf-8"), str(file))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"reward_function: {file} is no Python: {error}") from error


def _describe(error: Exception, file: Path) -> str:
    """An error and the last line of the file that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == file.resolve()]
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({file.name}:{error.lineno})"
    where = f" ({file.name}:{lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return f'"{text}"' if len(text) <= 60 else f'"{text[:57]}..."'
