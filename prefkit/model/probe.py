"""Probe rows: a few rows with the log-probs that a model gave them, to know the model again later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Message
from prefkit.data.messages import PLACEHOLDER
from prefkit.data.packing import pack
from prefkit.data.vision import Vision, probe_picture
from prefkit.files import replace_text
from prefkit.model.adapter import base_of
from prefkit.model.attention import plain_attention
from prefkit.model.errors import ModelError
from prefkit.model.load import DTYPES
from prefkit.model.vision import image_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefkit.data.template import ChatTemplate

PROBE_FILE = "probe.json"
_ROWS, _MOST_TOKENS = 4, 256
# How far two computations of a log-prob may be apart, as a mean over tokens, in nats: rounding of the
# weights that an adapter is merged into, and another order of sums. SmolLM2-135M in bfloat16 is 0.11 from
# itself in float32.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}

# What a model without a probe of its own is measured on, as question and answer.
_QUESTIONS = (
    ("Name three rivers of Europe.", "The Rhine, the Danube and the Loire are rivers of Europe."),
    ("How do I boil an egg?", "Put it into boiling water for seven minutes, then cool it."),
    ("What is 12 times 12?", "12 times 12 is 144."),
)
_ABOUT_PICTURE = ("What is in the picture?", "Shades of red, green and blue.")


@dataclass(frozen=True)
class Probe:
    """Rows as (prompt ids, response ids), the log-prob of each response token, and the weights' dtype."""

    rows: list[tuple[list[int], list[int]]]
    token_logps: list[list[float]]
    dtype: str
    quantized: bool

    @property
    def tolerance(self) -> float:
        """Mean difference per token, in nats, up to which a model counts as the one that was probed."""
        return TOLERANCE.get(getattr(torch, self.dtype), TOLERANCE[torch.bfloat16])


def make_probe(
    model: nn.Module, examples: Sequence[TokenizedExample], template: ChatTemplate | None = None
) -> Probe:
    """A probe of the model on the shortest of the examples: of each the chosen response, or its only one.

    Of a model that sees, as `template` says, the images of these are left out, and one row has a picture of
    ours.
    """
    vision = template.vision if template is not None else None
    shortest = sorted(examples, key=lambda example: example.num_tokens)[:_ROWS]
    rows = []
    for example in shortest:
        chosen = example.pairs[0].chosen if example.pairs else 0
        response = example.response_ids[chosen][: _MOST_TOKENS // 2]
        prompt = example.prompt_ids if vision is None else vision.leave_out(example.prompt_ids)
        rows.append((prompt[-_MOST_TOKENS // 2 :], response))
    if template is not None:
        rows += picture_rows(template)
    base = base_of(model)
    dtype = str(base.dtype).removeprefix("torch.")
    return Probe(rows, measure(model, rows, vision), dtype, bool(getattr(base, "is_quantized", False)))


Rows = list[tuple[list[int], list[int]]]


def picture_rows(template: ChatTemplate) -> Rows:
    """A question about `probe_picture`, for a model that sees."""
    if template.vision is None:
        return []
    texts = template.vision.unscaled.read([probe_picture()])[1]
    question, answer = _ABOUT_PICTURE
    prompt, (response,) = template.encode(
        [Message("user", f"{PLACEHOLDER}{question}")], [Message("assistant", answer)], images=texts
    )
    return [(prompt, response)] if template.count_places(prompt) else []


def question_rows(template: ChatTemplate) -> Rows:
    """Rows as (prompt ids, response ids) for a model that has no probe of its own."""
    rows = []
    for question, answer in _QUESTIONS:
        prompt, responses = template.encode([Message("user", question)], [Message("assistant", answer)])
        rows.append((prompt, responses[0]))
    return rows + picture_rows(template)


@torch.no_grad()
def measure(
    model: nn.Module, rows: Sequence[tuple[list[int], list[int]]], vision: Vision | None = None
) -> list[list[float]]:
    """Log-prob of each response token of the rows, from the model's own logits; where a row has places for an
    image, `vision` shows it `probe_picture`."""
    base: PreTrainedModel = base_of(model)
    was_training = model.training
    model.eval()
    found = []
    with plain_attention(base):
        for prompt, response in rows:
            inputs = _inputs(base, prompt, response, vision)
            logps = model(**inputs).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            target = torch.tensor(response, device=logps.device)
            found.append(logps.gather(1, target[:, None])[:, 0].tolist())
    model.train(was_training)
    return found


def _inputs(
    base: PreTrainedModel, prompt: list[int], response: list[int], vision: Vision | None
) -> dict[str, Any]:
    """What the model's own forward takes of a row."""
    if vision is None or vision.token_id not in prompt:
        return {"input_ids": torch.tensor([[*prompt, *response]], device=base.device)}
    row = TokenizedExample(prompt, [response], (), "", images=(probe_picture(),))
    batch = send_to_device(pack([row], "repeat", vision.unscaled).to_dict(), base.device)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    return inputs | image_inputs(base.config, batch["pixels"], batch["input_ids"])


def distance(probe: Probe, token_logps: Sequence[Sequence[float]]) -> float:
    """Mean absolute difference per token from the log-probs of the probe, in nats."""
    pairs = [
        (a, b)
        for one, other in zip(probe.token_logps, token_logps, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def compare(probe: Probe, model: nn.Module, vision: Vision | None = None) -> tuple[float, float]:
    """(distance of the model from the probe, how much of it the dtypes of both explain)."""
    tolerance = max(probe.tolerance, TOLERANCE.get(base_of(model).dtype, 0.0))
    return distance(probe, measure(model, probe.rows, vision)), tolerance


def write_probe(probe: Probe, folder: Path) -> None:
    """Write `probe.json`."""
    replace_text(folder / PROBE_FILE, json.dumps(asdict(probe)) + "\n")


def read_probe(folder: Path) -> Probe | None:
    """The probe in a folder; None where there is none. Raises `ModelError` when it is damaged."""
    file = folder / PROBE_FILE
    if not file.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if "scores" in values:
            return None  # of a reward model
        rows = [([*map(int, prompt)], [*map(int, response)]) for prompt, response in values.pop("rows")]
        probe = Probe(rows=rows, **values)
        lengths = [len(token_logps) for token_logps in probe.token_logps]
        if not rows or lengths != [len(response) for _, response in rows] or probe.dtype not in DTYPES:
            raise ValueError("its parts do not fit together")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{file} is damaged: {error}") from error
    return probe


def verify(model: nn.Module, folder: Path, name: str, vision: Vision | None = None) -> float | None:
    """How far the model, which sees by `vision`, is from what was probed when `folder` was written, in nats
    per token.

    None where there is nothing to compare: no probe, or one of a model quantised otherwise. Raises
    `ModelError` when it is another model: its base is not the one that it was trained on, or has changed.
    """
    probe = read_probe(folder)
    base = base_of(model)
    if probe is None or probe.quantized != bool(getattr(base, "is_quantized", False)):
        return None
    if (
        max(max(prompt + response) for prompt, response in probe.rows)
        >= base.config.get_text_config().vocab_size
    ):
        raise ModelError(f"{name}: {base.name_or_path} has fewer tokens than the model it was trained on")
    apart, tolerance = compare(probe, model, vision)
    if not apart <= tolerance:
        raise ModelError(
            f"{name} on {base.name_or_path} is not the model that was trained: the log-probs of its probe "
            f"rows ({PROBE_FILE}) are {apart:.2g} nats per token away (tolerance {tolerance:g}). Either this "
            "is another base than the one it was trained on, or a file of the base or adapter has changed."
        )
    return apart
