"""What a training is going to do: steps, tokens, passes through the models, and the loss it starts from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from prefkit.check.memory import batch_tokens
from prefkit.config.schema import RunConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import Layout
from prefkit.objectives.logps import PairLogps
from prefkit.objectives.pairwise import bco_loss, mix_bco
from prefkit.train.dpo import DpoStage
from prefkit.train.references import needs_reference
from prefkit.train.rollout_count import count_in_updates, prompts_per_rollout, updates_per_step

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class RolloutsAhead:
    """Of ppo: how many rollouts, how many prompts and responses each has, how many in a pass over all
    prompts, and what they take: `updates` and `most_tokens` to draw in each."""

    number: int
    prompts: int
    responses: int
    per_pass: int
    updates: int
    most_tokens: int


@dataclass(frozen=True)
class Outlook:
    """Numbers of a training. A pass is one example through one model.

    `updates` are optimiser steps, `tokens_per_epoch` those that the policy reads, a shared prompt once;
    `reference_passes` are forwards, `policy_passes` forwards with their backward. Of a stream, `rows` and
    `tokens_per_epoch` are those that were looked at, and there are no epochs.
    """

    rows: int
    batch: int
    micro_batches_per_epoch: int
    updates_per_epoch: int
    updates: int
    epochs: float
    tokens_per_epoch: int
    policy_passes: int
    reference_passes: int
    reference_from_cache: bool
    is_stream: bool = False
    rollouts: RolloutsAhead | None = None

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON."""
        return asdict(self)


def look_ahead(
    args: TrainingArguments,
    train: Iterable[TokenizedExample],
    layout: Layout,
    reads_reference: bool,
    cached: bool,
    is_stream: bool = False,
) -> Outlook:
    """The numbers of a training; those of one that only evaluates are zero.

    The cache is taken to be empty: the reference then computes each row once.
    """
    rows = tokens = 0
    for example in train:
        rows += 1
        tokens += batch_tokens([example], layout)
    per_micro = args.train_batch_size * args.world_size
    micro_batches = math.ceil(rows / per_micro)
    updates_per_epoch = max(math.ceil(micro_batches / args.gradient_accumulation_steps), 1) if rows else 0
    updates = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates_per_epoch)
    updates = updates if rows and args.do_train else 0
    batch = per_micro * args.gradient_accumulation_steps
    passes = updates * batch
    if updates and not is_stream:  # the last update of an epoch may have fewer rows
        whole, rest = divmod(updates, updates_per_epoch)
        passes = whole * rows + rest * batch
    epochs = passes / rows if updates and not is_stream else 0.0
    return Outlook(
        rows=rows,
        batch=batch,
        micro_batches_per_epoch=0 if is_stream else micro_batches,
        updates_per_epoch=0 if is_stream else updates_per_epoch,
        updates=updates,
        epochs=round(epochs, 3),
        tokens_per_epoch=tokens,
        policy_passes=passes,
        reference_passes=(min(rows, passes) if cached else passes) if reads_reference else 0,
        reference_from_cache=cached and reads_reference,
        is_stream=is_stream,
    )


def look_ahead_in_rollouts(
    config: RunConfig, args: TrainingArguments, train: Sequence[TokenizedExample], layout: Layout
) -> Outlook:
    """The numbers of a training by rollouts; a prompt with its responses is an example."""
    count_in_updates(config, args, len(train))
    updates = updates_per_step(config)
    prompts, group = prompts_per_rollout(config, args), config.ppo.ppo_group_size
    number = args.max_steps // updates if len(train) and args.do_train else 0
    return Outlook(
        rows=len(train),
        batch=prompts // config.ppo.ppo_buffer_size,
        micro_batches_per_epoch=0,
        updates_per_epoch=0,
        updates=number * updates,
        epochs=round(number * prompts / max(len(train), 1), 3),
        tokens_per_epoch=sum(batch_tokens([example], layout) for example in train),
        policy_passes=number * prompts * config.ppo.ppo_epochs,
        reference_passes=number * prompts,
        reference_from_cache=False,
        rollouts=RolloutsAhead(
            number,
            prompts,
            prompts * group,
            math.ceil(len(train) / prompts),
            updates,
            prompts * group * config.generation.max_new_tokens,
        ),
    )


@dataclass(frozen=True)
class FirstLoss:
    """The loss of the first step where policy and reference are equal; `value` is None where only the model
    can tell, and `why` says on what it depends or what comes on top."""

    value: float | None
    why: str


def expect_first_loss(config: RunConfig) -> FirstLoss:
    """The loss that the formula gives before anything was learned."""
    method = config.method
    if method.stage == "rm":
        zero = torch.zeros(1)
        return FirstLoss(
            round(-torch.nn.functional.logsigmoid(zero).item(), 4),
            "about: a new head has learnt nothing yet",
        )
    if method.stage == "ppo":
        return FirstLoss(None, "the policy's loss starts near 0; the value head's depends on the rewards")
    if not needs_reference(config):
        return FirstLoss(
            None, f"{method.pref_loss} has no reference: it starts from the model's own log-probs"
        )
    if not _starts_equal(config):
        return FirstLoss(None, "policy and reference differ from the start")
    if method.stage == "kto":
        return FirstLoss(0.5, "times the mean weight of the rows: 1 - sigmoid(0) for either class")
    stage = DpoStage(method, None, torch.float32)
    # Where both are equal their values cancel: any will do.
    equal = PairLogps(*torch.tensor([[-20.0], [-30.0], [10.0], [12.0]]))
    numbers: dict[str, Any] = dict(stage.numbers)
    if stage.loss.needs_batch_kl:
        numbers |= {"kl_chosen": 0.0, "kl_rejected": 0.0}
    loss = stage.loss.fn(equal, equal, **numbers)
    if method.pref_bco_weight:
        bco = bco_loss(equal, equal, beta=method.pref_beta, shift=0.0)
        loss = mix_bco(loss, bco, method.pref_bco_weight)
    why = "policy and reference are equal"
    if method.pref_ftx:
        why += f"; on top comes {method.pref_ftx:g} times the chosen responses' negative log-prob per token"
    return FirstLoss(round(loss.item(), 6), why)


def _starts_equal(config: RunConfig) -> bool:
    reference = config.reference
    if config.method.ld_alpha is not None and not config.method.ld_alpha_reference:
        return False
    if reference.ref_model is None:
        return True
    same = reference.ref_model == config.model.model_name_or_path
    return same and not reference.ref_model_adapters and not config.model.adapter_name_or_path
