"""What judges ppo: reward models that our stage rm or LLaMA-Factory left, functions, and their sum."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import prefkit.train.run
from prefkit.config import RunConfig, TuningConfig, load_config
from prefkit.config.errors import UserError
from prefkit.config.uses import SCORING
from prefkit.data.examples import Message
from prefkit.data.template import ChatTemplate, make_template
from prefkit.model.adapter import add_lora
from prefkit.model.errors import ModelError
from prefkit.model.load import load_tokenizer
from prefkit.model.reward_adapter import REWARD, RewardAdapter, load_reward_adapter
from prefkit.model.scorer import Scorer, open_scorer
from prefkit.runs.use import read_use_config
from prefkit.train.answered import Answered, Judge, JudgeFailed
from prefkit.train.judges import WeightedJudges, build_judge, fingerprint_functions, fingerprint_reward_models
from prefkit.train.model_judge import ModelJudge
from prefkit.train.reward_function import FunctionJudge
from prefkit.train.trainer import PrefTrainer
from tests.conftest import make_model, make_tokenizer
from tests.model.test_adapter import randomise
from tests.model.test_policy import EXAMPLES
from tests.model.test_reward import make_reward_model, put_value_head
from tests.model.test_reward_adapter import LONGEST, make_policy, make_rater
from tests.train.judged import TEXTS, make_answered
from tests.train.runs import losses, run, same, unfinish
from tests.train.test_kills import rest_is_slow

LONG = [Message("system", "S"), Message("user", "word " * 40)]
Configure = Callable[..., RunConfig]


@pytest.fixture
def configure(write_config: Callable[..., Path]) -> Configure:
    """A config of ppo upon the tiny model, whose prompts have up to 64 tokens."""

    def make(**keys: Any) -> RunConfig:
        given = {"stage": "ppo", "dataset": "judged", "template": "chatml", "cutoff_len": 64, **keys}
        return load_config(write_config(**given), []).config

    return make


@pytest.fixture
def train_rater(write_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Trains a reward model; its folder."""

    def train(name: str = "rater", **keys: Any) -> Path:
        folder = tmp_path / name
        given = {"stage": "rm", "template": "chatml", "cutoff_len": 80, "learning_rate": 0.1, "max_steps": 4}
        run(write_config(**{**given, **keys, "output_dir": str(folder)}))
        return folder

    return train


def template_of(config: RunConfig) -> ChatTemplate:
    return make_template(load_tokenizer(config.model), config.data)


def judge_of(config: RunConfig, policy: nn.Module | None = None) -> tuple[Judge, str]:
    """The judge, and what was said of it."""
    said: list[str] = []
    policy = policy or make_policy(Path(config.model.model_name_or_path))
    return build_judge(config, policy, template_of(config), said.append), "\n".join(said)


def scorer_of(folder: Path, *overrides: str) -> Scorer:
    """The same reward model as `prefkit score` opens it."""
    config = read_use_config(str(folder), overrides, SCORING).config
    return open_scorer(config.model, config.data)


def expected(scorer: Scorer, answered: Sequence[Answered]) -> list[float]:
    """The scores of the conversations as the reward model's own template writes them."""
    answers = [Message("assistant", one.text) for one in answered]
    rows = [
        scorer.fit_answer(one.prompt, answer, one.tools, one.ended)
        for one, answer in zip(answered, answers, strict=True)
    ]
    return [score for (score,) in scorer.score(rows)]


# Reward models of type lora


def test_reward_model_type_lora_is_the_reward_model_upon_the_policy(
    train_rater: Callable[..., Path], configure: Configure
) -> None:
    folder = train_rater()
    policy = make_policy(Path(configure(reward_model=str(folder)).model.model_name_or_path)).train()
    judge, said = judge_of(configure(reward_model=str(folder), reward_model_type="lora"), policy)
    assert "an adapter upon the policy's weights; its scores are those of its training, within" in said
    assert said.endswith("It reads the tokens as they are drawn.")
    assert isinstance(judge, ModelJudge) and isinstance(judge.scorer.model, RewardAdapter)
    answered = make_answered(unfinished=[1, 3])
    found = judge.score(answered)
    assert found == pytest.approx(expected(scorer_of(folder), answered), abs=1e-5)
    assert len(set(found)) == len(TEXTS) and judge.name == str(folder)
    assert policy.training and policy.active_adapter == "default"


@pytest.mark.parametrize(
    ("of_rater", "of_policy"),
    [
        ({"template": "llama3"}, {}),
        ({"template": "chatml", "default_system": "Be kind."}, {}),
        ({"template": None}, {}),
        ({"template": "chatml"}, {"template": "qwen3", "enable_thinking": False}),
    ],
)
def test_another_template_is_that_of_the_reward_model(
    of_rater: dict[str, Any],
    of_policy: dict[str, Any],
    train_rater: Callable[..., Path],
    configure: Configure,
) -> None:
    folder = train_rater(**of_rater)
    config = configure(reward_model=str(folder), **of_policy)
    judge, said = judge_of(config)
    assert said.endswith("It reads text, in its own template.")
    answered = make_answered(template_of(config), unfinished=[1])
    scorer = scorer_of(folder)
    assert judge.score(answered) == pytest.approx(expected(scorer, answered), abs=1e-5)
    assert scorer.template.name == of_rater["template"]


def test_whichever_token_ends_a_turn_the_reward_model_sees_its_own_end(
    train_rater: Callable[..., Path], configure: Configure
) -> None:
    judge, _ = judge_of(configure(reward_model=str(train_rater())))
    (ended,) = make_answered(texts=("yes",))
    other = Answered(ended.prompt, (), ended.prompt_ids, [*ended.response_ids[:-1], 0], True, "yes")
    cut = Answered(ended.prompt, (), ended.prompt_ids, ended.response_ids[:-1], False, "yes")
    one, same_one, open_one = judge.score([ended, other, cut])
    assert one == pytest.approx(same_one, abs=1e-5) and abs(one - open_one) > 1e-3


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_no_row_is_too_long(kind: str, train_rater: Callable[..., Path], configure: Configure) -> None:
    folder = train_rater(finetuning_type=kind, learning_rate=1e-2)
    for template in ("chatml", "qwen3"):  # as tokens, and as text
        config = configure(reward_model=str(folder), reward_model_type=kind, template=template)
        judge, _ = judge_of(config)
        assert isinstance(judge, ModelJudge) and judge.scorer.max_length == 80
        answered = make_answered(
            template_of(config), ("x" * 300, "y" * 70, "ok"), prompt=LONG, unfinished=[0]
        )
        found = judge.score(answered)
        rows = [judge.encode(one) for one in answered]
        assert all(len(row.prompt_ids) + len(row.response_ids[0]) == 80 for row in rows)
        scorer = scorer_of(folder)
        assert found == pytest.approx([score for (score,) in scorer.score(rows)], abs=1e-5)


def test_an_adapter_of_llamafactory(tiny_model: Path, tmp_path: Path, configure: Configure) -> None:
    folder = tmp_path / "theirs"
    writer = add_lora(make_model(), TuningConfig(lora_rank=2))
    randomise(writer, seed=5)
    writer.save_pretrained(str(folder))
    put_value_head(folder, bias=0.75)
    file = folder / "adapter_config.json"
    text = file.read_text()
    file.write_text(json.dumps({**json.loads(text), "base_model_name_or_path": "/their/base"}))
    config = configure(reward_model=str(folder), max_new_tokens=30)
    judge, said = judge_of(config)
    assert "no probe rows to check: that it was trained upon these weights is taken for granted" in said
    assert isinstance(judge, ModelJudge) and judge.scorer.max_length == 64 + 30
    file.write_text(
        text.replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{tiny_model}"')
    )
    scorer = scorer_of(folder, f"model_name_or_path={tiny_model}", "cutoff_len=94")
    answered = make_answered(ChatTemplate(make_tokenizer()))
    assert judge.score(answered) == pytest.approx(expected(scorer, answered), abs=1e-5)


def test_a_run_is_named_by_its_checkpoint_or_its_yaml(
    train_rater: Callable[..., Path], configure: Configure, tmp_path: Path
) -> None:
    folder = train_rater(save_steps=2)
    answered = make_answered()
    first, last = (
        judge_of(configure(reward_model=str(folder / name)))[0].score(answered)
        for name in ("checkpoint-2", "checkpoint-4")
    )
    assert first != pytest.approx(last, abs=1e-5)
    shutil.copy(folder / "config.yaml", tmp_path / "rater.yaml")
    by_yaml, _ = judge_of(configure(reward_model=str(tmp_path / "rater.yaml")))
    assert by_yaml.score(answered) == pytest.approx(last, abs=1e-5)


# Reward models of type full


def other_tokenizer() -> Any:
    """The bytes in another order, so that no id means what it means to the policy."""
    from tokenizers import Tokenizer

    state = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {token: i if i < 7 else 7 + 262 - i for token, i in vocabulary.items()}
    tokenizer = make_tokenizer()
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


def test_a_reward_model_with_another_tokenizer(tmp_path: Path, configure: Configure) -> None:
    folder = tmp_path / "other"
    make_reward_model("qwen2").save_pretrained(folder)
    other_tokenizer().save_pretrained(folder)
    judge, said = judge_of(configure(reward_model=str(folder), reward_model_type="full"))
    assert "a model of its own. It reads text, in its own template." in said
    answered = make_answered(unfinished=[1])
    found = judge.score(answered)
    assert found == pytest.approx(expected(scorer_of(folder), answered), abs=1e-5)
    ids = [[*one.prompt_ids, *one.response_ids] for one in answered]
    assert found != pytest.approx(scorer_of(folder).model.score_rows(ids), abs=1e-2)  # type: ignore[union-attr]


def test_a_whole_model_of_ours(train_rater: Callable[..., Path], configure: Configure) -> None:
    folder = train_rater(finetuning_type="full", learning_rate=1e-2)
    policy = make_policy(Path(configure(reward_model="r").model.model_name_or_path))
    number = sum(1 for _ in policy.parameters())
    judge, said = judge_of(configure(reward_model=str(folder), reward_model_type="full"), policy)
    assert "a model of its own; its scores are those of its training" in said and "as they are drawn" in said
    assert sum(1 for _ in policy.parameters()) == number
    answered = make_answered(unfinished=[0])
    assert judge.score(answered) == pytest.approx(expected(scorer_of(folder), answered), abs=1e-5)


def test_reward_model_adapters_are_put_upon_it(
    tiny_model: Path, tmp_path: Path, train_rater: Callable[..., Path], configure: Configure
) -> None:
    """Upon the base of the first, all but the last are merged; the template is that of the last."""
    below = train_rater("below", stage="dpo")
    rater = train_rater("upon", adapter_name_or_path=str(below), create_new_adapter=True, template="llama3")
    keys: dict[str, Any] = {"reward_model": str(tiny_model), "reward_model_type": "full"}
    judge, said = judge_of(configure(**keys, reward_model_adapters=[str(below), str(rater)]))
    assert "its scores are those of its training" in said
    answered = make_answered()
    assert judge.score(answered) == pytest.approx(expected(scorer_of(rater), answered), abs=1e-5)
    with pytest.raises(ModelError, match="is not the reward model that was trained"):
        judge_of(configure(**keys, reward_model_adapters=[str(rater)]))


def test_reward_model_quantization_bit_is_that_of_its_weights(
    train_rater: Callable[..., Path], configure: Configure
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = train_rater()
    keys: dict[str, Any] = {"reward_model": str(folder), "reward_model_type": "full"}
    judge, _ = judge_of(configure(**keys, reward_model_quantization_bit=8))
    assert isinstance(judge, ModelJudge)
    answered = make_answered()
    found = judge.score(answered)
    assert found == pytest.approx(expected(scorer_of(folder, "quantization_bit=8"), answered), abs=1e-5)
    assert found != pytest.approx(judge_of(configure(**keys))[0].score(answered), abs=1e-5)


# What is refused


def test_what_is_no_reward_model(
    tiny_model: Path, tmp_path: Path, train_rater: Callable[..., Path], configure: Configure
) -> None:
    with pytest.raises(ModelError, match=r"is no adapter: write reward_model_type: full"):
        judge_of(configure(reward_model=str(tiny_model)))
    with pytest.raises(ModelError, match="has no head for scores: it is no reward model"):
        judge_of(configure(reward_model=str(tiny_model), reward_model_type="full"))
    with pytest.raises(UserError, match="holds neither a model"):
        judge_of(configure(reward_model=str(tmp_path)))
    with pytest.raises(UserError, match="reward_model: /nowhere/at/all is no folder here and no adapter"):
        judge_of(configure(reward_model="/nowhere/at/all"))
    with pytest.raises(UserError, match="training with stage: dpo left, no reward model"):
        judge_of(configure(reward_model=str(train_rater(stage="dpo"))))


def test_a_reward_model_upon_other_weights(
    tmp_path: Path, train_rater: Callable[..., Path], configure: Configure, tiny_model: Path
) -> None:
    folder, other = train_rater(), tmp_path / "another"
    shutil.copytree(tiny_model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.02
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"on \S+another is not the reward model that was trained"):
        judge_of(configure(reward_model=str(folder), model_name_or_path=str(other)))


def test_what_cannot_be_scored_names_the_response(
    train_rater: Callable[..., Path], configure: Configure
) -> None:
    judge, _ = judge_of(configure(reward_model=str(train_rater())))
    assert isinstance(judge, ModelJudge)
    head: Any = judge.scorer.model.model.model.score  # type: ignore[union-attr]
    head.weight.data.fill_(float("nan"))
    with pytest.raises(JudgeFailed, match=r"rater: response \d of 5: its score is nan, not finite"):
        judge.score(make_answered())


def test_a_prompt_that_the_template_refuses_names_the_response(tmp_path: Path, configure: Configure) -> None:
    folder = tmp_path / "picky"
    make_reward_model().save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    tokenizer.chat_template += "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer.save_pretrained(folder)
    judge, _ = judge_of(configure(reward_model=str(folder), reward_model_type="full"))
    mixed = [*make_answered(), *make_answered(prompt=LONG)]
    with pytest.raises(JudgeFailed, match=r"picky, response 6 of 10: .*refuses this conversation: no system"):
        judge.score(mixed)


# Sums, functions, and what a run is known by


@pytest.fixture
def function(tmp_path: Path) -> str:
    (tmp_path / "length.py").write_text("def score(prompts, responses): return [len(it) for it in responses]")
    return f"{tmp_path / 'length.py'}:score"


def test_reward_function_alone(function: str, configure: Configure) -> None:
    judge, said = judge_of(configure(reward_function=function, finetuning_type="full"), make_model())
    assert isinstance(judge, FunctionJudge) and said == ""
    assert judge.score(make_answered()) == [float(len(text)) for text in TEXTS]
    assert judge.score([]) == []


def test_reward_weights_weigh_the_reward_model_first(
    function: str, train_rater: Callable[..., Path], configure: Configure
) -> None:
    folder = train_rater()
    answered = make_answered()
    scores = judge_of(configure(reward_model=str(folder)))[0].score(answered)
    keys: dict[str, Any] = {"reward_model": str(folder), "reward_function": function}
    for weights, (a, b) in (({}, (1, 1)), ({"reward_weights": [0.5, -2]}, (0.5, -2))):
        judge, _ = judge_of(configure(**keys, **weights))
        assert judge.name == f"{a:g} x {folder} + {b:g} x {function}"
        wanted = [a * score + b * len(text) for score, text in zip(scores, TEXTS, strict=True)]
        assert judge.score(answered) == pytest.approx(wanted, abs=1e-5)
    halved, _ = judge_of(configure(reward_function=function, reward_weights=[0.5]))
    assert isinstance(halved, WeightedJudges)
    assert halved.score(answered) == [0.5 * len(text) for text in TEXTS]


def test_what_a_resumed_run_must_share(
    function: str, train_rater: Callable[..., Path], configure: Configure, tiny_model: Path
) -> None:
    folder = train_rater()
    keys: dict[str, Any] = {"reward_model": str(folder), "reward_function": function}
    before = fingerprint_reward_models(configure(**keys)) | fingerprint_functions(configure(**keys))
    assert {*before} == {str(tiny_model), str(folder), function}
    Path(function.rpartition(":")[0]).write_text("def score(p, r): return [0] * len(r)")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: it + 1 for name, it in tensors.items()}, folder / "adapter_model.safetensors")
    after = fingerprint_reward_models(configure(**keys)) | fingerprint_functions(configure(**keys))
    assert [name for name in before if after[name] != before[name]] == [str(folder), function]
    address = {"reward_model": "http://127.0.0.1:1/x", "reward_model_type": "api"}
    assert (
        fingerprint_reward_models(configure(**address)) == fingerprint_functions(configure(**address)) == {}
    )


# A run that has a reward model upon its policy


@pytest.mark.parametrize("more", rest_is_slow([{}], [{"lora_target": "q_proj"}, {"pissa_init": True}]))
def test_a_run_saves_and_resumes_as_if_it_were_not_there(
    more: dict[str, Any],
    write_config: Callable[..., Path],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files, names and bits of a run whose policy was judged in each step, with a kill on its way."""
    rater = make_rater(tiny_model, tmp_path / "rater")
    if "pissa_init" in more:
        (rater / "probe.json").unlink()  # upon other weights, which ppo refuses
    keys = {**more, "max_steps": 6, "save_steps": 2, "load_best_model_at_end": False}
    run(write_config(**keys, output_dir=str(tmp_path / "plain")))
    judged: list[Any] = []
    build = prefkit.train.run.build_policy
    step = PrefTrainer.training_step

    def build_with_reward(*args: Any) -> Any:
        policy = build(*args)
        judged.append(load_reward_adapter(policy.model, rater, LONGEST, "rater"))  # type: ignore[arg-type]
        return policy

    def step_with_reward(self: PrefTrainer, *args: Any, **kwargs: Any) -> Any:
        scores.append(judged[-1].score(EXAMPLES))
        return step(self, *args, **kwargs)

    scores: list[Any] = []
    monkeypatch.setattr(prefkit.train.run, "build_policy", build_with_reward)
    monkeypatch.setattr(PrefTrainer, "training_step", step_with_reward)
    run(write_config(**keys, output_dir=str(tmp_path / "judged")))
    assert len(scores) == 6 and all(score == scores[0] for score in scores)
    _check_alike(tmp_path / "plain", tmp_path / "judged")
    unfinish(tmp_path / "judged")
    assert "checkpoint-4" in run(write_config(**keys, output_dir=str(tmp_path / "judged")))
    assert len(scores) == 8
    _check_alike(tmp_path / "plain", tmp_path / "judged")


def _check_alike(plain: Path, judged: Path) -> None:
    files = [sorted(str(it.relative_to(path)) for it in path.rglob("*")) for path in (plain, judged)]
    assert files[0] == files[1]
    for name in ("", *(it.name for it in plain.glob("checkpoint-*"))):
        assert same(plain / name, judged / name)
        assert (plain / name / "adapter_config.json").read_text() == (
            judged / name / "adapter_config.json"
        ).read_text()
    for folder in plain.glob("checkpoint-*"):
        one, other = (load_file(it / folder.name / "optimizer.safetensors") for it in (plain, judged))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert losses(plain) == losses(judged)
    assert not any(f".{REWARD}." in name for name in load_file(judged / "adapter_model.safetensors"))
