"""A reward model that is an adapter, put upon the weights of the policy: base weights are in memory once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import Layout, Packer
from prefkit.data.vision import Vision
from prefkit.model.adapter import (
    HEAD_IN_FILE,
    WEIGHTS,
    as_it_was,
    base_of,
    check_complete,
    check_ranks,
    read_adapter_config,
)
from prefkit.model.architecture import read_architecture
from prefkit.model.attention import plain_attention, shares_prompts
from prefkit.model.errors import ModelError
from prefkit.model.reward import HEAD, attach_scores_forward, read_value_head
from prefkit.model.reward_model import RewardModel, verify_scores
from prefkit.model.seeing_classifier import choose_classifier

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

REWARD = "reward"  # the name of the adapter within the policy
_WAY_OUT = "write reward_model_type: full, which reads it as a model of its own"


@dataclass(frozen=True)
class RewardAdapter:
    """A frozen adapter of the policy with a head for scores, which no other part of a run sees: it is neither
    trained nor saved. `model` has the policy's decoder as its own."""

    policy: PeftModel
    model: RewardModel

    @property
    def proof(self) -> float | None:
        """How far its scores are from those saved with it (`verify_scores`)."""
        return self.model.proof

    def score(self, examples: Sequence[TokenizedExample]) -> list[list[float]]:
        """The scores of the responses of each example, as `RewardModel.score` says; the policy is as it was
        afterwards."""
        base = base_of(self.policy)
        attention = plain_attention(base) if self.model.layout == "repeat" else nullcontext()
        with switched_to(self.policy, REWARD), attention:
            head: Any = getattr(self.model.model, HEAD)
            head.to(self.model.device)  # the policy may have moved since
            return self.model.score(examples)


@contextmanager
def switched_to(policy: PeftModel, adapter: str) -> Iterator[None]:
    """Another adapter in place of the active one within the block, and all of the policy in evaluation.

    Afterwards the active adapter, what needs a gradient and what trains are what they were.
    """
    active: Any = policy.active_adapter
    with as_it_was(policy):
        policy.set_adapter(adapter, inference_mode=True)
        policy.eval()
        try:
            yield
        finally:
            policy.set_adapter(active)


def load_reward_adapter(
    policy: PeftModel,
    folder: Path,
    max_length: int,
    name: str,
    vision: Vision | None = None,
    most: Callable[[int], int] = int,
) -> RewardAdapter:
    """Put the adapter of a folder, which our stage `rm` or LLaMA-Factory wrote, beside the policy's own.

    The policy is ready for batches, and rows have at most `max_length` tokens; `vision` is how the reward
    model sees, if it does, and `most` as `RewardModel` says. Raises `ModelError` for what
    is no reward model or cannot stand beside another adapter, and when its scores upon these weights are not
    those saved with it.
    """
    lora: Any = read_adapter_config(folder)
    tensors = _read_tensors(folder)
    head, bias = _take_head(tensors, folder, name)
    _check_plain(policy, lora, tensors, name)
    check_ranks(name, lora, {it: tensor.shape for it, tensor in tensors.items()})
    lora.task_type = lora.modules_to_save = None
    lora.inference_mode = True
    base = base_of(policy)
    with torch.random.fork_rng(devices=[]):  # new layers draw their first weights
        _add(policy, lora, tensors, name)
        shell = _share_decoder(base, head, name)
    proof = _verify(policy, shell, folder, name, vision)
    obstacle = read_architecture(base.config).find_obstacle(max_length, vision is not None)
    layout: Layout = "shared" if shares_prompts(base) and not obstacle else "repeat"
    return RewardAdapter(policy, RewardModel(shell, Packer(layout, vision), bias, proof, most))


def _verify(
    policy: PeftModel, shell: PreTrainedModel, folder: Path, name: str, vision: Vision | None
) -> float | None:
    """As `verify_scores`, saying what else to do."""
    try:
        with switched_to(policy, REWARD), plain_attention(base_of(policy)):
            return verify_scores(shell, folder, name, vision)
    except ModelError as error:
        numbers = str(shell.dtype).removeprefix("torch.")
        raise ModelError(
            f"{error} Here it stands upon the policy's weights, in {numbers}; reward_model_type: full reads "
            "it upon the base and in the numbers of its training."
        ) from error


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS} is damaged: {error}") from error


def _take_head(tensors: dict[str, Tensor], folder: Path, name: str) -> tuple[Tensor, float]:
    """Weight (1, hidden) and bias of the head, the adapter's own taken from among its tensors."""
    if (own := tensors.pop(HEAD_IN_FILE, None)) is not None:
        return own, 0.0
    if (beside := read_value_head(folder)) is not None:
        return beside
    raise ModelError(f"{name} has no head for scores: it is no reward model")


def _check_plain(policy: PeftModel, lora: Any, tensors: dict[str, Tensor], name: str) -> None:
    """Raises `ModelError` for an adapter with weights other than LoRA's below the head for tokens: as part of
    the policy they would be the policy's."""
    base = base_of(policy)
    outputs = base.get_output_embeddings()
    tops = [it for it, module in base.named_modules() if module is outputs]
    whole = [it for it in tensors if ".lora_" not in it or any(f".{top}." in it for top in tops)]
    if whole:
        raise ModelError(
            f"{name} trains {whole[0]} ({len(whole)} such), which is the policy's own: {_WAY_OUT}"
        )
    if lora.bias != "none":
        raise ModelError(f"{name} trains biases, which are the policy's own: {_WAY_OUT}")


def _add(policy: PeftModel, lora: Any, tensors: dict[str, Tensor], name: str) -> None:
    """Put the adapter into the policy, frozen and not active."""
    from peft import set_peft_model_state_dict

    active: Any = policy.active_adapter
    weights, modules = [*policy.parameters()], [*policy.modules()]
    try:
        with as_it_was(policy):
            policy.add_adapter(REWARD, lora)
            policy.set_adapter(active)
        check_complete(name, policy, tensors, REWARD)
        set_peft_model_state_dict(policy, tensors, REWARD)
    except (RuntimeError, ValueError) as error:
        reason = next((line.strip() for line in str(error).split("\n") if "mismatch" in line), str(error))
        raise ModelError(f"{name} is not an adapter of {base_of(policy).name_or_path}: {reason}") from error
    known = {id(it) for it in (*weights, *modules)}
    for parameter in policy.parameters():
        if id(parameter) not in known:
            parameter.requires_grad = False
    for module in policy.modules():
        if id(module) not in known:
            module.training = policy.training


def _share_decoder(base: PreTrainedModel, head: Tensor, name: str) -> PreTrainedModel:
    """A model with a head for scores, in fp32, upon the decoder of another, which both then have.

    Raises `ModelError` for an architecture whose model for scores has another decoder.
    """
    hidden = base.config.get_text_config().hidden_size
    weight = head.float().view(1, -1)
    if weight.shape[1] != hidden:
        raise ModelError(f"{name}: its head is for another hidden size, {weight.shape[1]} and not {hidden}")
    shell: Any = _empty_reward_model(base.config, name)
    prefix = base.base_model_prefix
    decoder = getattr(base, prefix, None)
    if shell.base_model_prefix != prefix or type(getattr(shell, prefix, None)) is not type(decoder):
        raise ModelError(f"{name}: {type(shell).__name__} has another decoder than the policy: {_WAY_OUT}")
    linear = nn.Linear(hidden, 1, bias=False, device=base.device).requires_grad_(False).eval()
    linear.weight.data.copy_(weight)
    setattr(shell, prefix, decoder)
    setattr(shell, HEAD, linear)
    shell.config, shell.name_or_path = base.config, base.name_or_path
    shell.is_quantized = getattr(base, "is_quantized", False)
    attach_scores_forward(shell)
    return shell


def _empty_reward_model(model_config: Any, name: str) -> PreTrainedModel:
    """The model for scores of an architecture, in evaluation, without weights."""
    own = copy.deepcopy(model_config)
    own.num_labels, own._attn_implementation = 1, "eager"
    try:
        with torch.device("meta"):
            model: PreTrainedModel = choose_classifier(own).from_config(own)
    except ValueError as error:
        raise ModelError(f"{name}: {str(error).splitlines()[0]}") from error
    return model.eval()
