"""DeepSpeed: ZeRO splits the states of the optimiser (stage 1), gradients (2) and weights (3) over processes
(Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054).

Its checkpoints are pickles, and are not written: states are put together weight by weight instead, so that a
run is gone on with by any number of processes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prefkit.config.errors import UserError
from prefkit.model.adapter import base_of
from prefkit.model.partitioned import gathered, is_partitioned
from prefkit.train.launched import free_port
from prefkit.train.strategy import MASTER, Masters, States

if TYPE_CHECKING:
    from transformers import TrainingArguments

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def start_deepspeed(on_cpu: bool) -> None:
    """Get ready for the `deepspeed` of a YAML, before weights are read: a process that no launcher has
    started becomes a group of one. Raises `UserError` where DeepSpeed is not installed."""
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"deepspeed: not installed ({error}): pip install 'prefkit[deepspeed]'") from error
    for name in ("DeepSpeed", "accelerate.accelerator"):  # the latter of accumulation, which the Trainer does
        logging.getLogger(name).setLevel(logging.ERROR)
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # accelerate warns without it
    if on_cpu:
        # Its own way of summing on one machine is compiled for minutes at the first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", verbose=False)


class Zero:
    """The model in the engine of DeepSpeed.

    Weights have one number format, that of the forward: DeepSpeed keeps fp32 beside them.
    """

    computes_early = True

    def __init__(self, args: TrainingArguments) -> None:
        self.args = args
        plugin: Any = args.deepspeed_plugin
        self.settings: dict[str, Any] = plugin.hf_ds_config.config
        self.stage = int(self.settings.get("zero_optimization", {}).get("stage", 0))
        self.name = f"DeepSpeed, ZeRO stage {self.stage}"
        self.splits_weights = self.stage == 3
        self.one_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self._optimizer: Any = None  # until the engine is there

    @property
    def masters(self) -> Masters:
        """It reads and writes them itself."""
        return self

    @contextmanager
    def loading_whole(self) -> Iterator[None]:
        """Without the partitioning of stage 3."""
        from transformers.integrations import deepspeed as of_transformers

        if not self.splits_weights:
            yield
            return
        plugin: Any = self.args.deepspeed_plugin
        of_transformers.unset_hf_deepspeed_config()
        try:
            yield
        finally:
            of_transformers.set_hf_deepspeed_config(plugin.hf_ds_config)

    def computing(self, model: nn.Module) -> AbstractContextManager[Any]:
        """In stage 3 each module gets its weights while it computes, until the engine does so."""
        return _gathering(model) if self.splits_weights and self._optimizer is None else nullcontext()

    def share(self, model: nn.Module) -> nn.Module:
        """In stage 3 an engine of its own, offloaded where the policy is."""
        if not self.splits_weights:
            return model.to(self.args.device)
        import deepspeed

        kept = ("stage", "offload_param", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size")
        zero = self.settings["zero_optimization"]
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {name: zero[name] for name in kept if zero.get(name, "auto") != "auto"},
        }
        settings |= {name: self.settings[name] for name in ("bf16", "fp16") if name in self.settings}
        engine, *_ = deepspeed.initialize(model=model, config=settings)
        engine.eval()
        shared: nn.Module = engine
        return shared

    def use(self, accelerator: Any, policy: nn.Module) -> None:
        """In stage 3 the head for tokens gathers its weights, an adapter's too, once for all its chunks, of
        which ranks have other numbers."""
        head = base_of(policy).get_output_embeddings()
        if self.splits_weights and head is not None:
            from deepspeed.utils import set_z3_leaf_module

            set_z3_leaf_module(head, True)

    def begin(self, trainer: Any) -> None:
        """The engine is there."""
        self._optimizer = trainer.model_wrapped.optimizer

    def whole(self, weights: Tensor) -> Tensor:
        """Gathered from all processes."""
        with gathered(weights):
            return weights.detach().to("cpu", copy=True)

    def own_part(self, weights: Tensor) -> Tensor:
        """The partition of this process."""
        part: Tensor = getattr(weights, "ds_tensor", weights)
        return part.detach()

    def read_states(self, weights: nn.Parameter) -> States:
        """By DeepSpeed's own reading of single weights."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link()
        found = {MASTER: safe_get_full_fp32_param(weights)}
        for name in self._state_names():
            found[name] = safe_get_full_optimizer_state(weights, name)
        return {name: value.detach().to("cpu", copy=True) for name, value in found.items()}

    def write_states(self, weights: nn.Parameter, states: States) -> None:
        """By DeepSpeed's own writing of single weights."""
        from deepspeed import utils

        here = {name: value.to(self.args.device) for name, value in states.items()}
        with torch.no_grad(), gathered(weights, writes=True):
            weights.copy_(here[MASTER])
        set_master, set_state = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
        if is_partitioned(weights):
            # Its setting of whole weights forgets that the last partition is padded.
            set_master, set_state = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
            here = {name: self._own_part_of(value, weights) for name, value in here.items()}
        set_master(weights, here.pop(MASTER).float())
        self._make_states(here)
        for name, value in here.items():
            set_state(weights, value, name)

    def _own_part_of(self, value: Tensor, weights: Any) -> Tensor:
        """Of a whole tensor the partition that this process has of a weight, padded with zeros."""
        size = weights.ds_tensor.numel()
        part = value.flatten()[size * self.args.process_index :][:size]
        return nn.functional.pad(part, (0, size - len(part)))

    def scalars(self) -> dict[str, Any]:
        """Numbers of steps, rates of the groups, and the scale of an fp16 loss."""
        scaler = getattr(self._optimizer, "loss_scaler", None)
        states = list(self._optimizer.state.values())
        counted = {k: float(v) for k, v in (states[0] if states else {}).items() if _is_number(v)}
        groups = [
            {k: v for k, v in group.items() if k != "params" and not torch.is_tensor(v)}
            for group in self._optimizer.param_groups
        ]
        known = {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)}
        return {"steps": counted, "groups": groups, "scaler": known}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Put them back."""
        for state in self._optimizer.state.values():
            for name, value in scalars["steps"].items():
                now = state.get(name, 0.0)
                state[name] = now.new_tensor(value) if torch.is_tensor(now) else type(now)(value)
        for group, saved in zip(self._optimizer.param_groups, scalars["groups"], strict=True):
            group.update(saved)
        for name, value in scalars["scaler"].items():
            setattr(self._optimizer.loss_scaler, name, value)

    @property
    def _flats(self) -> list[Tensor]:
        """The fp32 weights of this process, a tensor for each group, whose states the optimiser has."""
        names = (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        )
        found: list[Tensor] = next(
            getattr(self._optimizer, it) for it in names if hasattr(self._optimizer, it)
        )
        return found

    def _state_names(self) -> list[str]:
        """Names of the states that have a number for each weight, the same on all processes."""
        states = self._optimizer.state
        return sorted({name for flat in self._flats for name in _tensors(states.get(flat, {}))})

    def _make_states(self, names: Iterable[str]) -> None:
        """Make the states that the first step would make, which are written over."""
        fused = any(group.get("fused") or group.get("capturable") for group in self._optimizer.param_groups)
        for flat in self._flats:
            state = self._optimizer.state[flat]
            for name in names:
                if name not in state:
                    state[name] = torch.zeros_like(flat)
            if names and "step" not in state:
                state["step"] = torch.zeros((), device=flat.device if fused else "cpu")
        self._link()

    def _link(self) -> None:
        """Let each weight know its states: stages 1 and 2 do so once, before all groups have some."""
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()


def _tensors(state: dict[str, Any]) -> States:
    return {k: v for k, v in state.items() if torch.is_tensor(v) and v.dim() > 0}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (torch.is_tensor(value) and value.dim() == 0)


@contextmanager
def _gathering(model: nn.Module) -> Iterator[None]:
    """Each module of the model gathers its own weights before it computes, and lets go of them afterwards."""
    handles = []
    for module in model.modules():
        if own := [it for it in module.parameters(recurse=False) if is_partitioned(it)]:
            enter, leave = _hooks(own)
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(weights: list[Any]) -> tuple[Callable[..., None], Callable[..., None]]:
    opened: list[AbstractContextManager[Any]] = []

    def enter(*_: Any) -> None:
        context = gathered(*weights)
        context.__enter__()
        opened.append(context)

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    return enter, leave
