"""SIGTERM, SIGINT and their kin: a checkpoint at the next step boundary, then the end.

Outside the training loop there is nothing to save, and the first signal ends the run at once. A second one
always does.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefkit.train.launched import SIGNALS, is_launched

# A launcher hands on what the terminal has sent already: within these seconds it is the same signal.
_ECHO_SECONDS = 3.0


def _is_handed_on() -> bool:
    """Whether a launcher hands signals on to this process."""
    return is_launched() or "TORCHELASTIC_RUN_ID" in os.environ


class Interrupted(BaseException):
    """A signal ended the run; not an `Exception`, so that nothing on the way takes it for a fault.

    `exit_code` is 128 and the number of the signal; `checkpoint` names what was saved, if anything.
    """

    def __init__(self, number: int, checkpoint: str = "") -> None:
        super().__init__(number, checkpoint)
        self.number = number
        self.exit_code = 128 + number
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        """What happened."""
        saved = f" {self.checkpoint} is saved." if self.checkpoint else ""
        return f"Ended by {signal.Signals(self.number).name}.{saved}"


class StopSignals:
    """Takes the signals over while it is entered.

    `received` is the number of the one that came, or 0, `agreed` that of which all ranks know, as of the last
    step. `leads` says whether this process tells the user. Only a main thread can take signals.
    """

    def __init__(self, leads: bool = True) -> None:
        self.received = 0
        self.agreed = 0
        self.leads = leads
        self._defers = False
        self._time = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it a signal is only noted: `SaveAndStop` ends the training at the next step boundary.

        Raises `Interrupted` at its end when a signal came too late for that.
        """
        self._defers = True
        try:
            yield
        finally:
            self._defers = False
        if self.received:
            raise Interrupted(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if _is_handed_on() and time.monotonic() - self._time < _ECHO_SECONDS:
                return
            if self.leads:
                os.write(2, b"\nEnded at once; the newest checkpoint is what the run goes on from.\n")
            os._exit(128 + number)
        self.received, self._time = number, time.monotonic()
        if not self._defers:
            raise Interrupted(number)
        if self.leads:
            name = signal.Signals(number).name
            # Not by print: the handler may have interrupted one.
            os.write(2, f"\n{name}: saving after this step; once more ends at once.\n".encode())


class SaveAndStop(TrainerCallback):
    """Says when a checkpoint is saved: with each step that saves one, and with the first step after all ranks
    know of a signal, upon which the run ends.

    In the last step of an epoch, or of the training, it is saved after the log line and the evaluation that
    come with the end of the epoch: a resumed run would not make up for them. `whole_epochs` says that nothing
    is saved within one, which has what no checkpoint holds. This callback goes after those that have
    something to write when a checkpoint is saved.
    """

    def __init__(self, signals: StopSignals, whole_epochs: bool = False) -> None:
        self.signals = signals
        self.whole_epochs = whole_epochs
        self._is_owed = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint, or put it off."""
        wanted = control.should_save or bool(self.signals.agreed)
        ends_epoch = control.should_training_stop or float(state.epoch or 0.5).is_integer()
        ends_epoch = ends_epoch or self.whole_epochs
        control.should_save = wanted and not ends_epoch
        self._is_owed = wanted and ends_epoch

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for what was put off."""
        control.should_save = control.should_save or self._is_owed
        self._is_owed = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the run. Raises `Interrupted`."""
        if self.signals.agreed:
            raise Interrupted(self.signals.agreed, f"{args.output_dir}/checkpoint-{state.global_step}")


def ignore_in_worker() -> None:
    """A data worker leaves signals to the process it works for, which needs it until the next boundary, and
    ends with that process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
