"""A reward model in use, and the rows by which it is known again."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prefkit.config.errors import UserError
from prefkit.config.schema import ModelConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import Layout, Packer, last_positions, pack
from prefkit.data.vision import Vision, probe_picture
from prefkit.files import replace_text
from prefkit.model.adapter import base_of, find_adapter, start_from_adapters
from prefkit.model.attention import plain_attention
from prefkit.model.batches import prepare_for_batches
from prefkit.model.errors import ModelError
from prefkit.model.load import DTYPES, find_model, fit_vocabulary, load_tokenizer, num_rows
from prefkit.model.probe import PROBE_FILE, picture_rows
from prefkit.model.reward import (
    check_head,
    load_reward_base,
    read_value_head,
    response_scores,
    scores_at,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from prefkit.data.template import ChatTemplate

logger = logging.getLogger(__name__)

_PROBED, _MOST_TOKENS = 4, 256
_BATCH_TOKENS = 8192
# How far two computations of a score in fp32 may be apart, relative to its size or 1.
EXACT = 1e-5
# The least that half precision is allowed, one unit in its last place, and how many times the difference that
# was measured.
_UNIT = {"bfloat16": 2**-8, "float16": 2**-11}
_TIMES = 4
# Units that a score may differ by where the model is read in another number format than it was probed in.
_OTHER_FORMAT = 16


@torch.no_grad()
def plain_scores(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    batch_tokens: int = _BATCH_TOKENS,
    vision: Vision | None = None,
) -> list[float]:
    """The score of each row of token ids, read at its last token, outside of mixed precision and of packed
    batches: as transformers itself would compute it.

    Rows of like length are computed together, padded on the right, up to `batch_tokens` with the padding.
    Where a row has places for an image, `vision` shows it `probe_picture`, and it is computed alone. Raises
    `UserError` for an empty row and for ids that the model does not have.
    """
    base = base_of(model)
    _check_ids(rows, num_rows(base))
    scores = [0.0] * len(rows)
    seen = [i for i, row in enumerate(rows) if vision is not None and vision.token_id in row]
    plain = [i for i in range(len(rows)) if i not in seen]
    was_training = model.training
    model.eval()
    with plain_attention(base):
        for batch in _batches([(len(rows[i]), 1) for i in plain], "repeat", batch_tokens):
            found = _score_batch(model, [rows[plain[i]] for i in batch])
            for i, score in zip(batch, found, strict=True):
                scores[plain[i]] = score
        for i in seen:
            scores[i] = _score_seen(model, rows[i], vision)
    model.train(was_training)
    return scores


def _check_ids(rows: Sequence[Sequence[int]], size: int) -> None:
    for number, row in enumerate(rows):
        if not row:
            raise UserError(f"row {number + 1} has no token, so that there is nothing to score")
        if not 0 <= min(row) <= max(row) < size:
            raise UserError(f"row {number + 1} has token {max(row)}, and the model has {size}")


def _batches(sizes: Sequence[tuple[int, int]], layout: Layout, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of examples that are computed together, the longest first; of each `sizes` has its tokens and
    the rows that it takes. In the layout `repeat` a row is as long as the longest of its batch."""
    batch: list[int] = []
    used = longest = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
        length, rows = sizes[i]
        longest = max(longest, length)
        cost = length if layout == "shared" else longest * rows
        if batch and used + cost > batch_tokens:
            yield batch
            batch, used, longest = [], 0, length
            cost = length if layout == "shared" else longest * rows
        batch.append(i)
        used += cost
    if batch:
        yield batch


def _score_batch(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[float]:
    lengths = torch.tensor([len(row) for row in rows])
    length = int(lengths.max())
    ids = torch.zeros(len(rows), length, dtype=torch.long)  # any token does for padding: it is masked
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = torch.tensor(row)
    mask = (torch.arange(length) < lengths[:, None]).long()
    last = torch.arange(len(rows)) * length + lengths - 1
    device = base_of(model).device
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    scores: list[float] = _scores_through(model, last.to(device), inputs).tolist()
    return scores


def _scores_through(model: nn.Module, last: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """`scores_at` of a model with its adapter; where FSDP has split it, by the forward of all of it, in which
    weights are gathered."""
    base = base_of(model)
    if not isinstance(cast("nn.Linear", base.score).weight, DTensor):
        return scores_at(base, last, inputs)
    found: Tensor = model(**inputs, last=last)["scores"]
    return found


def _score_seen(model: nn.Module, row: Sequence[int], vision: Vision | None) -> float:
    example = replace(whole_row(row), images=(probe_picture(),))
    shown = None if vision is None else vision.unscaled
    batch = send_to_device(pack([example], "repeat", shown).to_dict(), base_of(model).device)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "pixels")}
    return float(_scores_through(model, last_positions(batch), inputs))


@dataclass(frozen=True)
class ScoreProbe:
    """Rows of token ids with their scores, the weights' dtype, and how far a score computed again may be from
    its own, relative to its size or 1.

    Where rows have places for an image, `picture` is a hash of what `probe_picture` was to the model.
    """

    rows: list[list[int]]
    scores: list[float]
    dtype: str
    quantized: bool
    tolerance: float
    picture: str = ""


def make_score_probe(
    model: nn.Module, examples: Sequence[TokenizedExample], template: ChatTemplate | None = None
) -> ScoreProbe:
    """A probe of the model on both responses of the shortest of the examples; see `probe_scores`.

    Of a model that sees, as `template` says, the images of these are left out, and one row has a picture of
    ours.
    """
    vision = template.vision if template is not None else None
    shortest = sorted(examples, key=lambda example: example.num_tokens)[:_PROBED]
    whole = ([*example.prompt_ids, *response] for example in shortest for response in example.response_ids)
    rows = [(ids if vision is None else vision.leave_out(ids))[-_MOST_TOKENS:] for ids in whole]
    if template is not None:
        rows += [prompt + response for prompt, response in picture_rows(template)]
    return probe_scores(model, rows, vision=vision)


def probe_scores(
    model: nn.Module, rows: list[list[int]], offset: float = 0.0, vision: Vision | None = None
) -> ScoreProbe:
    """A probe of the model, which sees by `vision`, on rows of token ids, `offset` added to what its head
    gives.

    In fp32 the tolerance is `EXACT`. Half precision is allowed 4 times what the scores of rows computed alone
    and in one batch differ by, and a unit in the last place at least.
    """
    base = base_of(model)
    dtype, quantized = str(base.dtype).removeprefix("torch."), bool(getattr(base, "is_quantized", False))
    scores = plain_scores(model, rows, 1, vision)
    together = plain_scores(model, rows, len(rows) * max(map(len, rows)), vision)
    measured = score_distance(scores, together)
    is_exact = dtype == "float32" and not quantized
    tolerance = EXACT if is_exact else max(_TIMES * measured, _UNIT.get(dtype, _UNIT["bfloat16"]))
    picture = _picture_of(rows, vision)
    return ScoreProbe(rows, [score + offset for score in scores], dtype, quantized, tolerance, picture)


def _picture_of(rows: Sequence[Sequence[int]], vision: Vision | None) -> str:
    """A hash of what `probe_picture` is to a model, where one of the rows shows it."""
    if vision is None or not any(vision.token_id in row for row in rows):
        return ""
    pixels, texts = vision.unscaled.read([probe_picture()])
    digest = hashlib.sha256("".join(texts).encode())
    for name in sorted(pixels):
        digest.update(name.encode() + pixels[name].numpy().tobytes())
    return digest.hexdigest()


def score_distance(scores: Sequence[float], others: Sequence[float]) -> float:
    """The largest difference of two scores of a row, relative to the first or 1; NaN where one is NaN.

    >>> score_distance([0.5, 10.0], [0.75, 11.0])
    0.25
    """
    one, other = (torch.tensor(it, dtype=torch.float64) for it in (scores, others))
    return float(((one - other).abs() / one.abs().clamp(min=1)).max())


def write_score_probe(probe: ScoreProbe, folder: Path) -> None:
    """Write `probe.json`."""
    facts = {name: value for name, value in asdict(probe).items() if name != "picture" or value}
    replace_text(folder / PROBE_FILE, json.dumps(facts) + "\n")


def read_score_probe(folder: Path) -> ScoreProbe | None:
    """The probe in a folder; None where there is none. Raises `ModelError` when it is damaged."""
    file = folder / PROBE_FILE
    if not file.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if "token_logps" in values:
            return None  # of a language model, upon which a reward model is trained
        probe = ScoreProbe(**values)
        if not probe.rows or len(probe.rows) != len(probe.scores) or probe.dtype not in DTYPES:
            raise ValueError("its parts do not fit together")
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file} is damaged: {error}") from error
    return probe


def _read_offset(folder: Path) -> float:
    """The bias of LLaMA-Factory's head in a folder, which the model's own head has no place for."""
    value_head = read_value_head(folder)
    return value_head[1] if value_head else 0.0


def _comparable(
    probe: ScoreProbe, model_config: PretrainedConfig, vision: Vision | None, name: str
) -> list[int]:
    """The rows of a probe that can be scored as they were. One with a picture cannot where that becomes other
    pixels: another version of a library, or another processor, scales it otherwise."""
    everything = range(len(probe.rows))
    if probe.picture == _picture_of(probe.rows, vision):
        return [*everything]
    logger.warning(
        "%s: images become other pixels here than in its training; what is compared are scores of text", name
    )
    token = getattr(model_config, "image_token_id", None)
    return [i for i in everything if token not in probe.rows[i]]


def verify_scores(model: nn.Module, folder: Path, name: str, vision: Vision | None = None) -> float | None:
    """How far the scores of the model, which sees by `vision`, are from those that were saved in `folder`,
    relative to their size or 1.

    None where there is nothing to compare: no probe, or one of a model quantised otherwise. Where the weights
    are now in fewer bits than when they were probed, these bits are allowed for. Raises `ModelError` when it
    is another model: its base, head or adapter is not the one that was trained.
    """
    probe = read_score_probe(folder)
    base = base_of(model)
    if probe is None or probe.quantized != bool(getattr(base, "is_quantized", False)):
        return None
    dtype = str(base.dtype).removeprefix("torch.")
    tolerance = probe.tolerance
    if dtype != probe.dtype:
        tolerance = max(tolerance, _OTHER_FORMAT * max(_UNIT.get(it, 0.0) for it in (dtype, probe.dtype)))
    compared = _comparable(probe, base.config, vision, name)
    try:
        found = plain_scores(model, [probe.rows[i] for i in compared], 1, vision)
    except UserError as error:
        raise ModelError(f"{name} on {base.name_or_path}: {error}: it was trained on another base") from error
    offset = _read_offset(folder)
    apart = score_distance([probe.scores[i] for i in compared], [score + offset for score in found])
    if not apart <= tolerance:
        read = "" if dtype == probe.dtype else f" It is read in {dtype}; write dtype: {probe.dtype}."
        raise ModelError(
            f"{name} on {base.name_or_path} is not the reward model that was trained: the scores of its "
            f"probe rows ({PROBE_FILE}) are {apart:.2g} away (tolerance {tolerance:.2g}, relative to a score "
            "or 1). Either this is another base than the one it was trained on, or a file of base, adapter "
            f"or head has changed.{read}"
        )
    return apart


@dataclass(frozen=True)
class RewardModel:
    """A reward model that takes the batches of `packer`; `offset` is added to what its head gives, `proof`
    is how far its scores are from those saved with it (`verify_scores`), and `most` makes of the number of
    batches the most of all processes, where these have to call the model equally often."""

    model: nn.Module
    packer: Packer
    offset: float
    proof: float | None
    most: Callable[[int], int] = int

    @property
    def layout(self) -> Layout:
        """How its batches are laid out."""
        return self.packer.layout

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return base_of(self.model).device

    @torch.no_grad()
    def score(
        self, examples: Sequence[TokenizedExample], batch_tokens: int = _BATCH_TOKENS
    ) -> list[list[float]]:
        """The scores of the responses of each example, by the forward that training uses.

        Examples are computed together up to `batch_tokens`, those with the same prompt as one, and in the
        layout `shared` a prompt once for its responses. In fp32 a score is the same within `EXACT` whatever
        it is computed with. Raises `UserError` for a score that is not finite.
        """
        found = [[0.0] * len(example.response_ids) for example in examples]
        joined, places = _join_prompts(examples, batch_tokens)
        sizes = [_size(example, self.layout) for example in joined]
        batches = list(_batches(sizes, self.layout, batch_tokens))
        batches += batches[-1:] * (self.most(len(batches)) - len(batches))
        for batch in batches:
            packed = self.packer([joined[i] for i in batch])
            here = send_to_device(packed, self.device)
            scores = (response_scores(self.model, here).double() + self.offset).tolist()
            for (i, k), score in zip((place for j in batch for place in places[j]), scores, strict=True):
                if not math.isfinite(score):
                    raise UserError(f"{examples[i].source or 'a row'}: its score is {score}, not finite")
                found[i][k] = score
        return found

    def score_rows(self, rows: Sequence[Sequence[int]], batch_tokens: int = _BATCH_TOKENS) -> list[float]:
        """The score of each row of token ids, read at its last token.

        Raises `UserError` for an empty row and for ids that the model does not have.
        """
        _check_ids(rows, num_rows(base_of(self.model)))
        return [score for (score,) in self.score([whole_row(row) for row in rows], batch_tokens)]


def whole_row(ids: Sequence[int]) -> TokenizedExample:
    """A row of token ids that has a score at its end, as an example."""
    return TokenizedExample(list(ids[:-1]), [list(ids[-1:])], (), "")


def _join_prompts(
    examples: Sequence[TokenizedExample], most_tokens: int
) -> tuple[list[TokenizedExample], list[list[tuple[int, int]]]]:
    """Examples with the same prompt as one, up to so many tokens, and for each response of each which it was:
    (example, response).

    >>> one, two = (TokenizedExample([7], [[k]], (), "f:1") for k in (1, 2))
    >>> joined, places = _join_prompts([one, two], 10)
    >>> joined[0].response_ids, places
    ([[1], [2]], [[(0, 0), (1, 0)]])
    """
    joined: list[TokenizedExample] = []
    places: list[list[tuple[int, int]]] = []
    of_prompt: dict[Any, int] = {}
    for i, example in enumerate(examples):
        prompt = (tuple(example.prompt_ids), *example.digests)
        j = of_prompt.get(prompt)
        if j is None or joined[j].num_tokens + sum(map(len, example.response_ids)) > most_tokens:
            j = of_prompt[prompt] = len(joined)
            joined.append(replace(example, response_ids=[], pairs=(), labels=()))
            places.append([])
        joined[j].response_ids.extend(example.response_ids)
        places[j] += [(i, k) for k in range(len(example.response_ids))]
    return joined, places


def _size(example: TokenizedExample, layout: Layout) -> tuple[int, int]:
    """Tokens of an example, or of the longest of its rows, and how many rows it takes."""
    if layout == "shared":
        return example.num_tokens, 1
    return len(example.prompt_ids) + max(map(len, example.response_ids)), len(example.response_ids)


def open_reward_model(
    config: ModelConfig,
    cutoff_len: int = 0,
    device: torch.device | None = None,
    vision: Vision | None = None,
) -> RewardModel:
    """Read the reward model that base and adapters are, on `device`, or this machine's accelerator; `vision`
    is how it sees, if it does.

    The bias of LLaMA-Factory's head is its `offset`. Raises `ModelError` when there is no head, and when it
    is not the model that was saved.
    """
    base = load_reward_base(config, cutoff_len)
    fit_vocabulary(base, load_tokenizer(config), config)
    model = start_from_adapters(base, config, create_new=False)
    model.requires_grad_(False)
    model.eval()
    check_head(base_of(model), config.trained_last)
    if config.quantization_bit is None:
        model.to(device or torch.accelerator.current_accelerator() or torch.device("cpu"))  # type: ignore[arg-type]
    adapters = config.adapter_name_or_path
    folder = find_adapter(adapters[-1], config) if adapters else find_model(config)
    proof = verify_scores(model, folder, config.trained_last, vision)
    layout = prepare_for_batches(base_of(model), config, cutoff_len, lambda text: None, vision is not None)
    return RewardModel(model, Packer(layout, vision), _read_offset(folder), proof)
