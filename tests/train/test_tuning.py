"""What is trained and how: each key of tuning and model changes what a run does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefkit.config.errors import UserError
from prefkit.train.trainer import PrefTrainer
from tests.conftest import make_model
from tests.train.runs import losses, read, run, same, unfinish, weights
from tests.train.test_kills import rest_is_slow


@pytest.mark.parametrize(
    "keys",
    rest_is_slow(
        [
            {"finetuning_type": "full", "bf16": True},
            {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "freeze_extra_modules": "lm_head"},
            {"finetuning_type": "full", "pure_bf16": True},
            {"pissa_init": True, "pissa_iter": 4},
        ],
        [
            {"quantization_bit": 4},
            {"finetuning_type": "full"},
            {"loraplus_lr_ratio": 4.0},
            {"add_special_tokens": "<|a|>,<|b|>"},
            {
                "early_stopping_steps": 3,
                "eval_dataset": "held_out",
                "eval_strategy": "steps",
                "eval_steps": 2,
            },
        ],
    ),
    ids=str,
)
def test_every_kind_of_training_resumes_bit_for_bit(
    write_config, tmp_path: Path, keys: dict[str, Any]
) -> None:
    config = write_config(**{"max_steps": 6, "save_steps": 4, "learning_rate": 1e-3, **keys})
    run(config)
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    for name in ("adapter_model.safetensors", "model.safetensors"):
        (tmp_path / "out" / name).unlink(missing_ok=True)
    unfinish(tmp_path / "out")
    assert "checkpoint-4" in run(config)
    assert same(tmp_path / "out", tmp_path / "whole")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


MOE = [{"num_experts": 4, "num_experts_per_tok": 2, "model_type": "qwen3_moe"}, {"model_type": "mixtral"}]


@pytest.mark.parametrize("keys", MOE)
def test_a_mixture_of_experts_resumes_every_weight(
    write_config, tmp_path: Path, keys: dict[str, Any]
) -> None:
    """Their files name experts otherwise than memory does: what is not loaded must not stay at its start."""
    base = save_model(tmp_path / "moe", write_config, **keys)
    config = {"model_name_or_path": base, "finetuning_type": "full", "learning_rate": 1e-3}
    config |= {"max_steps": 4, "save_steps": 2, "moe_aux_loss_coef": 0.1, "batch_layout": "repeat"}
    run(write_config(**config))
    (tmp_path / "out").rename(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    unfinish(tmp_path / "out")
    assert "checkpoint-2" in run(write_config(**config))
    assert same(tmp_path / "out", tmp_path / "whole")
    before, after = load_file(Path(base) / "model.safetensors"), weights(tmp_path / "out")
    assert any("experts" in name and not torch.equal(after[name], found) for name, found in before.items())


def save_model(folder: Path, write_config, model_type: str, **changes: Any) -> str:
    """A tiny model of another architecture, with the tokenizer of the tiny Llama."""
    make_model(model_type, **changes).save_pretrained(folder)
    tokenizer = read(write_config())["model_name_or_path"]
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def test_full_training_moves_every_weight_and_loads_with_transformers(
    write_config, tmp_path: Path, tiny_model: Path
) -> None:
    printed = run(
        write_config(finetuning_type="full", learning_rate=1e-3, eval_dataset="held_out", do_predict=True)
    )
    before, after = load_file(tiny_model / "model.safetensors"), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert "Training 32,416 of 32,416 weights" in printed and "model.safetensors" in printed
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.state_dict()["lm_head.weight"], after["lm_head.weight"])
    assert "transformers" in (tmp_path / "out" / "README.md").read_text()


def test_freeze_moves_the_chosen_weights_alone(write_config, tmp_path: Path, tiny_model: Path) -> None:
    keys = {"freeze_trainable_layers": -1, "freeze_trainable_modules": "mlp", "freeze_extra_modules": "norm"}
    run(write_config(finetuning_type="freeze", learning_rate=1e-3, **keys))
    before, after = load_file(tiny_model / "model.safetensors"), weights(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        *(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "model.norm.weight",
    }


@pytest.mark.parametrize(
    ("keys", "trained", "frozen"),
    [
        ({"finetuning_type": "full", "pure_bf16": True}, torch.bfloat16, None),
        ({"dtype": "bfloat16"}, torch.float32, torch.bfloat16),
        ({"finetuning_type": "freeze", "dtype": "bfloat16", "bf16": True}, torch.float32, torch.bfloat16),
        ({"finetuning_type": "freeze", "dtype": "bfloat16"}, torch.float32, torch.float32),
        *rest_is_slow(
            [],
            [
                ({"finetuning_type": "full", "dtype": "bfloat16"}, torch.float32, None),
                ({"pure_bf16": True}, torch.bfloat16, torch.bfloat16),
            ],
        ),
    ],
    ids=str,
)
def test_number_formats(write_config, monkeypatch, keys: dict, trained: torch.dtype, frozen: Any) -> None:
    keys = {"freeze_trainable_layers": 1, **keys} if keys.get("finetuning_type") == "freeze" else keys
    found: dict[bool, set] = {True: set(), False: set()}
    original = PrefTrainer.train

    def note(self: PrefTrainer, *args: Any, **kwargs: Any) -> Any:
        for parameter in self.model.parameters():
            found[parameter.requires_grad].add(parameter.dtype)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PrefTrainer, "train", note)
    run(write_config(**keys, max_steps=1))
    assert found == {True: {trained}, False: {frozen} if frozen else set()}


def test_loraplus_learns_b_faster(write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: dict[str, float] = {}
    original = PrefTrainer.create_optimizer

    def note(self: PrefTrainer, model: Any = None) -> Any:
        optimizer = original(self, model)
        names = {id(p): name for name, p in self.model.named_parameters()}
        for group in optimizer.param_groups:
            rates.update({names[id(p)]: group["lr"] for p in group["params"]})
        return optimizer

    monkeypatch.setattr(PrefTrainer, "create_optimizer", note)
    run(write_config(loraplus_lr_ratio=16, learning_rate=1e-3))
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {1.6e-2}
    run(write_config(learning_rate=1e-3, output_dir=str(tmp_path / "plain")))
    assert not same(tmp_path / "out", tmp_path / "plain")


def test_loraplus_has_a_rate_for_embeddings(write_config, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: dict[str, set[float]] = {}
    original = PrefTrainer.create_optimizer

    def note(self: PrefTrainer, model: Any = None) -> Any:
        optimizer = original(self, model)
        names = {id(p): name for name, p in self.model.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rates.setdefault(names[id(parameter)].rpartition("lora_")[2], set()).add(group["lr"])
        return optimizer

    monkeypatch.setattr(PrefTrainer, "create_optimizer", note)
    keys = {"lora_target": "q_proj,embed_tokens", "loraplus_lr_embedding": 3e-4}
    run(write_config(loraplus_lr_ratio=16, learning_rate=1e-3, max_steps=1, **keys))
    assert rates["embedding_A.default"] == rates["embedding_B.default"] == {3e-4}
    assert rates["A.default.weight"] == {1e-3}


@pytest.mark.parametrize("loss", rest_is_slow(["sigmoid"], ["orpo"]))
def test_pissa_is_saved_for_the_base_as_it_was(
    write_config, tmp_path: Path, tiny_model: Path, loss: str
) -> None:
    """Plain peft upon the plain base gives the log-probs that the run reported."""
    run(write_config(pissa_init=True, pissa_iter=4, lora_rank=4, pref_loss=loss))
    probe = read(tmp_path / "out" / "probe.json")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "out")
    (prompt, response), expected = probe["rows"][0], probe["token_logps"][0]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    found = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert read(tmp_path / "out" / "adapter_config.json")["r"] == 8


@pytest.mark.parametrize("bits", rest_is_slow([4], [8]))
def test_quantised_weights_stay_and_their_adapter_learns(write_config, tmp_path: Path, bits: int) -> None:
    printed = run(write_config(quantization_bit=bits, max_steps=6))
    assert ("uint8" if bits == 4 else "int8") in printed
    found = losses(tmp_path / "out")
    assert found[0] == pytest.approx(0.6931, abs=1e-3) and min(found) < 0.5
    plain = tmp_path / "plain"
    run(write_config(output_dir=str(plain)))
    assert losses(plain)[1] != found[1]


def test_added_tokens_are_tokens_and_their_rows_are_trained(write_config, tmp_path: Path) -> None:
    base = read(write_config())["model_name_or_path"]
    printed = run(write_config(add_tokens="good,very", add_special_tokens="<|x|>"))
    assert "Vocabulary: resized to 266 tokens." in printed
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("very<|x|>good") == ["very", "<|x|>", "good"]
    row = weights(tmp_path / "out")["base_model.model.lm_head.weight"]
    assert len(row) == 266
    again = {"adapter_name_or_path": str(tmp_path / "out"), "output_dir": str(tmp_path / "more")}
    assert "frozen copy of" in run(write_config(**again, max_steps=1))
    assert len(AutoTokenizer.from_pretrained(base)) == 263


@pytest.mark.parametrize("kind", rest_is_slow(["yarn"], ["linear", "llama3"]))
def test_rope_scaling_stretches_the_model(write_config, tmp_path: Path, kind: str) -> None:
    keys = {"finetuning_type": "full", "learning_rate": 1e-4, "cutoff_len": 1500}
    run(write_config(rope_scaling=kind, **keys))
    saved = read(tmp_path / "out" / "config.json")
    assert saved["max_position_embeddings"] == 1536
    assert (saved["rope_parameters"]["rope_type"], saved["rope_parameters"]["factor"]) == (kind, 3.0)
    run(write_config(output_dir=str(tmp_path / "plain"), **keys))
    assert losses(tmp_path / "out")[1] != losses(tmp_path / "plain")[1]


def test_rope_scaling_that_is_not_needed_is_said(write_config, caplog: pytest.LogCaptureFixture) -> None:
    run(write_config(rope_scaling="yarn"))
    assert "rope_scaling: not used, cutoff_len 128 fits the model's 512 positions" in caplog.text


def test_a_model_whose_angles_are_scaled_is_not_scaled_again(write_config, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    base = save_model(tmp_path / "scaled", write_config, "llama", rope_parameters=rope)
    with pytest.raises(UserError, match="rotary angles are linear already"):
        run(write_config(model_name_or_path=base, rope_scaling="yarn", cutoff_len=1500))


EACH_STEP = {"eval_dataset": "held_out", "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/accuracies"}


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the accuracy of each evaluation to come."""
    original = PrefTrainer._held_out_metrics

    def set_accuracies(*accuracies: float) -> None:
        given = iter(accuracies)

        def made_up(self: PrefTrainer, prediction: Any) -> dict[str, float]:
            return original(self, prediction) | {"rewards/accuracies": next(given)}

        monkeypatch.setattr(PrefTrainer, "_held_out_metrics", made_up)

    return set_accuracies


def test_the_best_checkpoint_is_kept(write_config, tmp_path: Path, give) -> None:
    give(0.25, 1.0, 0.5, 0.75)
    run(write_config(max_steps=4, **EACH_STEP, **BEST))
    checkpoints = {n: weights(tmp_path / "out" / f"checkpoint-{n}") for n in (1, 2, 4)}
    final = weights(tmp_path / "out")
    equal = {n: all(torch.equal(final[k], v) for k, v in found.items()) for n, found in checkpoints.items()}
    assert equal == {1: False, 2: True, 4: False}


@pytest.mark.parametrize(("finetuning_type", "file"), [("lora", "adapter_model"), ("full", "model")])
def test_early_stopping_counts_evaluations_since_the_best(
    write_config, tmp_path: Path, give, finetuning_type: str, file: str
) -> None:
    give(0.25, 0.5, 0.5, 0.25, 1.0, 1.0)
    keys = {"finetuning_type": finetuning_type, "learning_rate": 1e-3, "early_stopping_steps": 2}
    run(write_config(max_steps=6, **keys, **EACH_STEP, **BEST))
    assert len(losses(tmp_path / "out")) == 4
    best_one = load_file(tmp_path / "out" / "checkpoint-2" / f"{file}.safetensors")
    assert all(torch.equal(weights(tmp_path / "out")[name], found) for name, found in best_one.items())


def test_early_stopping_on_the_loss_wants_it_lower(write_config, tmp_path: Path) -> None:
    keys = {"eval_dataset": "held_out", "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    run(write_config(max_steps=9, early_stopping_steps=3, **keys))
    assert len(losses(tmp_path / "out")) == 4  # with a loss that stays, the first evaluation is the best


def test_the_load_balancing_loss_is_added(write_config, tmp_path: Path) -> None:
    base = save_model(tmp_path / "moe", write_config, "mixtral")
    keys = {"model_name_or_path": base, "max_steps": 1, "batch_layout": "repeat"}
    for name, coefficient in (("without", ...), ("with", 0.5)):
        run(write_config(output_dir=str(tmp_path / name), moe_aux_loss_coef=coefficient, **keys))
    lines = {n: read(tmp_path / n / "trainer_state.json")["log_history"][0] for n in ("with", "without")}
    assert "router_loss" not in lines["without"]
    added = 0.5 * lines["with"]["router_loss"]
    assert added > 0.1 and lines["with"]["loss"] == pytest.approx(lines["without"]["loss"] + added, rel=1e-4)


def test_a_load_balancing_loss_needs_experts(write_config) -> None:
    with pytest.raises(UserError, match="moe_aux_loss_coef: llama has no load-balancing loss"):
        run(write_config(moe_aux_loss_coef=0.1))


@pytest.mark.parametrize(
    ("keys", "implementation"),
    [
        ({"flash_attn": "disabled"}, "eager"),
        ({"flash_attn": "sdpa"}, "sdpa"),
        ({"flash_attn": "disabled", "batch_layout": "shared"}, "prefkit_shared_math"),
    ],
)
def test_the_attention_kernel_is_the_one_asked_for(
    write_config, monkeypatch: pytest.MonkeyPatch, keys: dict, implementation: str
) -> None:
    found: list[Any] = []
    original = PrefTrainer.train

    def note(self: PrefTrainer, *args: Any, **kwargs: Any) -> Any:
        found.append(self.model.get_base_model().config._attn_implementation)  # type: ignore[union-attr]
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PrefTrainer, "train", note)
    run(write_config(**{"batch_layout": "repeat", "max_steps": 1, **keys}))
    assert found == [implementation]


def test_a_kernel_that_is_not_installed_is_refused(write_config) -> None:
    with pytest.raises(UserError, match="flash_attn: fa2 needs the package flash-attn"):
        run(write_config(flash_attn="fa2"))
