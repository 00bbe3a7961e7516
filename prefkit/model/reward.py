"""A model with a head that gives a score: transformers' sequence classification with one label.

The head is a linear layer without bias, named `score`. Upon a language model it is new; a saved reward model
brings its own, and so does LLaMA-Factory's `value_head.safetensors`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from prefkit.config.schema import ModelConfig
from prefkit.data.packing import last_positions
from prefkit.model.errors import ModelError
from prefkit.model.load import find_model, is_classifier, load_model_config, load_pretrained
from prefkit.model.partitioned import gathered, is_partitioned, shape_of
from prefkit.model.seeing_classifier import choose_classifier, is_ours
from prefkit.model.vision import idle_weights, image_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

HEAD = "score"
HEAD_WEIGHT = f"{HEAD}.weight"
VALUE_HEAD = "value_head.safetensors"
PICKLED_VALUE_HEAD = "value_head.bin"
_VALUE_WEIGHT, _VALUE_BIAS = "v_head.summary.weight", "v_head.summary.bias"
# What the record of a run says of a head that lies beside an adapter or a model.
HEAD_FACTS = {
    "file": VALUE_HEAD,
    "weight": _VALUE_WEIGHT,
    "bias": _VALUE_BIAS,
    "reads": "the decoder's last hidden state at the last token of prompt and response",
}
# What the model's forward takes of a packed batch.
_FORWARD_KEYS = ("input_ids", "position_ids", "attention_mask", "segments", "pixels")


def is_reward_model(model: nn.Module) -> bool:
    """Whether a transformers model, without an adapter, has a head that gives one score."""
    config: Any = model.config
    return isinstance(getattr(model, HEAD, None), nn.Module) and config.num_labels == 1


def load_reward_base(config: ModelConfig, max_length: int = 0, seed: int | None = None) -> PreTrainedModel:
    """The model with its own head, with LLaMA-Factory's, or with a new one drawn from `seed`.

    A new head is normal with the model's own `initializer_range` (0.02) as its deviation, as transformers
    would draw it, which the usual learning rates suit: what an update below the head does to a score goes
    with the size of the head, and at zero it is nothing. Without a seed it is NaN, for an adapter to bring
    another; `check_head` says whether one did.

    Raises `ModelError` when the model is no language or reward model, when weights are missing, among them
    the head of a saved reward model, and when it gives several scores.
    """
    has_head = is_classifier(stored := load_model_config(config))
    if has_head and stored.num_labels != 1:
        raise ModelError(f"{config.model_name_or_path} gives {stored.num_labels} scores; a reward is one")
    labels = {} if has_head else {"num_labels": 1}
    with without_load_report():
        model, missing = load_pretrained(choose_classifier(stored), config, max_length, **labels)
    if not is_reward_model(model):
        raise ModelError(f"{config.model_name_or_path}: {type(model).__name__} has no head named {HEAD}")
    if missing - ({HEAD_WEIGHT} if not has_head else set()):
        name = HEAD_WEIGHT if HEAD_WEIGHT in missing else min(missing)
        raise ModelError(f"{config.model_name_or_path}: the weights lack {name} ({len(missing)} such)")
    if has_head and is_ours(model):
        _check_copy(model, find_model(config))
    if not has_head and not set_value_head(model, find_model(config)):
        _start_head(model, seed)
    return model


def _check_copy(model: PreTrainedModel, folder: Path) -> None:
    """Raises `ModelError` where the head beside a model of ours is not the one among its weights."""
    found, own = read_value_head(folder), cast("nn.Linear", model.score).weight
    if found is not None and not torch.equal(found[0].to(own), own):
        raise ModelError(f"{folder / VALUE_HEAD} has changed: it is not the head among the model's weights")


@contextmanager
def without_load_report() -> Iterator[None]:
    """transformers warns of the missing head and the surplus one of the language model: both are known."""
    from transformers.utils import logging as of_transformers

    before = of_transformers.get_verbosity()
    of_transformers.set_verbosity_error()
    try:
        yield
    finally:
        of_transformers.set_verbosity(before)


def _start_head(model: PreTrainedModel, seed: int | None) -> None:
    weight = cast("nn.Linear", model.score).weight
    if seed is None:
        with gathered(weight, writes=True):
            nn.init.constant_(weight, float("nan"))
        return
    generator = torch.Generator().manual_seed(seed)
    deviation = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    drawn = torch.empty(shape_of(weight)).normal_(0.0, deviation, generator=generator)
    with torch.no_grad(), gathered(weight, writes=True):
        weight.copy_(drawn)


def check_head(model: PreTrainedModel, name: str) -> None:
    """Raises `ModelError` when the model, its adapter in place, has no head but the one that is NaN."""
    with gathered(weight := cast("nn.Linear", model.score).weight):
        is_whole = bool(weight.isfinite().all())
    if not is_whole:
        raise ModelError(f"{name} has no head for scores: it is no reward model")


def read_value_head(folder: Path) -> tuple[Tensor, float] | None:
    """Weight (1, hidden) and bias of the head that LLaMA-Factory has put beside a model or an adapter.

    None where there is none. Raises `ModelError` when it is damaged, or only there as a pickle.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / VALUE_HEAD
    if not file.is_file():
        if (folder / PICKLED_VALUE_HEAD).is_file():
            raise ModelError(
                f"{folder}: {PICKLED_VALUE_HEAD} is a pickle, which is not opened: save {VALUE_HEAD}"
            )
        return None
    try:
        tensors = load_file(file)
        bias = tensors.get(_VALUE_BIAS, torch.zeros(1))
        return tensors[_VALUE_WEIGHT].float().view(1, -1), float(bias)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ModelError(f"{file} is no value head of LLaMA-Factory: {error}") from error


def write_value_head(folder: Path, weight: Tensor, bias: float) -> None:
    """Write a head, weight (1, hidden) and bias, as LLaMA-Factory reads it, in fp32."""
    from safetensors.torch import save_file

    tensors = {_VALUE_WEIGHT: weight.detach().float().cpu().contiguous(), _VALUE_BIAS: torch.tensor([bias])}
    save_file(tensors, folder / VALUE_HEAD, {"format": "pt"})


def set_value_head(model: PreTrainedModel, folder: Path) -> bool:
    """Give the model LLaMA-Factory's head of a folder, without its bias; says whether there is one."""
    found = read_value_head(folder)
    if found is None:
        return False
    head = cast("nn.Linear", model.score)
    weight, bias = found
    if weight.shape != shape_of(head.weight):
        raise ModelError(f"{folder / VALUE_HEAD} is for another hidden size, {weight.shape[1]}")
    if not is_partitioned(head.weight):
        head.to(torch.float32)
    with torch.no_grad(), gathered(head.weight, writes=True):
        head.weight.copy_(weight)
    if bias:
        logger.warning(
            "%s: its bias, %g, is the same for every score; the head that is trained has none",
            folder / VALUE_HEAD,
            bias,
        )
    return True


def compute_in_fp32(head: nn.Module) -> None:
    """Have the linear layers of a head compute in fp32, whatever they are held in."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            module.forward = MethodType(_fp32_forward, module)  # type: ignore[method-assign]


def _fp32_forward(self: nn.Linear, hidden: Tensor) -> Tensor:
    bias = None if self.bias is None else self.bias.float()
    return nn.functional.linear(hidden.float(), self.weight.float(), bias)


def attach_scores_forward(model: PreTrainedModel) -> None:
    """Give a reward model a forward that returns `{"scores": (N,)}` in fp32 when called with `last`, flat
    positions (N,) in the batch. No logits are computed. Called without, it is the model's own."""
    model.forward = MethodType(_scores_forward, model)


def _scores_forward(self: PreTrainedModel, *args: Any, last: Tensor | None = None, **kwargs: Any) -> Any:
    if last is None:
        return type(self).forward(self, *args, **kwargs)
    return {"scores": scores_at(self, last, kwargs)}


def scores_at(model: PreTrainedModel, last: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Scores, (N,) in fp32, read at the flat positions `last` (N,) of what the decoder makes of `inputs`.

    The head computes in the numbers that it is held in, whatever mixed precision does below it: a score in
    bfloat16 has three digits.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    pixels = given.pop("pixels", ())
    given |= image_inputs(model.config, pixels, given["input_ids"])
    output = model.base_model(**given, use_cache=False)
    hidden = output.last_hidden_state.flatten(0, 1)[last]
    head: Any = model.score
    with torch.autocast(hidden.device.type, enabled=False):
        scores = cast("Tensor", head(hidden.to(head.weight.dtype))[:, 0].float())
    return scores if (idle := idle_weights(model, pixels)) is None else scores + idle


def response_scores(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The score of each response in a packed batch (`PackedBatch.to_dict()`), (N,), read at its last token.

    Raises `TypeError` when a wrapper cast them: they are fp32 whatever the model's dtype.
    """
    found = model(**{key: batch[key] for key in _FORWARD_KEYS}, last=last_positions(batch))
    scores: Tensor = found["scores"]
    if scores.dtype != torch.float32:
        raise TypeError(f"scores arrived as {scores.dtype}; a wrapper cast the model's output")
    return scores
