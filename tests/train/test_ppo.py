"""The stage ppo: whole runs of the tiny model, what they count, learn, write and refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefkit.config.errors import UserError
from prefkit.model.reward import VALUE_HEAD
from prefkit.model.rollout import Sampled
from prefkit.train import vllm_engine
from prefkit.train.answered import JudgeFailed
from prefkit.train.answering import Answerer, Measured
from prefkit.train.ppo import PpoStage, RatioError
from prefkit.train.reward_function import FunctionJudge
from prefkit.train.rollouts import RolloutSource
from prefkit.train.signals import Interrupted
from prefkit.train.stages import StageOutput
from tests.train.forks import FORKS, Fork, run_in_two, two_ranks
from tests.train.runs import read, run, same, unfinish, weights
from tests.train.test_kills import rest_is_slow

pytestmark = FORKS

REWARDS = Path(__file__).with_name("rewards.py")
Write = Callable[..., Path]


@pytest.fixture
def write(write_config: Write) -> Write:
    """A YAML of ppo: rollouts of four prompts, two rollouts."""

    def make(**keys: Any) -> Path:
        given = {
            "stage": "ppo",
            "reward_function": f"{REWARDS}:plain",
            "template": "chatml",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "ppo_epochs": 2,
            "max_new_tokens": 8,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
        }
        return write_config(**{**given, **keys})

    return make


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of `trainer_log.jsonl`."""
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


def history(folder: Path) -> list[dict[str, Any]]:
    """The lines of training of the Trainer's own log."""
    log: list[dict[str, Any]] = read(folder / "trainer_state.json")["log_history"]
    return [line for line in log if "loss" in line]


# What a run counts and writes


def test_a_step_is_a_rollout(write: Write, tmp_path: Path) -> None:
    """ppo_epochs x ppo_buffer_size updates, which the Trainer counts; all else counts rollouts."""
    config = write(
        max_steps=4, save_steps=2, eval_dataset="held_out", eval_strategy="steps", eval_steps=3,
        ppo_buffer_size=2, warmup_steps=1, plot_loss=True, do_eval=True,
    )  # fmt: skip
    printed = run(config)
    out = tmp_path / "out"
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-16"}
    lines = log_of(out)
    trained = [line for line in lines if "loss" in line]
    assert [line["current_steps"] for line in trained] == [1, 2, 3, 4]
    assert all(line["total_steps"] == 4 and {"reward", "ppo_kl", "lr"} <= line.keys() for line in trained)
    assert [line["current_steps"] for line in lines if "eval_score" in line] == [3, 4]  # the last is do_eval
    state = read(out / "trainer_state.json")
    assert (state["global_step"], state["max_steps"]) == (16, 16)
    rates = [line["learning_rate"] for line in history(out)]
    assert max(rates) <= 1e-2 and rates == sorted(rates, reverse=True)  # the first rollout warms up
    assert "step 4/4  loss" in printed and "Judge: " in printed
    for name in ("training_reward.png", "training_kl.png", "training_curves.png", "eval_samples.md"):
        assert (out / name).is_file() and f"  {name}" in printed
    assert read(out / "prefkit.json")["judge"] == f"{REWARDS}:plain"
    assert read(out / "eval_results.json").keys() >= {"eval_score", "eval_kl", "eval_response_length"}


def test_every_number_of_the_issue_is_logged(write: Write, tmp_path: Path) -> None:
    run(write())
    names = ("score", "kl", "kl_coef", "clip_fraction", "approx_kl", "value_loss", "entropy", "ratio_max")
    names += ("value_explained_variance", "response_length", "eos_rate", "policy_loss")
    names += tuple(f"{phase}_seconds" for phase in ("generate", "score", "forward", "learn"))
    first, second = history(tmp_path / "out")
    assert first.keys() >= {f"ppo/{name}" for name in names}
    assert first["ppo/kl"] == pytest.approx(0, abs=1e-5) and first["ppo/kl_coef"] == 0.2
    assert second["ppo/kl_coef"] != 0.2 and first["ppo/ratio_max"] >= 1
    assert 0 < first["ppo/entropy"] < 10 and 0 <= first["ppo/clip_fraction"] <= 1


def test_a_run_learns_its_reward(write: Write, tmp_path: Path) -> None:
    """It writes more ASCII; the reward is then told apart from one that is always the same."""
    keys = {"max_steps": 15, "ppo_init_kl": 0, "ppo_group_size": 8, "ppo_epochs": 4, "logging_steps": 5}
    run(write(**keys))
    learnt = [line["reward"] for line in log_of(tmp_path / "out")]
    run(write(**{**keys, "max_steps": 5}, reward_function=f"{REWARDS}:same", overwrite_output_dir=True))
    assert learnt[-1] > learnt[0] + 1  # its standard error is 0.1
    assert {line["reward"] for line in log_of(tmp_path / "out")} == {1.0}


@pytest.fixture(scope="session")
def plain() -> dict[str, dict[str, torch.Tensor]]:
    """The weights of the run that others are compared with."""
    return {}


@pytest.mark.parametrize(
    "keys",
    rest_is_slow(
        [
            {"ppo_epochs": 3},
            {"ppo_group_size": 2},
            {"ppo_score_norm": True},
            {"ppo_init_kl": 0.5},
            {"ppo_clip": 0.01},
            {"ppo_ptx": 0.5, "ppo_ptx_dataset": "pairs"},
            {"temperature": 0.5},
            {"seed": 1},
        ],
        [
            {"ppo_buffer_size": 2},
            {"ppo_missing_eos_penalty": 1.0},
            {"ppo_target": 0.01, "ppo_kl_horizon": 10.0},
            {"ppo_kl_horizon": 20.0},
            {"ppo_whiten_rewards": True},
            {"ppo_gamma": 0.5},
            {"ppo_lambda": 0.5},
            {"ppo_value_clip": 0.01},
            {"ppo_value_coefficient": 1.0},
            {"top_k": 3},
            {"top_p": 0.5},
            {"do_sample": False},
            {"max_new_tokens": 4},
            {"repetition_penalty": 2.0},
            {"disable_shuffling": True},
        ],
    ),
    ids=lambda keys: next(iter(keys)),
)
def test_each_key_changes_what_is_learnt(
    keys: dict[str, Any], write: Write, tmp_path: Path, plain: dict[str, dict[str, torch.Tensor]]
) -> None:
    if not plain:
        run(write(output_dir=str(tmp_path / "plain")))
        plain["weights"] = weights(tmp_path / "plain")
    run(write(**keys))
    found = weights(tmp_path / "out")
    assert any(not torch.equal(found[name], value) for name, value in plain["weights"].items())


def test_the_same_run_is_the_same(write: Write, tmp_path: Path) -> None:
    """The control of the test above."""
    for name in ("one", "other"):
        run(write(output_dir=str(tmp_path / name)))
    assert same(tmp_path / "one", tmp_path / "other")


# What it learns from


def test_layouts_learn_the_same(write: Write, tmp_path: Path) -> None:
    for layout in ("shared", "repeat"):
        run(write(batch_layout=layout, output_dir=str(tmp_path / layout), ppo_group_size=2))
    one, other = (history(tmp_path / layout) for layout in ("shared", "repeat"))
    for a, b in zip(one, other, strict=True):
        for name in ("loss", "ppo/score", "ppo/kl", "ppo/value_loss"):
            assert a[name] == pytest.approx(b[name], abs=2e-4), name


def test_two_processes_are_one_with_twice_the_batch(write: Write, tmp_path: Path) -> None:
    """Which prompts are answered, and how, depends neither on the rank nor on the batch."""
    keys = {"ppo_ptx": 0.1, "ppo_ptx_dataset": "pairs", "ppo_score_norm": True, "ppo_whiten_rewards": True}
    config = write(**keys, eval_dataset="held_out", do_eval=True, per_device_eval_batch_size=3)
    run(config, "output_dir=" + str(tmp_path / "one"), "per_device_train_batch_size=4")
    run_in_two(tmp_path, "train", config, f"output_dir={tmp_path / 'two'}")
    one, two = (history(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name in ("ppo/score", "ppo/kl", "ppo/response_length", "ppo/kl_coef"):
            assert a[name] == pytest.approx(b[name], abs=1e-4), name
    answers = [(tmp_path / name / "eval_samples.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert [json.loads(line)["source"] for line in answers[0]] == [
        json.loads(line)["source"] for line in answers[1]
    ]


@pytest.mark.parametrize("rows", ["no output", "empty", "openai"])
def test_only_the_prompts_of_rows_are_read(
    rows: str, write: Write, tmp_path: Path, dataset_dir: Path
) -> None:
    """An `output` may be there, empty or absent, and conversations may end with an answer or without."""
    prompts = [f"Say {i}" for i in range(4)]
    made: list[dict[str, Any]] = [{"instruction": prompt} for prompt in prompts]
    entry: dict[str, Any] = {"file_name": "own.json"}
    if rows == "empty":
        made = [{**row, "input": "", "output": ""} for row in made]
    if rows == "openai":
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        made = [{"messages": turn + [{"role": "assistant", "content": "ok"}] * (i % 2)}
                for i, turn in enumerate(turns)]  # fmt: skip
        entry["formatting"] = "openai"
    (dataset_dir / "own.json").write_text(json.dumps(made))
    info = read(dataset_dir / "dataset_info.json")
    (dataset_dir / "dataset_info.json").write_text(json.dumps({**info, "own": entry}))
    assert "4 rows to train on" in run(write(dataset="own", max_steps=1))


def test_prompts_beyond_cutoff_len_are_cut_and_counted(write: Write, tmp_path: Path) -> None:
    """A response still has `max_new_tokens` after them."""
    run(write(cutoff_len=24, max_steps=1))
    (report,) = read(tmp_path / "out" / "data_report.json")["data_sets"]
    assert report["truncated"] > 0 and report["rejected"] == {}
    assert history(tmp_path / "out")[0]["ppo/response_length"] > 4


def test_responses_may_end_at_once(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end token first: a response of one token, an empty text."""
    texts: list[str] = []
    original = FunctionJudge.score

    def score(self: FunctionJudge, answered: Any) -> list[float]:
        texts.extend(one.text for one in answered)
        return original(self, answered)

    monkeypatch.setattr(FunctionJudge, "score", score)
    monkeypatch.setattr("prefkit.train.answering.stop_ids", lambda model, template: list(range(300)))
    run(write())
    first = history(tmp_path / "out")[0]
    assert first["ppo/response_length"] == 1 and first["ppo/eos_rate"] == 1
    assert "" in texts or all(len(text) <= 1 for text in texts)


def test_responses_may_never_end(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefkit.train.answering.stop_ids", lambda model, template: [])
    run(write())
    for line in history(tmp_path / "out"):
        assert line["ppo/response_length"] == 8 and line["ppo/eos_rate"] == 0
    assert history(tmp_path / "out")[0]["ppo/score"] > 0
    run(write(ppo_missing_eos_penalty=9.0, overwrite_output_dir=True))
    assert history(tmp_path / "out")[0]["ppo/score"] < 0


def test_equal_rewards_teach_nothing_but_the_value(write: Write, tmp_path: Path) -> None:
    run(write(reward_function=f"{REWARDS}:same", ppo_init_kl=0, ppo_score_norm=True, ppo_whiten_rewards=True))
    for line in history(tmp_path / "out"):
        assert abs(line["ppo/policy_loss"]) < 1e-2 and line["ppo/score"] == 1


def test_more_prompts_than_there_are(write: Write, tmp_path: Path) -> None:
    """A rollout of 16 prompts from a set of 12 takes some twice."""
    run(write(ppo_buffer_size=4))
    assert len(history(tmp_path / "out")) == 2


def test_rollout_engine_is_what_draws(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `vllm` the engine of that name, told what it has to draw by."""
    asked: list[dict[str, Any]] = []

    class Fives:
        def draw(self, prompts: Any, *, num_responses: int, **keys: Any) -> list[Sampled]:
            asked.append(keys)
            return [Sampled([[5, 5]] * num_responses, [False] * num_responses) for _ in prompts]

        def close(self) -> None:
            asked.append({"closed": True})

    monkeypatch.setattr(vllm_engine, "open_vllm_engine", lambda config, policy, say: Fives())
    run(write(rollout_engine="vllm"))
    assert {line["ppo/response_length"] for line in history(tmp_path / "out")} == {2}
    first, second, *_, last = asked
    assert last == {"closed": True}
    assert first["numbers"] == [0, 1, 2, 3] and first["generation"].max_new_tokens == 8
    assert (first["stream"].rollout, second["stream"].rollout) == (0, 1)


# The ratio, the value head


def test_another_policy_than_the_one_that_drew_is_refused(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Answerer.measure

    def measure(self: Answerer, trainer: Any, batch: Any) -> Measured:
        found = original(self, trainer, batch)
        found.logps.add_(1e-3)
        return found

    monkeypatch.setattr(Answerer, "measure", measure)
    with pytest.raises(RatioError, match=r"0\.001 away from 1 \(tolerance 0\.0001 in torch\.float32\)"):
        run(write())


@pytest.mark.parametrize("tuning", rest_is_slow(["lora", "full"], ["freeze"]))
def test_the_value_head_is_saved_and_resumed(tuning: str, write: Write, tmp_path: Path) -> None:
    """Beside the weights, under the names of LLaMA-Factory; the model's own file has none of it."""
    config = write(finetuning_type=tuning, max_steps=3, save_steps=1, learning_rate=1e-3)
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(config)
    shutil.copytree(out, whole)
    for name in ("adapter_model.safetensors", "model.safetensors", VALUE_HEAD):
        (out / name).unlink(missing_ok=True)
    unfinish(out)
    assert "Resuming from" in run(config)
    assert same(out, whole)
    head, other = (load_file(folder / VALUE_HEAD) for folder in (out, whole))
    assert {name: tuple(value.shape) for name, value in head.items()} == {
        "v_head.summary.weight": (1, 32),
        "v_head.summary.bias": (1,),
    }
    assert all(torch.equal(head[name], other[name]) for name in head)
    assert head["v_head.summary.weight"].abs().max() > 0
    assert not any("value" in name or "v_head" in name for name in weights(out))


def test_a_run_goes_on_with_the_value_head_of_another(write: Write, tmp_path: Path) -> None:
    run(write(output_dir=str(tmp_path / "first")))
    head = load_file(tmp_path / "first" / VALUE_HEAD)
    printed = run(write(adapter_name_or_path=str(tmp_path / "first"), learning_rate=0))
    assert f"Value head: that of {tmp_path / 'first'}, gone on with." in printed
    again = load_file(tmp_path / "out" / VALUE_HEAD)
    assert all(torch.equal(again[name], value) for name, value in head.items())


# Stops


def test_a_judge_that_fails_leaves_a_checkpoint_to_go_on_from(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(max_steps=3, ppo_score_norm=True, logging_steps=3)
    run(config, f"output_dir={tmp_path / 'whole'}")
    original, calls = FunctionJudge.score, []

    def score(self: FunctionJudge, answered: Any) -> list[float]:
        calls.append(len(answered))
        if len(calls) == 3:
            raise JudgeFailed("no answer")
        return original(self, answered)

    monkeypatch.setattr(FunctionJudge, "score", score)
    with pytest.raises(JudgeFailed, match=r"no answer\.\n.*checkpoint-4 is saved: the same command goes on"):
        run(config)
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
    run(config)
    assert same(tmp_path / "out", tmp_path / "whole")
    assert [line["loss"] for line in log_of(tmp_path / "out")] == [
        line["loss"] for line in log_of(tmp_path / "whole")
    ]


def test_a_judge_that_fails_at_once_leaves_nothing(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(self: FunctionJudge, answered: Any) -> list[float]:
        raise JudgeFailed("no answer")

    monkeypatch.setattr(FunctionJudge, "score", score)
    with pytest.raises(JudgeFailed, match=r"^no answer$"):
        run(write())
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_signal_in_the_midst_of_drawing_ends_the_run_before_it_learns(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(max_steps=3)
    run(config, f"output_dir={tmp_path / 'whole'}")
    original = Answerer.draw

    def draw(self: Answerer, trainer: Any, *args: Any) -> Any:
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "draw", draw)
        with pytest.raises(Interrupted, match="checkpoint-4 is saved"):
            run(config)
    run(config)
    assert same(tmp_path / "out", tmp_path / "whole")


def test_a_mended_reward_function_is_gone_on_with_and_said(write: Write, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(REWARDS.read_text())
    config = write(reward_function=f"{mine}:plain", save_steps=1)
    run(config)
    unfinish(tmp_path / "out")
    mine.write_text(REWARDS.read_text().replace("isascii", "isalpha"))
    said = " ".join(run(config).split())
    assert f"there changed: reward function {mine}:plain:" in said


def test_a_policy_is_no_reward_model(write: Write, tmp_path: Path) -> None:
    """Although it has a value head, which looks like one of LLaMA-Factory's."""
    run(write(output_dir=str(tmp_path / "policy")))
    with pytest.raises(UserError, match="stage: ppo left, no reward model: name the folder of one"):
        run(write(reward_function=..., reward_model=str(tmp_path / "policy")))
    with pytest.raises(UserError, match=r"reward_model: .*/nothing is no folder here"):
        run(write(reward_function=..., reward_model=str(tmp_path / "nothing")))


def test_an_epoch_of_the_log_is_a_pass_over_the_prompts(write: Write, tmp_path: Path) -> None:
    run(write(num_train_epochs=1, max_steps=...))  # 12 prompts, 4 to a rollout
    assert [line["epoch"] for line in log_of(tmp_path / "out")] == pytest.approx([1 / 3, 2 / 3, 1], abs=1e-3)


# Evaluations


def test_greedy_answers_are_judged(write: Write, tmp_path: Path) -> None:
    """Alike at every evaluation but for the policy; a table of all and a page of the newest."""
    run(
        write(
            eval_dataset="held_out", eval_strategy="steps", eval_steps=1, do_eval=True,
             load_best_model_at_end=True, save_steps=1,
        )
    )  # fmt: skip
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "eval_samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] * 4 + [2] * 4
    assert all(line["score"] == sum(map(str.isascii, line["answer"])) for line in lines)
    evaluated = [line for line in log_of(out) if "eval_score" in line]
    means = [sum(line["score"] for line in lines if line["step"] == step) / 4 for step in (1, 2)]
    assert [line["eval_score"] for line in evaluated] == pytest.approx(means)
    assert read(out / "trainer_state.json")["best_metric"] == pytest.approx(max(means))
    page = (out / "eval_samples.md").read_text()
    assert page.startswith("# Greedy answers to held-out prompts at step 2") and page.count("\n|") == 6


def test_each_set_is_evaluated_by_itself(write: Write, tmp_path: Path) -> None:
    run(write(eval_dataset="held_out,judged_held_out", eval_on_each_dataset=True, eval_strategy="epoch"))
    names = {line.get("eval_dataset") for line in log_of(tmp_path / "out") if "eval_score" in line}
    assert names == {"held_out", "judged_held_out"}
    assert (tmp_path / "out" / "eval_held_out_samples.jsonl").is_file()


def test_a_policy_is_only_evaluated(write: Write, tmp_path: Path) -> None:
    """Without do_train: the answers of the model as it is, here upon a trained adapter."""
    run(write(output_dir=str(tmp_path / "trained"), eval_dataset="held_out", do_eval=True))
    run(
        write(
            do_train=False, dataset=..., do_eval=True, do_predict=True, eval_dataset="held_out",
            adapter_name_or_path=str(tmp_path / "trained"), max_steps=...,
        )
    )  # fmt: skip
    found, trained = (read(tmp_path / name / "eval_results.json") for name in ("out", "trained"))
    assert found["eval_score"] == trained["eval_score"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and rows[0].keys() >= {"source", "answer", "score", "kl"}


def test_numbers_of_a_window_are_means(write: Write, tmp_path: Path) -> None:
    """Of three rollouts, those that are logged one by one."""
    run(write(max_steps=3, output_dir=str(tmp_path / "each")))
    run(write(max_steps=3, logging_steps=3))
    (line,) = history(tmp_path / "out")
    each = history(tmp_path / "each")
    for name in ("ppo/score", "ppo/kl", "ppo/kl_coef", "ppo/eos_rate"):
        assert line[name] == pytest.approx(sum(one[name] for one in each) / 3)
    assert line["ppo/ratio_max"] == max(one["ppo/ratio_max"] for one in each)


def test_memory_that_runs_out_changes_nothing(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches in pieces, answers of ppo_ptx among them, learn the same."""
    keys = {"ppo_ptx": 0.1, "ppo_ptx_dataset": "pairs", "learning_rate": 1e-4}
    run(write(**keys, output_dir=str(tmp_path / "whole")))
    original = PpoStage.compute

    def compute(self: PpoStage, model: Any, batch: dict[str, Any]) -> StageOutput:
        if len(batch["rows"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, model, batch)

    monkeypatch.setattr(PpoStage, "compute", compute)
    assert "now computed in 2 pieces" in run(write(**keys))
    for a, b in zip(history(tmp_path / "whole"), history(tmp_path / "out"), strict=True):
        for name in ("loss", "grad_norm", "ppo/ptx_loss", "ppo/score", "ppo/value_loss", "ppo/ratio_max"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name


def test_answers_of_ppo_ptx_get_likelier(write: Write, tmp_path: Path) -> None:
    run(write(ppo_ptx=1.0, ppo_ptx_dataset="pairs", max_steps=8, reward_function=f"{REWARDS}:same"))
    learnt = [line["ppo/ptx_loss"] for line in history(tmp_path / "out")]
    assert learnt[-1] < learnt[0] - 0.5
    names = [it["name"] for it in read(tmp_path / "out" / "data_report.json")["data_sets"]]
    assert names == ["pairs", "pairs (ppo_ptx)"]


def test_the_state_of_rollouts_is_needed(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight of the KL, moments of the scores: forgotten, a resumed run would be another."""
    config = write(max_steps=3, save_steps=1, ppo_score_norm=True, ppo_target=0.01, ppo_kl_horizon=10.0)
    run(config, f"output_dir={tmp_path / 'whole'}")
    for forgets in (False, True):
        folder = tmp_path / str(forgets)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "adapter_model.safetensors").unlink()
        unfinish(folder)
        with monkeypatch.context() as patch:
            if forgets:
                patch.setattr(RolloutSource, "load_state", lambda self, state: None)
            assert "Resuming from" in run(config, f"output_dir={folder}")
        assert same(folder, tmp_path / "whole") is not forgets


def test_a_judge_that_fails_on_one_rank_ends_both_with_a_checkpoint(write: Write, tmp_path: Path) -> None:
    """The other rank is not left waiting, and the same command goes on."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import os, pathlib\n"
        "calls = []\n"
        "def score(prompts, responses):\n"
        "    calls.append(1)\n"
        "    now = os.environ['RANK'] == '1' and len(calls) == 2\n"
        f"    if now and pathlib.Path({str(tmp_path / 'on')!r}).exists():\n"
        "        raise OSError('no route to the judge')\n"
        "    return [float(len(text)) for text in responses]\n"
    )
    config = write(reward_function=f"{mine}:score")
    (tmp_path / "on").touch()
    words = ("train", config, f"output_dir={tmp_path / 'out'}")
    ranks = [Fork(tmp_path / f"rank-{rank}.txt", **each) for rank, each in enumerate(two_ranks(*words))]
    assert [rank.end() for rank in ranks] == [1, 1]
    said = "".join(rank.printed() for rank in ranks)
    assert "no route to the judge" in said and "checkpoint-2 is saved: the same command goes on" in said
    (tmp_path / "on").unlink()
    run_in_two(tmp_path, *words)
    run_in_two(tmp_path, "train", config, f"output_dir={tmp_path / 'whole'}")
    assert same(tmp_path / "out", tmp_path / "whole")
