"""PPO on the real model with a reward whose best is known: about three minutes of two idle cores for a run.

With shuffled scores, which say nothing of the responses that have them, the policy must not get better.
"""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from statistics import mean, variance
from typing import Any

import pytest

from examples.rewards.short import score
from prefkit.config import load_config
from prefkit.runs.report import make_console
from prefkit.train.run import train

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.slow


def shuffled(prompts: list[Any], responses: list[str]) -> list[float]:
    """The scores of all responses, each given to another."""
    scores = score(prompts, responses)
    random.Random(len("".join(responses))).shuffle(scores)
    return scores


def learn(folder: Path, *overrides: str) -> tuple[list[float], list[float], dict[str, float]]:
    """Scores of greedy held-out answers before and after the example, and the last metrics."""
    given = [f"output_dir={folder}", "eval_steps=12", *overrides]
    train(load_config(ROOT / "examples" / "ppo_function.yaml", given).config, make_console(io.StringIO()))
    lines = [json.loads(line) for line in (folder / "eval_samples.jsonl").read_text().splitlines()]
    before, after = (
        score([], [line["answer"] for line in lines if line["step"] == step]) for step in (0, 12)
    )
    metrics: dict[str, float] = json.loads((folder / "eval_results.json").read_text())
    print(f"{overrides}: held-out score {mean(before):.3f} -> {mean(after):.3f}, KL {metrics['eval_kl']:.2f}")
    return before, after, metrics


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_known_optimum_is_approached(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By three standard errors of the paired difference, with a KL of at most 1.5 x ppo_target."""
    monkeypatch.chdir(ROOT)
    before, after, metrics = learn(tmp_path / "run", f"seed={seed}")
    rises = [new - old for old, new in zip(before, after, strict=True)]
    assert mean(rises) >= 3 * math.sqrt(variance(rises) / len(rises))
    assert metrics["eval_kl"] <= 1.5 * 6


def test_shuffled_scores_teach_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    before, after, _ = learn(tmp_path / "run", f"reward_function={__file__}:shuffled")
    error = math.sqrt(variance(before) / len(before) + variance(after) / len(after))
    assert mean(after) - mean(before) < 3 * error
