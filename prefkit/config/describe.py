"""What each key is, in words: for `prefkit keys`, `docs/keys.md` and the JSON Schema."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from typing import Any

from .errors import UserError
from .foreign import FOREIGN, Foreign
from .key import Key
from .schema import GROUPS, KEYS
from .suggest import SYNONYMS, nearest
from .uses import EXPORT, SCORING, TALKING

TRAINING_SENTENCE = "Keys of transformers.TrainingArguments, and warmup_ratio."
_WIDTH = 88


def readers(key: Key) -> tuple[str, ...]:
    """Who reads a key: the stages of training, and the other verbs.

    >>> readers(KEYS["pref_loss"]), readers(KEYS["temperature"]), readers(KEYS["export_dir"])
    (('dpo',), ('ppo', 'chat', 'api'), ('export',))
    """
    stages = () if key.group == "export" else key.stages
    is_used = key.group in ("model", "data", "generation", "export")
    talking = ("chat", "api") if is_used and key.name not in TALKING.unused else ()
    scoring = ("score", "serve") if is_used and key.name not in SCORING.unused else ()
    export = ("export",) if is_used and key.name not in EXPORT.unused else ()
    return (*stages, *talking, *scoring, *export)


def type_of(key: Key) -> str:
    """Its type and limits, or the values it may have.

    >>> type_of(KEYS["lora_rank"]), type_of(KEYS["export_device"])
    ('int, 1 <= x', 'cpu, auto')
    """
    if key.choices:
        return ", ".join(key.choices)
    names = {"numbers": "list of numbers"}
    types = " or ".join(names.get(t, t) for t in key.types if not (t == "int" and "float" in key.types))
    limits = key.limits.replace(key.name, "x")
    return ", ".join(part for part in (types, limits) if part)


def spell(value: Any) -> str:
    """A default as YAML spells it; empty where there is none."""
    value = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
    return "" if value in ("", None) else json.dumps(value).strip('"')


def explain(word: str = "") -> str:
    """What `prefkit keys WORD` prints: the key of that name, else those whose names hold the word, else
    that of the nearest name; without a word, every key by group.

    Raises `UserError` where nothing is near.
    """
    word = word.strip().lower().replace("-", "_")
    if not word:
        return _list_all()
    if word in KEYS or word in FOREIGN:
        return _explain_one(word)
    found = [name for name in (*KEYS, *FOREIGN) if word in name]
    near = SYNONYMS.get(word) or nearest(word, [*KEYS, *FOREIGN])
    if near and (word in SYNONYMS or not found):
        also = f"\n\nIn their names: {', '.join(found)}" if found else ""
        return f"{word} is no key; this one is meant, it seems:\n\n{_explain_one(near)}{also}"
    if not found:
        raise UserError(f"no key has {word} in its name: `prefkit keys` lists them all")
    lines = [_one_line(name) for name in dict.fromkeys(found)]
    return "\n".join([f"{len(lines)} keys with {word} in their names:", "", *lines])


def _list_all() -> str:
    parts = []
    for group in (*GROUPS, "training"):
        sentence = (GROUPS[group].__doc__ or "") if group in GROUPS else TRAINING_SENTENCE
        names = [name for name, key in KEYS.items() if key.group == group]
        parts += [f"{group.capitalize()}: {sentence}", *map(_one_line, names), ""]
    kept = ", ".join(sorted(name for name in FOREIGN if name not in KEYS))
    parts += ["Not in this version (`prefkit keys NAME` says what to do instead):", *_wrap(kept)]
    return "\n".join(parts)


def _one_line(name: str) -> str:
    """Name, default and the start of the sentence, on one line of a terminal."""
    if name in KEYS and not KEYS[name].required:
        default, help = spell(KEYS[name].default), KEYS[name].help
    elif name in KEYS:
        default, help = "required", KEYS[name].help
    else:
        default, help = FOREIGN[name].verdict, FOREIGN[name].hint
    room = max(20, _WIDTH + 12 - max(30, len(name)) - max(10, len(default)))
    text = help if len(help) <= room else help[: room - 3].rstrip() + "..."
    return f"  {name:30} {default:10} {text}".rstrip()


def _explain_one(name: str) -> str:
    key, foreign = KEYS.get(name), FOREIGN.get(name)
    lines = [name]
    if key is not None:
        lines += _wrap(key.help)
        facts = {
            "type": type_of(key),
            "default": "none: it must be given" if key.required else spell(key.default) or "null",
            "read by": "" if foreign else ", ".join(readers(key)),
            "LLaMA-Factory": key.elsewhere,
            "not yet": ", ".join(key.later),
        }
        lines += [f"  {label:13} {value}" for label, value in facts.items() if value]
    if foreign is not None:
        lines += _wrap(_verdict(foreign))
    return "\n".join(lines)


def _verdict(foreign: Foreign) -> str:
    default = spell(foreign.default)
    silent = f"At its default ({default}) it says nothing" if default else "Absent or off it says nothing"
    what = "is an error" if foreign.verdict == "refuse" else "is ignored with a warning"
    return f"{silent}; otherwise it {what}: {foreign.hint}."


def _wrap(text: str) -> Iterable[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
