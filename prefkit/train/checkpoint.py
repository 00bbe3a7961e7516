"""Checkpoints without pickle: a resumed run is the same run.

A checkpoint is a folder of safetensors and JSON, see `checkpoint_files`. What a run needs besides weights:

    optimizer.safetensors   tensors of the optimiser, keyed "index/name"; the rest is in optimizer.json
    states-<n>.safetensors  instead of it where DeepSpeed or FSDP2 trains, see `states`; with states.json
    scheduler.json          and scaler.json where fp16 scales the loss
    rng_state_<rank>.json   generators of one process, its losses since the last log line, its `own_state`
    stage_state.json        what the stage hands to `extra_state`
    run.json                of which run it is: `identity`, by which a resumed run is known as the same
    trainer_state.json      and training_args.json, without tokens

A pickle can run code, so none is written and a folder that holds one is refused. The sums guard against
accidents, not against someone who can rewrite the manifest as well.
"""

from __future__ import annotations

import logging
import random
import shutil
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import ExportableState, TrainerState

from prefkit.files import fsync_files, naming
from prefkit.model.adapter import TRAINED
from prefkit.model.reward import VALUE_HEAD
from prefkit.model.value import NAME as VALUE_NAME
from prefkit.model.value import load_value_head, save_value_head
from prefkit.runs.identity import RUN_FILE
from prefkit.train.checkpoint_files import (
    CheckpointError,
    blame,
    find_newest_checkpoint,
    publish,
    read_json,
    remove_leftovers,
    rotate,
    verify_checkpoint,
    write_json,
)
from prefkit.train.states import STATES, gather_weights, load_states, save_states
from prefkit.train.strategy import Strategy

logger = logging.getLogger(__name__)

INFINITE = (float("inf"), float("-inf"))
LOSS_COUNTERS = ("_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step")


def _undo_casts(optimizer: Any, saved: dict[int, dict[str, Any]]) -> None:
    """Give the optimiser's tensors the dtype they had; torch loads them in that of their parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in saved.items():
        current = optimizer.state[parameters[index]]
        for name in current.keys() & state.keys():
            if isinstance(current[name], Tensor) and current[name].dtype != state[name].dtype:
                current[name] = state[name].to(current[name].device)


def _check_adapter(policy: PeftModel, folder: Path) -> None:
    """Raises LookupError unless each weight of the trained adapter is there: peft would not say so."""
    wanted = get_peft_model_state_dict(policy, adapter_name=TRAINED, save_embedding_layers=False)
    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as tensors:
        absent = sorted(wanted.keys() - set(tensors.keys()))
    if absent:
        raise LookupError(f"{', '.join(absent[:3])} is missing ({len(absent)} in all)")


def _torch_generators(device: torch.device) -> dict[str, Any]:
    accelerator = {} if device.type == "cpu" else {device.type: torch.get_device_module(device)}
    return {"cpu": torch.random, **accelerator}


class PickleFreeCheckpoints(Trainer):
    """Mixin that goes before `transformers.Trainer` and replaces how it saves and resumes.

    One process or several, on one shared file system, however their `strategy` spreads the model.
    `train(resume_from_checkpoint=True)` takes the newest whole checkpoint of `output_dir`; a path takes that
    one or raises CheckpointError. A resumed run ends with the weights, states, log lines and summary of a run
    that was never stopped. Checkpoints are not pushed to the Hub. `identity` is written into each, where it
    is given.
    """

    identity: dict[str, Any] | None = None
    strategy: Strategy

    def extra_state(self) -> dict[str, Any]:
        """What a stage must remember across a resume, as JSON values; saved by the main process."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back on every process what `extra_state` gave, before the first resumed step."""

    def own_state(self) -> dict[str, Any]:
        """What each process must remember for itself, as JSON values."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take back what `own_state` of the same process gave, before the first resumed step."""

    def load_own_states(self, states: list[dict[str, Any]]) -> None:
        """Take back what `own_state` gave on each of another number of processes."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, on request from a verified checkpoint. Raises CheckpointError if it is not whole."""
        self._started = time.time()
        output_dir = str(self.args.output_dir)
        if self.args.should_save and (names := remove_leftovers(output_dir)):
            logger.warning("cleared what an interrupted save left: %s", ", ".join(names))
        if self.args.push_to_hub:
            logger.warning("push_to_hub: checkpoints stay here, only a finished model can be pushed")
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            newest = find_newest_checkpoint(output_dir)
            if newest is None:
                raise CheckpointError(f"{output_dir} has no whole checkpoint to resume from")
            resume_from_checkpoint = str(newest)
        elif resume_from_checkpoint:
            verify_checkpoint(resume_from_checkpoint)
        self._resume_from = str(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(self._resume_from, *args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write `checkpoint-<step>` as a whole, then delete what exceeds `save_total_limit`.

        Raises OSError when the disk does not take it; the older ones are as they were then, and what had
        been written is gone, since a full disk would stay full.
        """
        run_dir = Path(self._get_output_dir(trial))
        staging = run_dir / f".saving-{self.state.global_step}"
        try:
            with naming(staging):
                self._write_checkpoint(run_dir, staging)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            raise

    def _write_checkpoint(self, run_dir: Path, staging: Path) -> None:
        final = run_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.store_flos()
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if best == final or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        self.save_model(str(staging), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_rng_state(str(staging))
        if self.args.should_save:
            stateful: list[Any] = [*self.callback_handler.callbacks, self.control]
            stateful = [callback for callback in stateful if isinstance(callback, ExportableState)]
            self.state.stateful_callbacks = TrainerState(stateful_callbacks=stateful).stateful_callbacks
            self.state.save_to_json(str(staging / "trainer_state.json"))
            if self.identity is not None:
                write_json(staging / RUN_FILE, self.identity)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            fsync_files(run_dir)  # the log lines up to here
            publish(staging, final)
            self._rotate(run_dir, final)
        self.accelerator.wait_for_everyone()

    def _rotate(self, run_dir: Path, newest: Path) -> None:
        """Delete what exceeds `save_total_limit`, but neither the newest checkpoint nor the best."""
        best = Path(self.state.best_model_checkpoint or newest)
        rotate(run_dir, self.args.save_total_limit, {newest.name, best.name})

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Let the Trainer wrap model and optimiser; where these keep masters, take back their states here."""
        own = self.strategy.masters is not None
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, None if own else resume_from_checkpoint
        )
        self.strategy.begin(self)
        if own:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what `_save` does, put together from all processes."""
        masters, weights = self.strategy.masters, None
        if masters is not None and self.strategy.splits_weights:
            model = self.accelerator.unwrap_model(self.model)
            weights = gather_weights(masters, model, keeps=self.args.should_save)
        self._save(output_dir, weights)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save model, tokenizer or processor, and the arguments as JSON."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        save_value_head(model, folder, state_dict)  # first: transformers takes it out of `state_dict`
        if isinstance(model, PeftModel):
            # The trained adapter alone, not the frozen copy of it that may stand beside it.
            model.save_pretrained(
                str(folder), selected_adapters=[TRAINED], save_embedding_layers=False, state_dict=state_dict
            )
        elif isinstance(model, PreTrainedModel):
            model.save_pretrained(str(folder), state_dict=state_dict)
        else:
            save_file(state_dict or model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))
        arguments = {key: value for key, value in self.args.to_dict().items() if not key.endswith("_token")}
        write_json(folder / "training_args.json", arguments)

    def _stateful_parts(self) -> dict[str, Any]:
        parts = {"scheduler.json": self.lr_scheduler, "scaler.json": self.accelerator.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the state of the optimiser, the scheduler, the loss scaler and the stage."""
        folder = Path(output_dir)
        if (masters := self.strategy.masters) is not None:
            save_states(masters, self._trained(), folder, self.args.should_save)
        if not self.args.should_save:
            return
        if masters is not None:
            write_json(folder / "optimizer.json", masters.scalars())
        else:
            self._save_optimizer(folder)
        for name, part in self._stateful_parts().items():
            # An infinity (the first `best` of a plateau) is no JSON; left out, the constructor sets it again.
            write_json(folder / name, {k: v for k, v in part.state_dict().items() if v not in INFINITE})
        write_json(folder / "stage_state.json", self.extra_state())

    def _save_optimizer(self, folder: Path) -> None:
        tensors: dict[str, Tensor] = {}
        rest = dict(cast(Any, self.optimizer).state_dict())
        by_index = {str(index): state for index, state in rest.pop("state").items()}
        write_json(folder / "optimizer.json", by_index | rest, tensors)
        with naming(path := folder / "optimizer.safetensors"):
            save_file(tensors, path)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by its name in the model."""
        model = self.accelerator.unwrap_model(self.model)
        return {name: it for name, it in model.named_parameters() if it.requires_grad}

    def _load_optimizer(self, folder: Path) -> None:
        optimizer = cast(Any, self.optimizer)
        with blame(path := folder / "optimizer.safetensors"):  # cloned: what is loaded is a view of the file
            tensors = {name: value.clone() for name, value in load_file(path).items()}
        with blame(path := folder / "optimizer.json"):
            rest = read_json(path, tensors)
            saved = {int(index): rest.pop(index) for index in list(rest) if index.isdigit()}
            optimizer.load_state_dict(rest | {"state": saved})
            _undo_casts(optimizer, saved)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load what `_save_optimizer_and_scheduler` saved. Raises CheckpointError if any of it is missing."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if (masters := self.strategy.masters) is not None:
            with blame(folder / STATES):
                load_states(masters, self._trained(), folder)
            with blame(path := folder / "optimizer.json"):
                masters.load_scalars(read_json(path))
        else:
            self._load_optimizer(folder)
        for name, part in self._stateful_parts().items():
            with blame(path := folder / name):
                part.load_state_dict(read_json(path))
        with blame(path := folder / "stage_state.json"):
            self.load_extra_state(read_json(path))

    def _save_rng_state(self, output_dir: str) -> None:
        """Save what differs by process: the generators and the losses that wait for a log line."""
        numpy: Any = np.random.get_state()
        states = {
            "world_size": self.args.world_size,
            "seconds": time.time() - self._started,
            "loss": self._tr_loss.item(),
            "own": self.own_state(),
            **{name: getattr(self, name, 0) for name in LOSS_COUNTERS},
            "python": random.getstate(),
            "numpy": (numpy[0], numpy[1].tolist(), *numpy[2:]),
        }
        for name, generator in _torch_generators(self.args.device).items():
            states[name] = generator.get_rng_state().tolist()
        write_json(Path(output_dir) / f"rng_state_{self.args.process_index}.json", states)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore what `_save_rng_state` saved; the Trainer's last call before the first resumed step."""
        if checkpoint is None:
            return
        self._resume_from = None
        if self.args.should_save:  # what a kill between a save and its rotation left
            self._rotate(Path(str(self.args.output_dir)), Path(checkpoint))
        saved = self._read_ranks(Path(checkpoint))
        own = saved[min(self.args.process_index, len(saved) - 1)]
        with blame(Path(checkpoint) / f"rng_state_{self.args.process_index}.json"):
            self._started -= own["seconds"]
            # Logged as the mean over processes.
            self._tr_loss.fill_(sum(one["loss"] for one in saved) / len(saved))
            for name in LOSS_COUNTERS:
                setattr(self, name, own[name])
            if len(saved) == self.args.world_size:
                self._tr_loss.fill_(own["loss"])
                self.load_own_state(own["own"])
            else:
                self.load_own_states([one["own"] for one in saved])
            if self.args.process_index < len(saved):
                self._set_generators(own)

    def _read_ranks(self, folder: Path) -> list[dict[str, Any]]:
        """What each process has saved of itself."""
        found: list[dict[str, Any]] = []
        number = 1
        while len(found) < number:
            with blame(path := folder / f"rng_state_{len(found)}.json"):
                found.append(read_json(path))
                number = found[0]["world_size"]
        return found

    def _set_generators(self, states: dict[str, Any]) -> None:
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        for name, generator in _torch_generators(self.args.device).items():
            generator.set_rng_state(torch.tensor(states[name], dtype=torch.uint8))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train for an epoch, unless no step is left: the Trainer would take one upon the last checkpoint."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """Sum up the whole run, the sessions before a resume included."""
        self._load_rng_state(self._resume_from)  # not done yet if there was no step left to take
        return super()._finalize_training(trial, num_train_samples, self._started)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint. Raises CheckpointError unless every one of them is there."""
        model = self.accelerator.unwrap_model(model or self.model)
        folder = Path(resume_from_checkpoint)
        if (masters := self.strategy.masters) is not None:
            with blame(folder / STATES):
                load_states(masters, self._trained(), folder, weights_only=True)
            return
        if isinstance(model, PeftModel):
            with blame(folder / "adapter_model.safetensors"):
                _check_adapter(model, folder)
        with blame(folder / VALUE_HEAD):
            load_value_head(model, folder)
        if not isinstance(model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with blame(folder / "model.safetensors"):
            # Through the model's own reader, which knows where names in the file differ from names in memory.
            # fp32 holds every dtype in use exactly.
            read: Any = type(model).from_pretrained
            saved, info = read(folder, dtype=torch.float32, output_loading_info=True)
            if info["missing_keys"]:  # transformers would draw them anew, the head of a reward model as well
                raise LookupError(f"{', '.join(sorted(info['missing_keys']))} is missing")
            absent, _ = model.load_state_dict(saved.state_dict(), strict=False)
            if absent := [name for name in absent if not name.startswith(f"{VALUE_NAME}.")]:
                raise LookupError(f"{', '.join(sorted(absent))} is missing")

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        verify_checkpoint(best)
        logger.info("Loading the best model, %s", best)
        self._load_from_checkpoint(best)
