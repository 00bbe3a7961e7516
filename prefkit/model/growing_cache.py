"""Keys and values of text that is generated, in memory that is there before it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Tokens for which room is made at a time.
_ROOM = 16
# Layers whose `reorder_cache` takes, leaves out and repeats rows.
_SELECTABLE = {
    *(DynamicLayer, DynamicSlidingWindowLayer, DummyLayer, LinearAttentionLayer),
    *(LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer),
}


class GrowingLayer(DynamicLayer):
    """transformers' `DynamicLayer` that writes new states beside the old ones; its own copies all of them
    for each token. `keys` and `values`, (rows, heads, length, D), are views of `stores`, whose other places
    are 0 or hold what was."""

    keys: Tensor
    values: Tensor
    stores: tuple[Tensor, Tensor]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add states, (rows, heads, new, D); returns all, (rows, heads, length, D)."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self._keep(key_states, value_states)
            self.is_initialized = True
            return key_states, value_states
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self.stores[0].shape[2]:
            self.stores = _enlarge(self.keys, end + _ROOM), _enlarge(self.values, end + _ROOM)
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store[:, :, start:end] = states
        self.keys, self.values = (store[:, :, :end] for store in self.stores)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, (new rows,), in this order; a row may be there more than once."""
        if self.is_initialized:
            self._keep(self.keys[beam_idx], self.values[beam_idx])

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        self.stores = keys, values
        self.keys, self.values = keys, values


def _enlarge(states: Tensor, length: int) -> Tensor:
    larger = states.new_zeros(*states.shape[:2], length, states.shape[3])
    larger[:, :, : states.shape[2]] = states
    return larger


class RepeatedPrompts:
    """States of which every row has all, those of its prompt included, for any model whose layers allow it.

    Prompts (B rows) go through the model with `cache`, then `begin` makes the rows that go on from them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.cache.layers = [
            GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.cache.layers
        ]

    def begin(self, prompt_of: Tensor) -> None:
        """Have the rows (R,) go on from these prompts."""
        self.keep(prompt_of)

    def keep(self, rows: Tensor) -> None:
        """Keep these of the rows, (new rows,), in this order; one may be there more than once."""
        self.cache.reorder_cache(cast("torch.LongTensor", rows))

    def can_repeat(self) -> bool:
        """Whether its rows can be repeated and left out."""
        layers = self.cache.layers
        return all(isinstance(layer, GrowingLayer) or type(layer) in _SELECTABLE for layer in layers)

    @contextmanager
    def attention(self) -> Iterator[dict[str, Any]]:
        """What to call the model with within the block."""
        yield {}
