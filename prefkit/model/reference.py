"""The reference policy: which weights it is, and its log-probs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from prefkit.model.adapter import base_of
from prefkit.model.policy import response_logps
from prefkit.objectives.logps import ResponseLogps

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


class Reference(Protocol):
    """What a stage asks of a reference.

    `is_initial_policy` says that by construction it equals the policy before training.
    """

    is_initial_policy: bool

    def describe(self) -> str:
        """Which weights the reference is, in words for the log."""

    def logps(self, model: nn.Module, batch: dict[str, Any]) -> ResponseLogps:
        """Log-probs of the batch's responses, without gradient."""


class AdapterOff:
    """The policy's own base weights, read with the adapter switched off: no second copy in memory."""

    is_initial_policy = True

    def __init__(self, policy: PeftModel) -> None:
        self.policy = policy

    def describe(self) -> str:
        """Which weights the reference is, in words for the log."""
        name = base_of(self.policy).name_or_path
        return f"{name} with the adapter switched off (the same weights in memory)"

    def logps(self, model: nn.Module, batch: dict[str, Any]) -> ResponseLogps:
        """Log-probs of the batch's responses, without gradient, through the wrapped `model`."""
        with torch.no_grad(), self.policy.disable_adapter():
            return response_logps(model, batch)
