"""Reward models in the process that trains: an adapter upon the policy's weights, or a model of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefkit.config.errors import UserError
from prefkit.config.schema import RunConfig, UseConfig
from prefkit.config.uses import SCORING
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Message
from prefkit.data.messages import Degenerate, RowError
from prefkit.data.template import ChatTemplate
from prefkit.data.vision import Vision
from prefkit.model.adapter import find_adapter
from prefkit.model.errors import ModelError
from prefkit.model.load import is_seeing, load_model_config
from prefkit.model.reward_adapter import load_reward_adapter
from prefkit.model.scorer import Scorer, open_scorer
from prefkit.model.vision import load_template
from prefkit.runs.reward_model import recorded_stage
from prefkit.runs.use import read_use_config, recorded_usage
from prefkit.train.answered import Answered, JudgeFailed

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PretrainedConfig

Say = Callable[[str], None]


class ModelJudge:
    """A reward model with its template.

    Where its template and tokenizer write what the policy's do (`ChatTemplate.writes_as`), the tokens that
    were drawn reach it as they are, with the end of the turn that its training has seen after them; otherwise
    prompt and response are written anew as text, and the images read anew. The turn of a response that was
    cut off stays open. A row of more than the reward model's `cutoff_len` tokens is cut, see `fit_row`.
    """

    def __init__(self, name: str, scorer: Scorer, policy: ChatTemplate) -> None:
        self.name = name
        self.scorer = scorer
        own = scorer.template
        is_same = own.writes_as(policy) and _sees_as(own.vision, policy.vision)
        self.encode = self._take if is_same else self._write

    def score(self, answered: Sequence[Answered]) -> list[float]:
        """The reward model's score of each response. Raises `JudgeFailed`."""
        rows = []
        for number, one in enumerate(answered, 1):
            with_name = f"response {number} of {len(answered)}"
            try:
                rows.append(replace(self.encode(one), source=with_name))
            except (UserError, RowError, Degenerate) as error:
                raise JudgeFailed(f"reward_model {self.name}, {with_name}: {error}") from error
        try:
            return [score for (score,) in self.scorer.score(rows)]
        except UserError as error:
            raise JudgeFailed(f"reward_model {self.name}: {error}") from error

    def _take(self, one: Answered) -> TokenizedExample:
        """The tokens as they were drawn, but for those of images. Whichever token has ended the turn, it is
        the template's end that stands there."""
        template = self.scorer.template
        ids = [*one.response_ids[:-1], *template.closing] if one.ended else one.response_ids
        if template.count_places(ids):
            ids = [token for token in ids if not template.count_places([token])]
        return self.scorer.fit(one.prompt_ids, ids, one.images)

    def _write(self, one: Answered) -> TokenizedExample:
        """The conversation in the reward model's template and tokens."""
        answer = Message("assistant", one.text)
        return self.scorer.fit_answer(one.prompt, answer, one.tools, one.ended, one.images)


def _sees_as(own: Vision | None, policy: Vision | None) -> bool:
    """Whether the images of the policy's prompts are to the reward model what they are to the policy."""
    return own is None or policy is None or own.facts == policy.facts


def open_model_judge(
    config: RunConfig, policy: ChatTemplate, say: Say, has_images: bool = False
) -> ModelJudge:
    """A reward model of type `full`; `has_images` says whether prompts may have any. Raises `ModelError` when
    it is none, another than was trained, or does not see the images."""
    use = reward_model_use(config)
    name = str(config.reward.reward_model)
    _check_sight(name, load_model_config(use.model), has_images)
    judge = ModelJudge(name, open_scorer(use.model, use.data), policy)
    _tell(judge, "a model of its own", say)
    return judge


def _check_sight(name: str, model_config: PretrainedConfig, has_images: bool) -> None:
    if has_images and not is_seeing(model_config):
        raise ModelError(
            f"reward_model: {name} does not see, and the rows have images: train one upon a model that does, "
            "or take `images` out of `columns` in dataset_info.json"
        )


def open_adapter_judge(
    config: RunConfig,
    policy: nn.Module,
    template: ChatTemplate,
    say: Say,
    most: Callable[[int], int] = int,
) -> ModelJudge:
    """A reward model of type `lora`, put upon the policy. Raises `ModelError` when it is none, or was trained
    upon other weights."""
    use = reward_model_use(config)
    name = str(config.reward.reward_model)
    if not use.model.adapter_name_or_path:
        raise ModelError(f"reward_model: {name} is no adapter: write reward_model_type: full")
    adapted: PeftModel = policy  # type: ignore[assignment]
    folder = find_adapter(use.model.trained_last, use.model)
    own = load_template(use.model, use.data)
    adapter = load_reward_adapter(adapted, folder, use.data.cutoff_len, name, own.vision, most)
    judge = ModelJudge(name, Scorer(adapter, own, name, use.data.cutoff_len), template)
    _tell(judge, "an adapter upon the policy's weights", say)
    if adapter.proof is None:
        say(
            f"{name} has no probe rows to check: that it was trained upon these weights is taken for granted."
        )
    return judge


def _tell(judge: ModelJudge, what: str, say: Say) -> None:
    proof = judge.scorer.model.proof
    known = "" if proof is None else f"; its scores are those of its training, within {proof:.1e}"
    how = "the tokens as they are drawn" if judge.encode == judge._take else "text, in its own template"
    say(f"Reward model: {judge.name}, {what}{known}. It reads {how}.")


def _of_the_hub(source: str, config: RunConfig) -> str:
    try:
        return str(find_adapter(source, config.model))
    except UserError as error:
        raise UserError(
            f"reward_model: {source} is no folder here and no adapter of the hub: train one with stage: rm, "
            "as examples/reward.yaml does, and name its output_dir"
        ) from error


def _read_use(source: str) -> UseConfig:
    try:
        use: UseConfig = read_use_config(source, [], SCORING).config
    except UserError as error:
        raise UserError(f"reward_model: {error}") from error
    if (stage := recorded_stage(use.model)) not in (None, "rm"):
        raise UserError(
            f"reward_model: {source} is what a training with stage: {stage} left, no reward model: name the "
            "folder of one with stage: rm"
        )
    return use


def reward_model_use(config: RunConfig) -> UseConfig:
    """The reward model of types `lora` and `full`: its base, adapters and template, as its run has recorded
    them; the base of an adapter upon the policy is the policy's. Where nothing says how long its rows may be,
    they are as long as those of the policy.

    Raises `UserError` for a folder of neither model nor adapter.
    """
    reward = config.reward
    source = str(reward.reward_model)
    if reward.reward_model_type == "lora" and not Path(source).expanduser().exists():
        source = _of_the_hub(source, config)
    use = _read_use(source)
    if reward.reward_model_adapters:
        adapters = [*use.model.adapter_name_or_path, *reward.reward_model_adapters]
        use = read_use_config(source, [f"adapter_name_or_path={json.dumps(adapters)}"], SCORING).config
    names = ["cache_dir", "trust_remote_code", "quantization_type", "double_quantization"]
    if reward.reward_model_type == "lora":
        names += ["model_name_or_path", "model_revision"]
    own: dict[str, Any] = {name: config.value(name) for name in names}
    model = replace(use.model, quantization_bit=reward.reward_model_quantization_bit, **own)
    data = use.data
    if "cutoff_len" not in recorded_usage(Path(model.trained_last)):
        longest = config.data.cutoff_len + config.generation.max_new_tokens
        known = getattr(load_model_config(model).get_text_config(), "max_position_embeddings", None)
        data = replace(data, cutoff_len=min(longest, known or longest))
    return replace(use, model=model, data=data)
