"""References for stages that are tried by themselves."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from prefkit.data.packing import Layout
from prefkit.model.architecture import read_architecture
from prefkit.model.attention import use_shared_prompts
from prefkit.model.policy import attach_logps_forward
from prefkit.model.reference import FrozenModel
from prefkit.objectives.logps import ResponseLogps, sum_by_response
from tests.conftest import make_model


class GivenReference:
    """Has the log-probs of response tokens that it is made with; `owner` says whose each is."""

    is_initial_policy = False

    def __init__(self, token_logps: Tensor, owner: Tensor) -> None:
        self.found = sum_by_response(token_logps, owner, int(owner.max()) + 1)

    def describe(self) -> str:
        return "given by hand"

    def logps(self, model: Any, batch: Any) -> ResponseLogps:
        return self.found


def model_and_reference(layout: Layout, factor: float) -> tuple[Any, FrozenModel]:
    """A tiny policy that takes packed batches, and a reference whose weights are `factor` times its own."""
    model = make_model()
    if layout == "shared":
        use_shared_prompts(model, "auto")
    attach_logps_forward(model, read_architecture(model.config))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weights in other.parameters():
            weights.mul_(factor)
    return model, FrozenModel(other, "other", False, nullcontext)
