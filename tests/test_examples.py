"""Every file in examples/ loads and trains two steps."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from prefkit.config import RunConfig, load_config, load_use_config
from prefkit.config.uses import EXPORT, SCORING, TALKING
from prefkit.model.scorer import open_scorer
from prefkit.objectives.pairwise import LOSSES
from prefkit.runs.report import make_console
from prefkit.runs.use import read_use_config
from prefkit.train.reward_function import FunctionJudge
from prefkit.train.run import train
from tests.seeing import save_seeing_model
from tests.serve.serving import running_app
from tests.train.judged import make_answered

ROOT = Path(__file__).parent.parent
USE, SCORE = (ROOT / "examples" / name for name in ("use.yaml", "score.yaml"))
EXAMPLES = sorted({*(ROOT / "examples").glob("*.yaml")} - {USE, SCORE})
SEEING = [file for file in EXAMPLES if file.stem.endswith("_images")]
PPO = [file for file in EXAMPLES if file.stem.startswith("ppo")]


def train_example(name: str, folder: Path, *overrides: str) -> RunConfig:
    """Two steps of an example, upon some of its rows, into a folder."""
    given = [f"output_dir={folder}", "max_steps=2", "max_samples=16", *overrides]
    loaded = load_config(ROOT / "examples" / f"{name}.yaml", given)
    assert all("without effect" in warning for warning in loaded.warnings)
    train(loaded.config, make_console(io.StringIO()))
    return loaded.config


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that needs it leaves a reward model."""
    return tmp_path_factory.mktemp("judge") / "reward"


@pytest.fixture
def judge(file: Path, tiny_model: Path, reward: Path) -> Iterator[list[str]]:
    """The keys by which an example of ppo finds what judges, which is there as long as this fixture."""
    with contextlib.ExitStack() as held:
        if file.stem in ("ppo", "ppo_http") and not reward.exists():
            train_example("reward", reward, f"model_name_or_path={tiny_model}")
        if file.stem == "ppo_http":
            rewards = pytest.importorskip("prefkit.serve.rewards")
            config = read_use_config(str(reward), [], SCORING).config
            scorer = open_scorer(config.model, config.data)
            yield [f"reward_model={held.enter_context(running_app(rewards.make_app(scorer)))}/v1/rewards"]
        else:
            yield [f"reward_model={reward}"] if file.stem == "ppo" else []


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_trains(
    file: Path, judge: list[str], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    model = save_seeing_model(tmp_path / "model") if file in SEEING else tiny_model
    overrides = [f"model_name_or_path={model}", *judge]
    if "sample_prompts" in file.read_text():
        overrides += ["sample_prompts=1", "sample_max_new_tokens=4"]
    if file in PPO:
        overrides += ["max_new_tokens=8"]
    config = train_example(file.stem, tmp_path / "out", *overrides)
    weights = "model" if config.tuning.finetuning_type == "full" else "adapter_model"
    assert (tmp_path / "out" / f"{weights}.safetensors").is_file()
    assert (tmp_path / "out" / "eval_results.json").is_file()


def test_the_example_of_use_takes_every_verb() -> None:
    for rules, keys in ((TALKING, []), (EXPORT, ["export_dir=x"])):
        loaded = load_use_config(USE, keys, {}, rules)
        assert loaded.config.model.adapter_name_or_path == ("saves/dpo",)
        assert all(warning.startswith("not used here") for warning in loaded.warnings)


def test_the_example_of_scoring_takes_every_key() -> None:
    loaded = load_use_config(SCORE, [], {}, SCORING)
    assert loaded.config.model.adapter_name_or_path == ("saves/reward",) and not loaded.warnings


def test_there_is_one_for_each_loss() -> None:
    methods = [load_config(file, []).config.method for file in EXAMPLES]
    assert {method.pref_loss for method in methods if method.stage == "dpo"} == LOSSES.keys()
    assert {method.stage for method in methods} == {"dpo", "kto", "rm", "ppo"}


def test_those_of_ppo_differ_in_what_judges_alone() -> None:
    """So that what is learnt by the one way can be compared with the others."""
    own = {"reward_model", "reward_model_type", "reward_function", "reward_timeout", "reward_retries"}
    own |= {"ppo_missing_eos_penalty", "output_dir"}
    written = [yaml.safe_load(file.read_text()) for file in PPO]
    shared = [{key: value for key, value in keys.items() if key not in own} for keys in written]
    assert len(PPO) == 3 and shared[0] == shared[1] == shared[2]


def test_the_reward_of_the_example_is_best_for_one_short_sentence() -> None:
    judge = FunctionJudge(f"{ROOT / 'examples' / 'rewards' / 'short.py'}:score")
    best, more, long, open_end, empty = judge.score(
        make_answered(
            texts=(
                "It is a bird.",
                "It is a bird. It can fly.",
                "It is " + "very " * 15 + "big.",
                "It is a",
                "",
            )
        )
    )
    assert best == 1.0
    assert (more, open_end, empty) == (0.5, 0.0, -3.0)
    assert long == pytest.approx(1 - 6 / 12)
