"""Memory that runs out in a step changes neither gradients nor metrics; what cannot fit is explained."""

from __future__ import annotations

import copy
import gc
import random
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PrinterCallback

from prefkit.config import load_config
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair
from prefkit.data.lengths import WHOLE
from prefkit.data.packing import Layout, Packer
from prefkit.data.view import RowView
from prefkit.objectives.pairwise import LOSSES
from prefkit.train import dpo
from prefkit.train.arguments import make_training_arguments
from prefkit.train.dpo import DpoStage
from prefkit.train.out_of_memory import OutOfMemory, Pieces, is_out_of_memory
from prefkit.train.signals import StopSignals
from prefkit.train.strategy import choose_strategy
from prefkit.train.trainer import PrefTrainer
from tests.train.given import model_and_reference
from tests.train.runs import read, run, same, torchrun, unfinish

NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."
# What a loss reads of a batch, and the terms that can be added to it.
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"pref_loss": name} for name in LOSSES},
    "bco": {"pref_bco_weight": 0.5},
    "sft": {"pref_loss": "simpo", "pref_ftx": 0.5},
    "ld": {"pref_loss": "kto_pair", "ld_alpha": 0.5},
}


def view(rows: list[TokenizedExample]) -> RowView:
    """Rows as a run has them, all whole and in their order."""
    return RowView([rows], np.array([(0, row, WHOLE) for row in range(len(rows))]))


class Run:
    """A trainer of the tiny model, all weights trained, two micro-batches of up to four rows a step."""

    def __init__(self, config: Path, layout: Layout = "shared") -> None:
        self.config = load_config(config).config
        args = make_training_arguments(self.config)
        model, reference = model_and_reference(layout, 0.9)
        self.examples = view(make_examples(7, several=self.config.method.ld_alpha is None))
        self.held_out = view(make_examples(7, several=False))
        data: Any = SimpleNamespace(train=self.examples, held_out=self.held_out, held_out_parts={})
        self.said: list[str] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.trainer = PrefTrainer(
            model,
            args,
            DpoStage(
                self.config.method,
                reference if LOSSES[self.config.method.pref_loss].needs_reference else None,
                torch.float32,
            ),
            self.config.tuning,
            Packer(layout),
            data,
            None,  # type: ignore[arg-type]
            Pieces(self.config, args, reference, self.said.append),
            StopSignals(),
            choose_strategy(args),
        )
        self.trainer.remove_callback(PrinterCallback)

    def train(self) -> Run:
        original = self.trainer._get_grad_norm

        def note(model: Any, *args: Any, **kwargs: Any) -> Any:
            self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
            return original(model, *args, **kwargs)

        self.trainer._get_grad_norm = note  # type: ignore[method-assign]
        self.trainer.train()
        return self

    @property
    def log(self) -> list[dict[str, float]]:
        """The lines of the log, without times."""
        lines = [line for line in self.trainer.state.log_history if "rewards/margins" in line]
        return [{name: value for name, value in line.items() if "_per_" not in name} for line in lines]


def make_examples(number: int, several: bool = True) -> list[TokenizedExample]:
    draw = random.Random(0)

    def ids(most: int) -> list[int]:
        return [draw.randrange(7, 264) for _ in range(draw.randint(2, most))]

    examples = []
    for i in range(number):
        pairs = (Pair(0, 1, 0.1, 0.5), Pair(2, 1, 0.2, 1.5)) if several and i % 3 == 1 else (Pair(0, 1),)
        responses = [ids(12) for _ in range(len(pairs) + 1)]
        examples.append(TokenizedExample(ids(20), responses, pairs, f"rows.json:{i}"))
    return examples


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Each retry collects garbage, which takes long with all the modules that a test imports."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def make_run(write_config, tmp_path: Path) -> Callable[..., Run]:
    def make(layout: str = "shared", **keys: Any) -> Run:
        settings = {
            "finetuning_type": "full",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0,
            "optim": "sgd",
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "pref_beta": 0.5,
        }
        return Run(write_config(**{**settings, **keys}), layout)

    return make


@pytest.fixture
def fail_forward(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes the policy's forwards of these numbers fail, counted from now on, after they were computed."""
    original = dpo.response_logps

    def arm(*at: int, error: Exception | None = None, graded: bool = True) -> None:
        calls = 0

        def call(model: Any, batch: Any) -> Any:
            nonlocal calls
            found = original(model, batch)
            if torch.is_grad_enabled() == graded:
                calls += 1
                if calls in at:
                    raise error or torch.OutOfMemoryError(NO_MEMORY)
            return found

        monkeypatch.setattr(dpo, "response_logps", call)

    yield arm


def fail_backward(run: Run, *at: int, error: Exception | None = None) -> None:
    """Makes backwards of these numbers fail when they have come from the head to the first layer."""
    layers = run.trainer.model.model.layers  # type: ignore[union-attr]
    calls = 0

    def raise_in_time(parameter: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls in at:
            assert layers[1].mlp.down_proj.weight.grad.abs().sum() > 0  # a part was added
            raise error or torch.OutOfMemoryError(NO_MEMORY)

    layers[0].mlp.down_proj.weight.register_post_accumulate_grad_hook(raise_in_time)


def assert_same(found: Run, expected: Run) -> None:
    assert len(found.gradients) == len(expected.gradients) == 2
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        norm = torch.stack([gradient.norm() for gradient in other.values()]).norm()
        for name, gradient in other.items():
            assert (one[name] - gradient).abs().max() <= 1e-6 * norm, name
    assert len(found.log) == 2
    for line, other_line in zip(found.log, expected.log, strict=True):
        assert line == pytest.approx(other_line, rel=1e-5, abs=1e-6)
    means = [it.trainer.stage.reward_mean for it in (found, expected)]
    assert means[0].count == means[1].count and means[0].mean == pytest.approx(means[1].mean, abs=1e-6)


@pytest.mark.parametrize("layout", ["shared", pytest.param("repeat", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_and_metrics_are_those_without_a_split(
    make_run, fail_forward, variant: str, layout: str
) -> None:
    """Two micro-batches a step; the numbers count forwards or backwards, failed ones too."""
    plain = make_run(layout, **VARIANTS[variant]).train()
    assert plain.said == [] and plain.trainer.extra_state()["pieces"] == [1, 1]
    for at in ((1,), (2,), (2, 4)):
        fail_forward(*at)
        found = make_run(layout, **VARIANTS[variant]).train()
        assert [line.split(";")[0] for line in found.said] == ["Step 1: out of memory"] * len(at)
        assert_same(found, plain)
    fail_forward()
    for at in ((1,), (2,), (3,)):
        found = make_run(layout, **VARIANTS[variant])
        fail_backward(found, *at)
        found.train()
        step = 1 if at[0] < 3 else 2
        assert found.said == [
            f"Step {step}: out of memory; micro-batches are now computed in 2 pieces, with the same gradients"
        ]
        assert found.trainer.extra_state()["pieces"] == [2, 1]
        assert_same(found, plain)
    assert len(plain.log[0]) > 8


def test_without_the_statistics_of_the_whole_gradients_would_differ(
    make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A negative control: what the test above compares does depend on them."""
    plain = make_run(pref_loss="kto_pair").train()
    monkeypatch.setattr(DpoStage, "statistics", lambda self, model, pieces: None)
    found = make_run(pref_loss="kto_pair")
    fail_backward(found, 1)
    with pytest.raises(AssertionError):
        assert_same(found.train(), plain)


def test_without_a_replay_gradients_would_differ(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_run().train()
    monkeypatch.setattr(torch.nn.Module, "zero_grad", lambda self, set_to_none=True: None)
    found = make_run()
    fail_backward(found, 1)
    with pytest.raises(AssertionError):
        assert_same(found.train(), plain)


@pytest.mark.parametrize("variant", ["sigmoid", "kto_pair", "simpo"])
@pytest.mark.parametrize("layout", ["shared", "repeat"])
def test_evaluation_gives_the_same_table(make_run, fail_forward, variant: str, layout: str) -> None:
    plain = make_run(layout, **VARIANTS[variant])
    expected_means, expected = plain.trainer.predict_rows(plain.held_out)
    fail_forward(1, 3, graded=False)
    found = make_run(layout, **VARIANTS[variant])
    means, rows = found.trainer.predict_rows(found.held_out)
    assert found.said == [
        f"Evaluation at step 0: out of memory; batches are now computed in {n} pieces, with the same results"
        for n in (2, 4)
    ]
    assert found.trainer.extra_state()["pieces"] == [1, 4]
    assert len(rows) == len(expected) == 7
    for row, expected_row in zip(rows, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-5, abs=1e-5)
    for name in ("predict_loss", "predict_rewards/margins"):
        assert means[name] == pytest.approx(expected_means[name], rel=1e-5, abs=1e-6)


def test_a_row_that_does_not_fit_by_itself_is_named_with_the_ways_out(make_run, fail_forward) -> None:
    fail_forward(*range(1, 99))
    found = make_run(disable_shuffling=True, cutoff_len=2048)
    with pytest.raises(OutOfMemory) as caught:
        found.train()
    assert len(found.said) == 2  # halves, quarters
    text, row = str(caught.value), found.examples[0]
    longest = len(row.prompt_ids) + max(map(len, row.response_ids))
    assert text.startswith(
        f"Step 1: out of memory: a single row does not fit: rows.json:0 ({row.num_tokens} tokens, "
        f"the longest prompt with a response {longest})."
    )
    keys = ["ref_cache: true", "gradient_checkpointing: true", "bf16: true", 'finetuning_type: "lora"']
    places = [text.index(f"  {key}") for key in [*keys, f"cutoff_len: {longest // 2}"]]
    assert places == sorted(places)
    assert "per_device_train_batch_size" not in text and "disable_gradient" not in text
    assert "prefkit check FILE --memory 24GB" in text and "goes on from the last one" in text


def test_no_way_out_that_was_taken(make_run, fail_forward) -> None:
    fail_forward(1, 2, 3)
    with pytest.raises(OutOfMemory) as caught:
        make_run(disable_gradient_checkpointing=False, bf16=True, pref_loss="simpo").train()
    assert "checkpointing" not in str(caught.value) and "bf16" not in str(caught.value)
    advice = make_run(disable_gradient_checkpointing=True).trainer.training_pieces.advise()
    assert "  disable_gradient_checkpointing: false  (same result" in advice


def test_an_evaluation_that_does_not_fit(make_run, fail_forward) -> None:
    fail_forward(1, 2, 3, graded=False)
    found = make_run()
    with pytest.raises(OutOfMemory, match="Evaluation at step 0: out of memory: a single row") as caught:
        found.trainer.predict_rows(found.held_out)
    for useless in ("checkpointing", "lora", "goes on"):
        assert useless not in str(caught.value)


def test_memory_that_runs_out_in_the_update_is_explained(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError(NO_MEMORY)

    monkeypatch.setattr(torch.optim.SGD, "step", fail)
    found = make_run()
    with pytest.raises(
        OutOfMemory, match=r"Step 1: out of memory outside of the batches.*\n  ref_cache: true"
    ):
        found.train()
    assert found.said == []


@pytest.mark.parametrize("place", ["forward", "backward", "evaluation"])
@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("no"), KeyError("rows")])
def test_other_errors_pass(make_run, fail_forward, place: str, error: Exception) -> None:
    found = make_run()
    if place == "backward":
        fail_backward(found, 2, error=error)
    else:
        fail_forward(2, error=error, graded=place == "forward")
    with pytest.raises(type(error)) as caught:
        found.trainer.predict_rows(found.held_out) if place == "evaluation" else found.train()
    assert caught.value is error and found.said == []
    assert found.trainer.extra_state()["pieces"] == [1, 1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(NO_MEMORY), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to ..."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError(NO_MEMORY), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


class Box:
    """Holds a tensor that a graph saved for its backward, for as long as the graph lives."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_the_failed_graph_is_gone_before_the_retry(make_run, place: str) -> None:
    """Its tensors would take the memory that the pieces need."""
    found = make_run(pref_bco_weight=0.5)
    saved: weakref.WeakSet[Box] = weakref.WeakSet()
    counts: list[int] = []

    def keep(tensor: torch.Tensor) -> Box:
        saved.add(box := Box(tensor.detach()))  # an output that refers to its graph would be a ring
        return box

    def raise_and_count(*args: Any) -> None:
        counts.append(len(saved))
        if len(counts) == 2:
            raise torch.OutOfMemoryError(NO_MEMORY)

    layers = found.trainer.model.model.layers  # type: ignore[union-attr]
    if place == "forward":
        layers[1].register_forward_hook(raise_and_count)
    else:
        layers[0].mlp.down_proj.weight.register_post_accumulate_grad_hook(raise_and_count)
    found.trainer.training_pieces.say = lambda text: counts.append(len(saved))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box.tensor):
        found.train()
    assert counts[1] > 10 and counts[2] == 0


def test_an_optimiser_that_updates_in_the_backward_forbids_a_replay(make_run, fail_forward) -> None:
    found = make_run()
    pieces = found.trainer.training_pieces
    pieces.args = copy.copy(pieces.args)
    pieces.args.optim = "galore_adamw_layerwise"
    fail_forward(1)
    with pytest.raises(OutOfMemory, match=r"4 rows do not fit together.*this optimiser updates weights"):
        found.train()


def test_a_resumed_run_keeps_the_pieces(write_config, tmp_path: Path, fail_forward) -> None:
    config = write_config(max_steps=3, save_steps=1, per_device_train_batch_size=4)
    fail_forward(2)
    printed = run(config)
    out, kept = tmp_path / "out", tmp_path / "kept"
    assert "Step 2: out of memory; micro-batches are now computed in 2 pieces" in printed
    assert read(out / "checkpoint-1" / "stage_state.json")["pieces"] == [1, 1]
    assert read(out / "checkpoint-2" / "stage_state.json")["pieces"] == [2, 1]
    shutil.copytree(out, kept)
    unfinish(out)
    fail_forward()
    printed = run(config)
    assert "out of memory" not in printed and same(out, kept)
    assert read(out / "checkpoint-3" / "stage_state.json")["pieces"] == [2, 1]


def test_the_router_loss_is_said_to_differ(make_run, fail_forward) -> None:
    fail_forward(1)
    found = make_run(moe_aux_loss_coef=0.1).train()
    assert "with the same gradients but for those of the router loss" in found.said[0]


@pytest.mark.slow
def test_among_several_processes_the_one_that_fails_says_so(write_config, tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text(
        "import os, sys, torch\n"
        "sys.path.insert(0, os.getcwd())\n"
        "from prefkit import cli\n"
        "from prefkit.train import dpo\n"
        "original = dpo.response_logps\n"
        "def call(model, batch):\n"
        "    if os.environ['RANK'] == '1':\n"
        f"        raise torch.OutOfMemoryError('{NO_MEMORY}')\n"
        "    return original(model, batch)\n"
        "dpo.response_logps = call\n"
        "cli.main()\n"
    )
    done = torchrun(str(script), "train", str(write_config()), "ddp_backend=gloo")
    assert done.returncode != 0
    assert "error: Step 1, process 1: out of memory: 2 rows do not fit together: " in done.stderr
    assert "other processes" in done.stderr and "  per_device_train_batch_size: 1" in done.stderr


def test_memory_that_runs_out_while_a_model_loads_is_named_too(write_config, monkeypatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("prefkit.train.run.build_policy", fails)
    with pytest.raises(OutOfMemory, match=r"outside of the steps(.|\n)*What helps, the cheapest first"):
        run(write_config())
