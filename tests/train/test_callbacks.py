"""What accompanies a training goes on after a kill as if there had been none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from prefkit.train.callbacks import LOG_FILE, EarlyStopping, LogFile


def make_arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")


def evaluated(step: int, loss: float) -> dict[str, float]:
    return {"eval_loss": loss, "eval_rewards/margins": 0.0, "step": step}


@pytest.mark.parametrize(
    "torn", ["", '{"current_steps": 3, "lo', '{"current_st\n', "\0\0\0\n", "7\n", '{"loss": 1}\n']
)
def test_a_resumed_log_holds_what_its_checkpoint_knows_of(tmp_path: Path, torn: str) -> None:
    """Lines of later steps go, and so does an evaluation of the same step that came after the checkpoint."""
    state = TrainerState(is_world_process_zero=True, max_steps=4)
    log, arguments, control = LogFile(), make_arguments(tmp_path), TrainerControl()
    history = [{"loss": 0.7, "step": 1}, {"loss": 0.6, "step": 2}, evaluated(2, 0.5)]
    for logs in [*history, {"loss": 0.4, "step": 3}]:
        state.global_step = int(logs["step"])
        log.on_log(arguments, state, control, {name: logs[name] for name in logs if name != "step"})
    written = (tmp_path / LOG_FILE).read_text().splitlines(keepends=True)
    for known in range(4):
        (tmp_path / LOG_FILE).write_text("".join(written) + torn)
        state.log_history = [*history[:known], {"train_loss": 0.5, "step": 2}]
        state.global_step = int(history[known - 1]["step"]) if known else 0
        log.on_train_begin(arguments, state, control)
        assert (tmp_path / LOG_FILE).read_text().splitlines(keepends=True) == written[:known]
    assert [json.loads(line)["current_steps"] for line in written] == [1, 2, 2, 3]


@pytest.mark.parametrize("losses, stops", [([], False), ([1.0, 2.0], False), ([1.0, 2.0, 3.0], True)])
def test_a_training_that_was_to_end_early_ends_when_it_is_resumed(
    tmp_path: Path, losses: list[float], stops: bool
) -> None:
    state = TrainerState(log_history=[evaluated(step, loss) for step, loss in enumerate(losses)])
    control = TrainerControl()
    EarlyStopping(2).on_train_begin(make_arguments(tmp_path), state, control)
    assert control.should_training_stop is stops
