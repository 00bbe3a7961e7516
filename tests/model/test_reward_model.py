"""A reward model in use: one number for a row, whatever it is batched with, and known again by it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from prefkit.config.errors import UserError
from prefkit.model.errors import ModelError
from prefkit.model.probe import PROBE_FILE, make_probe, write_probe
from prefkit.model.reward_model import (
    EXACT,
    make_score_probe,
    plain_scores,
    probe_scores,
    read_score_probe,
    score_distance,
    verify_scores,
    write_score_probe,
)
from tests.conftest import make_model
from tests.model.test_policy import EXAMPLES
from tests.model.test_reward import make_reward_model, put_value_head

ROWS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 0, 0], [14, 15, 16, 17], [18, 19]]


@pytest.mark.parametrize("budget", [1, 8, 12, 10_000])
def test_a_score_does_not_depend_on_the_batch(budget: int) -> None:
    model = make_reward_model()
    sizes: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, given, named: sizes.append(named["input_ids"].numel()), with_kwargs=True
    )
    found = plain_scores(model, ROWS, budget)
    hook.remove()
    assert sum(sizes) >= sum(map(len, ROWS)) and max(sizes) <= max(budget, 7)
    alone = [plain_scores(model, [row])[0] for row in ROWS]
    assert found == pytest.approx(alone, abs=1e-5)
    # A row may end in the token that pads elsewhere; the model's own forward reads another place there.
    with torch.no_grad():
        plain = [model(input_ids=torch.tensor([row])).logits.item() for row in ROWS]
    assert [abs(a - b) < 1e-5 for a, b in zip(found, plain, strict=True)] == [True, True, False, True, True]


def test_rows_that_cannot_be_scored() -> None:
    with pytest.raises(UserError, match="row 2 has no token"):
        plain_scores(make_reward_model(), [[5], []])
    with pytest.raises(UserError, match="row 1 has token 264, and the model has 264"):
        plain_scores(make_reward_model(), [[5, 264]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds the probe of a model."""
    write_score_probe(make_score_probe(make_reward_model(), EXAMPLES), tmp_path)
    return tmp_path


def test_the_same_model_is_known_again(folder: Path) -> None:
    probe = read_score_probe(folder)
    assert probe is not None and probe.tolerance == EXACT and probe.dtype == "float32"
    assert sorted(map(len, probe.rows))[-1] <= 256 and len(probe.rows) == 6
    assert verify_scores(make_reward_model(), folder, "mine") == 0


@pytest.mark.parametrize("part", ["score.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_another_head_or_base_is_not(folder: Path, part: str) -> None:
    model = make_reward_model()
    with torch.no_grad():
        model.get_parameter(part).mul_(1.001)
    with pytest.raises(
        ModelError, match=r"mine on .* is not the reward model that was trained: .*tolerance 1e"
    ):
        verify_scores(model, folder, "mine")


def test_a_base_with_fewer_tokens_is_not(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"mine on .*and the model has 20: it was trained on another base"):
        verify_scores(make_reward_model(vocab_size=20), folder, "mine")


def test_in_bfloat16_within_what_was_measured(tmp_path: Path) -> None:
    model = make_reward_model().bfloat16()
    probe = make_score_probe(model, EXAMPLES)
    write_score_probe(probe, tmp_path)
    assert probe.dtype == "bfloat16" and 2**-8 <= probe.tolerance < 0.1
    assert verify_scores(make_reward_model().bfloat16(), tmp_path, "mine") == 0
    # fp32 of the same weights is within the bits that bfloat16 lacks; another head is not.
    assert (verify_scores(make_reward_model(), tmp_path, "mine") or 0) > 0
    with torch.no_grad():
        model.score.weight.mul_(1.2)
    with pytest.raises(ModelError, match="is not the reward model that was trained"):
        verify_scores(model, tmp_path, "mine")


def test_read_in_another_format_the_one_it_was_probed_in_is_named(folder: Path) -> None:
    model = make_reward_model().bfloat16()
    with torch.no_grad():
        model.score.weight.mul_(1.5)
    with pytest.raises(
        ModelError, match=r"or head has changed. It is read in bfloat16; write dtype: float32\."
    ):
        verify_scores(model, folder, "mine")


def test_the_bias_of_llamafactorys_head_is_a_part_of_the_scores(tmp_path: Path) -> None:
    put_value_head(tmp_path, bias=0.5)
    write_score_probe(probe_scores(make_reward_model(), ROWS, offset=0.5), tmp_path)
    assert verify_scores(make_reward_model(), tmp_path, "mine") == 0
    put_value_head(tmp_path, bias=0.501)
    with pytest.raises(ModelError, match="is not the reward model that was trained"):
        verify_scores(make_reward_model(), tmp_path, "mine")


def test_no_number_is_no_distance() -> None:
    for scores in ([1.0, math.nan], [math.nan, 1.0]):
        assert math.isnan(score_distance([1.0, 1.0], scores))


def test_no_probe_a_language_models_and_a_damaged_one(tmp_path: Path) -> None:
    assert verify_scores(make_reward_model(), tmp_path, "mine") is None
    write_probe(make_probe(make_model(), EXAMPLES), tmp_path)
    assert verify_scores(make_reward_model(), tmp_path, "mine") is None
    damaged: list[Any] = ["{", json.dumps({"rows": [[1]]}), "[]"]
    for text in damaged:
        (tmp_path / PROBE_FILE).write_text(text)
        with pytest.raises(ModelError, match=r"probe.json is damaged"):
            read_score_probe(tmp_path)
