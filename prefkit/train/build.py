"""The parts of a run put together: stage, rollouts, Trainer and its callbacks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from transformers import PrinterCallback

from prefkit.config.schema import RunConfig
from prefkit.data.dataset import RunData
from prefkit.data.streaming import StreamedRows
from prefkit.data.template import ChatTemplate
from prefkit.model.ref_cache import CachedReference
from prefkit.model.reference import FrozenModel, Reference
from prefkit.model.tuning import set_one_dtype
from prefkit.train.answering import Answerer
from prefkit.train.callbacks import EarlyStopping, KeepReferenceLogps, LogFile, ProgressBar
from prefkit.train.dpo import DpoStage
from prefkit.train.engine import build_engine
from prefkit.train.judges import build_judge
from prefkit.train.kto import KtoStage
from prefkit.train.out_of_memory import Pieces
from prefkit.train.output import OutputFolder
from prefkit.train.policy import Policy, choose_policy_logps
from prefkit.train.ppo import PpoStage
from prefkit.train.reward import RewardStage
from prefkit.train.rollout_count import epochs_per_rollout, updates_per_step
from prefkit.train.rollouts import RolloutSource
from prefkit.train.signals import SaveAndStop, StopSignals
from prefkit.train.stages import Stage
from prefkit.train.strategy import Strategy, together
from prefkit.train.trainer import PrefTrainer
from prefkit.train.watchdog import Heartbeat, Watchdog

if TYPE_CHECKING:
    from transformers import TrainingArguments


def build_trainer(
    config: RunConfig,
    args: TrainingArguments,
    policy: Policy,
    reference: Reference | None,
    data: RunData,
    template: ChatTemplate,
    folder: OutputFolder,
    signals: StopSignals,
    console: Console,
    watchdog: Watchdog,
    strategy: Strategy,
) -> PrefTrainer:
    """The Trainer of a run with its stage and callbacks. Raises `UserError` for a wrong judge or engine."""
    stage = build_stage(config, policy, reference, starts_here=folder.checkpoint is None)
    rollouts = None
    updates = updates_per_step(config)
    bar = ProgressBar(console, updates)
    if isinstance(stage, PpoStage):
        assert reference is not None and not isinstance(data.train, StreamedRows)
        with strategy.loading_whole(), strategy.computing(policy.model):
            most = partial(together, strategy, torch.max)
            judge = build_judge(config, policy.model, template, console.print, policy.has_images, most)
        if strategy.one_dtype is not None:
            set_one_dtype(policy.model, strategy.one_dtype)  # of an adapter that judges, too
        console.print(f"Judge: {judge.name}.")
        engine = build_engine(config, policy, watchdog.beat, console.print, strategy)
        answerer = Answerer(
            policy, reference, judge, engine, template, config.generation, config.ppo.ppo_missing_eos_penalty
        )
        rollouts = RolloutSource(config, args, answerer, stage, data.train, data.answers)
        rollouts.show = bar.show
    trainer = PrefTrainer(
        policy.model,
        args,
        stage,
        config.tuning,
        policy.packer,
        data,
        template.saved,
        Pieces(config, args, reference, console.print),
        signals,
        strategy,
        rollouts,
    )
    share_reference(reference, strategy)
    bar.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    epochs = epochs_per_rollout(config, args, len(rollouts.prompts.rows)) if rollouts is not None else 1.0
    trainer.add_callback(LogFile(updates, epochs))
    trainer.add_callback(bar)
    if isinstance(reference, CachedReference):
        trainer.add_callback(KeepReferenceLogps(reference.store))
    if config.method.early_stopping_steps:
        trainer.add_callback(EarlyStopping(config.method.early_stopping_steps))
    trainer.add_callback(SaveAndStop(signals, whole_epochs=rollouts is not None))
    trainer.add_callback(Heartbeat(watchdog))
    return trainer


def share_reference(reference: Reference | None, strategy: Strategy) -> None:
    """Put a second model in memory where the strategy wants it."""
    inner = reference.reference if isinstance(reference, CachedReference) else reference
    if isinstance(inner, FrozenModel):
        inner.model = strategy.share(inner.model)


def build_stage(config: RunConfig, policy: Policy, reference: Reference | None, starts_here: bool) -> Stage:
    """What the YAML's `stage` names; `starts_here` says that the run is not resumed."""
    if config.method.stage == "rm":
        return RewardStage(config.method)
    coefficient = config.model.moe_aux_loss_coef or 0.0
    if config.method.stage == "ppo":
        return PpoStage(config.ppo, policy.compute_dtype, coefficient)
    stage: DpoStage | KtoStage
    if config.method.stage == "kto":
        assert reference is not None
        logps = choose_policy_logps(config, policy.base.config)
        stage = KtoStage(config.method, reference, logps, policy.compute_dtype, coefficient)
    else:
        stage = DpoStage(config.method, reference, policy.compute_dtype, coefficient)
    stage.expects_identity = reference is not None and reference.is_initial_policy and starts_here
    return stage


def loss_name(config: RunConfig) -> str:
    """The loss of a run in a word."""
    names = {"dpo": config.method.pref_loss, "kto": "kto", "rm": "bradley-terry", "ppo": "ppo"}
    return names[config.method.stage]
