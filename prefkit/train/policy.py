"""The policy of a run: model, adapters, what is trained, and the layout of its batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prefkit.config.errors import UserError
from prefkit.config.schema import RunConfig
from prefkit.data.packing import Layout, Packer
from prefkit.data.template import ChatTemplate
from prefkit.model.adapter import base_of
from prefkit.model.architecture import batch_dependence, read_architecture
from prefkit.model.batches import prepare_for_batches
from prefkit.model.errors import ModelError
from prefkit.model.load import fit_vocabulary, load_causal_lm
from prefkit.model.partitioned import size_of
from prefkit.model.partners import judged_logps
from prefkit.model.policy import LogpsOf, response_logps
from prefkit.model.probe import verify
from prefkit.model.reward import (
    HEAD,
    VALUE_HEAD,
    check_head,
    compute_in_fp32,
    is_reward_model,
    load_reward_base,
)
from prefkit.model.reward_model import read_score_probe, verify_scores
from prefkit.model.tuning import prepare_for_training, set_one_dtype
from prefkit.model.value import NAME as VALUE_NAME
from prefkit.model.value import add_value_head, load_value_head
from prefkit.model.vision import PARTS
from prefkit.train.strategy import Strategy

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        TrainingArguments,
    )

Say = Callable[[str], None]


@dataclass(frozen=True)
class Policy:
    """The model that is trained, ready for the batches of `packer`, some of which may have images.

    `compute_dtype` is the number format of its forward.
    """

    model: PreTrainedModel | PeftModel
    packer: Packer
    compute_dtype: torch.dtype
    has_images: bool = False

    @property
    def layout(self) -> Layout:
        """How its batches are laid out."""
        return self.packer.layout

    @property
    def base(self) -> PreTrainedModel:
        """The model under the adapter."""
        return base_of(self.model)


def build_policy(
    config: RunConfig,
    args: TrainingArguments,
    template: ChatTemplate,
    say: Say,
    strategy: Strategy,
    has_images: bool = False,
) -> Policy:
    """Load and prepare the policy, which in the stage `rm` is a reward model; `has_images` says whether rows
    may have any.

    Raises `ModelError` for what the model cannot do.
    """
    if config.method.stage != "rm":
        _refuse_reward_models(config.model.adapter_name_or_path)
    tokenizer = template.tokenizer
    base = _load_base(config, args, template, strategy)
    resized = fit_vocabulary(base, tokenizer, config.model)
    if resized:
        say(f"Vocabulary: resized to {len(tokenizer)} tokens.")
    mixed, one_dtype = args.bf16 or args.fp16, strategy.one_dtype
    model = prepare_for_training(base, config.model, config.tuning, resized, mixed, one_dtype)
    if adapter := config.continued_adapter:
        with strategy.computing(model):
            if is_reward_model(base_of(model)):
                verify_scores(model, Path(adapter), adapter, template.vision)
            else:
                verify(model, Path(adapter), adapter, template.vision)
    if is_reward_model(base_of(model)):
        check_head(base_of(model), config.model.trained_last)
    if not config.training.get("do_train"):
        model.requires_grad_(False)
    if config.method.stage == "ppo":
        _add_value_head(model, config, say)
        if one_dtype is not None:
            set_one_dtype(model, one_dtype)
    _keep_heads_exact(base_of(model), one_dtype)
    layout = prepare_for_batches(base_of(model), config.model, config.longest_row, say, has_images)
    policy = Policy(model, Packer(layout, template.vision), _compute_dtype(model, args), has_images)
    _tell_weights(policy, say, strategy)
    return policy


def _keep_heads_exact(base: PreTrainedModel, one_dtype: torch.dtype | None) -> None:
    """Where all weights have one number format, heads for scores and values still compute in fp32."""
    heads = [getattr(base, name, None) for name in (HEAD, VALUE_NAME)]
    for head in heads if one_dtype is not None else ():
        if head is not None:
            compute_in_fp32(head)


def _refuse_reward_models(adapters: Sequence[str]) -> None:
    """Raises `ModelError` for the adapter of a reward model, also where its head is a file beside it."""
    for path in adapters:
        if read_score_probe(Path(path).expanduser()) is not None:
            raise ModelError(f"adapter_name_or_path: {path} is a reward model, which writes no text")


def _add_value_head(model: PreTrainedModel | PeftModel, config: RunConfig, say: Say) -> None:
    """A value head, that of an earlier run where training goes on from one that has it."""
    base = base_of(model)
    if read_architecture(base.config).logits is None:
        raise UserError(
            f"ppo: the head of {base.config.model_type} is not known, and values are read before it"
        )
    add_value_head(model)
    before = Path(config.model.trained_last).expanduser()
    if (before / VALUE_HEAD).is_file():
        load_value_head(model, before)
        say(f"Value head: that of {config.model.trained_last}, gone on with.")


def _load_base(
    config: RunConfig, args: TrainingArguments, template: ChatTemplate, strategy: Strategy
) -> PreTrainedModel:
    """The model without adapters. A head for scores is a new one only where it is going to be trained."""
    if config.method.stage != "rm":
        return load_causal_lm(config.model, config.longest_row)
    base = load_reward_base(config.model, config.data.cutoff_len, args.seed if args.do_train else None)
    base.config.get_text_config().pad_token_id = template.tokenizer.pad_token_id
    name = config.model.model_name_or_path
    if not config.model.adapter_name_or_path:
        with strategy.computing(base):
            verify_scores(base, Path(name), name, template.vision)
    return base


def choose_policy_logps(config: RunConfig, model_config: PretrainedConfig) -> LogpsOf:
    """What computes the log-probs of the policy in a step: for `stage: kto`, partners without gradient.

    Where log-probs depend on the batch they are computed in, policy and reference need the same one.
    """
    apart = config.method.stage == "kto" and not batch_dependence(model_config, config.data.cutoff_len)
    return judged_logps if apart else response_logps


def _tell_weights(policy: Policy, say: Say, strategy: Strategy) -> None:
    trainable = sum(size_of(weights) for weights in policy.model.parameters() if weights.requires_grad)
    total = sum(size_of(weights) for weights in policy.model.parameters())
    upon = ", updated in float32" if strategy.one_dtype not in (None, torch.float32) and trainable else ""
    formats = ", ".join([*sorted(_dtypes(policy.model)), f"forward in {policy.compute_dtype}{upon}"])
    if policy.packer.vision is not None:
        say(f"{_tell_parts(policy)}.")
    what = f"Training {trainable:,} of {total:,}" if trainable else f"Evaluating {total:,}"
    say(f"{what} weights ({formats}).".replace("torch.", ""))


def _tell_parts(policy: Policy) -> str:
    """Which parts of a model that sees are trained, in words."""
    parts = PARTS[policy.base.config.model_type]
    trained: dict[str, bool] = dict.fromkeys(("image reader", "projector", "language model"), False)
    for name, weights in policy.base.named_parameters():
        starts = (("projector", parts.projector), ("image reader", parts.tower))
        part = next((part for part, start in starts if name.startswith(start)), "language model")
        trained[part] |= weights.requires_grad
    told = (f"{part} {'trained' if it else 'frozen'}" for part, it in trained.items())
    rows = "" if policy.has_images else "; no row has images"
    return f"Parts: {', '.join(told)}{rows}"


def _dtypes(model: torch.nn.Module) -> set[str]:
    return {
        f"{'trained' if weights.requires_grad else 'frozen'} in {weights.dtype}"
        for weights in model.parameters()
    }


def _compute_dtype(model: PreTrainedModel | PeftModel, args: TrainingArguments) -> torch.dtype:
    """The dtype of the forward: that of mixed precision, else of the base weights."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return base_of(model).dtype
