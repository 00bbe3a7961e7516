"""Partners read apart have the log-probs of one row, and leave nothing for the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import Layout, pack
from prefkit.data.picking import pick
from prefkit.model import partners
from prefkit.model.architecture import read_architecture
from prefkit.model.attention import use_shared_prompts
from prefkit.model.partners import PromptStates, judged_logps
from prefkit.model.policy import attach_logps_forward, response_logps
from tests.conftest import make_model
from tests.model.test_policy import EXAMPLES as PAIRS
from tests.model.test_policy import (
    LOCAL_EXPERTS,
    REPEATING,
    SHARING,
    distance,
    gradients,
    make_routed,
    make_trained,
)

# One partner is longer than its response, one shorter, and one prompt is a single token.
EXAMPLES = [
    TokenizedExample(pair.prompt_ids, pair.response_ids, (), pair.source, labels=("desirable", "partner"))
    for pair in PAIRS
]
JUDGED = [0, 2, 4]


def make_batch(layout: Layout) -> dict[str, Any]:
    return pack(EXAMPLES, layout).to_dict()


def loss_of(logps: Tensor) -> Tensor:
    return (logps[JUDGED] * torch.arange(1.0, 4)).sum()


def check(policy: Any, layout: Layout) -> None:
    together = response_logps(policy, make_batch(layout))
    expected = gradients(policy, loss_of(together.logps))
    apart = judged_logps(policy, make_batch(layout))
    torch.testing.assert_close(apart.token_logps, together.token_logps, atol=1e-4, rtol=0)
    torch.testing.assert_close(apart.logps, together.logps, rtol=1e-5, atol=1e-6)
    assert torch.equal(apart.lengths, together.lengths) and torch.equal(apart.owner, together.owner)
    # What the loss takes of partners changes no gradient.
    found = gradients(policy, loss_of(apart.logps) + apart.logps[[1, 3, 5]].square().sum())
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert distance(found[parameter], gradient) < 1e-5


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # peft, of adapted experts
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SHARING)
def test_log_probs_and_gradients_are_those_of_one_row(name: str, checkpointing: bool) -> None:
    check(make_trained(name, SHARING[name], "shared", checkpointing), "shared")


@pytest.mark.parametrize("name", ["llama", "jamba", "gpt_oss", "stablelm"])
def test_log_probs_and_gradients_are_those_of_repeated_prompts(name: str) -> None:
    check(make_trained(name, {**SHARING, **REPEATING}[name], "repeat", checkpointing=False), "repeat")


@pytest.mark.parametrize("layout", ["shared", "repeat"])
def test_partners_leave_nothing_for_the_backward(layout: Layout) -> None:
    policy = make_trained("llama", {}, layout, checkpointing=False)

    def saved(compute: Any, batch: dict[str, Any]) -> int:
        sizes: list[int] = []

        def pack_hook(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            compute(policy, batch)
        return sum(sizes)

    batch = make_batch(layout)
    alone, apart = saved(response_logps, pick(batch, JUDGED)), saved(judged_logps, batch)
    joining = 100  # the few numbers by which log-probs are put in order and added up
    assert alone <= apart < alone + joining < saved(response_logps, batch)


@pytest.mark.parametrize("layout", ["shared", "repeat"])
def test_without_gradients_all_are_one_batch(layout: Layout) -> None:
    policy = make_trained("llama", {}, layout, checkpointing=False)
    with torch.no_grad():
        found, expected = (fn(policy, make_batch(layout)) for fn in (judged_logps, response_logps))
    assert torch.equal(found.token_logps, expected.token_logps)


def make_dropping(checkpointing: bool) -> Any:
    model = make_model()
    use_shared_prompts(model)
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5)
    policy = get_peft_model(model, lora).train()
    attach_logps_forward(model, read_architecture(model.config))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return policy


def test_dropout_under_checkpointing_is_that_without() -> None:
    """The forward that checkpointing repeats draws again what it drew, whatever partners drew in between."""
    found = []
    for checkpointing in (False, True):
        policy = make_dropping(checkpointing)
        torch.manual_seed(2)
        responses = judged_logps(policy, make_batch("shared"))
        found.append((responses.token_logps.detach(), gradients(policy, loss_of(responses.logps))))
    (one, expected), (other, repeated) = found
    assert torch.equal(one, other)
    for parameter, gradient in expected.items():
        assert distance(repeated[parameter], gradient) < 1e-5
    torch.manual_seed(3)
    assert not torch.equal(judged_logps(policy, make_batch("shared")).token_logps, one)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_keys_of_prompts_are_read_once_and_let_go(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[PromptStates] = []

    class Noted(PromptStates):
        def __init__(self, segments: Any) -> None:
            super().__init__(segments)
            made.append(self)

    monkeypatch.setattr(partners, "PromptStates", Noted)
    policy = make_trained("llama", {}, "shared", checkpointing)
    responses = judged_logps(policy, make_batch("shared"))
    loss_of(responses.logps).backward()
    (states,) = made
    assert list(states._layers.values()) == [None, None]
    with pytest.raises(RuntimeError, match="have been read before"):
        states.read(next(iter(states._layers)), torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))


def test_layers_that_are_one_module_are_refused() -> None:
    states, layer = PromptStates(((0, 2, ((2, 3),)),)), torch.nn.Module()
    states.keep(layer, torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))
    with pytest.raises(RuntimeError, match="share an attention module"):
        states.keep(layer, torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))


def test_the_router_loss_leaves_partners_out() -> None:
    model = make_routed("mixtral")
    assert LOCAL_EXPERTS.items() <= SHARING["mixtral"].items()
    use_shared_prompts(model)
    batch = make_batch("shared")
    expected = response_logps(model, pick(batch, JUDGED)).router_loss
    found = judged_logps(model, batch).router_loss
    assert found is not None and expected is not None
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, response_logps(model, batch).router_loss)
