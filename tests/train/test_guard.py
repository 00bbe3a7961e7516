"""No update and no save with a number that is not finite; the report names stage, step, rows and tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair
from prefkit.data.packing import Layout, pack
from prefkit.model import reference
from prefkit.objectives.pairwise import LOSSES
from prefkit.train import dpo
from prefkit.train.dpo import DpoStage
from prefkit.train.guard import NotFinite, Seen, StepGuard, check_finite
from prefkit.train.spikes import Spike
from prefkit.train.stages import StageOutput
from prefkit.train.trainer import PrefTrainer
from tests.train.runs import read, run, same, torchrun

BAD_STEP = 3
KEYS: dict[str, Any] = {"max_steps": 5, "save_steps": 1, "save_total_limit": 5}
Spoil = Callable[[pytest.MonkeyPatch, float], None]


def _in_bad_step(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[PrefTrainer], None]) -> None:
    """Call `spoil` before the micro-batch of `BAD_STEP`, and undo what it patches after it."""
    original = PrefTrainer.compute_loss

    def compute_loss(self: PrefTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == BAD_STEP - 1:
            spoil(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PrefTrainer, "compute_loss", compute_loss)


def spoil_policy(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    original = dpo.response_logps

    def logps(*args: Any) -> Any:
        found = original(*args)
        found.logps[0] = found.logps[0] + value
        return found

    _in_bad_step(monkeypatch, lambda _: monkeypatch.setattr(dpo, "response_logps", logps))


def spoil_reference(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    original = reference.AdapterOff.logps

    def logps(*args: Any) -> Any:
        found = original(*args)
        found.logps[0] = value
        return found

    _in_bad_step(monkeypatch, lambda _: monkeypatch.setattr(reference.AdapterOff, "logps", logps))


def _spoil_output(monkeypatch: pytest.MonkeyPatch, change: Callable[[StageOutput], None]) -> None:
    original = DpoStage.compute

    def compute(self: DpoStage, *args: Any) -> Any:
        output = original(self, *args)
        change(output)
        return output

    _in_bad_step(monkeypatch, lambda _: monkeypatch.setattr(DpoStage, "compute", compute))


def spoil_loss(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    _spoil_output(monkeypatch, lambda output: output.losses.mul_(value))


def spoil_reward(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    _spoil_output(monkeypatch, lambda output: output.metrics["rewards/chosen"].fill_(value))


def spoil_gradient(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    def hook(trainer: PrefTrainer) -> None:
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        parameter.register_hook(lambda gradient: gradient * value)

    _in_bad_step(monkeypatch, hook)


def _spoil_at_save(monkeypatch: pytest.MonkeyPatch, change: Callable[[PrefTrainer], None]) -> None:
    original = PrefTrainer._save_checkpoint

    def save(self: PrefTrainer, *args: Any) -> None:
        if self.state.global_step == BAD_STEP:
            change(self)
        original(self, *args)

    monkeypatch.setattr(PrefTrainer, "_save_checkpoint", save)


def spoil_moment(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    def change(trainer: PrefTrainer) -> None:
        next(iter(trainer.optimizer.state.values()))["exp_avg"][0] = value

    _spoil_at_save(monkeypatch, change)


def spoil_weight(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    def change(trainer: PrefTrainer) -> None:
        next(p for p in trainer.model.parameters() if p.requires_grad).data[0] = value

    _spoil_at_save(monkeypatch, change)


BAD = r"is (NaN|infinite) for \S+pairs.json:\d+"
SITES: dict[str, tuple[Spoil, str]] = {
    "policy": (spoil_policy, rf"step 3: .*\n  logps/chosen {BAD}"),
    "reference": (spoil_reference, rf"step 3: .*\n  reference logps/chosen {BAD}"),
    "loss": (spoil_loss, rf"step 3: .*\n  loss {BAD}"),
    "reward": (spoil_reward, rf"step 3: .*\n  rewards/chosen {BAD}"),
    "gradient": (
        spoil_gradient,
        r"step 3: .*\n  the gradient of \S+lora_A\S+.* is not finite, in a step of \S+",
    ),
    "moment": (spoil_moment, r"step 3: not finite in exp_avg of \S+lora_A\S+, so nothing was saved"),
    "weight": (spoil_weight, r"step 3: not finite in \S+lora_A\S+, so nothing was saved"),
}
REFERENCE_LOSSES = [name for name, loss in LOSSES.items() if loss.needs_reference]
IN_THE_STEP = ["policy", "loss", "reward", "gradient"]


def refuses(write_config: Callable[..., Path], site: str, loss: str, value: float) -> None:
    """The run ends before the update, and its newest checkpoint is that of the step before."""
    spoil, said = SITES[site]
    config = write_config(**KEYS, pref_loss=loss)
    with pytest.MonkeyPatch.context() as monkeypatch:
        spoil(monkeypatch, value)
        with pytest.raises(NotFinite, match=rf"^dpo \({loss}\), {said}") as error:
            run(config)
    assert error.value.exit_code == 65
    folder = Path(read(config)["output_dir"])
    steps = sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))
    assert steps == list(range(1, BAD_STEP)) and not (folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_nothing_that_is_not_finite_is_learnt_or_saved(site: str, value: float, write_config) -> None:
    refuses(write_config, site, "sigmoid", value)


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "sigmoid"])
def test_whatever_the_loss(loss: str, write_config) -> None:
    refuses(write_config, "policy", loss, math.nan)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("site", SITES)
def test_every_site_with_every_loss(site: str, loss: str, write_config) -> None:
    if site == "reference" and loss not in REFERENCE_LOSSES:
        pytest.skip("the loss has no reference")
    refuses(write_config, site, loss, math.nan)


def test_the_run_goes_on_from_the_checkpoint_before(write_config, tmp_path: Path) -> None:
    run(write_config(**KEYS, output_dir=str(tmp_path / "whole")))
    refuses(write_config, "gradient", "sigmoid", math.nan)
    assert "Resuming from" in run(write_config(**KEYS))
    assert same(tmp_path / "out", tmp_path / "whole")


def test_an_evaluation_names_the_row(write_config, monkeypatch: pytest.MonkeyPatch) -> None:
    original = dpo.response_logps

    def logps(model: Any, batch: Any) -> Any:
        found = original(model, batch)
        if not torch.is_grad_enabled():
            found.logps[-1] = math.nan
        return found

    monkeypatch.setattr(dpo, "response_logps", logps)
    keys = {"eval_dataset": "held_out", "do_eval": True, "per_device_eval_batch_size": 4}
    with pytest.raises(NotFinite, match=r"evaluation: .*logps/rejected is NaN for \S+held_out.json:4"):
        run(write_config(**keys, pref_loss="simpo"))


# The guard by itself


@pytest.fixture
def guard() -> StepGuard:
    return StepGuard("dpo (sigmoid)", lambda vector: vector, lambda spike: None)


MODEL = torch.nn.Linear(1, 1)


def end_step(guard: StepGuard, loss: float, norm: float = 1.0, **own: Any) -> Any:
    return guard.end_step(1, {"loss": (loss, 1.0)}, norm, MODEL, **own)


def test_a_scaler_may_overflow(guard: StepGuard) -> None:
    assert end_step(guard, 0.5, math.inf, scaled=True).loss == 0.5
    with pytest.raises(NotFinite, match="the norm of the gradient is not finite"):
        end_step(guard, 0.5, math.inf)
    with pytest.raises(NotFinite):
        end_step(guard, math.nan, scaled=True)


def test_all_ranks_end_together() -> None:
    def gather(own: torch.Tensor) -> torch.Tensor:
        return torch.cat([own, own.new_tensor([1.0, 1.0, float(other_is_bad), 15.0])])

    guard = StepGuard("dpo", gather, lambda spike: None)
    other_is_bad = False
    numbers = end_step(guard, 0.5)
    assert (numbers.loss, numbers.signal) == (0.75, 15)
    other_is_bad = True
    with pytest.raises(NotFinite):
        end_step(guard, 0.5)


@pytest.mark.parametrize("layout", ["shared", "repeat"])
def test_rows_of_pairs(layout: Layout) -> None:
    examples = [
        TokenizedExample([1, 2], [[3], [4, 5], [6]], (Pair(0, 1), Pair(0, 2)), "a:1"),
        TokenizedExample([1], [[3, 3], [4]], (Pair(1, 0),), "b:2"),
        TokenizedExample([1], [[3], [4]], (Pair(0, 1),), "c:3"),
    ]
    assert Seen(pack(examples, layout).to_dict(), {}).rows() == ["a:1", "a:1", "b:2", "c:3"]


def test_check_finite_passes_numbers_that_are_no_floats() -> None:
    check_finite("x", [("count", torch.tensor(3)), ("weight", torch.ones(2))])
    with pytest.raises(NotFinite, match="x: not finite in b, d"):
        check_finite("x", [(name, torch.tensor(math.inf if name in "bd" else 0.0)) for name in "abcd"])


# Spikes


def test_a_spike_is_logged_with_its_rows_once(write_config, tmp_path: Path, monkeypatch) -> None:
    original = DpoStage.compute

    def compute(self: DpoStage, model: Any, batch: Any) -> Any:
        output = original(self, model, batch)
        spiky = torch.tensor([name.endswith("json:5") for name in batch["rows"]])
        seen.append(bool(spiky.any()))
        loss = torch.where(spiky & torch.tensor(len(seen) > 24), 5.0, 0.7)
        output.losses.copy_(output.losses * 0 + loss)
        return output

    seen: list[bool] = []
    monkeypatch.setattr(DpoStage, "compute", compute)
    keys = {"max_steps": 30, "save_steps": 28, "logging_steps": 10}
    printed = run(write_config(**keys))
    lines = (tmp_path / "out" / "loss_spikes.jsonl").read_text().splitlines()
    steps = [step for step, spiky in enumerate(seen, 1) if spiky and step > 24]
    spikes = [json.loads(line) for line in lines]
    assert [spike["current_steps"] for spike in spikes] == steps
    assert spikes[0]["rows"][0]["row"].endswith("pairs.json:5") and spikes[0]["rows"][0]["loss"] == 5.0
    assert f"step {steps[0]}: loss 2.85 stands out (usual 0.7); highest: " in printed.replace("\n", " ")


def test_the_losses_that_others_are_compared_with_resume(guard: StepGuard) -> None:
    for loss in [0.7] * 25:
        end_step(guard, loss)
    spikes: list[Spike] = []
    other = StepGuard("dpo", lambda vector: vector, spikes.append)
    other.load_state(guard.state())
    other.see(
        Seen(
            pack([TokenizedExample([1], [[2], [3]], (Pair(0, 1),), "a:1")], "shared").to_dict(),
            {"loss": torch.tensor([4.0])},
        )
    )
    end_step(other, 4.0)
    assert spikes == [Spike(1, 4.0, pytest.approx(0.7), [("a:1", 4.0)])]


ONE_BAD_RANK = """
import os
from prefkit.cli import main
from prefkit.train import dpo
original, calls = dpo.response_logps, []
def logps(*args):
    found = original(*args)
    calls.append(found)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        found.logps[0] = found.logps[0] * float("inf")
    return found
dpo.response_logps = logps
main()
"""


@pytest.mark.slow
def test_a_bad_number_of_one_rank_ends_both_with_its_row(write_config, tmp_path: Path) -> None:
    script = tmp_path / "one_bad_rank.py"
    script.write_text(ONE_BAD_RANK)
    done = torchrun(str(script), "train", str(write_config(**KEYS)), "ddp_backend=gloo")
    assert "dpo (sigmoid), step 3: a number is not finite" in done.stderr
    assert "logps/chosen is infinite for " in done.stderr and done.stderr.count("exitcode  : 65") >= 1
    assert (tmp_path / "out" / "checkpoint-2").exists() and not (tmp_path / "out" / "checkpoint-3").exists()
