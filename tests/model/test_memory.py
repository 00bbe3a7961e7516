"""Peak memory of a step: what it does not grow with, and what checkpointing takes off it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import prefkit.objectives.head
from benchmarks.peak import PeakMemory
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair
from prefkit.data.packing import pack
from prefkit.model.architecture import read_architecture
from prefkit.model.attention import use_shared_prompts
from prefkit.model.policy import attach_logps_forward
from tests.conftest import make_model
from tests.model.test_policy import distance, loss_of, make_policy, response_logps

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory.py"
DEEP = {"num_hidden_layers": 16, "max_position_embeddings": 1024, "initializer_range": 0.05}


def make_batch(prompt: int, response: int) -> dict[str, Any]:
    """One prompt with two responses of as many tokens, shared."""
    torch.manual_seed(0)
    ids = torch.randint(7, 264, (prompt + 2 * response,)).tolist()
    responses = [ids[prompt : prompt + response], ids[prompt + response :]]
    return pack([TokenizedExample(ids[:prompt], responses, (Pair(0, 1),), "f:1")], "shared").to_dict()


def peak_of_a_step(vocabulary: int, targets: list[str]) -> int:
    policy = make_policy("llama", {"vocab_size": vocabulary, "hidden_size": 64}, "shared", targets)
    batch = make_batch(100, 1200)
    with PeakMemory() as memory:
        loss_of(response_logps(policy, batch).logps).backward()
    adapter = sum(p.numel() * 4 for p in policy.parameters() if p.requires_grad)
    return memory.peak - 2 * adapter  # a LoRA on the head has weights and gradients as long as the vocabulary


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], pytest.param(["q_proj", "lm_head"], marks=pytest.mark.slow)]
)
def test_peak_at_152k_is_that_at_8k(targets: list[str]) -> None:
    small, large = (peak_of_a_step(vocabulary, targets) for vocabulary in (8_000, 152_000))
    assert small > 40e6  # the chunk of logits is seen
    assert abs(large - small) < 0.1 * small, (targets, small, large)


def make_deep(tuning: str, checkpointing: bool) -> Any:
    """A narrow model of many layers, with LoRA or trained in full, head and all."""
    if tuning == "lora":
        policy = make_policy("llama", DEEP, "shared")
        model = policy.base_model.model
    else:
        model = policy = make_model("llama", **DEEP)
        use_shared_prompts(model)
        attach_logps_forward(model, read_architecture(model.config))
    if checkpointing:
        policy.train()
        model.activation_checkpointing_enable({"use_reentrant": False})
    return policy


def step(policy: Any, batch: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """(gradients, peak in bytes)."""
    with PeakMemory() as memory:
        loss = loss_of(response_logps(policy, batch).logps)
        loss.backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}, memory.peak


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_checkpointing_with_a_shared_prompt_costs_less_and_changes_nothing(
    tuning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(prefkit.objectives.head._CHUNK_NUMBERS, "cpu", 264 * 100)
    batch = make_batch(200, 150)
    expected, plain = step(make_deep(tuning, checkpointing=False), batch)
    found, checkpointed = step(make_deep(tuning, checkpointing=True), batch)
    assert ("lm_head.weight" in found) == (tuning == "full")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        assert distance(found[name], gradient) < 1e-5
    assert checkpointed < 0.4 * plain, (checkpointed, plain)


def test_the_peak_is_that_of_what_lives_at_one_time() -> None:
    ones = torch.ones(1000)
    with PeakMemory() as memory:
        twice = ones + ones
        (twice + twice).sum()
        del twice
        ones + ones
    assert memory.peak == 2 * 4000 + 4
    weights = torch.ones(1000, requires_grad=True)
    with PeakMemory() as memory:
        (weights * 2).sum().backward()
        memory.tag([weights.grad])
    assert memory.tagged == 4000


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    curves = ["length", "vocabulary", "batch", "finetuning"]
    command = [sys.executable, SCRIPT, "--quick", "--output", tmp_path, "--curves", *curves]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "memory.json").read_text())
    assert list(results) == curves
    for curve, rows in results.items():
        assert (tmp_path / f"memory_{curve}.png").exists()
        for row in rows:
            parts = ("weights", "second_copy", "optimiser", "gradients", "activations")
            assert row["peak"] == sum(row[part] for part in parts) < row["resident"]
