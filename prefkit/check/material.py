"""All that a training reads but the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

from prefkit.check.tokens import Pieces
from prefkit.config.load import LoadedConfig
from prefkit.config.schema import RunConfig
from prefkit.data.dataset import RunData, load_data
from prefkit.data.encode import TokenizedExample
from prefkit.data.ledger import Ledger
from prefkit.data.streaming import StreamedRows
from prefkit.data.template import ChatTemplate
from prefkit.model.vision import load_template
from prefkit.train.arguments import make_training_arguments, without_engine

if TYPE_CHECKING:
    from transformers import TrainingArguments

Say = Callable[[str], None]
_MOST_STREAMED = 1000  # rows of a stream that are looked at


@dataclass(frozen=True)
class Material:
    """What a check reads before it computes anything: `rows` are those that are trained on, or the first of a
    stream, and `ledgers` are those of these rows."""

    loaded: LoadedConfig[RunConfig]
    args: TrainingArguments
    template: ChatTemplate
    data: RunData
    rows: Sequence[TokenizedExample]
    ledgers: list[Ledger]

    @property
    def config(self) -> RunConfig:
        """What the YAML says."""
        return self.loaded.config

    @property
    def shown(self) -> Sequence[TokenizedExample]:
        """The rows to show some of: those that are trained on, else those that are held out."""
        return self.rows or self.data.held_out

    @cached_property
    def pieces(self) -> Pieces:
        """How their tokens are taken apart."""
        vision = self.template.vision
        return Pieces(self.template.tokenizer, vision.token_ids if vision is not None else ())


def read_material(loaded: LoadedConfig[RunConfig], say: Say) -> Material:
    """Read it; `say` is told what takes time. Raises `UserError` for whatever would stop the training as
    well."""
    config = loaded.config
    if config.training.get("deepspeed") or config.training.get("fsdp"):
        say(
            "What is told of memory is that of one process that splits nothing; docs/scaling.md has the rest."
        )
    args = make_training_arguments(without_engine(config))
    template = load_template(config.model, config.data)
    say("Reading the data ...")
    data = load_data(config, template, args.seed, say, lambda items, title: items)
    return Material(loaded, args, template, data, *_rows_to_look_at(data, args))


def _rows_to_look_at(
    data: RunData, args: TrainingArguments
) -> tuple[Sequence[TokenizedExample], list[Ledger]]:
    """The rows that are trained on, or the first of a stream, with the ledgers."""
    if not isinstance(data.train, StreamedRows):
        return data.train, data.ledgers
    number = min(args.max_steps * args.train_batch_size * args.gradient_accumulation_steps, _MOST_STREAMED)
    rows = list(islice(data.train, number))
    settled = data.train.settle(len(rows))
    return rows, [*settled, *data.ledgers[len(settled) :]]
