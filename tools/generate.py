"""Write the files that follow from the code: training_arguments.json and docs/keys.md.

`python tools/generate.py` writes them; `--check` writes nothing and exits 1 where they differ.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import sys
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = ROOT / "prefkit" / "config" / "training_arguments.json"
KEYS_DOC = ROOT / "docs" / "keys.md"
REQUIRED = "output_dir"
# What the annotation of transformers leaves out and its code takes.
EXTRA_TYPES = {"eval_steps": "int", "fsdp": "bool", "resume_from_checkpoint": "bool"}


def describe_training_arguments() -> dict[str, Any]:
    """Every field of the installed TrainingArguments: types, choices, default and first sentence."""
    import transformers
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    rows = [_describe_field(field, hints[field.name]) for field in dataclasses.fields(TrainingArguments)]
    return {"transformers": transformers.__version__, "arguments": rows}


def _describe_field(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory()  # type: ignore[operator]
    members = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
    enums = [member for member in members if isinstance(member, type) and issubclass(member, enum.Enum)]
    choices = [str(item.value) for item in enums[0]] if enums else list(field.metadata.get("choices") or [])
    types = {_name_type(member) for member in members - {type(None)}} | {EXTRA_TYPES.get(field.name, "")}
    if type(default) is int and "float" in types:
        types.add("int")
    row = {
        "name": field.name,
        "types": sorted(types - {""}, key=["int", "float", "bool", "str", "list", "dict"].index),
        "nullable": type(None) in members,
        "default": default,
        "choices": choices,
        "help": _first_sentence(field.metadata.get("help", "")),
    }
    return row | ({"required": True} if field.name == REQUIRED else {})


def _name_type(member: Any) -> str:
    """The YAML type of one member of an annotation; empty for what only Python code can make."""
    if isinstance(member, type) and issubclass(member, enum.Enum):
        return "str"
    origin = getattr(member, "__origin__", member)
    if get_args(member) == (False,):
        return "bool"
    return origin.__name__ if origin in (int, float, bool, str, list, dict) else ""


def _first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence; `%%` is argparse's spelling of `%`."""
    text = " ".join(text.replace("%%", "%").split())
    return re.split(r"(?<=[.?!])\s+(?=[A-Z0-9`])", text)[0]


def render_arguments() -> str:
    """The text of training_arguments.json: one argument a line."""
    described = describe_training_arguments()
    rows = ",\n".join("  " + json.dumps(row) for row in described["arguments"])
    return f'{{"transformers": "{described["transformers"]}", "arguments": [\n{rows}\n]}}\n'


def render_keys_doc() -> str:
    """The text of docs/keys.md."""
    sys.path.insert(0, str(ROOT))
    from prefkit.config.foreign import FOREIGN
    from prefkit.config.schema import GROUPS, KEYS

    parts = [_INTRODUCTION]
    for group, owner in GROUPS.items():
        parts.append(f"## {group.capitalize()}\n\n{owner.__doc__}\n")
        parts.append(_table(["Key", "Type", "Default", "Meaning"], _key_rows(KEYS, group)))
    parts.append("## Training\n\nThe keys of transformers.TrainingArguments, and `warmup_ratio`.\n")
    parts.append(_table(["Key", "Type", "Default", "Meaning"], _key_rows(KEYS, "training", FOREIGN)))
    parts.append(_FOREIGN)
    rows = [[f"`{k}`", _cell(f.default), f.verdict, f.hint] for k, f in sorted(FOREIGN.items())]
    parts.append(_table(["Key", "Default", "Verdict", "What to do, or why"], rows))
    return "\n".join(parts)


_INTRODUCTION = """\
# Keys of the YAML

Written by `python tools/generate.py`; change the code, not this page. A list may be written `a,b` too.
An unknown key is an error. `null` stands for the default where it has no meaning of its own.

`prefkit train` reads all keys but those of Export and Generation; `prefkit export` reads Model, Data and
Export, `prefkit chat` and `prefkit api` Model, Data and Generation. A key that a verb does not read is a
warning.
"""

_FOREIGN = """\
## Keys of LLaMA-Factory that this version does not have

At its default, or switched off, such a key says nothing. Otherwise `refuse` is an error, because the
training would not be the one asked for, and `ignore` a warning. To `prefkit export`, `chat` and `api` both
are a warning, unless they say which model it is or hold a secret.
"""


def _key_rows(keys: dict[str, Any], group: str, left_out: Any = ()) -> list[list[str]]:
    return [
        [f"`{name}`", _type_cell(key), "required" if key.required else _cell(key.default), key.help]
        for name, key in keys.items()
        if key.group == group and name not in left_out
    ]


def _type_cell(key: Any) -> str:
    if key.choices:
        return ", ".join(key.choices)
    types = " or ".join(t for t in key.types if not (t == "int" and "float" in key.types))
    limits = key.limits.replace(key.name, "x")
    return f"{types}, {limits}" if limits else types


def _cell(value: Any) -> str:
    value = ",".join(value) if isinstance(value, list | tuple) else value
    return "" if value in ("", None) else f"`{json.dumps(value).strip(chr(34))}`"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines) + "\n"


def main(arguments: list[str]) -> int:
    """Write the files, or compare them."""
    different = 0
    for path, render in ((ARGUMENTS, render_arguments), (KEYS_DOC, render_keys_doc)):
        text = render()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        different = 1
        if "--check" in arguments:
            print(f"{path.relative_to(ROOT)} is out of date: run python tools/generate.py")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return different if "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
