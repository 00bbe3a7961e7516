"""FSDP2, by way of accelerate: each process holds a part of every weight (Zhao et al. 2023,
https://arxiv.org/abs/2304.11277)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from prefkit.config.errors import UserError
from prefkit.train.strategy import MASTER, Masters, States, wants_fsdp

if TYPE_CHECKING:
    from transformers import TrainingArguments


def settings_of_fsdp(given: Any, fsdp: Any) -> dict[str, Any]:
    """`fsdp_config` with what prefkit wants unless it says otherwise: FSDP2, a unit for each layer."""
    config = {name.removeprefix("fsdp_"): value for name, value in (given or {}).items()}
    config.setdefault("version", 2)
    config.setdefault("cpu_ram_efficient_loading", False)
    if isinstance(fsdp, str):
        config.setdefault("reshard_after_forward", "shard_grad_op" not in fsdp)
    return config


def check_fsdp(has_accelerator: bool, num_processes: int) -> None:
    """Raises `UserError` where the libraries would train something else: on a CPU they leave weights whole
    without a word."""
    if not has_accelerator:
        raise UserError("fsdp: runs on GPUs only; on a CPU write deepspeed: with ZeRO stage 3, or remove it")
    if num_processes < 2:
        raise UserError(
            "fsdp: splits weights among several processes, and this is one: start it with "
            "FORCE_TORCHRUN=1 NPROC_PER_NODE=..., or remove it"
        )


def check_accelerate_config(environment: Mapping[str, str]) -> None:
    """Raises `UserError` where `accelerate launch` was given settings of FSDP that are not taken."""
    if wants_fsdp(environment) and environment.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate's config asks for FSDP1: write fsdp_version: 2 in it")
    if environment.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise UserError("accelerate's config: write fsdp_cpu_ram_efficient_loading: false in it")


def sum_as_they_come(accelerator_config: Any) -> Any:
    """accelerate's settings with gradients summed over processes in each micro-batch, unless they say else.

    Else each process would keep all gradients whole until the last micro-batch of a step.
    """
    if not isinstance(accelerator_config, dict | None):
        return accelerator_config
    given = accelerator_config or {}
    accumulation = {"sync_each_batch": True, **(given.get("gradient_accumulation_kwargs") or {})}
    return {**given, "gradient_accumulation_kwargs": accumulation}


class FullySharded:
    """The model as FSDP2 splits it: weights are DTensors."""

    name = "FSDP2"
    splits_weights = True
    computes_early = False  # on a device a whole model may not fit
    one_dtype = None

    def __init__(self, args: TrainingArguments) -> None:
        self.args = args
        self._accelerator: Any = None
        self._optimizer: Any = None

    @property
    def masters(self) -> Masters:
        """It reads and writes them itself."""
        return self

    def loading_whole(self) -> AbstractContextManager[Any]:
        """Nothing: weights are split after they are loaded."""
        return nullcontext()

    def computing(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Nothing: until the Trainer splits it, the policy is whole."""
        return nullcontext()

    def share(self, model: nn.Module) -> nn.Module:
        """Split as the policy is."""
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        assert self._accelerator is not None, "the Trainer comes first"
        shared: nn.Module = fsdp2_prepare_model(self._accelerator, model)
        return shared

    def use(self, accelerator: Any, policy: nn.Module) -> None:
        """Let the model return what it computes as it is.

        accelerate would have log-probs cast to bfloat16, and gradients summed in it.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy

        self._accelerator = accelerator
        plugin = accelerator.state.fsdp_plugin
        if (precision := plugin.mixed_precision_policy) is not None:
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=precision.param_dtype, reduce_dtype=torch.float32, output_dtype=None
            )

    def begin(self, trainer: Any) -> None:
        """Weights are split from now on."""
        self._optimizer = trainer.optimizer
        # A rollout calls the model under the root, which must know its units by then.
        trainer.model_wrapped._get_fsdp_state()._lazy_init()

    def whole(self, weights: Tensor) -> Tensor:
        """Gathered from all processes."""
        return _full(weights)

    def own_part(self, weights: Tensor) -> Tensor:
        """The part of this process."""
        part: Tensor = weights.detach()
        return part.to_local() if hasattr(part, "to_local") else part

    def read_states(self, weights: nn.Parameter) -> States:
        """The weight and its states, each gathered."""
        states = self._optimizer.state[weights]
        return {
            MASTER: _full(weights),
            **{k: _full(v) for k, v in states.items() if _is_split(v)},
        }

    def write_states(self, weights: nn.Parameter, states: States) -> None:
        """Each process takes its part."""
        own = dict(states)
        with torch.no_grad():
            weights.copy_(_like(own.pop(MASTER), weights))
        self._optimizer.state[weights].update({k: _like(v, weights) for k, v in own.items()})

    def scalars(self) -> dict[str, Any]:
        """Numbers of steps, and rates of the groups."""
        counted: dict[str, float] = {}
        for state in self._optimizer.state.values():
            counted |= {k: float(_full(v)) for k, v in state.items() if not _is_split(v)}
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self._optimizer.param_groups]
        return {"steps": counted, "groups": groups}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Put them back."""
        for group, saved in zip(self._optimizer.param_groups, scalars["groups"], strict=True):
            group.update(saved)
            for weights in group["params"]:
                for name, value in scalars["steps"].items():
                    self._optimizer.state[weights][name] = torch.tensor(value)


def _full(value: Any) -> Tensor:
    full = value.full_tensor() if hasattr(value, "full_tensor") else value
    # A copy, since what has been gathered may still be on its way.
    return full.detach().to("cpu", copy=True) if torch.is_tensor(full) else torch.tensor(full)


def _is_split(value: Any) -> bool:
    """Whether a state is split as its weight is, rather than being a number."""
    return isinstance(value, DTensor)


def _like(value: Tensor, weights: Any) -> Tensor:
    """A whole tensor split as a weight is."""
    here = value.to(weights.device)
    if not hasattr(weights, "device_mesh"):
        return here
    return distribute_tensor(here, weights.device_mesh, weights.placements)
