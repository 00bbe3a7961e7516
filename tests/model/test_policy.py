"""Log-probs and gradients do not depend on layout, chunks or architecture."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import prefkit.objectives.head
from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import Layout, pack
from prefkit.model.architecture import read_architecture
from prefkit.model.attention import plain_attention, use_shared_prompts
from prefkit.model.policy import attach_logps_forward, response_logps
from tests.conftest import make_model

EXAMPLES = [
    TokenizedExample([3, 9, 20, 31, 4], [[5, 6, 7], [8, 9]], [(0, 1)], "f:1"),
    TokenizedExample([11], [[12], [13, 14, 15, 16, 17, 18, 19]], [(0, 1)], "f:2"),
    TokenizedExample([40, 41, 42, 43, 44, 45, 46, 47], [[50, 51, 52, 53], [54]], [(0, 1)], "f:3"),
]
SHARING = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "qwen3": {"layer_types": ["full_attention"] * 2},
    "mistral": {"sliding_window": None},
    "gemma": {},
}
REPEATING = {
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 5.0, "layer_types": None},
    "gemma3_text": {"sliding_window": 4, "final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "phi3": {},
    "stablelm": {},
}


def make_policy(name: str, changes: dict, layout: Layout, targets: list[str] | None = None):
    model = make_model(name.split()[0], **changes)
    architecture = read_architecture(model.config)
    if layout == "shared":
        use_shared_prompts(model)
    targets = targets or ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    torch.manual_seed(1)
    # Random B, not zero: otherwise no gradient reaches A.
    policy = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    attach_logps_forward(model, architecture)
    return policy


def padded_logps(policy, examples: list[TokenizedExample]) -> list[Tensor]:
    """Token log-probs of each response from the model's own logits, one plain sequence at a time."""
    found = []
    for example in examples:
        for ids in example.response_ids:
            row = torch.tensor([[*example.prompt_ids, *ids]])
            logps = policy(input_ids=row).logits.float().log_softmax(-1)[0, -len(ids) - 1 : -1]
            found.append(logps.gather(1, torch.tensor(ids)[:, None])[:, 0])
    return found


def gradients(policy, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def loss_of(logps: Tensor) -> Tensor:
    """Weighs every response differently, so that none cancels."""
    return (logps * torch.arange(1.0, len(logps) + 1)).sum()


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SHARING)
def test_shared_equals_repeat_equals_plain(name: str, checkpointing: bool) -> None:
    results = {}
    for layout in ("shared", "repeat"):
        policy = make_policy(name, SHARING[name], layout)
        if checkpointing:
            policy.train()
            policy.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        responses = response_logps(policy, pack(EXAMPLES, layout).to_dict())
        results[layout] = (responses, gradients(policy, loss_of(responses.logps)))
    policy = make_policy(name, SHARING[name], "repeat")
    plain = padded_logps(policy, EXAMPLES)
    plain_sums = torch.stack([logps.sum() for logps in plain])
    plain_gradients = gradients(policy, loss_of(plain_sums))
    assert plain_gradients
    for responses, found in results.values():
        torch.testing.assert_close(responses.token_logps, torch.cat(plain), atol=1e-4, rtol=0)
        torch.testing.assert_close(responses.logps, plain_sums, rtol=1e-5, atol=0)
        assert found.keys() == plain_gradients.keys()
        for parameter, gradient in plain_gradients.items():
            assert distance(found[parameter], gradient) < 1e-5


@pytest.mark.parametrize("name", REPEATING)
def test_repeat_equals_the_models_own_logits(name: str) -> None:
    targets = ["qkv_proj", "o_proj"] if name == "phi3" else ["q_proj", "v_proj"]
    policy = make_policy(name, REPEATING[name], "repeat", targets)
    responses = response_logps(policy, pack(EXAMPLES, "repeat").to_dict())
    plain = torch.cat(padded_logps(policy, EXAMPLES))
    torch.testing.assert_close(responses.token_logps, plain, atol=1e-4, rtol=0)
    found = gradients(policy, loss_of(responses.logps))
    sums = torch.stack([logps.sum() for logps in padded_logps(policy, EXAMPLES)])
    for parameter, gradient in gradients(policy, loss_of(sums)).items():
        assert distance(found[parameter], gradient) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "obstacle"),
    [
        ("llama", {}, None),
        ("gemma", {}, None),
        ("mistral", {"sliding_window": 4}, "window of 4"),
        ("mistral", {"sliding_window": None}, None),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "window of 8"),
        ("gemma2", {}, "gemma2"),
        ("stablelm", {}, "stablelm"),
    ],
)
def test_who_can_share_is_read_from_the_config(name: str, changes: dict, obstacle: str | None) -> None:
    found = read_architecture(make_model(name, **changes).config).sharing_obstacle
    assert found is None if obstacle is None else obstacle in found


def test_head_with_lora_or_in_full_gets_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prefkit.objectives.head._CHUNK_NUMBERS, "cpu", 264 * 3)
    policy = make_policy("llama", {}, "shared", ["q_proj", "lm_head"])
    responses = response_logps(policy, pack(EXAMPLES, "shared").to_dict())
    found = gradients(policy, loss_of(responses.logps))
    sums = torch.stack([logps.sum() for logps in padded_logps(plain_twin(policy), EXAMPLES)])
    assert any("lm_head" in name for name in found)
    for parameter, gradient in gradients(policy, loss_of(sums)).items():
        assert distance(found[parameter], gradient) < 1e-5


def plain_twin(policy):
    """The same policy called with ordinary attention."""

    def call(input_ids: Tensor):
        with plain_attention(policy.base_model.model):
            return policy(input_ids=input_ids)

    return call


def test_log_probs_are_fp32_whatever_the_model() -> None:
    policy = make_policy("llama", {}, "shared").to(torch.bfloat16)
    responses = response_logps(policy, pack(EXAMPLES, "shared").to_dict())
    assert responses.token_logps.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert response_logps(policy, pack(EXAMPLES, "shared").to_dict()).logps.dtype == torch.float32


def test_a_wrapper_that_casts_is_found() -> None:
    policy = make_policy("llama", {}, "shared")

    def cast(**batch):
        return {name: value.bfloat16() for name, value in policy(**batch).items()}

    with pytest.raises(TypeError, match="bfloat16"):
        response_logps(cast, pack(EXAMPLES, "shared").to_dict())  # type: ignore[arg-type]


def test_a_forward_without_a_packed_batch_is_the_models_own() -> None:
    policy = make_policy("llama", {}, "repeat")
    ids = torch.tensor([[1, 2, 3]])
    plain = partial(type(policy.base_model.model).forward, policy.base_model.model)
    assert torch.equal(policy(input_ids=ids).logits, plain(input_ids=ids).logits)
