"""The three ways to attend under a shared prompt agree with a dense mask."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prefkit.data.encode import TokenizedExample
from prefkit.data.examples import Pair
from prefkit.data.packing import Segments, pack
from prefkit.data.picking import pick_continuing
from prefkit.model.attention import (
    fitting_attention,
    flash_attention,
    flex_attention,
    math_attention,
    plain_attention,
    plain_implementation,
    segment_attention,
    shared_prompt_attention,
    use_shared_prompts,
)
from prefkit.model.load import ModelError
from prefkit.model.policy import response_logps
from tests.conftest import make_model
from tests.model.test_policy import EXAMPLES as PAIRS
from tests.model.test_policy import SHARING, distance, gradients, loss_of, make_policy

EXAMPLES = [
    TokenizedExample([1] * 5, [[2] * 3, [3] * 4], (Pair(0, 1),), "f:1"),
    TokenizedExample([1], [[2] * 2, [3]], (Pair(0, 1),), "f:2"),
    TokenizedExample([1] * 2, [[2], [3] * 6, [4] * 2], (Pair(0, 1),), "f:3"),
]


@pytest.fixture
def segments() -> Segments:
    found = pack(EXAMPLES, "shared").segments
    assert found is not None
    return found


@pytest.fixture(params=[8, 6], ids=["equal", "narrow values"])
def states(segments: Segments, request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; in latent attention, the last are narrower."""
    torch.manual_seed(0)
    length = segments[-1][2][-1][1]
    sizes = ((4, 8), (2, 8), (2, request.param))
    query, key, value = (torch.randn(1, heads, length, width) for heads, width in sizes)
    return query, key, value


softcaps = pytest.mark.parametrize("softcap", [None, 0.5])


def dense(states: tuple[Tensor, Tensor, Tensor], segments: Segments, softcap: float | None) -> Tensor:
    """By the rule itself: own prompt, own response, nothing later."""
    length = states[0].shape[2]
    mask = torch.zeros(length, length, dtype=torch.bool)
    for start, end, responses in segments:
        for q in range(start, end):
            mask[q, start : q + 1] = True
        for first, last in responses:
            for q in range(first, last):
                mask[q, start:end] = True
                mask[q, first : q + 1] = True
    return masked(*states, mask, softcap)


def masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float | None, scale: float = 0.3
) -> Tensor:
    outputs = []
    for head in range(4):
        group = head * key.shape[1] // 4
        scores = query[:, head] @ key[:, group].mT * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        outputs.append(scores.where(mask, -torch.inf).softmax(-1) @ value[:, group])
    return torch.stack(outputs, 1)


@softcaps
@pytest.mark.parametrize("attend", [segment_attention, math_attention, fitting_attention])
def test_segments(attend, states, segments, softcap) -> None:
    found = attend(*states, segments, 0.3, softcap)
    torch.testing.assert_close(found, dense(states, segments, softcap), atol=1e-5, rtol=1e-5)


@softcaps
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex(states, segments, softcap) -> None:
    found = flex_attention(*states, segments, 0.3, softcap)
    torch.testing.assert_close(found, dense(states, segments, softcap), atol=1e-5, rtol=1e-5)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain stand-in with the signature, the one width and the lower-right causal mask of flash-attn."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, softcap=0.0
    ):
        assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        outputs = []
        queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert queries[-1] == len(q) and keys[-1] == len(k)
        for i in range(len(queries) - 1):
            one = q[queries[i] : queries[i + 1]]
            them = slice(keys[i], keys[i + 1])
            assert len(one) <= max_seqlen_q and keys[i + 1] - keys[i] <= max_seqlen_k
            mask = torch.ones(len(one), keys[i + 1] - keys[i], dtype=torch.bool)
            mask = mask.tril(mask.shape[1] - mask.shape[0])
            parts = [part.transpose(0, 1)[None] for part in (one, k[them], v[them])]
            out = masked(*parts, mask, softcap or None, softmax_scale)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@softcaps
@pytest.mark.usefixtures("flash_attn")
def test_flash_is_called_with_ragged_sequences(states, segments, softcap) -> None:
    found = flash_attention(*states, segments, 0.3, softcap)
    torch.testing.assert_close(found, dense(states, segments, softcap), atol=1e-5, rtol=1e-5)


READ = pick_continuing(pack(EXAMPLES, "shared").to_dict(), [1, 2, 3, 6])["segments"]
NUM_KNOWN = 4 + 0 + 1  # tokens of the prompts but their last


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@softcaps
@pytest.mark.parametrize("attend", [segment_attention, math_attention, flex_attention, flash_attention])
def test_prompts_that_are_known_from_before(attend, softcap) -> None:
    """Keys of three prompts, of which one is empty, lie before the row."""
    torch.manual_seed(0)
    length = READ[-1][2][-1][1]
    query, key, value = (torch.randn(1, heads, length, 8) for heads in (4, 2, 2))
    expected = dense((query, key, value), READ, softcap)[:, :, NUM_KNOWN:]
    found = attend(query[:, :, NUM_KNOWN:], key, value, READ, 0.3, softcap)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_softcap_as_the_model_does_it_in_bf16(states, segments) -> None:
    """Scores in bf16 and softmax in fp32, as in Gemma 2: near what fp32 gives."""
    found = segment_attention(*(part.bfloat16() for part in states), segments, 0.3, 0.5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), dense(states, segments, 0.5), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"segments": ()}, "needs segments"),
        ({"dropout": 0.1}, "neither mask nor dropout"),
        ({"attention_mask": torch.ones(1)}, "neither mask nor dropout"),
        ({"is_causal": False}, "causal"),
        ({"s_aux": torch.ones(4)}, "cannot honour s_aux"),
        ({"position_bias": torch.ones(4)}, "cannot honour position_bias"),
        ({"output_attentions": True}, "cannot honour output_attentions"),
        ({"sliding_window": 8}, "window of 8"),
        ({}, None),
        ({"sliding_window": 9, "is_causal": True, "use_cache": False, "s_aux": None}, None),
        ({"position_ids": torch.ones(4)}, None),
    ],
)
def test_what_attention_is_given_is_honoured_or_refused(
    states, segments, given: dict, message: str | None
) -> None:
    """The longest sequence here has 9 tokens."""
    arguments = {"attention_mask": None, "segments": segments, "kernel": segment_attention, **given}
    if message is None:
        shared_prompt_attention(torch.nn.Module(), *states, **arguments)
    else:
        with pytest.raises(RuntimeError, match=message):
            shared_prompt_attention(torch.nn.Module(), *states, **arguments)


def test_a_window_that_the_layer_keeps_to_itself_is_found(states, segments) -> None:
    layer = torch.nn.Module()
    layer.sliding_window = 8  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="window of 8"):
        shared_prompt_attention(layer, *states, None, segments=segments, kernel=segment_attention)


@pytest.mark.parametrize("name", ["gemma2", "llama", "deepseek_v3"])
def test_every_kernel_gives_the_same_gradients(name: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("flash_attn")
    batch = pack(PAIRS, "shared").to_dict()
    found = {}
    for flash_attn in ("auto", "sdpa", "disabled", "fa2"):
        policy = make_policy(name, SHARING[name], "repeat", ["o_proj"])
        use_shared_prompts(policy.base_model.model, flash_attn)
        found[flash_attn] = gradients(policy, loss_of(response_logps(policy, batch).logps))
    for other in found.values():
        for parameter, gradient in found["auto"].items():
            assert distance(other[parameter], gradient) < 1e-5


def test_disabled_uses_no_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = []
    original = F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        fused.append(torch.backends.cuda.flash_sdp_enabled())
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for flash_attn, allowed in (("auto", True), ("disabled", False)):
        fused.clear()
        policy = make_policy("llama", {}, "repeat")
        use_shared_prompts(policy.base_model.model, flash_attn)
        response_logps(policy, pack(PAIRS, "shared").to_dict())
        assert set(fused) == {allowed}


def test_the_models_own_implementation(request: pytest.FixtureRequest) -> None:
    assert [plain_implementation(value) for value in ("auto", "sdpa", "disabled")] == [None, "sdpa", "eager"]
    with pytest.raises(ModelError, match=r"fa2 needs the package flash-attn.*write flash_attn: auto"):
        plain_implementation("fa2")
    request.getfixturevalue("flash_attn")
    assert plain_implementation("fa2") == "flash_attention_2"


@pytest.mark.parametrize("flash_attn", ["auto", "sdpa", "disabled", "fa2"])
@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_generation_gets_the_attention_that_the_model_had(own: str, flash_attn: str) -> None:
    model = make_model()
    model.set_attn_implementation(own)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    for _ in range(2):  # a second time it is ours that is there before
        use_shared_prompts(model, flash_attn)
    ours = model.config._attn_implementation
    assert ours.startswith("prefkit_shared")
    with plain_attention(model):
        assert model.config._attn_implementation == own
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.config._attn_implementation == ours


def test_a_model_of_its_own_attention_keeps_it_in_generation() -> None:
    model = make_model()
    with plain_attention(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "sdpa"
