"""`make demo-ppo` on the real model, at most 15 minutes on two idle cores: what it says is so."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.slow.test_demo import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from demo_report import count_short, held_out_scores

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


def test_held_out_scores_rise_by_three_standard_errors_and_the_kl_stays_in_bounds(said: str) -> None:
    (first, before, kl), *_, (last, after, last_kl) = held_out_scores(
        SAVES / "demo_ppo" / "trainer_log.jsonl"
    )
    assert first == 0 and last > 0 and kl == pytest.approx(0, abs=1e-3)
    assert last_kl <= 1.5 * 6.0
    lines = (SAVES / "demo_ppo" / "eval_samples.jsonl").read_text(encoding="utf-8").splitlines()
    scores: dict[int, list[float]] = {}
    for line in map(json.loads, lines):
        scores.setdefault(line["step"], []).append(line["score"])
    rises = [new - old for old, new in zip(scores[first], scores[last], strict=True)]
    mean = sum(rises) / len(rises)
    error = (sum((rise - mean) ** 2 for rise in rises) / (len(rises) - 1) / len(rises)) ** 0.5
    assert mean == pytest.approx(after - before, abs=1e-6)
    assert mean >= 3 * error


def test_more_answers_are_short_than_before(said: str) -> None:
    before, after, total = count_short(SAVES / "demo_ppo" / "samples.jsonl")
    assert total == 20 and after > before
    assert f"  after  {after:3}  " in said


def test_the_merged_model_answers_and_the_curves_are_there(said: str) -> None:
    talk = said.partition("> What is a bridge for?")[2].partition("Short answers")[0]
    answers = [line for line in talk.splitlines() if line and not line.startswith((">", "The conv"))]
    assert len(answers) >= 3
    assert (SAVES / "demo_ppo_merged" / "model.safetensors").is_file()
    for name in ("training_reward.png", "training_eval_reward.png"):
        assert (SAVES / "demo_ppo" / name).is_file() and name in said
