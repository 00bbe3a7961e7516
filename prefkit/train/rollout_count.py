"""What is counted in rollouts and what in updates: a step of the YAML is a rollout, one of the Trainer an
update of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.trainer_utils import IntervalStrategy

from prefkit.config.schema import RunConfig

if TYPE_CHECKING:
    from transformers import TrainingArguments


def updates_per_step(config: RunConfig) -> int:
    """Updates of the weights in what the YAML calls a step."""
    return config.ppo.ppo_epochs * config.ppo.ppo_buffer_size if config.method.stage == "ppo" else 1


def prompts_per_rollout(config: RunConfig, args: TrainingArguments) -> int:
    """Prompts of one rollout on all ranks."""
    per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return per_update * config.ppo.ppo_buffer_size * args.world_size


def epochs_per_rollout(config: RunConfig, args: TrainingArguments, num_prompts: int) -> float:
    """Which share of a pass over the prompts a rollout is: of the Trainer it is an epoch."""
    return prompts_per_rollout(config, args) / max(num_prompts, 1)


def count_in_updates(config: RunConfig, args: TrainingArguments, num_prompts: int) -> None:
    """Make updates of all steps that the Trainer's arguments take from the YAML, where they are rollouts.

    An epoch of the YAML is a pass over the prompts, a fraction one of the whole training.
    """
    updates, per_pass = updates_per_step(config), -(-num_prompts // prompts_per_rollout(config, args))
    rollouts = args.max_steps if args.max_steps > 0 else max(round(args.num_train_epochs * per_pass), 1)
    args.max_steps = rollouts * updates
    if args.warmup_steps >= 1:
        args.warmup_steps *= updates
    args.logging_first_step = False
    if args.eval_delay:
        args.eval_delay *= updates * (per_pass if args.eval_strategy == IntervalStrategy.EPOCH else 1)
    for what in ("logging", "save", "eval"):
        every = getattr(args, f"{what}_steps")
        strategy = getattr(args, f"{what}_strategy")
        if strategy.value == "epoch":
            setattr(args, f"{what}_strategy", type(strategy)("steps"))
            every = per_pass
        elif every is not None and every < 1:
            every = max(round(every * rollouts), 1)
        if every is not None:
            setattr(args, f"{what}_steps", int(every) * updates)
