"""Key: what one YAML key accepts, and how the field of a dataclass becomes one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

REQUIRED: Any = dataclasses.MISSING
STAGES = ("dpo", "kto", "rm", "ppo")


@dataclass(frozen=True)
class Key:
    """What one YAML key accepts.

    `later` are values of LLaMA-Factory that this version lacks, `stages` those that read the key, `elsewhere`
    is what LLaMA-Factory does without it where that differs; a `verbatim` text keeps its `${...}`.
    """

    name: str
    group: str
    types: tuple[str, ...]
    default: Any
    help: str
    nullable: bool = False
    choices: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    reason: str = ""
    example: str = ""
    verbatim: bool = False
    stages: tuple[str, ...] = STAGES
    elsewhere: str = ""

    @property
    def required(self) -> bool:
        """Whether the YAML must give it."""
        return self.default is REQUIRED

    @property
    def limits(self) -> str:
        """Its range as an inequality, empty without one.

        >>> Key("lora_dropout", "tuning", ("float",), 0.0, "Dropout.", minimum=0, below=1).limits
        '0 <= lora_dropout < 1'
        """
        low = [f"{self.minimum:g} <="] if self.minimum is not None else []
        low += [f"{self.above:g} <"] if self.above is not None else []
        high = [f"<= {self.maximum:.10g}"] if self.maximum is not None else []
        high += [f"< {self.below:g}"] if self.below is not None else []
        return " ".join([*low, self.name, *high]) if low or high else ""

    def admits(self, number: float) -> bool:
        """Whether a number lies within the limits."""
        return (
            (self.minimum is None or number >= self.minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )


def key(default: Any, help: str, **facts: Any) -> Any:
    """A dataclass field that is a YAML key; `facts` are fields of `Key`."""
    return dataclasses.field(default=default, metadata={"help": help, **facts})


def own_keys(group: str, owner: type) -> dict[str, Key]:
    """The keys that the fields of a dataclass are."""
    hints = get_type_hints(owner)
    return {
        f.name: Key(
            f.name,
            group,
            _type_names(hints[f.name]),
            f.default,
            nullable=f.default is None or type(None) in get_args(hints[f.name]),
            **f.metadata,
        )
        for f in dataclasses.fields(owner)
    }


def _type_names(hint: Any) -> tuple[str, ...]:
    """Names of the YAML types; `list` is one of texts, `numbers` one of numbers."""
    if getattr(hint, "__origin__", None) is tuple:
        return ("numbers",) if float in get_args(hint) else ("list",)
    return tuple(t.__name__ for t in get_args(hint) or (hint,) if t is not type(None))
