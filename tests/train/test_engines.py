"""DeepSpeed and FSDP2 train what one process trains."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prefkit.config.errors import UserError
from prefkit.objectives import head
from prefkit.train.dpo import DpoStage
from prefkit.train.fully_sharded import check_accelerate_config, check_fsdp
from prefkit.train.ppo import PpoStage
from prefkit.train.trainer import PrefTrainer
from tests.conftest import make_model, make_tokenizer
from tests.train.engines import KEYS, use_fsdp_on_cpu
from tests.train.forks import FORKS, Fork, command, two_ranks
from tests.train.runs import losses, read, run, unfinish, weights

pytestmark = FORKS
Write = Callable[..., Path]
_PATIENCE = 180.0  # seconds for a run that hangs

STAGES: dict[str, dict[str, Any]] = {
    "dpo": {"eval_dataset": "held_out"},
    "kto": {"stage": "kto", "dataset": "judged", "eval_dataset": "judged_held_out"},
    "rm": {"stage": "rm", "eval_dataset": "held_out"},
}
TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {"finetuning_type": "lora"},
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
}


def cases(names: Sequence[str], values: Sequence[Iterable[str]], *quick: str) -> pytest.MarkDecorator:
    """All combinations of values as parameters, of which all but the `quick` ones are slow."""
    found = [(one, "-".join(one)) for one in itertools.product(*values)]
    assert {*quick} <= {name for _, name in found}
    rows = [
        pytest.param(*one, id=name, marks=() if name in quick else pytest.mark.slow) for one, name in found
    ]
    return pytest.mark.parametrize(tuple(names), rows)


def on(engine: str, work: Callable[[], Any]) -> Callable[[], Any]:
    """Work in a process in which the libraries may say what they like, and FSDP runs on a CPU."""

    def prepared() -> Any:
        warnings.simplefilter("ignore")
        if engine == "fsdp":
            use_fsdp_on_cpu()
        return work()

    return prepared


def run_on(engine: str, folder: Path, *words: object) -> str:
    """Train in two processes by an engine; what the first printed."""
    ranks = [
        Fork(folder / f"rank-{rank}.txt", on(engine, **arguments))
        for rank, arguments in enumerate(two_ranks("train", *words))
    ]
    codes = [rank.kill_after(_PATIENCE) for rank in ranks]
    assert codes == [0, 0], "".join(rank.printed() for rank in ranks)
    return ranks[0].printed()


def assert_same(one: Path, other: Path) -> None:
    """Two runs logged the same losses and saved the same weights."""
    assert losses(other) == pytest.approx(losses(one), rel=1e-5)
    found = weights(other)
    for name, expected in weights(one).items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)
    if (one / "eval_results.json").is_file():
        a, b = (read(folder / "eval_results.json") for folder in (one, other))
        for name in a.keys() - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name


@cases(
    ("engine", "stage", "tuning"),
    [KEYS, STAGES, TUNINGS],
    *("zero1-kto-freeze", "zero2-dpo-lora", "zero3-dpo-full", "zero3-rm-lora", "fsdp-dpo-lora"),
)
def test_two_processes_are_one_with_twice_the_batch(
    engine: str, stage: str, tuning: str, write_config: Write, tmp_path: Path
) -> None:
    """Under each setting of `deepspeed` and `fsdp`."""
    keys = {**STAGES[stage], **TUNINGS[tuning], "max_steps": 3, "do_eval": True, "save_steps": 2}
    run(write_config(per_device_train_batch_size=2, output_dir=str(tmp_path / "one"), **keys))
    two = write_config(
        per_device_train_batch_size=1, output_dir=str(tmp_path / "two"), **keys, **KEYS[engine]
    )
    run_on(engine, tmp_path, two)
    assert_same(tmp_path / "one", tmp_path / "two")


SPLIT = ("zero1", "zero2", "zero3", "fsdp")
PPO = {
    "stage": "ppo",
    "reward_function": f"{Path(__file__).with_name('rewards.py')}:plain",
    "template": "chatml",
    "gradient_accumulation_steps": 2,
    "ppo_epochs": 2,
    "ppo_group_size": 2,
    "max_new_tokens": 8,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "eval_dataset": "held_out",
    "do_eval": True,
    "learning_rate": 1e-3,
}


@cases(("engine", "tuning"), [SPLIT, ["lora", "full"]], "zero3-lora", "fsdp-lora")
def test_ppo_draws_and_learns_the_same(engine: str, tuning: str, write_config: Write, tmp_path: Path) -> None:
    keys = {**PPO, **TUNINGS[tuning], "per_device_train_batch_size": 2}
    run_on("ddp", tmp_path, write_config(**keys, output_dir=str(tmp_path / "one")))
    run_on(engine, tmp_path, write_config(**keys, **KEYS[engine], output_dir=str(tmp_path / "two")))
    assert_same(tmp_path / "one", tmp_path / "two")
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "eval_samples.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [row["answer"] for row in one] == [row["answer"] for row in two]


@pytest.mark.slow
def test_an_adapter_of_zero3_judges(write_config: Write, tmp_path: Path) -> None:
    """Upon weights that no process holds whole."""
    judge = tmp_path / "judge"
    run(write_config(stage="rm", output_dir=str(judge)))
    keys = {**PPO, "per_device_train_batch_size": 1, "reward_model": str(judge)} | {"reward_function": ...}
    run_on("ddp", tmp_path, write_config(**keys, output_dir=str(tmp_path / "one")))
    printed = run_on(
        "zero3", tmp_path, write_config(**keys, **KEYS["zero3"], output_dir=str(tmp_path / "two"))
    )
    assert "an adapter upon the policy's weights; its scores are those of its training" in printed
    assert_same(tmp_path / "one", tmp_path / "two")


REFERENCES: dict[str, dict[str, Any]] = {
    "second model": {"finetuning_type": "full", "ref_cache": False},
    "named": {"ref_cache": False},
    "cache": {"finetuning_type": "full", "num_train_epochs": 2, "max_steps": -1},
    "cache as they come": {"num_train_epochs": 2, "max_steps": -1},
    "trained head": {"additional_target": "lm_head", "activation_checkpointing": True},
    "adapted head": {"lora_target": "lm_head,q_proj"},
    "samples": {"sample_prompts": 2, "sample_max_new_tokens": 8, "do_predict": True},
}


@cases(
    ("engine", "reference"),
    [["zero2", "zero3", "fsdp"], REFERENCES],
    *("zero3-second model", "zero3-cache", "zero3-adapted head", "fsdp-samples"),
)
def test_each_reference(
    engine: str,
    reference: str,
    write_config: Write,
    tmp_path: Path,
    other_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Three tokens at a time, so that ranks have other numbers of chunks.
    monkeypatch.setattr(head, "_CHUNK_NUMBERS", {"cpu": 3 * 264})
    keys: dict[str, Any] = {**STAGES["dpo"], "gradient_accumulation_steps": 2, **REFERENCES[reference]}
    if reference == "named":
        keys["ref_model"] = str(other_model)
    run(write_config(**keys, per_device_train_batch_size=2, output_dir=str(tmp_path / "one")))
    two = write_config(
        **keys,
        **KEYS[engine],
        per_device_train_batch_size=1,
        output_dir=str(tmp_path / "two"),
        cache_dir=str(tmp_path / "own-cache"),
    )
    run_on(engine, tmp_path, two)
    assert_same(tmp_path / "one", tmp_path / "two")
    if reference == "samples":
        assert (tmp_path / "one/samples.md").read_text() == (tmp_path / "two/samples.md").read_text()


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokens."""
    folder = tmp_path_factory.mktemp("other-llama")
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


RUNS = {"dpo": STAGES["dpo"], "rm": {**STAGES["rm"], "finetuning_type": "full"}, "ppo": PPO}


@cases(("engine", "stage"), [SPLIT, RUNS], "zero2-dpo", "zero3-ppo")
def test_a_run_that_goes_on_ends_as_one_that_was_never_stopped(
    engine: str, stage: str, write_config: Write, tmp_path: Path
) -> None:
    given = {
        **RUNS[stage],
        "max_steps": 4,
        "save_steps": 1,
        "lora_dropout": 0.1,
        "weight_decay": 0.1,
        "warmup_steps": 2,
    }
    given |= KEYS[engine] | {"per_device_train_batch_size": 1}
    if given.get("finetuning_type") == "full":
        del given["lora_dropout"]
    config = write_config(**given)
    run_on(engine, tmp_path, config)
    before = {**weights(tmp_path / "out")}
    logged = losses(tmp_path / "out")
    unfinish(tmp_path / "out")
    newest = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[-2]
    shutil.rmtree(newest)
    run_on(engine, tmp_path, config)
    after = weights(tmp_path / "out")
    assert losses(tmp_path / "out") == logged
    assert all(torch.equal(before[name], after[name]) for name in before)


@cases(("engine", "stage"), [["ddp", "zero2", "zero3"], ["dpo", "rm"]], "zero3-rm")
def test_another_number_of_processes_goes_on(
    engine: str, stage: str, write_config: Write, tmp_path: Path
) -> None:
    """As long as a step has as many rows; it is said."""
    given = {
        **RUNS[stage],
        **KEYS[engine],
        "max_steps": 4,
        "save_steps": 1,
        "logging_steps": 4,
        "warmup_steps": 2,
    }
    one = [write_config(**given), "per_device_train_batch_size=2"]
    alone = Fork(tmp_path / "whole.txt", on(engine, command("train", *one, f"output_dir={tmp_path / 'one'}")))
    assert alone.end() == 0, alone.printed()
    run_on(engine, tmp_path, one[0], "per_device_train_batch_size=1")
    unfinish(tmp_path / "out")
    shutil.rmtree(tmp_path / "out/checkpoint-3")
    rest = Fork(tmp_path / "rest.txt", on(engine, command("train", *one)))
    assert rest.end() == 0, rest.printed()
    assert "since there changed: processes number: 2 -> 1" in rest.printed()
    assert_same(tmp_path / "one", tmp_path / "out")


def _keep_digits(stage: Any) -> None:
    """Let a stage look at the log-probs of its batches: none may have been rounded to bfloat16 on the way."""
    own = stage.compute

    def compute(self: Any, model: Any, batch: dict[str, Any]) -> Any:
        output = own(self, model, batch)
        found = [*output.reference.values(), *batch.get("drawn", {}).values()]
        found = [it for it in found if it.is_floating_point() and it.abs().max() > 1]
        assert found and all(it.dtype == torch.float32 for it in found)
        assert any((it.bfloat16().float() != it).any() for it in found)
        return output

    stage.compute = compute


@cases(("engine", "stage"), [["zero2", "zero3", "fsdp"], ["dpo", "ppo"]], "zero2-ppo", "fsdp-dpo")
def test_log_probs_keep_their_digits_in_bfloat16(
    engine: str, stage: str, write_config: Write, tmp_path: Path
) -> None:
    """Those of some -300 are whole numbers in bfloat16: the loss starts at its known value, and a rollout at
    a ratio of 1."""
    drawing = {"temperature": 5.0, "max_new_tokens": 64, "ppo_epochs": 1}
    keys = STAGES["dpo"] if stage == "dpo" else PPO | drawing

    def work(rank: Callable[[], Any]) -> Callable[[], Any]:
        def spied() -> Any:
            _keep_digits(DpoStage if stage == "dpo" else PpoStage)
            return rank()

        return spied

    config = write_config(**{**keys, **KEYS[engine]}, bf16=True, per_device_train_batch_size=1)
    ranks = [
        Fork(tmp_path / f"rank-{rank}.txt", on(engine, work(arguments["work"])))
        for rank, arguments in enumerate(two_ranks("train", config))
    ]
    assert [rank.kill_after(_PATIENCE) for rank in ranks] == [0, 0], ranks[0].printed() + ranks[1].printed()
    (first, *_) = (
        line for line in read(tmp_path / "out/trainer_state.json")["log_history"] if "loss" in line
    )
    if stage == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    else:
        assert first["ppo/ratio_max"] == pytest.approx(1.0, abs=5e-2)


def _die_in_third_step() -> None:
    own = PrefTrainer.training_step

    def step(self: PrefTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(self, *args, **kwargs)

    PrefTrainer.training_step = step  # type: ignore[method-assign]


@cases(("engine",), [["ddp", *SPLIT]], "zero3")
def test_a_rank_is_killed(engine: str, write_config: Write, tmp_path: Path) -> None:
    """The other ends by itself; the same command goes on, and ends with the bits of a run in one go."""
    keys = {**KEYS[engine], "max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 1}
    config = write_config(**keys)
    run_on(engine, tmp_path, config, f"output_dir={tmp_path / 'whole'}")

    def dying(work: Callable[[], Any]) -> Callable[[], Any]:
        def rank() -> Any:
            _die_in_third_step()
            return work()

        return on(engine, rank)

    first, second = two_ranks("train", config)
    ranks = [Fork(tmp_path / "0.txt", on(engine, **first)), Fork(tmp_path / "1.txt", dying(**second))]
    codes = [rank.kill_after(_PATIENCE) for rank in ranks]
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    run_on(engine, tmp_path, config)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


BY_ACCELERATE = {
    "fsdp": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    },
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


@cases(("engine",), [BY_ACCELERATE], "fsdp")
def test_accelerates_config_says_the_engine(
    engine: str, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its launcher hands it on by variables."""
    config = write_config(per_device_train_batch_size=1, max_steps=3)
    run(config, "per_device_train_batch_size=2", f"output_dir={tmp_path / 'one'}")
    for name, value in BY_ACCELERATE[engine].items():
        monkeypatch.setenv(name, value)
    printed = run_on(engine, tmp_path, config)
    assert {"fsdp": "FSDP2", "zero3": "ZeRO stage 3"}[engine] in printed
    assert_same(tmp_path / "one", tmp_path / "out")


def test_fsdp_on_a_cpu_is_an_error(write_config: Write, tmp_path: Path) -> None:
    """Which the libraries below would turn into DDP without a word."""
    ranks = [
        Fork(tmp_path / f"{rank}.txt", **arguments)
        for rank, arguments in enumerate(two_ranks("train", write_config(fsdp="full_shard")))
    ]
    assert [rank.kill_after(_PATIENCE) for rank in ranks] == [1, 1]
    assert "error: fsdp: runs on GPUs only; on a CPU write deepspeed" in ranks[0].printed()


def test_it_is_said_what_may_stand_in_the_settings(write_config: Write) -> None:
    with pytest.raises(UserError, match="and this is one"):
        check_fsdp(True, 1)
    with pytest.raises(UserError, match="fsdp_version: 2"):
        check_accelerate_config({"ACCELERATE_USE_FSDP": "true"})
    with pytest.raises(UserError, match="cpu_ram_efficient_loading"):
        check_accelerate_config(BY_ACCELERATE["fsdp"] | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"})
