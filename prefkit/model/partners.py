"""Log-probs of judged responses, and, without gradient, of the partners that KTO estimates its KL by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prefkit.data.packing import Segments
from prefkit.data.picking import pick, pick_continuing
from prefkit.model.policy import response_logps
from prefkit.objectives.logps import ResponseLogps, sum_by_response


def judged_logps(model: nn.Module, batch: dict[str, Any]) -> ResponseLogps:
    """Log-probs of all responses of a packed batch; those of partners have no gradient, and cost none.

    In the layout `shared` the judged responses and their prompts are a batch of their own, and partners are
    read on from keys and values that it leaves. In `repeat` either is a batch. Where gradients are off, all
    are one batch.
    """
    if not torch.is_grad_enabled():
        return response_logps(model, batch)
    numbers = range(batch["num_responses"])
    partners = [number for number in numbers if batch["labels"][number] == "partner"]
    judged = [number for number in numbers if batch["labels"][number] != "partner"]
    own = pick(batch, judged)
    if batch["segments"] is None:
        learned = response_logps(model, own)
        with torch.no_grad():
            others = response_logps(model, pick(batch, partners))
    else:
        states = PromptStates(own["segments"])
        learned = response_logps(model, own, states.keep)
        with torch.no_grad():
            others = response_logps(model, pick_continuing(batch, partners), states.read)
    parts: dict[int, Tensor] = {}
    for which, found in ((judged, learned), (partners, others)):
        lengths = [batch["response_lengths"][number] for number in which]
        parts |= zip(which, found.token_logps.split(lengths), strict=True)
    together = torch.cat([parts[number] for number in numbers])
    return replace(sum_by_response(together, batch["owner"], len(numbers)), router_loss=learned.router_loss)


class PromptStates:
    """Keys and values of the prompts of one forward, for a later one of further responses under them.

    Of the prompts that `segments` describe, all tokens but the last are kept, one prompt after the other, as
    `pick_continuing` counts them. They carry no gradient, and what dropout there was in the first forward.
    """

    def __init__(self, segments: Segments) -> None:
        self.places = [place for start, end, _ in segments for place in range(start, end - 1)]
        self._layers: dict[nn.Module, tuple[Tensor, Tensor] | None] = {}

    def keep(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what a layer has of the prompts. What activation checkpointing computes again in the backward,
        after it was read, is not kept again.

        Raises `RuntimeError` for two layers that are one module.
        """
        if layer not in self._layers:
            index = torch.tensor(self.places, device=key.device)
            self._layers[layer] = key.detach()[:, :, index], value.detach()[:, :, index]
        elif self._layers[layer] is not None:
            raise RuntimeError("two layers share an attention module: their keys cannot be told apart")
        return key, value

    def read(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put what was kept before keys and values, and let go of it.

        Raises `RuntimeError` for a layer of which nothing is kept, or no longer.
        """
        kept = self._layers.get(layer)
        if kept is None:
            raise RuntimeError("a layer's keys of the prompts were not kept, or have been read before")
        self._layers[layer] = None
        return torch.cat([kept[0], key], 2), torch.cat([kept[1], value], 2)
