"""Write a reward model as transformers' sequence classification, or as LLaMA-Factory's value head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from prefkit.config.errors import UserError
from prefkit.config.schema import ModelConfig, UseConfig
from prefkit.data.template import ChatTemplate, make_template
from prefkit.data.vision import Vision
from prefkit.model.adapter import base_of, save_without_head, without_lora
from prefkit.model.attention import plain_attention
from prefkit.model.errors import ModelError
from prefkit.model.load import DTYPES, fit_vocabulary, is_classifier, is_seeing, load_model_config
from prefkit.model.padding import set_pad_token
from prefkit.model.probe import question_rows
from prefkit.model.reward import VALUE_HEAD, write_value_head
from prefkit.model.reward_model import (
    RewardModel,
    open_reward_model,
    plain_scores,
    probe_scores,
    read_score_probe,
    score_distance,
    write_score_probe,
)
from prefkit.model.seeing_classifier import has_classifier
from prefkit.model.vision import load_template
from prefkit.runs.use import usage_of
from prefkit.serve.card import (
    SCORING,
    SCORING_BY_SEEING_ADAPTER,
    SCORING_BY_VALUE_HEAD,
    make_record,
    write_facts,
)
from prefkit.serve.language_head import under_language_head

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# How far merging and rounding may move a score, relative to its size or 1. What `examples/reward.yaml` trains
# has margins of 1.6; its scores are 5e-6 away when merged, 0.02 when written in float16, 0.45 in bfloat16.
_TOLERANCE = {"float32": 1e-4, "float16": 0.1, "bfloat16": 1.0}
# Share of what training changed that rounding may take unsaid.
_SHARE_TO_MENTION = 0.05


@dataclass(frozen=True)
class _Before:
    """Rows with their scores before merging, and how far the adapter's matrices move these; None without."""

    rows: list[list[int]]
    scores: list[float]
    moved: float | None


def export_reward_model(config: UseConfig, folder: Path, say: Callable[[str], None]) -> None:
    """Write a reward model to `folder` in the form of `export_value_head`, with its probe, record and card.

    The written model must give the scores that adapter and base gave. Raises `UserError` where it has not the
    form that is asked for, and `ModelError` when it is not what was trained or not what was written.
    """
    config = _with_form(config, say)
    form = config.export.export_value_head
    trained = replace(config.model, dtype=_trained_dtype(config.model))
    if form == "lora":
        _check_one_adapter(config.model, trained.dtype)
        config = replace(config, model=trained)
    template = _make_template(config)
    accelerator = torch.accelerator.current_accelerator() if config.export.export_device == "auto" else None
    device = accelerator or torch.device("cpu")
    reward = open_reward_model(trained, config.data.cutoff_len, device, template.vision)
    name = config.model.trained_last
    if form != "lora" and getattr(base_of(reward.model), "is_quantized", False):
        raise UserError(
            f"{config.model.model_name_or_path} is quantised, and nothing can be merged into it: name the "
            "model that it was made from, or write export_value_head: lora"
        )
    if reward.proof is not None:
        say(f"{name} is the reward model that was trained: scores of its probe are {reward.proof:.1e} apart.")
    dtype = DTYPES.get(config.model.dtype, base_of(reward.model).dtype)
    if form != "lora":
        reward.model.float()  # to be merged and compared without the noise of half precision
    before = _score_before(config, reward, template)
    if reward.offset and form is None:
        say(
            f"warning: {VALUE_HEAD} has a bias, {reward.offset:g}, for which the head of a sequence "
            f"classification has no place: every score is {abs(reward.offset):g} "
            f"{'lower' if reward.offset > 0 else 'higher'}; export_value_head: full keeps it."
        )
    _write(reward, dtype, template, config, folder, say)
    del reward  # its memory is for what is read again
    apart = _compare(before, folder, config, device, template.vision, say)
    _write_facts(config, folder, apart, before.moved)
    told = "" if before.moved is None else f" (the adapter moves them by {before.moved:.1e})"
    say(f"Proof: {len(before.rows)} probe rows score the same before and after within {apart:.1e}{told}.")


def _with_form(config: UseConfig, say: Callable[[str], None]) -> UseConfig:
    """The config with the form in which a model that transformers has no class for can be written."""
    if config.export.export_value_head or has_classifier(load_model_config(config.model)):
        return config
    say(
        "transformers has no class for this model with a head for scores: it is written as a language model, "
        f"its head beside it in {VALUE_HEAD} (export_value_head: full)."
    )
    return replace(config, export=replace(config.export, export_value_head="full"))


def _trained_dtype(model: ModelConfig) -> str:
    """The number format that the reward model was probed in, where that is known: what it is to be written in
    is not what it is known again by."""
    probe = read_score_probe(Path(model.trained_last))
    return model.dtype if probe is None or probe.quantized else probe.dtype


def _check_one_adapter(model: ModelConfig, dtype: str) -> None:
    """Raises `UserError` unless the reward model is one adapter upon a language model: LLaMA-Factory reads it
    upon that of the policy. Its own numbers stay as they are."""
    if model.dtype not in ("auto", dtype):
        raise UserError(f"dtype: an adapter is written as it is, upon a base in {dtype}: remove it")
    found = {0: "no adapter", 1: "one upon a reward model"}
    number = len(model.adapter_name_or_path)
    if number != 1 or is_classifier(load_model_config(model)):
        raise UserError(
            "export_value_head: lora is for one adapter upon a language model, and "
            f"{model.trained_last} has {found.get(number, f'{number} adapters')}: write full"
        )


def _make_template(config: UseConfig) -> ChatTemplate:
    """The template; where transformers is to read the scores, its tokenizer pads with what no row ends in."""
    template = load_template(config.model, config.data)
    tokenizer = template.tokenizer
    if config.export.export_value_head is None:
        set_pad_token(tokenizer, template, config.model)
        template = make_template(tokenizer, config.data, template.vision)  # it knows a token that may be new
    tokenizer.padding_side = "right"
    return template


def _score_before(config: UseConfig, reward: RewardModel, template: ChatTemplate) -> _Before:
    """Scores of the training's own probe rows, or of questions of ours."""
    model = config.model
    paths = (*reversed(model.adapter_name_or_path), model.model_name_or_path)
    probe = next((found for path in paths if (found := read_score_probe(Path(path)))), None)
    rows = probe.rows if probe else [prompt + response for prompt, response in question_rows(template)]
    offset = reward.offset if config.export.export_value_head else 0.0
    vision = template.vision
    scores = _scores(reward.model, rows, offset, vision)
    if not model.adapter_name_or_path:
        return _Before(rows, scores, None)
    with without_lora(cast("PeftModel", reward.model)):
        untuned = _scores(reward.model, rows, offset, vision)
    return _Before(rows, scores, score_distance(scores, untuned))


def _scores(model: nn.Module, rows: list[list[int]], offset: float, vision: Vision | None) -> list[float]:
    return [score + offset for score in plain_scores(model, rows, vision=vision)]


def _write(
    reward: RewardModel,
    dtype: torch.dtype,
    template: ChatTemplate,
    config: UseConfig,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Write weights, head and tokenizer."""
    form = config.export.export_value_head
    head = cast("nn.Linear", base_of(reward.model).score).weight.detach().clone()
    if form == "lora":
        folder.mkdir(parents=True)
        save_without_head(cast("PeftModel", reward.model), folder)
    else:
        merged = _merge(reward.model, config, say)
        merged.to(dtype)  # type: ignore[arg-type]
        fit_vocabulary(merged, template.tokenizer, config.model)
        merged.config.get_text_config().pad_token_id = template.tokenizer.pad_token_id
        whole = merged if form is None else under_language_head(merged, config)
        whole.save_pretrained(str(folder), max_shard_size=f"{config.export.export_size}GB")
    if form is not None:
        write_value_head(folder, head, reward.offset)
    template.saved.save_pretrained(str(folder))


def _merge(model: nn.Module, config: UseConfig, say: Callable[[str], None]) -> PreTrainedModel:
    """The model with its last adapter merged, and the head that it brings."""
    if not config.model.adapter_name_or_path:
        return cast("PreTrainedModel", model)
    say(f"Merging {', '.join(config.model.adapter_name_or_path)} into {config.model.model_name_or_path} ...")
    return cast("PreTrainedModel", cast("PeftModel", model).merge_and_unload(safe_merge=True))


def _open_written(
    config: UseConfig, folder: Path, device: torch.device, vision: Vision | None
) -> RewardModel:
    model = config.model
    if config.export.export_value_head == "lora":
        written = replace(model, adapter_name_or_path=(str(folder),))
    else:
        written = ModelConfig(
            model_name_or_path=str(folder), dtype=model.dtype, trust_remote_code=model.trust_remote_code
        )
    return open_reward_model(written, config.data.cutoff_len, device, vision)


def _compare(
    before: _Before,
    folder: Path,
    config: UseConfig,
    device: torch.device,
    vision: Vision | None,
    say: Callable[[str], None],
) -> float:
    """How far the scores of the written model are from those before; writes the probe by which it is known.

    Raises `ModelError` when it is another model, or nearer to the one without the adapter's matrices.
    """
    form = config.export.export_value_head
    written = _open_written(config, folder, device, vision)
    probe = probe_scores(written.model, before.rows, written.offset, vision)
    if form != "lora":
        written.model.float()
    apart = score_distance(before.scores, _scores(written.model, before.rows, written.offset, vision))
    if form is None:
        plain = [i for i, row in enumerate(before.rows) if vision is None or vision.token_id not in row]
        read = _scores_of_transformers(written.model, [before.rows[i] for i in plain])
        apart = max(apart, score_distance([before.scores[i] for i in plain], read))
    exact = _TOLERANCE["float32"]
    tolerance = _TOLERANCE[probe.dtype]
    if before.moved is not None:
        tolerance = min(tolerance, max(before.moved / 2, exact))
    if not apart <= tolerance:
        raise ModelError(
            f"The written reward model is not {config.model.trained_last}: scores of the probe rows are "
            f"{apart:.2g} apart, relative to a score or 1 (tolerance {tolerance:.2g} in {probe.dtype}). "
            "Nothing was written. Write dtype: float32 to merge without rounding."
        )
    write_score_probe(probe, folder)
    if before.moved is not None and max(exact, _SHARE_TO_MENTION * before.moved) < apart:
        say(
            f"warning: rounding to {probe.dtype} takes {apart / before.moved:.0%} of what training changed; "
            "write dtype: float32 to keep it, and another export_dir."
        )
    return apart


@torch.no_grad()
def _scores_of_transformers(model: nn.Module, rows: list[list[int]]) -> list[float]:
    """What transformers itself reads in one batch, padded with the token of the model's config."""
    config: Any = model.config
    pad = config.get_text_config().pad_token_id
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    base = base_of(model)
    with plain_attention(base):
        found = base(input_ids=ids.to(base.device), attention_mask=mask.to(base.device))
    scores: list[float] = found.logits[:, 0].tolist()
    return scores


def _write_facts(config: UseConfig, folder: Path, apart: float, moved: float | None) -> None:
    form = config.export.export_value_head
    record = make_record(config, {"score": apart, "moved_by_training": moved}) | {"stage": "rm"}
    record["export_value_head"] = form
    record["usage"] = usage_of(config, is_adapter=form == "lora", scores=True)
    sees = is_seeing(load_model_config(config.model))
    code = SCORING if form is None else SCORING_BY_VALUE_HEAD[form]
    if form == "lora":  # its base is not of this folder, nor in the number format of the training
        code = SCORING_BY_SEEING_ADAPTER if sees else code
        code = code.replace("path/to/the/base", config.model.model_name_or_path)
        code = code.replace('dtype="auto"', f'dtype="{config.model.dtype}"')
    more = {"proof": f"scores of probe rows within {apart:.1e} of those before"}
    if form is not None and not sees:
        more["in LLaMA-Factory"] = f"`reward_model: path/to/this/folder`, `reward_model_type: {form}`"
    write_facts(folder, config, record, code, more)
