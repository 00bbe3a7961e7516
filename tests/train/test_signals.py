"""SIGTERM and its kin: a checkpoint at the next step boundary and exit 128 + n; the second ends at once."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefkit.train.checkpoint_files import find_newest_checkpoint, verify_checkpoint
from prefkit.train.signals import SIGNALS, Interrupted, StopSignals
from prefkit.train.trainer import PrefTrainer
from tests.train.forks import FORKS
from tests.train.runs import run
from tests.train.test_kills import COMMON, MORE, STAGES, Lab, lab, rest_is_slow

pytestmark = FORKS
__all__ = ["lab"]
Labs = Callable[[dict[str, Any]], Lab]
ONE_EPOCH = {"num_train_epochs": 1}  # of six steps


def at_step(step: int, do: Callable[[], None]) -> Callable[[], None]:
    """What to do in a child so that it does something before the last micro-batch of a step."""

    def prepare() -> None:
        original = PrefTrainer.compute_loss

        def compute_loss(self: PrefTrainer, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == step - 1 and self.accelerator.sync_gradients:
                do()
            return original(self, *args, **kwargs)

        PrefTrainer.compute_loss = compute_loss  # type: ignore[method-assign]

    return prepare


def raise_signal(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", rest_is_slow(SIGNALS[:2], SIGNALS[2:]))
def test_a_checkpoint_at_the_next_step_boundary(number: signal.Signals, lab: Labs) -> None:
    one = lab(STAGES["dpo-sigmoid"] | ONE_EPOCH)
    folder, printed = one.root / "stopped", one.root / "stopped.txt"
    assert one.start(folder, at_step(3, raise_signal(number))).end() == 128 + number
    said = printed.read_text()
    assert f"{number.name}: saving after this step" in said and "Traceback" not in said
    assert f"Ended by {number.name}. {folder}/checkpoint-3 is saved. To go on from there: the same" in said
    assert find_newest_checkpoint(folder) == folder / "checkpoint-3"
    one.run(folder)
    assert f"Resuming from {folder}/checkpoint-3." in printed.read_text().replace("\n", "")
    assert one.is_same(folder)


@pytest.mark.parametrize(
    "stage, epochs, step",
    rest_is_slow(
        [("hinge", 2, 6), ("orpo", 1, 6)], [("orpo", 2, 12), ("streaming", ..., 3), ("simpo", 2, 8)]
    ),
)
def test_at_the_end_of_an_epoch_in_a_stream_beside_an_evaluation_and_in_the_last_step(
    stage: str, epochs: Any, step: int, lab: Labs
) -> None:
    one = lab((STAGES | MORE)[stage] | {"num_train_epochs": epochs})
    folder = one.root / "stopped"
    assert one.start(folder, at_step(step, raise_signal(signal.SIGTERM))).end() == 143
    assert find_newest_checkpoint(folder) == folder / f"checkpoint-{step}"
    one.run(folder)
    assert one.is_same(folder)


@pytest.mark.slow
def test_a_run_that_saves_no_checkpoints_saves_this_one(lab: Labs) -> None:
    one = lab({"save_strategy": "no", "save_steps": ..., "save_total_limit": ...})
    folder = one.root / "stopped"
    assert one.start(folder, at_step(3, raise_signal(signal.SIGINT))).end() == 130
    verify_checkpoint(folder / "checkpoint-3")
    one.run(folder)
    same = one.root / "stopped" / "adapter_model.safetensors"
    assert same.read_bytes() == (one.whole / "adapter_model.safetensors").read_bytes()


def test_the_whole_group_gets_it_and_the_workers_leave_it_to_the_run(lab: Labs) -> None:
    more = {"save_steps": 2, "load_best_model_at_end": False, "eval_strategy": "no", "eval_dataset": ...}
    one = lab(STAGES["simpo"] | ONE_EPOCH | more)
    folder = one.root / "stopped"
    assert one.start(folder, at_step(3, lambda: os.killpg(0, signal.SIGTERM))).end() == 143
    assert find_newest_checkpoint(folder) == folder / "checkpoint-3"
    one.run(folder)
    assert one.is_same(folder)


def test_the_second_ends_at_once(lab: Labs) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    one = lab(STAGES["dpo-sigmoid"] | ONE_EPOCH)
    folder, started = one.root / "stopped", time.monotonic()
    assert one.start(folder, at_step(5, twice)).end() == 143
    assert time.monotonic() - started < 30
    assert find_newest_checkpoint(folder) == folder / "checkpoint-4"
    one.run(folder)
    assert one.is_same(folder)


def interrupt(one: Lab, name: str) -> bool:
    """Signal a run at a random instant, let it go on, and compare; whether the signal came in time."""
    folder = one.root / name
    child = one.start(folder)
    time.sleep(random.SystemRandom().uniform(0.05, one.seconds))
    number = random.SystemRandom().choice(SIGNALS)
    if (code := child.poll()) is None:
        os.kill(child.pid, number)
        code = child.end()
    said = child.printed()
    # Before the handlers are there the signal kills, and python's own handler takes SIGINT.
    assert code in (0, 128 + number, -number), said
    assert "Traceback" not in said, said
    if saved := re.search(r"(\S+/checkpoint-\d+) is saved", said):
        verify_checkpoint(saved[1])
    one.run(folder)
    assert one.is_same(folder, last_only=True), said
    return code != 0


def test_at_any_instant(lab: Labs) -> None:
    one = lab(STAGES["dpo-sigmoid"] | ONE_EPOCH)
    for trial in range(2):
        interrupt(one, f"trial-{trial}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*STAGES, *MORE])
def test_at_fifty_instants(stage: str, lab: Labs) -> None:
    one, hits, trial = lab((STAGES | MORE)[stage]), 0, 0
    while hits < 50:
        trial += 1
        hits += interrupt(one, f"trial-{trial}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_at_the_same_step(number: int, write_config, tmp_path: Path) -> None:
    """The launcher passes the signal on, and on a terminal the ranks have had it already."""
    keys = COMMON | {"num_train_epochs": 40, "gradient_accumulation_steps": 1, "sample_prompts": 0}
    config = write_config(**keys)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "prefkit", "train", str(config), "ddp_backend=gloo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    while not (tmp_path / "out" / "checkpoint-4").exists():
        time.sleep(0.1)
        assert process.poll() is None
    os.killpg(process.pid, number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    saved = re.search(r"(\S+/checkpoint-\d+) is saved", printed)
    assert saved, printed
    assert find_newest_checkpoint(tmp_path / "out") == Path(saved[1])


def test_handlers_are_given_back(write_config) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    run(write_config())
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with StopSignals(), pytest.raises(Interrupted) as error:
        os.kill(os.getpid(), signal.SIGHUP)
    assert error.value.exit_code == 129 and str(error.value) == "Ended by SIGHUP."
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_launcher_that_hands_on_the_signal_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(Interrupted), StopSignals(leads=False) as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGTERM
