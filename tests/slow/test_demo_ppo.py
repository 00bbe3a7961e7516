"""`make demo-ppo` on the real model, at most 15 minutes on two idle cores: what it says is so."""

from __future__ import annotations

import os
import subprocess
import sys
from statistics import mean, stdev
from typing import Any

import pytest

from tests.slow.test_demo import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from demo_report import evaluations, is_short

pytestmark = pytest.mark.slow
SAVES = ROOT / "saves"


@pytest.fixture(scope="module")
def said() -> str:
    """What the demo prints; it leaves `saves/demo_ppo`, as it does for a user."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # this tree, whatever is installed in .venv
    command = ["make", "--old-file", ".venv/ready", "demo-ppo"]  # .venv is taken as it is
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def answers(said: str) -> dict[int, list[dict[str, Any]]]:
    return evaluations(SAVES / "demo_ppo" / "eval_samples.jsonl")


def test_held_out_scores_rise_by_three_standard_errors_and_the_kl_stays_in_bounds(
    answers: dict[int, list[dict[str, Any]]],
) -> None:
    first, last = answers[0], answers[max(answers)]
    assert len(first) == len(last) == 40 and max(answers) > 0
    rises = [new["score"] - old["score"] for old, new in zip(first, last, strict=True)]
    assert mean(rises) >= 3 * stdev(rises) / len(rises) ** 0.5
    assert mean(answer["kl"] for answer in first) == pytest.approx(0, abs=1e-3)
    assert mean(answer["kl"] for answer in last) <= 1.5 * 6.0


def test_most_answers_are_short(said: str, answers: dict[int, list[dict[str, Any]]]) -> None:
    before, after = (
        sum(is_short(answer["answer"]) for answer in answers[step]) for step in (0, max(answers))
    )
    assert before <= 0.6 * 40 and after >= 0.8 * 40
    assert f"  after  {after:3}  " in said


def test_the_merged_model_answers_and_the_curves_are_there(said: str) -> None:
    talk = said.partition("> What is a bridge for?")[2].partition("I have a friend")[0]
    told = [line for line in talk.splitlines() if line.strip() and not line.startswith((">", "The conv"))]
    assert len(told) >= 3
    assert (SAVES / "demo_ppo_merged" / "model.safetensors").is_file()
    for name in ("training_reward.png", "training_eval_reward.png"):
        assert (SAVES / "demo_ppo" / name).is_file() and name in said
