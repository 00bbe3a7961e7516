"""What accompanies a training: progress bar, `trainer_log.jsonl`, reference cache, an early end."""

from __future__ import annotations

import json
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefkit.files import naming, replace_text
from prefkit.model.ref_cache import LogpsStore
from prefkit.train.spikes import SPIKE_FILE

if TYPE_CHECKING:
    from prefkit.train.trainer import PrefTrainer

LOG_FILE = "trainer_log.jsonl"
# Keys of a line in the log file, and what they are called in the Trainer's own log.
_LOG_KEYS = {
    "loss": "loss",
    "predict_loss": "predict_loss",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "kl": "kl",
    "reward": "ppo/score",
    "ppo_kl": "ppo/kl",
    "work_imbalance": "work_imbalance",
    "lr": "learning_rate",
    "epoch": "epoch",
}
_EVALUATED = {
    "eval_loss": "loss",
    "eval_accuracy": "rewards/accuracies",
    "eval_auc": "rewards/auc",
    "eval_margin": "rewards/margins",
    "eval_kl": "kl",
    "eval_score": "score",
    "eval_score_stderr": "score_stderr",
    "eval_response_length": "response_length",
    "eval_eos_rate": "eos_rate",
}


def evaluation_prefix(logs: dict[str, float]) -> str | None:
    """What the metrics of an evaluation start with: `eval_`, or `eval_NAME_` where a data set is evaluated by
    itself; None where the log is of no evaluation.

    >>> evaluation_prefix({"eval_more_loss": 0.5, "eval_more_rewards/margins": 0.1})
    'eval_more_'
    """
    # Margins of pairs, or where all responses of a data set are of one label the KL.
    for mark in ("rewards/margins", "kl"):
        marked = (name for name in logs if name.startswith("eval_") and name.endswith(mark))
        if found := next(marked, None):
            return found.removesuffix(mark)
    return None


class LogFile(TrainerCallback):
    """Appends a JSON line to `trainer_log.jsonl` at each logging step and evaluation.

    A step of the file is one of the YAML: so many `updates` of the Trainer. An epoch of the Trainer is
    `epochs` of the YAML.
    """

    def __init__(self, updates: int = 1, epochs: float = 1.0) -> None:
        self.updates, self.epochs = updates, epochs
        self.started, self.first_step = time.time(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and drop lines beyond the checkpoint that training goes on from."""
        self.started, self.first_step = time.time(), state.global_step
        if state.is_world_process_zero:
            written = sum(1 for logs in state.log_history if _numbers_of(logs))
            _keep_lines(_log_file(args), state.global_step // self.updates, written)
            _keep_lines(_log_file(args).with_name(SPIKE_FILE), state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line."""
        numbers = _numbers_of(logs or {})
        if not state.is_world_process_zero or not numbers:
            return
        steps = {
            "current_steps": state.global_step // self.updates,
            "total_steps": state.max_steps // self.updates,
        }
        line: dict[str, Any] = {**steps, **numbers}
        if "epoch" in line and self.epochs != 1:
            line["epoch"] = round(line["epoch"] * self.epochs, 4)
        elapsed = time.time() - self.started
        done = state.global_step - self.first_step
        remaining = elapsed / done * (state.max_steps - state.global_step) if done > 0 else 0.0
        line["percentage"] = round(100 * state.global_step / max(state.max_steps, 1), 2)
        line["elapsed_time"] = str(timedelta(seconds=int(elapsed)))
        line["remaining_time"] = str(timedelta(seconds=int(remaining)))
        path = _log_file(args)
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _log_file(args: TrainingArguments) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / LOG_FILE


def _numbers_of(logs: dict[str, float]) -> dict[str, Any]:
    """What a line of the file says of a line of the Trainer's log; empty where it has none."""
    line: dict[str, Any] = {key: logs[name] for key, name in _LOG_KEYS.items() if name in logs}
    if (prefix := evaluation_prefix(logs)) is not None:
        line |= {key: logs[prefix + name] for key, name in _EVALUATED.items() if prefix + name in logs}
        if name := prefix.removeprefix("eval_").removesuffix("_"):
            line["eval_dataset"] = name
    return line if line.keys() & {"loss", "eval_loss", "eval_score"} else {}


def _keep_lines(file: Path, last_step: int, number: int | None = None) -> None:
    """Keep the lines of steps up to `last_step`, the first `number` of them where that is given.

    A resumed run writes the later ones again, and that of an evaluation after the last step.
    """
    if file.exists():
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= last_step]
        replace_text(file, "".join(kept[:number]))


def _step_of(line: str) -> float:
    """The step of a line of the log; infinity for one that a kill or a power cut has torn."""
    try:
        return int(json.loads(line)["current_steps"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


class ProgressBar(TrainerCallback):
    """A bar with loss, margin and the like of the newest step; plain lines where there is no terminal.

    A step of the bar is one of the YAML: so many `updates` of the Trainer.
    """

    def __init__(self, console: Console, updates: int = 1) -> None:
        self.console = console
        self.updates = updates
        self.trainer: PrefTrainer | None = None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
        )

    def show(self, what: str) -> None:
        """Say what goes on, in a word or two."""
        if self.progress.tasks:
            self.progress.update(self.task, description=what)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self.task = self.progress.add_task("train", total=state.max_steps // self.updates, numbers="")
        self.progress.update(self.task, completed=state.global_step // self.updates)
        if self.console.is_terminal:
            self.progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        numbers = _numbers(self.trainer.latest) if self.trainer else ""
        self.progress.update(self.task, completed=state.global_step // self.updates, numbers=numbers)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print a line for the log where no bar can move, and for each evaluation."""
        logs = logs or {}
        step = f"step {state.global_step // self.updates}/{state.max_steps // self.updates}"
        if (prefix := evaluation_prefix(logs)) is not None:
            name = prefix.removeprefix("eval_").removesuffix("_")
            self.console.print(f"{step}  held out{name and f' ({name})'}: {_numbers(logs, prefix)}")
        elif "loss" in logs and not self.console.is_terminal:
            self.console.print(f"{step}  {_numbers(logs)}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it is."""
        if self.console.is_terminal:
            self.progress.stop()


def _numbers(values: dict[str, float], prefix: str = "") -> str:
    names = {
        "loss": "loss",
        "margin": "rewards/margins",
        "accuracy": "rewards/accuracies",
        "auc": "rewards/auc",
        "kl": "kl",
    }
    if "ppo/score" in values or f"{prefix}score" in values:
        own = prefix or "ppo/"
        names = {"loss": "loss", "score": f"{own}score", "kl": f"{own}kl", "length": f"{own}response_length"}
        return _show(names, values)
    return _show({label: f"{prefix}{name}" for label, name in names.items()}, values)


def _show(names: dict[str, str], values: dict[str, float]) -> str:
    """The values that are there, by their labels."""
    shown = {label: values.get(name) for label, name in names.items()}
    return "  ".join(f"{label} {value:.3f}" for label, value in shown.items() if value is not None)


class EarlyStopping(TrainerCallback):
    """Ends the training after `patience` evaluations in a row without a better metric.

    It counts in the log, which a checkpoint holds, so that a resumed run ends where the other would.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the evaluations since the best."""
        self._count(args, state, control)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count those before a resume: the checkpoint may be the one that training was to end with."""
        self._count(args, state, control)

    def _count(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        name = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        is_greater_better = args.greater_is_better
        if is_greater_better is None:
            is_greater_better = not name.endswith("loss")
        values = [
            line[name] if is_greater_better else -line[name] for line in state.log_history if name in line
        ]
        if values and len(values) - 1 - values.index(max(values)) >= self.patience:
            control.should_training_stop = True


class KeepReferenceLogps(TrainerCallback):
    """Writes the log-probs that the reference cache has gathered, and reads those of other processes."""

    def __init__(self, store: LogpsStore) -> None:
        self.store = store

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write, so that a run that goes on from here need not compute them again."""
        self.store.flush()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write, and read what the other processes have written: rows change places with the epoch."""
        self.store.flush()
        PartialState().wait_for_everyone()
        self.store.refresh()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the held-out rows too."""
        self.store.flush()

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any,
        **kwargs: Any,
    ) -> None:
        """Write the held-out rows too."""
        self.store.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write."""
        self.store.flush()
