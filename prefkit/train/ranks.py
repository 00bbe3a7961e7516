"""What the ranks of a run do one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from accelerate import PartialState

from prefkit.config.schema import RunConfig
from prefkit.data.dataset import RunData, load_data
from prefkit.data.rows import Say, Track
from prefkit.data.template import ChatTemplate

if TYPE_CHECKING:
    from transformers import TrainingArguments


def load_data_once(
    config: RunConfig, args: TrainingArguments, template: ChatTemplate, say: Say, track: Track
) -> RunData:
    """The data of a run, encoded by rank 0: the others find what it has kept. On a node that does not see
    the disk of rank 0 the first rank encodes for its node. A stream is read by each rank. Raises `DataError`.
    """
    if args.process_index:
        config = replace(config, data=replace(config.data, overwrite_cache=False))  # rank 0 has done it
    with _in_turns(args):
        return load_data(config, template, args.seed, say, track)


@contextmanager
def _in_turns(args: TrainingArguments) -> Iterator[None]:
    """Rank 0 first, then the first rank of each other node, then all others."""
    waits = 0 if args.process_index == 0 else 1 if args.local_process_index == 0 else 2
    state = PartialState()
    for _ in range(waits):
        state.wait_for_everyone()
    try:
        yield
    finally:
        for _ in range(2 - waits):
            state.wait_for_everyone()
