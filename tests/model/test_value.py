"""The value head: upon the trunk, in fp32, beside the weights and not among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import pack
from prefkit.model.architecture import read_architecture
from prefkit.model.attention import plain_attention, use_shared_prompts
from prefkit.model.errors import ModelError
from prefkit.model.policy import attach_logps_forward, response_logps
from prefkit.model.reward import VALUE_HEAD
from prefkit.model.value import add_value_head, load_value_head, save_value_head, value_head_of
from tests.conftest import make_model

ROWS = [TokenizedExample([7, 8, 9], [[1, 2], [3]], (), "f:1"), TokenizedExample([9], [[4, 5]], (), "f:2")]


def make_policy() -> Any:
    model = make_model()
    add_value_head(model)
    use_shared_prompts(model, "auto")
    attach_logps_forward(model, read_architecture(model.config))
    return model


def test_values_are_those_of_the_hidden_state_before_each_token() -> None:
    model = make_policy()
    head = value_head_of(model)
    assert head is not None
    batch = pack(ROWS, "shared").to_dict()
    first = response_logps(model, batch).values
    assert first is not None and not first.any()  # zero at first
    torch.nn.init.normal_(head.weight)
    head.bias.data.fill_(0.5)
    found = response_logps(model, batch).values
    expected = []
    for row in ROWS:
        for response in row.response_ids:
            with plain_attention(model):
                hidden = model.model(torch.tensor([[*row.prompt_ids, *response]])).last_hidden_state[0]
            first_token = len(row.prompt_ids) - 1
            expected += head(hidden[first_token : first_token + len(response)])[:, 0].tolist()
    assert found is not None and found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_values_are_fp32_under_mixed_precision() -> None:
    model = make_policy()
    torch.nn.init.normal_(value_head_of(model).weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = response_logps(model, pack(ROWS, "shared").to_dict()).values
    assert found is not None and found.dtype == torch.float32
    assert (found.bfloat16().float() != found).any()


def test_it_comes_back_and_is_no_part_of_the_model(tmp_path: Path) -> None:
    model, other = make_policy(), make_policy()
    torch.nn.init.normal_(value_head_of(model).weight)
    save_value_head(model, tmp_path)
    model.save_pretrained(tmp_path)
    assert not any("value" in name for name in load_file(tmp_path / "model.safetensors"))
    load_value_head(other, tmp_path)
    for one, two in zip(*(value_head_of(it).parameters() for it in (model, other)), strict=True):
        assert torch.equal(one, two)


def test_one_that_is_missing_or_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{VALUE_HEAD} is missing"):
        load_value_head(make_policy(), tmp_path)
    other = make_model(hidden_size=64)
    add_value_head(other)
    save_value_head(other, tmp_path)
    with pytest.raises(ModelError, match="no value head of this model"):
        load_value_head(make_policy(), tmp_path)


def test_a_policy_without_one_has_no_file(tmp_path: Path) -> None:
    save_value_head(make_model(), tmp_path)
    load_value_head(make_model(), tmp_path)
    assert not list(tmp_path.iterdir())
