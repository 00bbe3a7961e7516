"""How a model is spread over processes: a copy on each, or a part on each.

`zero.py` and `fully_sharded.py` are the files that name DeepSpeed and FSDP; whatever else has to know asks a
`Strategy`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather, send_to_device
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import TrainingArguments

States = dict[str, Tensor]
MASTER = "master"  # the name of the weight itself among its states


class Masters(Protocol):
    """Where the optimiser updates numbers of its own, split among processes. All of these have to call each
    method that reads or writes weights."""

    def whole(self, weights: Tensor) -> Tensor:
        """All numbers of a weight as the forward has them, on the CPU."""

    def read_states(self, weights: nn.Parameter) -> States:
        """The weight as the optimiser has it (`MASTER`) and its states, whole, on the CPU."""

    def write_states(self, weights: nn.Parameter, states: States) -> None:
        """Put back what `read_states` gave."""

    def scalars(self) -> dict[str, Any]:
        """What the optimiser knows besides, as JSON."""

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Put back what `scalars` gave."""


class Strategy(Protocol):
    """A way of spreading a model over processes.

    `name` is what the user calls it. Where it `splits_weights`, no process holds the model whole, and all of
    them have to call it equally often. `masters` reads and writes the numbers that the optimiser updates,
    where these are its own: always where weights are split. `one_dtype` is the number format that all weights
    have to have, if so, in which the forward computes without mixed precision, and `computes_early` says
    whether the policy can be called before the Trainer has wrapped it.
    """

    splits_weights: bool
    computes_early: bool

    @property
    def name(self) -> str:
        """As the class says."""

    @property
    def masters(self) -> Masters | None:
        """As the class says."""

    @property
    def one_dtype(self) -> torch.dtype | None:
        """As the class says."""

    def loading_whole(self) -> AbstractContextManager[Any]:
        """Within it, models are loaded whole on each process, whatever is done with the policy."""

    def computing(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Within it, the policy can be called before the Trainer has wrapped it, if `computes_early`."""

    def share(self, model: nn.Module) -> nn.Module:
        """A second model that is not trained, ready to be called, and split where the policy is."""

    def use(self, accelerator: Any, policy: nn.Module) -> None:
        """Set up what wraps the policy, before it does."""

    def begin(self, trainer: Any) -> None:
        """Take notice that the Trainer has wrapped model and optimiser."""

    def own_part(self, weights: Tensor) -> Tensor:
        """The numbers of a weight, or of a state of the optimiser, that this process holds."""


@dataclass
class Replicated:
    """The model is whole on each process: one alone, or several whose gradients are averaged (DDP)."""

    args: TrainingArguments
    splits_weights = False
    computes_early = True
    masters = None
    one_dtype = None

    @property
    def name(self) -> str:
        """DDP, where there are several processes."""
        return "DDP" if self.args.world_size > 1 else "alone"

    def loading_whole(self) -> AbstractContextManager[Any]:
        """Nothing: it is whole anyway."""
        return nullcontext()

    def computing(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Nothing: the policy can always be called."""
        return nullcontext()

    def share(self, model: nn.Module) -> nn.Module:
        """The model on the device of this process."""
        return model.to(self.args.device)

    def use(self, accelerator: Any, policy: nn.Module) -> None:
        """Nothing to set up."""

    def begin(self, trainer: Any) -> None:
        """Nothing to take notice of."""

    def own_part(self, weights: Tensor) -> Tensor:
        """The weight itself."""
        return weights.detach()


def choose_strategy(args: TrainingArguments) -> Strategy:
    """How the YAML, or the launcher, wants the model to be spread."""
    if getattr(args, "deepspeed_plugin", None) is not None:
        from prefkit.train.zero import Zero

        return Zero(args)
    if args.fsdp or wants_fsdp(os.environ):
        from prefkit.train.fully_sharded import FullySharded

        return FullySharded(args)
    return Replicated(args)


def wants_fsdp(environment: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` says that weights are split by FSDP."""
    return _is_true(environment.get("ACCELERATE_USE_FSDP", ""))


def wants_deepspeed(environment: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` says that DeepSpeed trains."""
    return _is_true(environment.get("ACCELERATE_USE_DEEPSPEED", ""))


def _is_true(word: str) -> bool:
    return word.lower() in ("1", "true", "yes", "on")


def together(strategy: Strategy, choose: Callable[[Tensor], Tensor], number: int) -> int:
    """`choose` of the numbers of all processes where these have to call a model equally often; else the
    number itself."""
    if not strategy.splits_weights:
        return number
    here = send_to_device(torch.tensor([number]), PartialState().device)
    found: Any = gather(here)
    return int(choose(found))
