"""Log-probs and gradients do not depend on layout, chunks or architecture."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.models.mixtral import modeling_mixtral

import prefkit.objectives.head
from prefkit.config.errors import UserError
from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair
from prefkit.data.packing import Layout, pack
from prefkit.model.adapter import linear_names
from prefkit.model.architecture import read_architecture
from prefkit.model.attention import plain_attention, use_shared_prompts
from prefkit.model.policy import attach_logps_forward, has_router_loss, response_logps
from prefkit.objectives.logps import desensitize_length
from tests.conftest import SMALL, make_model

EXAMPLES = [
    TokenizedExample([3, 9, 20, 31, 4], [[5, 6, 7], [8, 9]], (Pair(0, 1),), "f:1"),
    TokenizedExample([11], [[12], [13, 14, 15, 16, 17, 18, 19]], (Pair(0, 1),), "f:2"),
    TokenizedExample([40, 41, 42, 43, 44, 45, 46, 47], [[50, 51, 52, 53], [54]], (Pair(0, 1),), "f:3"),
]
LONGEST = 12  # tokens of the third prompt with its first response
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA4 = {**LOCAL_EXPERTS, "intermediate_size_mlp": 48, "no_rope_layers": [1, 0], "attention_chunk_size": 4}
GEMMA3 = {"sliding_window": LONGEST, "layer_types": ["sliding_attention", "full_attention"]}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": LONGEST, "max_window_layers": 1}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
ROUNDED = {"initializer_range": 0.1}  # with larger weights, gradients lose more than 1e-5 to rounding
# Where there is a window, it is as long as the longest sequence.
SHARING: dict[str, dict] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama4_text": {**LLAMA4, "attention_chunk_size": LONGEST, "attn_temperature_tuning": False},
    "mistral": {"sliding_window": None},
    "mistral window": {"sliding_window": LONGEST},
    "mixtral": {**LOCAL_EXPERTS, "sliding_window": LONGEST},
    "qwen2": QWEN_WINDOW,
    "qwen3": {"layer_types": ["full_attention"] * 2},
    "qwen3 window": QWEN_WINDOW,
    "qwen3_moe": {**EXPERTS, **QWEN_WINDOW},
    "gemma": {},
    "gemma2": {
        "sliding_window": LONGEST,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 4,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": {
        "text_config": {**SMALL, **GEMMA3, "final_logit_softcapping": 3.0},
        "vision_config": {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
        },
    },
    "gemma3_text": {**GEMMA3, "final_logit_softcapping": 3.0},
    "phi3": {"sliding_window": LONGEST},
    "glm": {},
    "glm4": {},
    "deepseek_v3": {
        **{"num_key_value_heads": 4, "head_dim": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 6},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "first_k_dense_replace": 1, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16},
    },
    "smollm3": {"use_sliding_window": True, "sliding_window": LONGEST, "no_rope_layers": [1, 0]},
    "olmo2": {},
    "olmo3": {"sliding_window": LONGEST, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": LONGEST, "sliding_window_pattern": 2},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.5},
    "starcoder2": {"sliding_window": LONGEST},
    "ernie4_5": ROUNDED,
}


def shorten(changes: dict) -> dict:
    """The same model with shorter windows."""
    return {
        key: shorten(value) if isinstance(value, dict) else 4 if value == LONGEST else value
        for key, value in changes.items()
    }


WINDOWED = [name for name, changes in SHARING.items() if shorten(changes) != changes]
REPEATING: dict[str, dict] = {
    **{f"{name} short": shorten(SHARING[name]) for name in WINDOWED},
    "llama4_text": {**LLAMA4, "attn_temperature_tuning": True, "floor_scale": 2, "attn_scale": 0.5},
    "gpt_oss": {**LOCAL_EXPERTS, "sliding_window": 4},
    "jamba": {
        **ROUNDED,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
    },
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "granitemoehybrid": {
        **{**MAMBA2, **LOCAL_EXPERTS, "layer_types": ["mamba", "attention"]},
        **{**ROUNDED, "shared_intermediate_size": 16, "logits_scaling": 4.0},
    },
    "nemotron_h": {
        **{"num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "moe"], "n_groups": 1},
        **{"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
    },
    "qwen3_next": {
        **{**EXPERTS, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2},
        **{"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        "shared_expert_intermediate_size": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "stablelm": {},  # of an unknown head
}
# Has experts and a head that is not known.
OLMOE = {"num_experts": 4, "num_experts_per_tok": 2}


def make_policy(name: str, changes: dict, layout: Layout, targets: list[str] | None = None):
    model = make_model(name.split()[0], **changes)
    architecture = read_architecture(model.config)
    if layout == "shared":
        use_shared_prompts(model)
    targets = targets or sorted(linear_names(model))
    torch.manual_seed(1)
    # Random B, not zero: otherwise no gradient reaches A.
    policy = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    attach_logps_forward(model, architecture)
    return policy


def make_trained(name: str, changes: dict, layout: Layout, checkpointing: bool):
    policy = make_policy(name, changes, layout)
    if checkpointing:
        policy.train()
        policy.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
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
    """Those that are not zero: an image reader that sees nothing has zeros, or none."""
    policy.zero_grad()
    loss.backward()
    found = ((name, p.grad) for name, p in policy.named_parameters())
    return {name: grad.clone() for name, grad in found if grad is not None and grad.any()}


def loss_of(logps: Tensor) -> Tensor:
    """Weighs every response differently, so that none cancels."""
    return (logps * torch.arange(1.0, len(logps) + 1)).sum()


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # peft, of adapted experts
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SHARING)
def test_shared_equals_repeat_equals_plain(name: str, checkpointing: bool) -> None:
    results = {}
    for layout in ("shared", "repeat"):
        policy = make_trained(name, SHARING[name], layout, checkpointing)
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


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # peft, of adapted experts
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", REPEATING)
def test_repeat_equals_the_models_own_logits(name: str, checkpointing: bool) -> None:
    policy = make_trained(name, REPEATING[name], "repeat", checkpointing)
    responses = response_logps(policy, pack(EXAMPLES, "repeat").to_dict())
    plain = torch.cat(padded_logps(policy, EXAMPLES))
    torch.testing.assert_close(responses.token_logps, plain, atol=1e-4, rtol=0)
    found = gradients(policy, loss_of(responses.logps))
    sums = torch.stack([logps.sum() for logps in padded_logps(policy, EXAMPLES)])
    for parameter, gradient in gradients(policy, loss_of(sums)).items():
        assert distance(found[parameter], gradient) < 1e-5


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


def test_generate_still_knows_what_the_model_takes() -> None:
    """Positions of GPT-2 are learned: a padded prompt needs its own, not those of the row."""
    model = make_model("gpt2", n_positions=64, n_embd=32, n_head=4, n_layer=2).eval()
    ids = torch.tensor([[0] * 6 + [20, 21, 22], list(range(30, 39))])
    mask = torch.ones_like(ids)
    mask[0, :6] = 0

    def generate(first: int) -> list[int]:
        rows = {"input_ids": ids[:, first:], "attention_mask": mask[:, first:]}
        output = model.generate(**rows, max_new_tokens=12, do_sample=False, pad_token_id=0)
        return output[0, 9 - first :].tolist()

    alone = generate(first=6)
    assert generate(first=0) == alone
    attach_logps_forward(model, read_architecture(model.config))
    assert generate(first=0) == generate(first=6) == alone
    assert model._supports_logits_to_keep()


def make_routed(name: str):
    changes = {**SHARING, **REPEATING, "olmoe": OLMOE}[name]
    model = make_model(name, **changes).train()
    attach_logps_forward(model, read_architecture(model.config), router_loss=True)
    return model


def own_forward(model, **batch):
    """What the class of the model makes of a batch."""
    return type(model).forward(model, output_router_logits=True, **batch)


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "gpt_oss", "jamba", "granitemoehybrid", "qwen3_next", "olmoe"]
)
def test_the_router_loss_is_the_models_own_without_padding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_routed(name)
    batch = pack(EXAMPLES, "repeat").to_dict()
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask")}
    expected = own_forward(model, **inputs).aux_loss
    expected_gradients = gradients(model, expected)
    if name != "olmoe":
        monkeypatch.setattr(type(model), "forward", None)  # nothing may make all logits
    loss = response_logps(model, batch).router_loss
    torch.testing.assert_close(loss, expected)
    found = gradients(model, loss)
    assert found.keys() == expected_gradients.keys()
    routers = [parameter for parameter in found if parameter.endswith(("gate.weight", "router.weight"))]
    assert len(routers) > 1 or name == "jamba"
    assert all(found[parameter].norm() > 0 for parameter in routers)
    for parameter, gradient in expected_gradients.items():
        assert distance(found[parameter], gradient) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_router_loss_of_a_shared_prompt_counts_it_once(checkpointing: bool) -> None:
    model = make_routed("mixtral")
    rows = []
    for example in EXAMPLES:
        for number, ids in enumerate(example.response_ids):
            row = torch.tensor([[*example.prompt_ids, *ids]])
            start = 0 if number == 0 else len(example.prompt_ids)
            rows.append([logits[start:] for logits in own_forward(model, input_ids=row).router_logits])
    all_rows = tuple(torch.cat(layer) for layer in zip(*rows, strict=True))
    expected = modeling_mixtral.load_balancing_loss_func(all_rows, num_experts=4, top_k=2)
    expected_gradients = gradients(model, expected)
    use_shared_prompts(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    loss = response_logps(model, pack(EXAMPLES, "shared").to_dict()).router_loss
    torch.testing.assert_close(loss, expected)
    found = gradients(model, loss)
    for parameter, gradient in expected_gradients.items():
        assert distance(found[parameter], gradient) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_there_is_no_router_loss_but_in_training(name: str) -> None:
    model = make_routed(name)
    batch = pack(EXAMPLES, "repeat").to_dict()
    with torch.no_grad():
        assert response_logps(model, batch).router_loss is None
    assert response_logps(model.eval(), batch).router_loss is None


def test_the_router_loss_outlives_weights_by_length() -> None:
    batch = pack(EXAMPLES, "repeat").to_dict()
    responses = response_logps(make_routed("mixtral"), batch)
    assert desensitize_length(responses, batch["pairs"], 0.5).router_loss is responses.router_loss


def test_a_router_loss_without_gradient_is_refused() -> None:
    """The forward of a reentrant checkpoint records no gradient, and with it none of the routers."""
    model = make_routed("mixtral")
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UserError, match="use_reentrant"):
        response_logps(model, pack(EXAMPLES, "repeat").to_dict())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("deepseek_v3", {}),
        ("jamba", {"num_experts": 1}),
        ("granitemoehybrid", {"num_local_experts": 0}),
    ],
)
def test_models_without_a_router_loss_are_told(name: str, changes: dict) -> None:
    model = make_model(name, **{**{**SHARING, **REPEATING}[name], **changes})
    assert not has_router_loss(model)
    with pytest.raises(ValueError, match="no load-balancing loss"):
        attach_logps_forward(model, read_architecture(model.config), router_loss=True)
