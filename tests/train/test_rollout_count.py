"""Steps of the YAML are rollouts, those of the Trainer updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefkit.config import load_config
from prefkit.train.arguments import make_training_arguments
from prefkit.train.rollout_count import count_in_updates, prompts_per_rollout, updates_per_step

# Two prompts to a micro-batch, three of these to an update, two updates to a pass: 12 prompts, 4 x 2 updates.
KEYS = {"stage": "ppo", "reward_function": "r.py:f", "gradient_accumulation_steps": 3, "ppo_buffer_size": 2}


@pytest.fixture
def counted(write_config: Callable[..., Path]) -> Callable[..., Any]:
    """The Trainer's arguments for 30 prompts, counted in updates."""

    def count(**keys: Any) -> Any:
        config = load_config(write_config(**{**KEYS, "max_steps": ..., **keys})).config
        args = make_training_arguments(config)
        assert (updates_per_step(config), prompts_per_rollout(config, args)) == (8, 12)
        count_in_updates(config, args, 30)
        return args

    return count


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"max_steps": 5}, {"max_steps": 40}),
        ({"num_train_epochs": 2}, {"max_steps": 48}),  # 3 rollouts for all prompts
        ({"num_train_epochs": 0.1}, {"max_steps": 8}),
        ({"save_steps": 2, "logging_steps": 3}, {"save_steps": 16, "logging_steps": 24}),
        ({"logging_steps": ...}, {"logging_steps": 8, "save_steps": 4000}),
        ({"max_steps": 10, "save_steps": 0.5}, {"save_steps": 40}),
        ({"save_strategy": "epoch"}, {"save_steps": 24, "save_strategy": "steps"}),
        (
            {"eval_strategy": "epoch", "eval_delay": 1, "eval_dataset": "held_out"},
            {"eval_steps": 24, "eval_delay": 24, "eval_strategy": "steps"},
        ),
        (
            {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 3, "eval_dataset": "held_out"},
            {"eval_steps": 16, "eval_delay": 24},
        ),
        ({"warmup_steps": 2}, {"warmup_steps": 16}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"logging_first_step": True}, {"logging_first_step": False}),
    ],
)
def test_steps(keys: dict[str, Any], expected: dict[str, Any], counted: Callable[..., Any]) -> None:
    args = counted(**keys)
    assert {name: getattr(args, name) for name in expected} == expected
