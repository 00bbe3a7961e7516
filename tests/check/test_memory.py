"""The estimate: its parts, what a run has in it, and changes that make it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory_estimate import fit
from prefkit.check.advice import change, find_advice
from prefkit.check.memory import KEPT, PROCESS, Estimate, largest_batch, parse_size
from prefkit.check.run import check
from prefkit.config import load_config
from prefkit.config.errors import UserError
from prefkit.config.schema import RunConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Label
from prefkit.data.packing import Layout

Write = Callable[..., Path]
LAYOUTS: tuple[Layout, ...] = ("shared", "repeat")


def estimate(file: Path) -> Estimate:
    return check(load_config(file, ()), None, lambda text: None).memory.estimate


def test_parts_are_those_of_the_run(write_config: Write) -> None:
    lora, full = estimate(write_config()), estimate(write_config(finetuning_type="full", ref_cache=False))
    for found in (lora, full):
        assert sum(found.parts.values()) == found.total
    # The tiny Llama has 27,936 weights; LoRA of rank 8 on q, k, v, o and the three of the MLP, twice.
    adapter = 8 * 4 * 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)
    assert lora.adapter == adapter and lora.reference == 0
    assert full.adapter == 0 and full.reference == full.weights > 4 * 20_000
    assert lora.optimiser == pytest.approx(2 * adapter, rel=0.02)
    assert full.optimiser == pytest.approx(2 * full.weights, rel=0.02)


def test_what_is_not_there_costs_nothing(write_config: Write, tiny_model: Path) -> None:
    full = {"finetuning_type": "full"}
    assert estimate(write_config(**full, ref_cache=True)).reference == 0
    assert estimate(write_config(**full, pref_loss="simpo")).reference == 0
    only_reads = estimate(
        write_config(
            do_train=False, do_eval=True, dataset=..., eval_dataset="held_out", ref_model=str(tiny_model)
        )
    )
    assert only_reads.optimiser == only_reads.gradients == 0


def test_a_state_of_other_optimisers(write_config: Write) -> None:
    plain = estimate(write_config(optim="sgd"))
    assert plain.optimiser == 0
    assert estimate(write_config(optim="adafactor")).optimiser > 0


def test_quantised_weights(write_config: Write) -> None:
    whole, four = estimate(write_config()), estimate(write_config(quantization_bit=4))
    assert four.weights < whole.weights


def test_the_measured_numbers_are_those_of_the_script() -> None:
    process, kept = fit()
    assert pytest.approx(process, rel=0.01) == PROCESS
    assert pytest.approx(kept, abs=0.005) == KEPT


def test_a_partner_does_not_make_a_row_large() -> None:
    labels: tuple[Label, Label] = ("desirable", "partner")
    rows = [
        TokenizedExample([1] * 4, [[2] * own, [3] * partner], (), f"f:{own}", labels=labels)
        for own, partner in ((9, 1), (5, 30))
    ]
    for layout in LAYOUTS:
        assert [row.source for row in largest_batch(rows, 1, layout)] == ["f:9"]


@pytest.mark.parametrize("text", ["", "24", "GB", "-1GB", "0MB", "24XB", "nanGB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--memory"):
        parse_size(text)


def price(config: RunConfig) -> int:
    """A made-up peak in which each change saves something."""
    size = 1000 if config.tuning.finetuning_type == "full" else 500
    size -= 100 * bool(config.reference.ref_cache)
    size -= 100 * (config.model.disable_gradient_checkpointing is False)
    size += 10 * config.value("per_device_train_batch_size")
    return size - 50 * bool(config.value("bf16")) + config.data.cutoff_len // 8


def test_the_cheapest_change_comes_first(write_config: Write) -> None:
    config = load_config(write_config(finetuning_type="full", per_device_train_batch_size=8)).config
    peak = price(config)
    one = find_advice(config, peak - 100, price)
    assert one is not None and one.keys == {"ref_cache": True} and one.total == peak - 100
    several = find_advice(config, peak - 240, price)
    assert several is not None
    assert several.keys == {
        "ref_cache": True,
        "disable_gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    assert price(change(config, several.keys)) == several.total <= peak - 240
    assert find_advice(config, 1, price) is None


def test_a_change_replaces_other_names_of_a_key(write_config: Write) -> None:
    config = load_config(write_config(gradient_checkpointing=False)).config
    changed = change(config, {"disable_gradient_checkpointing": False})
    assert "gradient_checkpointing" not in changed.training
    assert changed.model.disable_gradient_checkpointing is False


def test_advice_really_fits(write_config: Write) -> None:
    file = write_config(finetuning_type="full", ref_cache=False)
    loaded = load_config(file, ())
    whole = check(loaded, None, lambda text: None).memory.estimate
    said: list[str] = []
    memory = check(loaded, whole.total - whole.reference, said.append).memory
    assert memory.fits is False and memory.advice is not None
    assert memory.advice.keys == {"ref_cache": True} and any("ref_cache" in text for text in said)
    mended = check(
        loaded._replace(config=change(loaded.config, memory.advice.keys)), memory.budget, said.append
    )
    assert mended.memory.fits and mended.memory.estimate.total == memory.advice.total


def test_a_longer_row_takes_more(write_config: Write, dataset_dir: Path) -> None:
    before = estimate(write_config())
    row: dict[str, Any] = {"instruction": "Say " * 20, "chosen": "yes " * 15, "rejected": "no"}
    rows = __import__("json").loads((dataset_dir / "pairs.json").read_text())
    (dataset_dir / "pairs.json").write_text(__import__("json").dumps([*rows, row]))
    after = estimate(write_config())
    assert after.activations > before.activations
    assert replace(after, activations=0, logits=0, kept=0, gradients=0) == replace(
        before, activations=0, logits=0, kept=0, gradients=0
    )
