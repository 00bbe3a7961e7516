"""Decode several responses to each prompt while the keys and values of a prompt are there only once.

A row of the batch is a response. For a token of each, attention reads the states of a prompt by one product
with the queries of all of its rows, and the rows' own states by one for each row. One softmax goes over the
scores of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel

from prefkit.model.architecture import read_architecture
from prefkit.model.attention import check_honoured, implementation_of, no_mask, set_implementation
from prefkit.model.growing_cache import GrowingLayer

# Architectures whose cache holds something that keys and values are made of.
_CACHE_LATENTS = {"deepseek_v3"}
# Transformers looks for sdpa, flash and flex_attention in a name.
NAME = "prefkit_decoding"


class _Layer(GrowingLayer):
    """Takes the states of prompts, then those of what follows, apart."""

    prompt_keys: Tensor
    prompt_values: Tensor
    has_prompts = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """States of prompts (B, heads, P, D), later one more of each row; returns these, or all of the rows,
        (R, heads, length, D)."""
        if not self.has_prompts:
            # As they come from the model, each product would copy them.
            self.prompt_keys, self.prompt_values = key_states.contiguous(), value_states.contiguous()
            self.has_prompts = True
            return key_states, value_states
        return super().update(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens of a prompt, padding included, and of what follows."""
        prompt = self.prompt_keys.shape[2] if self.has_prompts else 0
        return prompt + super().get_seq_length()

    def keep(self, rows: Tensor, prompts: Tensor) -> None:
        """Keep these rows and these prompts."""
        self.reorder_cache(rows)
        if len(prompts) < len(self.prompt_keys):
            self.prompt_keys, self.prompt_values = self.prompt_keys[prompts], self.prompt_values[prompts]


def can_share_prompts(model: PreTrainedModel, longest: int) -> bool:
    """Whether rows may read the states of their prompts; `longest` is the most tokens of both together."""
    architecture = read_architecture(model.config)
    return architecture.name not in _CACHE_LATENTS and architecture.find_obstacle(longest) is None


class SharedPrompts:
    """The states of B prompts and of the R rows under them, and which prompt each row is under.

    First the prompts go through the model with `cache` and its own attention, then `begin` says which rows
    there are; from then on it computes with `attention` and the keyword `shared_prompts`.
    """

    def __init__(self, model: PreTrainedModel, prompt_mask: Tensor) -> None:
        self.layers = [_Layer() for _ in range(model.config.get_text_config().num_hidden_layers)]
        self.cache = Cache(layers=[*self.layers])
        self._model, self._mask = model, prompt_mask

    def begin(self, prompt_of: Tensor) -> None:
        """Have the rows (R,) under these prompts, ascending."""
        self._prompt_of = prompt_of
        self._place()

    def keep(self, rows: Tensor) -> None:
        """Keep these of the rows, ascending, and the prompts that still have one."""
        prompts, self._prompt_of = self._prompt_of[rows].unique(return_inverse=True)
        for layer in self.layers:
            layer.keep(rows, prompts)
        self._mask = self._mask[prompts]
        self._place()

    def _place(self) -> None:
        """Lay the rows in a grid, prompts x their most rows, whose empty places hold any row."""
        counts = torch.bincount(self._prompt_of)
        rows = torch.arange(len(self._prompt_of), device=counts.device)
        most = int(counts.max())
        self.place_of_row = self._prompt_of * most + rows - (counts.cumsum(0) - counts)[self._prompt_of]
        self.row_of_place = rows.new_zeros(len(counts) * most).index_put((self.place_of_row,), rows)
        hidden = self._mask[self._prompt_of, None, None] == 0
        self.bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)

    @contextmanager
    def attention(self) -> Iterator[dict[str, Any]]:
        """What to call the model with within the block, where it attends by this."""
        AttentionInterface.register(NAME, decoding_attention)
        AttentionMaskInterface.register(NAME, no_mask)
        before = implementation_of(self._model)
        set_implementation(self._model, NAME)
        try:
            yield {"shared_prompts": self}
        finally:
            set_implementation(self._model, before)


def decoding_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    *,
    shared_prompts: SharedPrompts,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer, for one token of each row.

    query (R, heads, 1, D), key (R, kv_heads, L, D), value (R, kv_heads, L, E) of the rows alone; returns
    (R, 1, heads, E). Scores are in the number format of the model and their softmax in fp32, as in the
    models' own eager attention. Raises `RuntimeError` for anything that would change the result.
    """
    layer = shared_prompts.layers[cast("int", module.layer_idx)]
    check_honoured(module, layer.get_seq_length(), attention_mask, dropout, **kwargs)
    if key is not layer.keys or value is not layer.values:
        raise RuntimeError("the model attends to other states than those in its cache")
    rows, heads, _, width = query.shape
    kv_heads, prompt, end = key.shape[1], layer.prompt_keys.shape[2], layer.get_seq_length()
    # All of the stores: products in half precision would copy a part of them.
    keys, values = layer.stores
    query = query.view(rows, kv_heads, heads // kv_heads, width)
    of_prompts = _by_prompt(query, layer.prompt_keys.transpose(2, 3), shared_prompts)
    scores = torch.cat([of_prompts, query @ keys.transpose(2, 3)], 3).float()
    scores *= width**-0.5 if scaling is None else scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores[..., :prompt] += shared_prompts.bias
    scores[..., end:] = -torch.inf
    weights = scores.softmax(3).to(value.dtype)
    output = _by_prompt(weights[..., :prompt], layer.prompt_values, shared_prompts)
    output = output + weights[..., prompt:] @ values
    return output.reshape(rows, 1, heads, -1), None


def _by_prompt(of_rows: Tensor, of_prompts: Tensor, shared: SharedPrompts) -> Tensor:
    """(R, kv_heads, group, X) @ (B, kv_heads, X, Y) of each row's prompt, (R, kv_heads, group, Y)."""
    prompts, kv_heads, inner, outer = of_prompts.shape
    group = of_rows.shape[2]
    grid = of_rows[shared.row_of_place].view(prompts, -1, kv_heads, group, inner).transpose(1, 2)
    product = grid.reshape(prompts, kv_heads, -1, inner) @ of_prompts
    product = product.view(prompts, kv_heads, -1, group, outer).transpose(1, 2)
    return product.reshape(-1, kv_heads, group, outer)[shared.place_of_row]
