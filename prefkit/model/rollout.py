"""Responses drawn from a model, several for each prompt, all prompts at once: what PPO learns from.

A prompt goes through the model once for all of its responses. Each response has random numbers of its own,
which follow from (seed, rollout, prompt, response), so that it depends neither on what else is in the batch
nor on the rank that draws it. Logits may differ in their last digits between batches of another shape;
where a draw falls that close to the boundary between two tokens, the response is another from there on.
Models whose log-probs depend on the batch (`batch_dependence`), or that scale queries by the place in the row
(Llama 4 with `attn_temperature_tuning`), draw by the batch they are in, as with `generate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import GenerationConfig as GenerateConfig
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList

from prefkit.config.schema import GenerationConfig
from prefkit.data.vision import Seen
from prefkit.model.adapter import base_of
from prefkit.model.architecture import batch_dependence
from prefkit.model.attention import plain_attention
from prefkit.model.errors import ModelError
from prefkit.model.growing_cache import RepeatedPrompts
from prefkit.model.partitioned import through_root
from prefkit.model.sampling import draw_tokens, penalise_repetition, random_numbers
from prefkit.model.shared_decoding import SharedPrompts, can_share_prompts
from prefkit.model.vision import generation_inputs, image_inputs, media_tokens

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Complete rows leave the batch once they are this share of it: what stays has to be copied then.
_ENDED_SHARE = 1 / 8
# Models with inputs of their own for images or for stretched positions: for text they are the common ones.
_COMMON_INPUTS = {
    *("gemma3", "phi3", "bamba", "falcon_h1", "nemotron_h"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava_onevision", "idefics3", "smolvlm"),
}


@dataclass(frozen=True)
class Sampled:
    """The responses to one prompt.

    `response_ids` are the tokens of each, at least one, the token that ended it included; `ended` says
    whether there is such a token, or the response was cut off.
    """

    response_ids: list[list[int]]
    ended: list[bool]


@dataclass(frozen=True)
class Stream:
    """Where the random numbers of a rollout come from: the run's seed, and the number of the rollout."""

    seed: int
    rollout: int


def sample_responses(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    numbers: Sequence[int],
    num_responses: int,
    generation: GenerationConfig,
    stop_ids: Sequence[int],
    stream: Stream,
    all_done: Callable[[bool], bool] = bool,
    seen: Sequence[Seen] = (),
) -> list[Sampled]:
    """`num_responses` responses to each prompt, given as token ids, in the order of the prompts.

    `seen` are the images of each prompt, which the model sees once; none where no prompt has any.

    `numbers` say which prompt of the run each is, whatever its rank and batch. The model computes with its
    adapters as they are, in the numbers it is held in, and in eval mode, which is undone. A response ends at
    one of `stop_ids`; it is cut off after `max_new_tokens`, or where the model has no more positions.

    `all_done` is told before each further token whether all responses here are complete, and says whether
    they are everywhere: where weights are sharded, every rank has to call its model equally often.

    Raises `ModelError` for a prompt that leaves no position for a response, `FloatingPointError` for logits
    that are not finite.
    """
    base = base_of(model)
    limits = find_limits(base, prompts, generation.max_new_tokens)
    seen = send_to_device(list(seen) or [Seen()] * len(prompts), base.device)
    draws = _Draws(
        *(prompts, seen, numbers, num_responses, generation, stop_ids, stream, limits),
        forbidden=media_tokens(base.config),
        device=base.device,
    )
    obstacle = find_expansion_obstacle(base, max(map(len, prompts)) + generation.max_new_tokens)
    run = _decode if obstacle is None else _generate
    # Not `inference_mode`: what a module keeps for itself meanwhile must be of use in training.
    with torch.no_grad(), evaluating(model), plain_attention(base), through_root(model, base):
        run(base, draws, all_done)
    return draws.collect()


def find_expansion_obstacle(model: PreTrainedModel, longest: int) -> str | None:
    """Why prompts have to go through the model once for each response, by transformers' `generate`.

    None where once for all is enough. `longest` is the most tokens of a prompt with its response.
    """
    kind: Any = type(model)
    own = kind.prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    if own and model.config.model_type not in _COMMON_INPUTS:
        return "the model prepares its inputs in a way of its own"
    if "past_key_values" not in _arguments(model) or not kind._supports_default_dynamic_cache():
        return "the model keeps its states in a way of its own"
    if not RepeatedPrompts(model).can_repeat():
        return "the model has layers whose states cannot be repeated"
    return batch_dependence(model.config, longest)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within the block, where nothing is dropped out and no layer is checkpointed; afterwards every
    module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # a module comes before those within it
            module.train(training)


def find_limits(model: PreTrainedModel, prompts: Sequence[Sequence[int]], most: int) -> list[int]:
    """The most tokens of a response to each prompt: `most`, or as many as the model has positions for.

    Raises `ModelError` for a prompt that leaves none.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return [most] * len(prompts)
    longest = max(map(len, prompts))
    if longest >= positions:
        raise ModelError(f"a prompt has {longest} tokens; the model takes {positions}, its response included")
    return [min(most, positions - len(prompt)) for prompt in prompts]


class _Draws:
    """Of N responses, n to each of B prompts one after the other: what is drawn, and what is drawn by.

    `open` (N,) says which go on, `drawn` (N, most) are their tokens and `counts` (N,) how many.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        seen: Sequence[Seen],
        numbers: Sequence[int],
        num_responses: int,
        generation: GenerationConfig,
        stop_ids: Sequence[int],
        stream: Stream,
        limits: Sequence[int],
        forbidden: Sequence[int],
        device: torch.device,
    ) -> None:
        self.num_responses, self.generation = num_responses, generation
        self.prompt_ids, self.prompt_mask = _align(prompts, device)
        self.pixels = [it.pixels for it in seen]
        self.prompt_positions = _align_positions(prompts, seen, device)
        ends = [it.end(len(prompt)) for prompt, it in zip(prompts, seen, strict=True)]
        self.prompt_ends = torch.tensor(ends, device=device)
        self._limits = torch.tensor(limits, device=device).repeat_interleave(num_responses)
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.long, device=device)
        self._forbidden = torch.tensor(forbidden, dtype=torch.long, device=device)
        most, total = max(limits), len(prompts) * num_responses
        streams = [
            random_numbers(stream.seed, stream.rollout, number, response, most)
            for number in numbers
            for response in range(num_responses)
        ]
        self._uniform = torch.from_numpy(np.stack(streams))
        self.drawn = self.prompt_ids[:, -1:].repeat_interleave(num_responses, 0).repeat(1, most)
        self.counts = torch.zeros(total, dtype=torch.long, device=device)
        self.open = torch.ones(total, dtype=torch.bool, device=device)
        self._ended = ~self.open

    def draw(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        """Token number `step` of the responses `rows` (R,), from logits (R, V). (R,)"""
        # A place for an image that nobody has shown.
        logits = logits.index_fill(1, self._forbidden, -torch.inf)
        if self.generation.repetition_penalty != 1:
            prompts = self.prompt_ids[rows // self.num_responses]
            seen = torch.cat([prompts, self.drawn[rows, :step]], 1)
            logits = penalise_repetition(logits, seen, self.generation.repetition_penalty)
        tokens = draw_tokens(logits, self._uniform[rows.to("cpu"), step], self.generation)
        self.drawn[rows, step] = tokens
        was_open, stops = self.open[rows], torch.isin(tokens, self.stop_ids)
        self.counts[rows] += was_open
        self._ended[rows] |= was_open & stops
        self.open[rows] = was_open & ~stops & (step + 1 < self._limits[rows])
        return tokens

    def collect(self) -> list[Sampled]:
        """The responses of each prompt."""
        drawn = zip(self.drawn.tolist(), self.counts.tolist(), strict=True)
        ids, ended = [row[:count] for row, count in drawn], self._ended.tolist()
        groups = [slice(i, i + self.num_responses) for i in range(0, len(ids), self.num_responses)]
        return [Sampled(ids[group], ended[group]) for group in groups]


def _align(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts that all end in the last column, (B, P), and where they are, (B, P).

    Each is padded with a token of its own: what a response has seen is then all that its row has.
    """
    length = max(map(len, prompts))
    ids = [[prompt[0]] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _align_positions(prompts: Sequence[Sequence[int]], seen: Sequence[Seen], device: torch.device) -> Tensor:
    """Positions of the tokens of aligned prompts, (B, P), or (3, B, P) where one has more than one dimension.
    Padding is at 0."""
    length = max(map(len, prompts))
    rows = [
        nn.functional.pad(it.positions(len(prompt)).to(device), (length - len(prompt), 0))
        for prompt, it in zip(prompts, seen, strict=True)
    ]
    found = torch.stack(rows, 1)
    return found[0] if all(it.places is None for it in seen) else found


def _decode(model: PreTrainedModel, draws: _Draws, all_done: Callable[[bool], bool]) -> None:
    """Prompts once; then a token at a time of all responses that are not complete."""
    prompts, of_prompts = draws.prompt_ids, draws.prompt_mask
    most, accepted = draws.drawn.shape[1], _arguments(model)
    shares = can_share_prompts(model, prompts.shape[1] + most)
    states = SharedPrompts(model, of_prompts) if shares else RepeatedPrompts(model)

    def compute(ids: Tensor, mask: Tensor | None, positions: Tensor, **keys: Any) -> Tensor:
        given = {"position_ids": positions, "logits_to_keep": 1}
        keys |= {name: value for name, value in given.items() if name in accepted}
        output = model(
            input_ids=ids, attention_mask=mask, past_key_values=states.cache, use_cache=True, **keys
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    rows = torch.arange(len(draws.open), device=prompts.device)  # which responses are in the batch
    prompt_of = rows // draws.num_responses
    images = image_inputs(model.config, draws.pixels, prompts)
    logits = compute(prompts, of_prompts, draws.prompt_positions, **images)[prompt_of]
    states.begin(prompt_of)
    mask = torch.cat([of_prompts, of_prompts.new_ones(len(prompts), most)], 1)[prompt_of]
    positions = draws.prompt_ends[prompt_of]
    with states.attention() as keys:
        for step in range(most):
            tokens = draws.draw(logits, rows, step)
            is_open = draws.open[rows]
            if all_done(not is_open.any().item()):
                return
            if (~is_open).sum() >= _ENDED_SHARE * len(rows):
                kept = is_open.nonzero()[:, 0] if is_open.any() else rows.new_zeros(1)
                states.keep(kept)
                rows, tokens, mask, positions = rows[kept], tokens[kept], mask[kept], positions[kept]
            seen = None if shares else mask[:, : prompts.shape[1] + step + 1]
            logits = compute(tokens[:, None], seen, positions[:, None], **keys)
            positions = positions + draws.open[rows]  # a complete row stays within the model's positions


def _arguments(model: PreTrainedModel) -> set[str]:
    """What the model's own forward takes, whatever was put in its place."""
    return set(inspect.signature(type(model).forward).parameters)


def _generate(model: PreTrainedModel, draws: _Draws, all_done: Callable[[bool], bool]) -> None:
    """The same by `generate`, which asks other ranks itself where it has to."""
    ids, mask = (
        each.repeat_interleave(draws.num_responses, 0) for each in (draws.prompt_ids, draws.prompt_mask)
    )
    keys = {"do_sample": False, "max_new_tokens": draws.drawn.shape[1], "pad_token_id": 0}
    processors = LogitsProcessorList([_Draw(draws, ids.shape[1])])
    before = model.generation_config  # whose penalties and the like would be added to what is asked for
    model.generation_config = GenerateConfig(**keys, eos_token_id=draws.stop_ids.tolist() or None)
    try:
        pixels = [it for it in draws.pixels for _ in range(draws.num_responses)]
        images = generation_inputs(model.config, pixels, ids)
        cast("Any", model).generate(input_ids=ids, attention_mask=mask, logits_processor=processors, **images)
    finally:
        model.generation_config = before


class _Draw(LogitsProcessor):
    """Leaves `generate` one token to take: the one that is drawn."""

    def __init__(self, draws: _Draws, start: int) -> None:
        self.draws, self.start = draws, start
        self.rows = torch.arange(len(draws.open), device=draws.open.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = self.draws.draw(scores, self.rows, input_ids.shape[1] - self.start)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)
