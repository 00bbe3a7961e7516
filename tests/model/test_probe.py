"""Probe rows tell a model again that was trained, and one that was not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefkit.config import TuningConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair
from prefkit.model.adapter import add_lora
from prefkit.model.attention import use_shared_prompts
from prefkit.model.errors import ModelError
from prefkit.model.probe import (
    PROBE_FILE,
    Probe,
    distance,
    make_probe,
    measure,
    read_probe,
    verify,
    write_probe,
)
from tests.conftest import make_model
from tests.model.test_policy import EXAMPLES


def make_policy(seed: int = 1, **changes):
    """A model with a random adapter."""
    policy = add_lora(make_model(**changes), TuningConfig(lora_rank=2))
    generator = torch.Generator().manual_seed(seed)
    for weights in policy.parameters():
        if weights.requires_grad:
            weights.data = torch.randn(weights.shape, generator=generator) * 0.1
    return policy


@pytest.fixture
def policy():
    return make_policy()


@pytest.fixture
def folder(policy, tmp_path: Path) -> Path:
    """Holds the probe of `policy`."""
    write_probe(make_probe(policy, EXAMPLES), tmp_path)
    return tmp_path


def change(folder: Path, **values: object) -> None:
    """Change values of the probe in a folder."""
    file = folder / PROBE_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_token_logps_are_those_of_the_models_own_logits(policy) -> None:
    found = measure(policy, [([3, 9, 20], [5, 6])])
    with torch.no_grad():
        logps = policy(input_ids=torch.tensor([[3, 9, 20, 5, 6]])).logits[0].log_softmax(-1)
    assert found == [pytest.approx([logps[2, 5].item(), logps[3, 6].item()], abs=1e-6)]


def test_measuring_leaves_training_mode_and_attention_as_they_were(policy) -> None:
    use_shared_prompts(policy.get_base_model())
    policy.train()
    measure(policy, [([3], [5])])
    assert policy.training and policy.get_base_model().training
    assert policy.config._attn_implementation == "prefkit_shared"
    policy.eval()
    measure(policy, [([3], [5])])
    assert not policy.training


def test_the_four_shortest_examples_are_probed_with_their_chosen_response(policy) -> None:
    examples = [
        TokenizedExample([9] * length, [[1], [2, 3]], (Pair(1, 0),), f"f:{length}")
        for length in (7, 2, 5, 3, 4)
    ]
    assert make_probe(policy, examples).rows == [([9] * length, [2, 3]) for length in (2, 3, 4, 5)]


def test_a_long_row_is_cut_around_the_border(policy) -> None:
    prompt, response = list(range(10, 210)), list(range(20, 220))
    (row,) = make_probe(policy, [TokenizedExample(prompt, [response, [1]], (Pair(0, 1),), "f:1")]).rows
    assert row == (prompt[-128:], response[:128])


def test_a_probe_is_read_as_it_was_written(policy, folder: Path) -> None:
    probe = read_probe(folder)
    assert probe == make_probe(policy, EXAMPLES)
    assert (probe.dtype, probe.quantized, probe.tolerance) == ("float32", False, 1e-3)
    assert [len(logps) for logps in probe.token_logps] == [len(response) for _, response in probe.rows]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("float16", 0.05), ("bfloat16", 0.25)])
def test_tolerance_is_that_of_the_dtype(dtype: str, tolerance: float) -> None:
    assert Probe([], [], dtype, False).tolerance == tolerance


def test_the_distance_is_a_mean_over_tokens() -> None:
    probe = Probe([([1], [2, 3]), ([1], [4])], [[-1.0, -2.0], [-3.0]], "float32", False)
    assert distance(probe, [[-1.5, -2.0], [-2.0]]) == pytest.approx(0.5)


def test_the_same_model_is_known_again(folder: Path) -> None:
    apart = verify(make_policy(), folder, "a")
    assert apart is not None and apart < 1e-6


def test_a_merged_model_is_known_again(folder: Path) -> None:
    apart = verify(make_policy().merge_and_unload(), folder, "a")
    assert apart is not None and apart < 1e-4


def test_a_model_in_another_dtype_has_the_tolerance_of_the_coarser(folder: Path) -> None:
    apart = verify(make_policy().to(torch.bfloat16), folder, "a")
    assert apart is not None and 1e-3 < apart < 0.25


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.base_layer.weight", "lm_head.weight"])
def test_a_changed_base_is_refused(folder: Path, name: str) -> None:
    other = make_policy()
    dict(other.get_base_model().named_parameters())[name].data *= 1.2
    other.get_base_model().name_or_path = "the/base"
    with pytest.raises(ModelError) as caught:
        verify(other, folder, "my-adapter")
    message = str(caught.value)
    assert message.startswith("my-adapter on the/base is not the model that was trained")
    assert "nats per token away (tolerance 0.001)" in message and "another base than the one" in message


def test_another_adapter_and_none_are_refused(folder: Path) -> None:
    for other in (make_policy(seed=2), make_model()):
        with pytest.raises(ModelError, match="is not the model that was trained"):
            verify(other, folder, "a")


def test_a_model_that_gives_no_numbers_is_refused(folder: Path) -> None:
    other = make_policy()
    other.get_base_model().lm_head.weight.data[:] = math.nan
    with pytest.raises(ModelError, match="are nan nats per token away"):
        verify(other, folder, "a")


def test_without_a_probe_there_is_nothing_to_compare(tmp_path: Path) -> None:
    assert read_probe(tmp_path) is None
    assert verify(make_policy(seed=2), tmp_path, "a") is None


def test_a_model_quantised_otherwise_is_not_compared(policy, folder: Path) -> None:
    write_probe(replace(read_probe(folder), quantized=True), folder)
    assert verify(make_policy(seed=2), folder, "a") is None
    policy.get_base_model().is_quantized = True
    assert verify(policy, folder, "a") == pytest.approx(0, abs=1e-6)


def test_a_smaller_vocabulary_is_refused(folder: Path) -> None:
    """53 is the highest token of the probe."""
    other = make_policy(vocab_size=53)
    other.get_base_model().name_or_path = "small"
    with pytest.raises(ModelError) as caught:
        verify(other, folder, "a")
    assert str(caught.value) == "a: small has fewer tokens than the model it was trained on"
    with pytest.raises(ModelError, match="is not the model that was trained"):
        verify(make_policy(vocab_size=54), folder, "a")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", "5", '{"rows": 5}', '{"rows": [[[1], [2]]], "dtpye": ""}']
)
def test_a_damaged_probe_is_refused(folder: Path, text: str) -> None:
    (folder / PROBE_FILE).write_text(text)
    with pytest.raises(ModelError, match=r"probe\.json is damaged"):
        read_probe(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"dtype": "float33"},
        {"token_logps": [[-1.0]]},
        {"rows": [], "token_logps": []},
        {"rows": [[["x"], ["y"]]], "token_logps": [[-1.0]]},
    ],
)
def test_a_probe_that_does_not_fit_together_is_refused(policy, folder: Path, values: dict) -> None:
    change(folder, **values)
    with pytest.raises(ModelError, match=r"probe\.json is damaged"):
        verify(policy, folder, "a")
