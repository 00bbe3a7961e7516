"""What is read from a config: who shares a prompt up to which length, and whose rows depend on each other."""

from __future__ import annotations

import pytest
import torch

from prefkit.config.errors import UserError
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair
from prefkit.data.packing import pack
from prefkit.model.architecture import Architecture, batch_dependence, read_architecture
from prefkit.model.policy import response_logps
from tests.conftest import make_model
from tests.model.test_policy import EXAMPLES, LLAMA4, LONGEST, REPEATING, SHARING, WINDOWED, make_policy


def architecture_of(name: str, changes: dict) -> Architecture:
    return read_architecture(make_model(name.split()[0], **changes).config)


def widen(changes: dict) -> dict:
    """The same model with windows that hide nothing."""
    return {
        key: widen(value) if isinstance(value, dict) else 500 if value == LONGEST else value
        for key, value in changes.items()
    }


@pytest.mark.parametrize("name", SHARING)
def test_a_prompt_is_shared_up_to_the_window(name: str) -> None:
    architecture = architecture_of(name, SHARING[name])
    assert architecture.choose_layout("auto", LONGEST) == "shared"
    assert architecture.choose_layout("shared", LONGEST) == "shared"
    assert architecture.choose_layout("repeat", LONGEST) == "repeat"
    beyond = architecture.choose_layout("auto", LONGEST + 1)
    assert beyond == ("repeat" if name in WINDOWED else "shared")


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_hides_nothing_up_to_its_length(name: str) -> None:
    """The model's own logits, with the window and without: the same for as many tokens, not for one more."""
    model = make_model(name.split()[0], **SHARING[name])
    free = make_model(name.split()[0], **widen(SHARING[name]))
    ids = torch.arange(20, 20 + LONGEST + 1)[None]
    fits = ids[:, :-1]
    torch.testing.assert_close(model(input_ids=fits).logits, free(input_ids=fits).logits)
    assert not torch.allclose(model(input_ids=ids).logits[0, -1], free(input_ids=ids).logits[0, -1])


@pytest.mark.parametrize("name", WINDOWED)
def test_a_sequence_longer_than_the_window_stops_the_shared_layout(name: str) -> None:
    policy = make_policy(name, SHARING[name], "shared")
    longer = TokenizedExample([5] * LONGEST, [[6], [7]], (Pair(0, 1),), "f:1")
    with pytest.raises(RuntimeError, match=f"longer than the window of {LONGEST}"):
        response_logps(policy, pack([longer], "shared").to_dict())


def test_a_row_may_be_longer_than_the_window() -> None:
    row = pack(EXAMPLES, "shared").input_ids
    assert row.shape[1] > LONGEST
    assert architecture_of("mistral", {"sliding_window": LONGEST}).choose_layout("auto", LONGEST) == "shared"


@pytest.mark.parametrize("name", REPEATING)
def test_others_repeat_the_prompt(name: str) -> None:
    architecture = architecture_of(name, REPEATING[name])
    assert architecture.choose_layout("auto", LONGEST) == "repeat"
    with pytest.raises(UserError, match="batch_layout: shared is not possible"):
        architecture.choose_layout("shared", LONGEST)


def test_all_heads_here_are_known_but_one() -> None:
    tested = {**SHARING, **REPEATING}
    unknown = [name for name, changes in tested.items() if architecture_of(name, changes).logits is None]
    assert unknown == ["stablelm"]


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {}, None),
        ("qwen2", {"sliding_window": 4}, None),  # which use_sliding_window leaves off
        ("mistral", {"sliding_window": 512}, "through a window of 512 tokens, and cutoff_len is 1024"),
        ("gemma3_text", {"sliding_window": 512}, "through a window of 512 tokens, and cutoff_len is 1024"),
        ("gemma", {"use_bidirectional_attention": True}, "its attention is not causal"),
        ("gpt_oss", REPEATING["gpt_oss"], "its attention has sinks"),
        ("jamba", REPEATING["jamba"], "its recurrent or convolution layers read the row as one sequence"),
        ("llama4_text", REPEATING["llama4_text"], "its attn_temperature_tuning goes by the place in the row"),
        ("stablelm", {}, "sharing is not known to be exact for the architecture 'stablelm'"),
    ],
)
def test_the_reason_is_told(name: str, changes: dict, reason: str | None) -> None:
    found = architecture_of(name, changes).find_obstacle(1024)
    assert found is None if reason is None else found is not None and found.endswith(reason)


def test_tuned_temperature_without_layers_that_have_it_is_no_obstacle() -> None:
    changes = {**LLAMA4, "attention_chunk_size": LONGEST, "no_rope_layers": [1, 1]}
    assert architecture_of("llama4_text", changes).find_obstacle(LONGEST) is None


def test_an_attention_that_is_not_ours_to_honour_is_refused() -> None:
    """Sinks, and a model that attends both ways."""
    for name, changes, what in [
        ("gpt_oss", REPEATING["gpt_oss"], "s_aux"),
        ("gemma", {"use_bidirectional_attention": True}, "causal"),
    ]:
        policy = make_policy(name, changes, "shared")
        with pytest.raises(RuntimeError, match=what):
            response_logps(policy, pack(EXAMPLES, "shared").to_dict())


LONGROPE = {
    "original_max_position_embeddings": 8,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
PER_LAYER = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": DYNAMIC,
}


@pytest.mark.parametrize(
    ("name", "changes", "cutoff_len", "reason"),
    [
        ("llama", {}, 4096, None),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, 4096, None),
        ("jamba", REPEATING["jamba"], 4096, None),  # without rotary angles
        ("phi3", LONGROPE, 8, None),
        ("phi3", LONGROPE, 9, "more than 8 tokens, and cutoff_len is 9"),
        ("llama", {"rope_parameters": DYNAMIC}, 8, "dynamic"),
        ("gemma3_text", {"rope_parameters": PER_LAYER, **SHARING["gemma3_text"]}, 8, "dynamic"),
    ],
)
def test_who_depends_on_its_batch(name: str, changes: dict, cutoff_len: int, reason: str | None) -> None:
    found = batch_dependence(make_model(name, **changes).config, cutoff_len)
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("phi3", LONGROPE),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}),
    ],
)
def test_a_batch_with_a_longer_row_changes_the_others(name: str, changes: dict) -> None:
    short, longer = EXAMPLES[0], EXAMPLES[2]
    alone, together = (
        response_logps(make_policy(name, changes, "repeat"), pack(examples, "repeat").to_dict()).logps[:2]
        for examples in ([short], [short, longer])
    )
    assert not torch.allclose(alone, together, atol=1e-2)
    steady = {**changes, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    alone, together = (
        response_logps(make_policy(name, steady, "repeat"), pack(examples, "repeat").to_dict()).logps[:2]
        for examples in ([short], [short, longer])
    )
    torch.testing.assert_close(alone, together)


def test_both_layouts_of_a_batch_agree_on_long_angles() -> None:
    """The longest sequence is the same in both."""
    found = [
        response_logps(make_policy("phi3", LONGROPE, layout), pack(EXAMPLES, layout).to_dict()).logps
        for layout in ("shared", "repeat")
    ]
    torch.testing.assert_close(*found)
