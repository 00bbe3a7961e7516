"""What judges the responses of ppo: a reward model here or behind HTTP, a Python function, or their sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefkit.config.schema import RunConfig
from prefkit.data.template import ChatTemplate
from prefkit.model.adapter import find_adapter
from prefkit.model.fingerprint import fingerprint
from prefkit.model.load import find_model
from prefkit.train.answered import Answered, Judge
from prefkit.train.model_judge import open_adapter_judge, open_model_judge, reward_model_use
from prefkit.train.reward_function import FunctionJudge, check_function_file, fingerprint_function
from prefkit.train.reward_server import open_server_judge

if TYPE_CHECKING:
    from torch import nn

Say = Callable[[str], None]


class WeightedJudges:
    """The weighted sum of what several judges say."""

    def __init__(self, judges: Sequence[Judge], weights: Sequence[float]) -> None:
        self.judges = judges
        self.weights = weights
        parts = (f"{weight:g} x {judge.name}" for weight, judge in zip(weights, judges, strict=True))
        self.name = " + ".join(parts)

    def score(self, answered: Sequence[Answered]) -> list[float]:
        """The sum of each response's scores by their weights. Raises `JudgeFailed`."""
        columns = [judge.score(answered) for judge in self.judges]
        return [
            sum(weight * score for weight, score in zip(self.weights, scores, strict=True))
            for scores in zip(*columns, strict=True)
        ]


def build_judge(
    config: RunConfig,
    policy: nn.Module,
    template: ChatTemplate,
    say: Say,
    has_images: bool = False,
    most: Callable[[int], int] = int,
) -> Judge:
    """What judges the responses of a run; `template` is that of the policy, `has_images` says whether prompts
    may have any, `most` is that of `RewardModel`.

    A reward model of type `lora` becomes part of the policy, see `load_reward_adapter`. Raises `UserError`
    for what cannot judge.
    """
    reward = config.reward
    judges: list[Judge] = []
    if reward.reward_model and reward.reward_model_type == "lora":
        judges.append(open_adapter_judge(config, policy, template, say, most))
    elif reward.reward_model and reward.reward_model_type == "full":
        judges.append(open_model_judge(config, template, say, has_images))
    elif reward.reward_model:
        judges.append(open_server_judge(reward, template.tokenizer, say, has_images))
    if reward.reward_function:
        judges.append(FunctionJudge(reward.reward_function))
    weights = reward.reward_weights or (1.0,) * len(judges)
    return judges[0] if weights == (1.0,) else WeightedJudges(judges, weights)


def check_judges(config: RunConfig) -> None:
    """Raises `UserError` for a reward model or function that is not there, before anything is loaded."""
    reward = config.reward
    if reward.reward_model and reward.reward_model_type != "api":
        reward_model_use(config)
    if reward.reward_function:
        check_function_file(reward.reward_function)


def fingerprint_functions(config: RunConfig) -> dict[str, str]:
    """sha256 of the file of the function that judges, by its name in the YAML."""
    name = config.reward.reward_function
    return {name: fingerprint_function(Path(name.rpartition(":")[0]))} if name else {}


def fingerprint_reward_models(config: RunConfig) -> dict[str, str]:
    """sha256 of each part of the reward model that is read from files, by its name: one that changes would
    make a resumed run another. What a server has is not known."""
    reward, found = config.reward, {}
    if reward.reward_model and reward.reward_model_type != "api":
        use = reward_model_use(config).model
        found[use.model_name_or_path] = fingerprint(find_model(use))
        found |= {path: fingerprint(find_adapter(path, use)) for path in use.adapter_name_or_path}
    return found
