"""What is foretold happens: first loss and number of updates of a real run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefkit.check.outlook import expect_first_loss
from prefkit.check.run import check
from prefkit.config import load_config
from prefkit.objectives.pairwise import LOSSES
from prefkit.runs.report import make_console
from prefkit.train.run import train


def first_line(config: Path) -> dict[str, Any]:
    loaded = load_config(config)
    train(loaded.config, make_console(io.StringIO()))
    state = json.loads((Path(loaded.config.training["output_dir"]) / "trainer_state.json").read_text())
    return dict(state["log_history"][0])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_loss(loss: str, write_config: Callable[..., Path]) -> None:
    config = write_config(pref_loss=loss)
    expected = expect_first_loss(load_config(config).config)
    if not LOSSES[loss].needs_reference:
        assert expected.value is None and "model" in expected.why
    else:
        assert expected.value == pytest.approx(first_line(config)["loss"], abs=1e-4)


def test_the_first_loss_with_a_classifier(write_config: Callable[..., Path]) -> None:
    config = write_config(pref_bco_weight=0.5)
    expected = expect_first_loss(load_config(config).config)
    assert expected.value == pytest.approx(first_line(config)["loss"], abs=1e-4)


def test_what_is_added_or_unknown_is_said(write_config: Callable[..., Path]) -> None:
    assert "0.5 times" in expect_first_loss(load_config(write_config(pref_ftx=0.5)).config).why
    one_sided = write_config(ld_alpha=0.5, ld_alpha_reference=False)
    assert expect_first_loss(load_config(one_sided).config).value is None
    for stage, value in (("rm", 0.6931), ("kto", 0.5), ("ppo", None)):
        config = load_config(write_config(stage=stage, reward_model=...), ["stage=dpo"]).config
        changed = config.__class__(
            **{**vars(config), "method": config.method.__class__(**{**vars(config.method), "stage": stage})}
        )
        assert expect_first_loss(changed).value == value


def test_updates_and_passes_are_those_of_the_run(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(
        max_steps=..., num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    ahead = check(load_config(config, ()), None, lambda text: None).outlook
    train(load_config(config).config, make_console(io.StringIO()))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert ahead.updates == state["global_step"] == 4
    assert (ahead.rows, ahead.micro_batches_per_epoch, ahead.updates_per_epoch) == (12, 6, 2)
    assert (ahead.policy_passes, ahead.reference_passes, ahead.reference_from_cache) == (24, 12, True)
