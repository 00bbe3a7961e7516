"""A reward model's adapter upon the policy: the scores of the reward model alone, the policy untouched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from prefkit.config import ModelConfig, TuningConfig
from prefkit.config.errors import UserError
from prefkit.data.packing import Layout, pack
from prefkit.model.adapter import HEAD_IN_FILE, add_lora, base_of, freeze_initial
from prefkit.model.batches import prepare_for_batches
from prefkit.model.errors import ModelError
from prefkit.model.load import load_causal_lm
from prefkit.model.policy import response_logps
from prefkit.model.reward import load_reward_base
from prefkit.model.reward_adapter import REWARD, RewardAdapter, load_reward_adapter, switched_to
from prefkit.model.reward_model import make_score_probe, open_reward_model, write_score_probe
from tests.conftest import SMALL, make_model, make_tokenizer
from tests.model.test_adapter import edit, randomise
from tests.model.test_policy import EXAMPLES, LONGEST, SHARING
from tests.model.test_reward import put_value_head

LAYOUTS: tuple[Layout, ...] = ("shared", "repeat")


def make_base(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """A folder with a tiny language model."""
    make_model(name.split()[0], **{**SHARING.get(name, {}), **changes}).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_rater(base: Path, folder: Path, **tuning: Any) -> Path:
    """An adapter with a head for scores, as a run of ours leaves it, with random weights."""
    model = add_lora(
        load_reward_base(ModelConfig(model_name_or_path=str(base)), seed=1), TuningConfig(**tuning)
    )
    randomise(model, seed=7, scale=0.3)
    model.save_pretrained(str(folder))
    write_score_probe(make_score_probe(model, EXAMPLES), folder)
    return folder


def make_policy(base: Path, layout: Layout = "shared", **tuning: Any) -> PeftModel:
    """The same base with an adapter that is trained, which is not zero, ready for batches."""
    config = ModelConfig(model_name_or_path=str(base), batch_layout=layout)
    policy = add_lora(load_causal_lm(config), TuningConfig(**tuning))
    randomise(policy, seed=3)
    assert prepare_for_batches(base_of(policy), config, LONGEST, lambda text: None) == layout
    return policy


def alone(base: Path, rater: Path) -> list[list[float]]:
    """The scores by the reward model itself."""
    config = ModelConfig(model_name_or_path=str(base), adapter_name_or_path=(str(rater),))
    return open_reward_model(config).score(EXAMPLES)


def flat(scores: list[list[float]]) -> list[float]:
    return [score for row in scores for score in row]


@pytest.fixture
def rater(tiny_model: Path, tmp_path: Path) -> Path:
    return make_rater(tiny_model, tmp_path / "rater", lora_rank=4)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alike": ({}, {"lora_rank": 4}),
    "others are adapted": ({"lora_target": ("q_proj",)}, {"lora_target": ("v_proj", "down_proj")}),
    "more are adapted": ({}, {"lora_target": ("o_proj",), "lora_rank": 2}),
    "dora and rslora": ({"use_dora": True}, {"use_rslora": True, "lora_alpha": 9}),
    "dora": ({}, {"use_dora": True}),
    "embedding in full": ({"additional_target": ("embed_tokens",)}, {}),
    "dropout": ({"lora_dropout": 0.5}, {"lora_dropout": 0.5}),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_the_scores_are_those_of_the_reward_model(
    case: str, layout: Layout, tiny_model: Path, tmp_path: Path
) -> None:
    of_policy, of_rater = CASES[case]
    rater = make_rater(tiny_model, tmp_path / "rater", **of_rater)
    policy = make_policy(tiny_model, layout, **of_policy).train()
    adapter = load_reward_adapter(policy, rater, LONGEST, "rater")
    assert adapter.model.layout == layout
    found = adapter.score(EXAMPLES)
    assert flat(found) == pytest.approx(flat(alone(tiny_model, rater)), abs=1e-5)
    assert adapter.proof is not None and adapter.proof < 1e-5
    assert len(set(flat(found))) == 6 and max(map(abs, flat(found))) > 0.1


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("name", ["llama tied", "qwen2", "qwen3", "gemma2", "mistral window"])
def test_families(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", name)
    rater = make_rater(base, tmp_path / "rater")
    no_window = name in ("llama tied", "qwen3")
    for layout in LAYOUTS:
        policy = make_policy(base, layout)
        for longest in (LONGEST, LONGEST + 1):
            adapter = load_reward_adapter(policy, rater, longest, "rater")
            assert adapter.model.layout == (layout if longest == LONGEST or no_window else "repeat")
            found = flat(adapter.score(EXAMPLES))
            assert found == pytest.approx(flat(alone(base, rater)), abs=1e-5)
            policy.delete_adapter(REWARD)


def test_the_head_of_llamafactory_has_a_bias(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    writer = add_lora(make_model(), TuningConfig(lora_rank=2))
    randomise(writer, seed=5)
    writer.save_pretrained(str(folder))
    put_value_head(folder, bias=0.75)
    adapter = load_reward_adapter(make_policy(tiny_model), folder, LONGEST, "theirs")
    found = flat(adapter.score(EXAMPLES))
    assert adapter.proof is None
    assert found == pytest.approx(flat(alone(tiny_model, folder)), abs=1e-5)
    put_value_head(folder, bias=0.0)
    assert found == pytest.approx([score + 0.75 for score in flat(alone(tiny_model, folder))], abs=1e-5)


def seen(policy: PeftModel) -> dict[str, Any]:
    """What the policy says, and what else training could notice."""
    batch = pack(EXAMPLES, "shared").to_dict()
    modes = [(module, module.training) for module in policy.modules()]
    needed = [(weights, weights.requires_grad) for weights in policy.parameters()]
    found: dict[str, Any] = {
        "active": (policy.active_adapter, policy.base_model.active_adapters),
        "random": torch.random.get_rng_state().tolist(),
    }
    with torch.no_grad():
        policy.eval()
        found["logps"] = response_logps(policy, batch).token_logps.tolist()
        with policy.disable_adapter():
            found["base"] = response_logps(policy, batch).token_logps.tolist()
    for module, trains in modes:
        module.training = trains
    for weights, needs in needed:
        weights.requires_grad = needs  # peft's own switch does not keep them
    return found


def flags(policy: PeftModel) -> tuple[dict[int, bool], dict[int, bool]]:
    """Which weights need a gradient and which modules train, each by its identity."""
    return (
        {id(weights): weights.requires_grad for weights in policy.parameters()},
        {id(module): module.training for module in policy.modules()},
    )


def prepare(policy: PeftModel) -> None:
    """Modes and gradients of which no rule would make the same."""
    torch.manual_seed(5)
    for number, module in enumerate(policy.modules()):
        module.training = number % 3 == 0
    for number, weights in enumerate(policy.parameters()):
        weights.requires_grad = number % 4 == 0


@pytest.mark.parametrize("frozen_start", [False, True])
def test_the_policy_is_what_it_was(frozen_start: bool, tiny_model: Path, rater: Path) -> None:
    policy = make_policy(tiny_model, lora_target=("q_proj", "v_proj"), lora_rank=4)
    if frozen_start:
        freeze_initial(policy)
    prepare(policy)
    kept = [*policy.parameters(), *policy.modules()]  # so that no identity is given anew
    before, (needed, trained) = seen(policy), flags(policy)
    adapter = load_reward_adapter(policy, rater, LONGEST, "rater")
    assert len(kept) < len([*policy.parameters(), *policy.modules()])
    assert seen(policy) == before
    assert needed.items() <= flags(policy)[0].items() and trained.items() <= flags(policy)[1].items()
    assert not any(needs for it, needs in flags(policy)[0].items() if it not in needed)
    after_loading = flags(policy)
    adapter.score(EXAMPLES)
    assert seen(policy) == before and flags(policy) == after_loading
    with pytest.raises(RuntimeError, match="on the way"), switched_to(policy, REWARD):
        assert policy.active_adapter == REWARD and not any(module.training for module in policy.modules())
        assert not any(it.requires_grad for name, it in policy.named_parameters() if "lora_" in name)
        raise RuntimeError("on the way")
    assert seen(policy) == before and flags(policy) == after_loading


def test_nothing_of_it_is_trained_or_saved(tiny_model: Path, rater: Path, tmp_path: Path) -> None:
    policy = make_policy(tiny_model)
    policy.save_pretrained(str(tmp_path / "before"))
    trained = [name for name, it in policy.named_parameters() if it.requires_grad]
    number = sum(it.numel() for it in policy.parameters())
    adapter = load_reward_adapter(policy, rater, LONGEST, "rater")
    assert [name for name, it in policy.named_parameters() if it.requires_grad] == trained
    tensors = load_file(rater / "adapter_model.safetensors")
    added = sum(it.numel() for name, it in tensors.items() if name != HEAD_IN_FILE)
    assert sum(it.numel() for it in policy.parameters()) == number + added
    base: Any = base_of(policy)
    assert adapter.model.model.model is base.model  # the decoder is shared
    assert adapter.model.model.score.weight.dtype == torch.float32
    policy.save_pretrained(str(tmp_path / "after"), selected_adapters=["default"])
    assert sorted(path.name for path in (tmp_path / "after").iterdir()) == sorted(
        path.name for path in (tmp_path / "before").iterdir()
    )
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_scores_stay_while_the_policy_learns(tiny_model: Path, rater: Path) -> None:
    policy = make_policy(tiny_model).train()
    adapter = load_reward_adapter(policy, rater, LONGEST, "rater")
    before = adapter.score(EXAMPLES)
    optimizer = torch.optim.SGD([it for it in policy.parameters() if it.requires_grad], lr=1.0)
    logps = response_logps(policy, pack(EXAMPLES, "shared").to_dict()).logps
    logps.sum().backward()
    optimizer.step()
    assert adapter.score(EXAMPLES) == before
    changed = response_logps(policy, pack(EXAMPLES, "shared").to_dict()).logps
    assert not torch.allclose(changed, logps)


def without_probe(folder: Path) -> None:
    (folder / "probe.json").unlink()


def load(policy: PeftModel, folder: Path) -> RewardAdapter:
    return load_reward_adapter(policy, folder, LONGEST, "rater")


def test_another_base_is_known_by_the_probe(tiny_model: Path, rater: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    message = r"rater on \S+other is not the reward model that was trained.*in float32; .*type: full reads"
    with pytest.raises(ModelError, match=message):
        load(make_policy(tmp_path / "other"), rater)
    without_probe(rater)
    assert load(make_policy(tmp_path / "other"), rater).proof is None


def _add_weights(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(264, 32)


def _double_rank(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".lora_A." in name]:
        tensors[name] = torch.cat([tensors[name]] * 2)


def _shrink(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".lora_A." in name]:
        tensors[name] = tensors[name][:, :16].contiguous()


def _lose_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if ".lora_B." in name)]


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.1" in name]:
        tensors[name.replace("layers.1", "layers.7")] = tensors.pop(name)


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no head": (lambda tensors: tensors.pop(HEAD_IN_FILE), "has no head for scores: it is no reward model"),
    "other head": (
        lambda tensors: tensors.update({HEAD_IN_FILE: torch.ones(1, 16)}),
        "its head is for another hidden size, 16 and not 32",
    ),
    "weights in full": (
        _add_weights,
        r"trains base_model.model.model.embed_tokens.weight \(1 such\), .*full",
    ),
    "other rank": (_double_rank, "has rank 8, but adapter_config.json says r: 4"),
    "other size": (_shrink, "is not an adapter of .*size mismatch"),
    "part missing": (_lose_one, r"lacks base_model.*lora_B.weight \(1 such\)"),
    "other layers": (_rename, "has no place for base_model.model.model.layers.7"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_reward_model_for_this_policy(change: str, tiny_model: Path, rater: Path) -> None:
    edit(rater, CHANGES[change][0])
    with pytest.raises(ModelError, match=CHANGES[change][1]):
        load(make_policy(tiny_model), rater)


def test_biases_and_damage(tiny_model: Path, rater: Path) -> None:
    file = rater / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "bias": "all"}))
    with pytest.raises(
        ModelError, match="trains biases, which are the policy's own: write reward_model_type"
    ):
        load(make_policy(tiny_model), rater)
    file.write_text(json.dumps(config))
    (rater / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is damaged"):
        load(make_policy(tiny_model), rater)


def test_a_score_that_is_not_finite_leaves_the_policy_as_it_was(tiny_model: Path, rater: Path) -> None:
    policy = make_policy(tiny_model)
    adapter = load(policy, rater)
    before = seen(policy), flags(policy)
    head: Any = adapter.model.model.score
    head.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match=r"its score is (inf|-inf|nan), not finite"):
        adapter.score(EXAMPLES)
    assert (seen(policy), flags(policy)) == before


@pytest.mark.parametrize("bits", [4, 8])
def test_upon_quantised_weights(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    big = {**SMALL, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    base = make_base(tmp_path / "base", **big)
    rater = make_rater(base, tmp_path / "rater")
    keys: dict[str, Any] = {"model_name_or_path": str(base), "quantization_bit": bits, "dtype": "float32"}
    policy = add_lora(load_causal_lm(ModelConfig(**keys)), TuningConfig())
    prepare_for_batches(base_of(policy), ModelConfig(**keys), LONGEST, lambda text: None)
    adapter = load_reward_adapter(policy, rater, LONGEST, "rater")
    config = ModelConfig(**keys, adapter_name_or_path=(str(rater),))
    expected = open_reward_model(config).score(EXAMPLES)
    assert adapter.proof is None  # the probe is of weights that are not quantised
    assert flat(adapter.score(EXAMPLES)) == pytest.approx(flat(expected), abs=1e-5)
