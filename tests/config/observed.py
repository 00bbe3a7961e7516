"""Which test observes each key: what `docs/keys.md` shows and `test_observed.py` verifies."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def _definitions(file: str) -> dict[str, str]:
    """Text of each function and of each constant of a test module, decorators and all."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        names, first = [], node.lineno
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        found |= {name: "\n".join(lines[first - 1 : node.end_lineno]) for name in names}
    return found


def text_of(test: str) -> str:
    """A test with the helpers, fixtures and constants of its module that it names; KeyError without it."""
    file, _, function = test.partition("::")
    definitions = _definitions(file)
    wanted, seen = [function], {function: definitions[function]}
    while wanted:
        words = set(ast_names(seen[wanted.pop()]))
        for name in words & definitions.keys() - seen.keys():
            seen[name] = definitions[name]
            wanted.append(name)
    return "\n".join(seen.values())


def ast_names(text: str) -> list[str]:
    """Every name in a text of Python."""
    return [node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)] + [
        node.arg for node in ast.walk(ast.parse(text)) if isinstance(node, ast.arg)
    ]
