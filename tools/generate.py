"""Write the files that follow from the code: training_arguments.json, docs/keys.md and the JSON Schema.

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
SCHEMA = ROOT / "docs" / "prefkit.schema.json"
REQUIRED = "output_dir"
sys.path.insert(0, str(ROOT))
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


def render_schema() -> str:
    """The text of prefkit.schema.json: one key a line."""
    from prefkit.config.json_schema import make_json_schema

    schema = make_json_schema()
    rows = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in schema.pop("properties").items()]
    head = json.dumps(schema, indent=1).removesuffix("\n}")
    return head + ',\n "properties": {\n' + ",\n".join(rows) + "\n }\n}\n"


def render_keys_doc() -> str:
    """The text of docs/keys.md."""
    from prefkit.config.describe import TRAINING_SENTENCE, spell
    from prefkit.config.foreign import FOREIGN
    from prefkit.config.schema import GROUPS, KEYS
    from tests.config.observed import OBSERVED

    header = ["Key", "Type", "Default", "Read by", "Meaning", "Test"]
    parts = [_INTRODUCTION]
    for group, owner in GROUPS.items():
        rows = [_key_row(key, OBSERVED[name]) for name, key in KEYS.items() if key.group == group]
        parts += [f"## {group.capitalize()}\n\n{owner.__doc__}\n", _table(header, rows)]
    rows = [
        _key_row(key, OBSERVED.get(name, ""))
        for name, key in KEYS.items()
        if key.group == "training" and name not in FOREIGN
    ]
    parts += [f"## Training\n\n{TRAINING_SENTENCE} {_PASSED_ON}\n", _table(header, rows), _FOREIGN]
    rows = [[f"`{k}`", _code(spell(f.default)), f.verdict, f.hint] for k, f in sorted(FOREIGN.items())]
    parts.append(_table(["Key", "Default", "Verdict", "What to do, or why"], rows))
    return "\n".join(parts)


_INTRODUCTION = """\
# Keys of the YAML

Written by `python tools/generate.py`; change the code, not this page. A list may be written `a,b` too.
An unknown key is an error. `null` stands for the default where it has no meaning of its own.

`prefkit keys NAME` prints a row of this page. *Read by* names stages of training, and the verbs `chat`,
`api` and `export`; a key that is given and not read is a warning. *Test* is the test that fails when
the key does nothing.

A value may be `${env:NAME}`, a variable of the environment, or `${other_key}`; both may stand within a text,
a list or a mapping. `$${` is a `${` that stands for itself. `default_system` is taken as it is written.
"""

_PASSED_ON = """\
They are passed to the Trainer of transformers as they are, unless a test is named; that they
arrive is tested for each by `tests/train/test_arguments.py::test_each_key_arrives`."""

_FOREIGN = """\
## Keys of LLaMA-Factory that this version does not have

At its default, or switched off, such a key says nothing. Otherwise `refuse` is an error, because the
training would not be the one asked for, and `ignore` a warning. To `prefkit export`, `chat` and `api` both
are a warning, unless the model or its answers would be others, or the key holds a secret.
"""


def _key_row(key: Any, test: str) -> list[str]:
    from prefkit.config.describe import readers, spell, type_of

    help = f"{key.help} LLaMA-Factory: {key.elsewhere}." if key.elsewhere else key.help
    stages, read = ("dpo", "kto", "rm", "ppo"), readers(key)
    if read[:4] == stages:
        read = ("all stages", *read[4:])
    default = "required" if key.required else _code(spell(key.default))
    return [f"`{key.name}`", type_of(key), default, ", ".join(read), help, _code(test.removeprefix("tests/"))]


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines) + "\n"


def main(arguments: list[str]) -> int:
    """Write the files, or compare them."""
    different = 0
    renders = {ARGUMENTS: render_arguments, KEYS_DOC: render_keys_doc, SCHEMA: render_schema}
    for path, render in renders.items():
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
