"""`prefkit check`: everything that can be told of a training before any weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from prefkit.check.advice import Advice, find_advice
from prefkit.check.data import (
    DataSummary,
    Duplicates,
    Images,
    Summary,
    as_dict,
    count_images,
    find_duplicates,
)
from prefkit.check.material import Material, Say, read_material
from prefkit.check.memory import Estimate, batch_tokens, estimate_memory, largest_batch
from prefkit.check.models import Models, build_models
from prefkit.check.outlook import FirstLoss, Outlook, expect_first_loss, look_ahead, look_ahead_in_rollouts
from prefkit.check.settings import Setting, read_settings, show_value
from prefkit.check.tokens import Part, render
from prefkit.config.errors import UserError
from prefkit.config.load import LoadedConfig
from prefkit.config.schema import RunConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.ledger import Ledger
from prefkit.data.streaming import StreamedRows
from prefkit.train.arguments import make_training_arguments, without_engine
from prefkit.train.judges import check_judges
from prefkit.train.references import wants_cache

if TYPE_CHECKING:
    from transformers import TrainingArguments

_SHOWN_EXAMPLES = 2
# What a training of a stage holds besides the step that is rehearsed.
_LEFT_OUT = {
    "ppo": "what the drawing keeps, and a reward model; a response is taken to have max_new_tokens",
}


@dataclass(frozen=True)
class Memory:
    """The estimated peak, on which device, for which micro-batch, and how it compares with `budget` bytes.

    `advice` is the cheapest change that fits, where the estimate does not and there is one.
    """

    estimate: Estimate
    device: str
    batch_rows: int
    batch_tokens: int
    budget: int | None
    advice: Advice | None
    leaves_out: str = ""

    @property
    def fits(self) -> bool | None:
        """Whether the training fits; None without a budget."""
        return None if self.budget is None else self.estimate.total <= self.budget

    def to_dict(self) -> dict[str, Any]:
        """The estimate as JSON, in bytes."""
        advice = self.advice
        return {
            "device": self.device,
            "parts": self.estimate.parts,
            "total": self.estimate.total,
            "batch_examples": self.batch_rows,
            "batch_tokens": self.batch_tokens,
            "budget": self.budget,
            "fits": self.fits,
            "advice": advice and {"keys": advice.keys, "cost": advice.cost, "total": advice.total},
            "leaves_out": self.leaves_out,
        }


@dataclass(frozen=True)
class Report:
    """What `prefkit check` found."""

    settings: list[Setting]
    warnings: tuple[str, ...]
    ledgers: list[Ledger]
    summaries: list[DataSummary]
    duplicates: Duplicates
    held_out: int
    images: Images | None
    examples: list[tuple[str, list[Part]]]
    layout: str
    num_weights: tuple[int, int]
    outlook: Outlook
    first_loss: FirstLoss
    memory: Memory

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "config": {setting.key: setting.to_dict() for setting in self.settings},
            "warnings": list(self.warnings),
            "ledger": [ledger.to_dict() for ledger in self.ledgers],
            "data": [as_dict(summary) for summary in self.summaries],
            "held_out": self.held_out,
            "duplicates": vars(self.duplicates),
            "images": self.images and {**vars(self.images), "mean_tokens": round(self.images.mean, 1)},
            "examples": [
                {"source": source, "parts": [part.to_dict() for part in parts]}
                for source, parts in self.examples
            ],
            "layout": self.layout,
            "weights": {"trained": self.num_weights[0], "all": self.num_weights[1]},
            "training": self.outlook.to_dict(),
            "first_loss": {"value": self.first_loss.value, "why": self.first_loss.why},
            "memory": self.memory.to_dict(),
        }


def check(loaded: LoadedConfig[RunConfig], budget: int | None, say: Say) -> Report:
    """Look at everything that a training would use but the weights; `budget` is in bytes.

    `say` is told what takes time. Raises `UserError` for whatever would stop the training as well.
    """
    return report_on(read_material(loaded, say), budget, say)


def report_on(material: Material, budget: int | None, say: Say) -> Report:
    """What a training would do and take that reads `material`. As `check` otherwise."""
    config, args, data, train = material.config, material.args, material.data, material.rows
    vision, vocabulary = material.template.vision, len(material.template.tokenizer)
    models = build_models(config, args, vocabulary, len(train), data.has_images)

    def all_rows() -> Iterable[TokenizedExample]:
        return chain(train, data.held_out, data.answers)

    return Report(
        settings=read_settings(config),
        warnings=(*material.loaded.warnings, *_miss_judges(config)),
        ledgers=material.ledgers,
        summaries=_by_data_set(material.ledgers, all_rows(), config.data.cutoff_len),
        duplicates=find_duplicates(train, data.held_out),
        held_out=len(data.held_out),
        images=None if vision is None else count_images(all_rows(), vision.token_ids),
        examples=[
            (row.source, render(row, material.pieces)) for row in islice(material.shown, _SHOWN_EXAMPLES)
        ],
        layout=models.layout,
        num_weights=models.num_weights,
        outlook=_look_ahead(config, args, train, models, isinstance(data.train, StreamedRows)),
        first_loss=expect_first_loss(config),
        memory=_estimate(material, models, budget, say),
    )


def _miss_judges(config: RunConfig) -> list[str]:
    """What would stop a training by rollouts now: a reward model that is not trained yet, say."""
    if config.method.stage != "ppo":
        return []
    try:
        check_judges(config)
    except UserError as error:
        return [str(error)]
    return []


def _look_ahead(
    config: RunConfig,
    args: TrainingArguments,
    train: Sequence[TokenizedExample],
    models: Models,
    is_stream: bool,
) -> Outlook:
    if config.method.stage == "ppo":
        return look_ahead_in_rollouts(config, args, train, models.layout)
    return look_ahead(
        args,
        train,
        models.layout,
        reads_reference=models.needs_reference,
        cached=not is_stream and wants_cache(config, args, models.config, len(train)),
        is_stream=is_stream,
    )


def _by_data_set(
    ledgers: Sequence[Ledger], examples: Iterable[TokenizedExample], cutoff_len: int
) -> list[DataSummary]:
    """Each data set by itself; an example belongs to the one whose file its source names."""
    owner = {place: ledger.name for ledger in ledgers for place in ledger.places}
    summaries = {name: Summary(name, cutoff_len) for name in dict.fromkeys(owner.values())}
    for example in examples:
        summaries[owner[example.source.rpartition(":")[0]]].add(example)
    return [summary.finish() for summary in summaries.values()]


def _estimate(material: Material, models: Models, budget: int | None, say: Say) -> Memory:
    say("Rehearsing a step for its memory ...")
    config, args, has_images = material.config, material.args, material.data.has_images
    vocabulary = len(material.template.tokenizer)
    rows = _with_responses(material.shown, config)
    batch = largest_batch(rows, args.per_device_train_batch_size, models.layout)
    estimate = estimate_memory(models, args, batch)

    def peak_with(changed: RunConfig) -> int:
        if changed == config:
            return estimate.total
        say(f"Rehearsing with {describe_change(config, changed)} ...")
        other_args = make_training_arguments(without_engine(changed))
        other = build_models(changed, other_args, vocabulary, len(rows), has_images)
        cut = [_cut(row, changed.data.cutoff_len) for row in rows]
        own = largest_batch(cut, other_args.per_device_train_batch_size, other.layout)
        return estimate_memory(other, other_args, own).total

    too_much = budget is not None and estimate.total > budget
    advice = find_advice(config, budget, peak_with) if budget is not None and too_much else None
    tokens = batch_tokens(batch, models.layout)
    return Memory(
        estimate, args.device.type, len(batch), tokens, budget, advice, _left_out(config, has_images)
    )


def _left_out(config: RunConfig, has_images: bool) -> str:
    """What is not in an estimate."""
    parts = [_LEFT_OUT[config.method.stage]] if config.method.stage in _LEFT_OUT else []
    if has_images:
        is_frozen = config.tuning.freeze_vision_tower and config.tuning.freeze_multi_modal_projector
        which = "frozen image reader" if is_frozen else "image reader, a part of which is trained,"
        parts.append(f"what the {which} itself takes (what is seen is counted as the tokens that it has)")
    return "; ".join(parts)


def _with_responses(rows: Sequence[TokenizedExample], config: RunConfig) -> Sequence[TokenizedExample]:
    """The rows, those without a response with one as long as generation makes it."""
    if config.method.stage != "ppo":
        return rows
    longest = max(rows, key=lambda row: len(row.prompt_ids))
    responses = [[0] * config.generation.max_new_tokens] * config.ppo.ppo_group_size
    return [replace(longest, response_ids=responses)] * len(rows)


def describe_change(config: RunConfig, changed: RunConfig) -> str:
    """The keys in which two configs differ, as YAML would have them."""
    old, new = config.to_yaml_dict(), changed.to_yaml_dict()
    return ", ".join(f"{key}: {show_value(new[key])}" for key in new if new[key] != old.get(key))


def _cut(example: TokenizedExample, cutoff_len: int) -> TokenizedExample:
    """About as many tokens as encoding for a smaller `cutoff_len` would leave."""
    longest = max(map(len, example.response_ids), default=0)
    if len(example.prompt_ids) + longest <= cutoff_len:
        return example
    kept = max(cutoff_len - len(example.prompt_ids), cutoff_len * 3 // 4)
    responses = [ids[:kept] for ids in example.response_ids]
    room = cutoff_len - max(map(len, responses), default=0)
    return replace(example, prompt_ids=example.prompt_ids[-room:], response_ids=responses)
