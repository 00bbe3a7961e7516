"""Responses that are drawn: the same as by transformers' `generate`, and the same in any company.

What is promised holds up to ties: logits differ in their last digits between batches of another shape. Here,
in fp32, that is about 1e-6 of a logit, and no draw of these tests falls so near to a boundary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig as GenerateConfig

import prefkit.model.rollout
from prefkit.config.schema import GenerationConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import pack
from prefkit.model.adapter import base_of, linear_names
from prefkit.model.architecture import read_architecture
from prefkit.model.attention import plain_attention, use_shared_prompts
from prefkit.model.errors import ModelError
from prefkit.model.policy import attach_logps_forward, response_logps
from prefkit.model.rollout import Sampled, Stream, find_expansion_obstacle, sample_responses
from prefkit.model.sampling import random_numbers
from tests.conftest import make_model
from tests.model.test_policy import REPEATING, SHARING

torch.manual_seed(3)
PROMPTS = [torch.randint(5, 264, (length,)).tolist() for length in (9, 3, 6, 1)]
NUMBERS = [4, 7, 9, 2]
STOPS = [7, 8, 9, 11]
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "max_new_tokens": 14}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14}
GPT2 = {"n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 2}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
FAMILIES: dict[str, dict] = {
    **{**SHARING, **REPEATING, "gpt2": GPT2, "llama dynamic": DYNAMIC},
    "falcon_mamba": {"state_size": 4, "time_step_rank": 4},
}
FEW = {
    *("llama", "mistral window", "qwen2", "qwen3_moe", "gemma2", "gemma3_text", "deepseek_v3", "phi3"),
    *("gemma3 short", "mistral window short", "llama4_text short", "gpt_oss", "jamba", "bamba", "lfm2"),
    *("qwen3_next", "stablelm", "gpt2", "llama dynamic", "falcon_mamba"),
}


def make(name: str = "llama", **changes: Any):
    return make_model(name.split()[0], **{**FAMILIES[name], **changes}).eval()


def sample(
    model, prompts=PROMPTS, numbers=NUMBERS, count=2, stops=STOPS, stream=(0, 0), **keys
) -> list[Sampled]:
    return sample_responses(
        model,
        prompts,
        numbers=numbers,
        num_responses=count,
        generation=GenerationConfig(**(keys or SAMPLED)),
        stop_ids=stops,
        stream=Stream(*stream),
    )


def generate(model, prompt: list[int], **keys: Any) -> list[int]:
    """What transformers answers, greedy, to a prompt alone; cut off after the token that ends it."""
    settings = GenerateConfig(do_sample=False, max_new_tokens=14, eos_token_id=STOPS, pad_token_id=0, **keys)
    with torch.no_grad():
        output = model.generate(input_ids=torch.tensor([prompt]), generation_config=settings)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "name", [pytest.param(it, marks=[] if it in FEW else pytest.mark.slow) for it in FAMILIES]
)
def test_they_are_what_generate_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy those of each prompt alone; drawn, those of the same numbers in `generate` with each prompt
    repeated, which is what models take whose states cannot be repeated."""
    model = make(name)
    found = sample(model, **GREEDY)
    if name not in ("llama dynamic", "llama4_text"):  # with these an answer depends on the company
        expected = [generate(model, prompt) for prompt in PROMPTS]
        assert [sampled.response_ids for sampled in found] == [[ids, ids] for ids in expected]
        assert [sampled.ended for sampled in found] == [[ids[-1] in STOPS] * 2 for ids in expected]
    drawn = sample(model)
    assert len({tuple(ids) for sampled in drawn for ids in sampled.response_ids}) > 4
    monkeypatch.setattr(prefkit.model.rollout, "find_expansion_obstacle", lambda *_: "for comparison")
    assert sample(model) == drawn


def test_the_company_changes_nothing() -> None:
    model = make()
    together = sample(model, count=4)
    alone = [sample(model, [p], [n], count=4)[0] for p, n in zip(PROMPTS, NUMBERS, strict=True)]
    assert alone == together
    order = [2, 0, 3, 1]
    again = sample(model, [PROMPTS[i] for i in order], [NUMBERS[i] for i in order], count=4)
    assert again == [together[i] for i in order]
    fewer = sample(model, count=1)
    assert [s.response_ids[0] for s in fewer] == [s.response_ids[0] for s in together]
    ranks = sample(model, PROMPTS[:1], NUMBERS[:1], 4) + sample(model, PROMPTS[1:], NUMBERS[1:], 4)
    assert ranks == together
    longer = sample(model, count=4, **{**SAMPLED, "max_new_tokens": 20})
    for short, long in zip(together, longer, strict=True):
        assert [ids[:14] for ids in long.response_ids] == short.response_ids


def test_seed_rollout_prompt_and_response_each_give_other_responses() -> None:
    model = make()
    prompt = [PROMPTS[0]] * 2
    first, second = sample(model, prompt, [0, 1])
    every = [*first.response_ids, *second.response_ids]
    for stream in ((1, 0), (0, 1)):
        every += sample(model, prompt, [0, 1], stream=stream)[0].response_ids
    assert len({tuple(ids) for ids in every}) == len(every)
    assert sample(model, prompt, [0, 0]) == [first, first]
    assert sample(model, prompt, [0, 1]) == [first, second]


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    sample(make())
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_follow_from_probabilities_and_numbers() -> None:
    """Token by token, by a softmax over the logits of a plain forward."""
    model = make()
    (found,) = sample(model, PROMPTS[:1], [5], stream=(3, 6), **{**SAMPLED, "top_p": 1.0, "temperature": 0.8})
    for response, ids in enumerate(found.response_ids):
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[0] + ids])).logits[0, len(PROMPTS[0]) - 1 : -1]
        bounds = (logits / 0.8).softmax(1).double().cumsum(1)
        numbers = random_numbers(3, 6, 5, response, len(ids))
        expected = [int((row <= number).sum()) for row, number in zip(bounds, numbers, strict=True)]
        assert ids == expected


def test_a_response_that_never_ends_is_cut_off() -> None:
    for sampled in sample(make(), stops=[]):
        assert [len(ids) for ids in sampled.response_ids] == [14, 14]
        assert sampled.ended == [False, False]


def test_a_response_may_be_its_end_token_alone() -> None:
    for sampled in sample(make(), stops=list(range(264))):
        assert [len(ids) for ids in sampled.response_ids] == [1, 1]
        assert sampled.ended == [True, True]


def test_one_token() -> None:
    ((first, second),) = (
        s.response_ids for s in sample(make(), PROMPTS[:1], [4], **{**SAMPLED, "max_new_tokens": 1})
    )
    whole = sample(make(), PROMPTS[:1], [4])[0].response_ids
    assert [first, second] == [ids[:1] for ids in whole]


def test_a_response_holds_its_end_token_and_nothing_after_it() -> None:
    found = [
        (ids, ended)
        for s in sample(make(), count=8)
        for ids, ended in zip(s.response_ids, s.ended, strict=True)
    ]
    assert {ended for _, ended in found} == {True, False}
    for ids, ended in found:
        assert not set(ids[:-1]) & set(STOPS)
        assert (ids[-1] in STOPS) == ended
        assert ended or len(ids) == 14


def record_shapes(model, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of `input_ids` that the model is called with from now on."""
    shapes: list[tuple[int, ...]] = []
    forward = type(model).forward

    def recorded(self, *args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return forward(self, *args, input_ids=input_ids, **kwargs)

    recorded.__signature__ = prefkit.model.rollout.inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model), "forward", recorded)
    return shapes


@pytest.mark.parametrize("name", ["llama", "mistral window short", "bamba"])
def test_a_prompt_is_computed_once_and_complete_rows_leave(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name)
    monkeypatch.setattr(prefkit.model.rollout, "_ENDED_SHARE", 2.0)
    stops = list(range(5, 60))
    all_along = sample(model, count=4, stops=stops)
    monkeypatch.setattr(prefkit.model.rollout, "_ENDED_SHARE", 1 / 8)
    shapes = record_shapes(model, monkeypatch)
    assert sample(model, count=4, stops=stops) == all_along
    assert shapes[0] == (4, 9) and {columns for _, columns in shapes[1:]} == {1}
    rows = [rows for rows, _ in shapes[1:]]
    assert rows == sorted(rows, reverse=True) and rows[0] > 2 * rows[-1]
    lengths = [len(ids) for sampled in all_along for ids in sampled.response_ids]
    assert len(shapes) == max(lengths)
    for step, number in enumerate(rows, start=1):
        is_open = sum(length > step for length in lengths)
        assert is_open <= number < is_open / (1 - 1 / 8) + 1


def test_it_goes_on_until_every_rank_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here all responses end at once; another rank needs ten tokens more, and this one calls its model as
    often."""
    model = make()
    stops = list(range(264))
    expected = sample(model, stops=stops)
    shapes, told = record_shapes(model, monkeypatch), []

    def all_done(here: bool) -> bool:
        told.append(here)
        return len(told) == 11

    found = sample_responses(
        model,
        PROMPTS,
        numbers=NUMBERS,
        num_responses=2,
        generation=GenerationConfig(**SAMPLED),
        stop_ids=stops,
        stream=Stream(0, 0),
        all_done=all_done,
    )
    assert found == expected
    assert told == [True] * 11
    assert shapes == [(4, 9), *[(1, 1)] * 10]


def test_the_models_positions_are_the_limit() -> None:
    model = make("gpt2", max_position_embeddings=12)
    lengths = [[len(ids) for ids in s.response_ids] for s in sample(model, stops=[])]
    assert lengths == [[3, 3], [9, 9], [6, 6], [11, 11]]
    with pytest.raises(ModelError, match="has 12 tokens; the model takes 12"):
        sample(model, [[5] * 12], [0])


def test_what_the_models_own_settings_say_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them a penalty that many models bring along; also where `generate` is asked."""
    model = make()
    expected = sample(model)
    own = GenerateConfig(
        repetition_penalty=1.5, temperature=0.3, do_sample=True, top_k=5, no_repeat_ngram_size=2
    )
    model.generation_config = own
    assert sample(model) == expected
    monkeypatch.setattr(prefkit.model.rollout, "find_expansion_obstacle", lambda *_: "for comparison")
    assert sample(model) == expected
    assert model.generation_config is own


@pytest.mark.parametrize("name", ["llama", "llama dynamic"])
def test_repetition_penalty_is_that_of_transformers(name: str) -> None:
    model = make(name)
    found = sample(model, PROMPTS[:1], [0], 1, **{**GREEDY, "repetition_penalty": 1.7})
    assert found[0].response_ids == [generate(model, PROMPTS[0], repetition_penalty=1.7)]
    assert found[0].response_ids != sample(model, PROMPTS[:1], [0], 1, **GREEDY)[0].response_ids


def test_padding_has_not_been_seen() -> None:
    model = make()
    keys = {**GREEDY, "repetition_penalty": 1.7}
    alone = [sample(model, [prompt], [0], 1, **keys)[0] for prompt in PROMPTS]
    assert sample(model, count=1, **keys) == alone


def test_logits_that_are_not_finite_end_it() -> None:
    model = make()
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(model)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("llama", {}, None),
        ("llama dynamic", {}, "dynamic"),
        ("bamba", {}, None),
        ("falcon_mamba", {}, "prepares its inputs"),
        ("xglm", {"d_model": 32, "num_layers": 1, "attention_heads": 4, "ffn_dim": 32}, None),
        ("ctrl", {"n_embd": 32, "n_layer": 1, "n_head": 4, "dff": 32}, "prepares its inputs"),
    ],
)
def test_who_takes_a_prompt_once(name: str, changes: dict[str, Any], why: str | None) -> None:
    model = make_model(name.split()[0], **{**FAMILIES.get(name, {}), **changes})
    found = find_expansion_obstacle(model, 30)
    assert found is None if why is None else why in str(found)


def make_trained(layout: str):
    """A policy as the trainer has it: adapter, log-prob forward, checkpointed layers, in train mode."""
    torch.manual_seed(1)
    base = make_model()
    if layout == "shared":
        use_shared_prompts(base)
    lora = LoraConfig(
        r=2, lora_dropout=0.5, target_modules=sorted(linear_names(base)), init_lora_weights=False
    )
    policy = get_peft_model(base, lora)
    attach_logps_forward(base, read_architecture(base.config))
    base.activation_checkpointing_enable({"use_reentrant": False})
    policy.train()
    base.model.norm.eval()
    return policy


@pytest.mark.parametrize("layout", ["shared", "repeat"])
def test_a_policy_that_is_trained_comes_back_as_it_was(layout: str) -> None:
    policy = make_trained(layout)
    base = base_of(policy)
    modes = [module.training for module in policy.modules()]
    attention = base.config._attn_implementation
    found = sample(policy)
    assert [module.training for module in policy.modules()] == modes
    assert base.config._attn_implementation == attention
    assert base.is_activation_checkpointing
    assert not any(tensor.is_inference() for tensor in (*policy.parameters(), *policy.buffers()))
    rows = [TokenizedExample(p, s.response_ids, (), "f:1") for p, s in zip(PROMPTS, found, strict=True)]
    logps = response_logps(policy, pack(rows, layout).to_dict())  # type: ignore[arg-type]
    logps.logps.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters() if p.requires_grad)


def test_the_adapter_as_it_is_draws_the_responses() -> None:
    policy = make_trained("shared")
    found = sample(policy, **GREEDY)
    with policy.disable_adapter():
        without = sample(policy, **GREEDY)
    assert without == sample(make(), **GREEDY) != found
    policy.eval()
    with plain_attention(base_of(policy)):
        expected = [generate(policy, prompt) for prompt in PROMPTS]
    assert [sampled.response_ids[0] for sampled in found] == expected


def test_a_policy_is_put_back_after_an_error_too() -> None:
    policy = make_trained("shared")
    base = base_of(policy)
    modes, attention = [module.training for module in policy.modules()], base.config._attn_implementation
    base.lm_head.weight.data[5] = torch.nan
    with pytest.raises(FloatingPointError):
        sample(policy)
    assert [module.training for module in policy.modules()] == modes
    assert base.config._attn_implementation == attention


@pytest.mark.parametrize("layout", ["shared", "repeat"])
def test_old_log_probs_of_the_training_forward_are_those_that_tokens_were_drawn_with(layout: str) -> None:
    """The probability that the training forward gives a drawn token holds the number it was drawn by."""
    policy = make_trained(layout).eval()
    found = sample(policy, **{**SAMPLED, "top_p": 1.0})
    rows = [TokenizedExample(p, s.response_ids, (), "f:1") for p, s in zip(PROMPTS, found, strict=True)]
    with torch.no_grad():
        logps = response_logps(policy, pack(rows, layout).to_dict()).logps  # type: ignore[arg-type]
    expected = []
    for prompt, sampled in zip(PROMPTS, found, strict=True):
        for ids in sampled.response_ids:
            with torch.no_grad(), plain_attention(base_of(policy)):
                logits = policy(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            expected.append(logits.log_softmax(1).gather(1, torch.tensor(ids)[:, None]).sum())
    torch.testing.assert_close(logps, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_half_precision_draws_too() -> None:
    for sampled in sample(make().to(torch.bfloat16), stops=[]):
        assert [len(ids) for ids in sampled.response_ids] == [14, 14]


@pytest.mark.parametrize("name", ["llama", "mistral window short"])
def test_mixed_precision_may_be_put_around_it(name: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sample(make(name), stops=[])
    assert all(len(ids) == 14 for sampled in found for ids in sampled.response_ids)
