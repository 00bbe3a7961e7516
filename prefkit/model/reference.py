"""The reference policy: which weights it is, and its log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from prefkit.model.adapter import as_it_was, base_of, initial_adapter
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

    def __init__(self, policy: PeftModel, merged: Sequence[str] = (), is_initial_policy: bool = True) -> None:
        self.policy = policy
        self.merged = merged
        self.is_initial_policy = is_initial_policy

    def describe(self) -> str:
        """Which weights the reference is, in words for the log."""
        base = base_of(self.policy)
        quantized = ", quantised," if getattr(base, "is_quantized", False) else ""
        merged = f" with {' and '.join(self.merged)} merged in, and" if self.merged else " with"
        which = "the new adapter" if self.merged else "the adapter"
        return f"{base.name_or_path}{quantized}{merged} {which} switched off (the same weights in memory)"

    def logps(self, model: nn.Module, batch: dict[str, Any]) -> ResponseLogps:
        """Log-probs of the batch's responses, without gradient, through the wrapped `model`."""
        with torch.no_grad(), as_it_was(self.policy), self.policy.disable_adapter():
            return response_logps(model, batch)


class InitialAdapter:
    """A frozen copy of the adapter that training goes on from, upon the policy's own base weights."""

    is_initial_policy = True

    def __init__(self, policy: PeftModel, name: str) -> None:
        self.policy = policy
        self.name = name

    def describe(self) -> str:
        """Which weights the reference is, in words for the log."""
        return f"{base_of(self.policy).name_or_path} with a frozen copy of {self.name}"

    def logps(self, model: nn.Module, batch: dict[str, Any]) -> ResponseLogps:
        """Log-probs of the batch's responses, without gradient, through the wrapped `model`."""
        with torch.no_grad(), initial_adapter(self.policy):
            return response_logps(model, batch)


class FrozenModel:
    """Another model in memory; `autocast` is the mixed precision that the policy's forward has."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        is_initial_policy: bool,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.name = name
        self.is_initial_policy = is_initial_policy
        self.autocast = autocast

    def describe(self) -> str:
        """Which weights the reference is, in words for the log."""
        return f"{self.name} (a second model in memory)"

    def logps(self, model: nn.Module, batch: dict[str, Any]) -> ResponseLogps:
        """Log-probs of the batch's responses, without gradient; the policy is not read."""
        with torch.no_grad(), self.autocast():
            return response_logps(self.model, batch)
