"""A reward model from YAML to files that plain transformers and peft score with."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefkit.config.errors import UserError
from prefkit.model.errors import ModelError
from prefkit.model.reward import HEAD_WEIGHT, VALUE_HEAD
from prefkit.model.reward_model import RewardModel
from prefkit.train import reward
from prefkit.train.checkpoint_files import CheckpointError
from prefkit.train.guard import NotFinite
from prefkit.train.out_of_memory import OutOfMemory
from prefkit.train.trainer import PrefTrainer
from tests.conftest import make_model, make_tokenizer
from tests.model.test_reward import lose, put_value_head
from tests.train.forks import forks, run_in_two
from tests.train.runs import load_reward_model, losses, read, run, same, unfinish, weights
from tests.train.test_kills import rest_is_slow

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "learning_rate": 1e-3},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3},
}
HEAD_IN_ADAPTER = f"base_model.model.{HEAD_WEIGHT}"


@pytest.fixture
def configure(write_config: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a YAML of a reward model."""
    return lambda **keys: write_config(**{"stage": "rm", "template": "chatml", **keys})


def texts(folder: Path) -> list[str]:
    """Conversations as the saved template writes them, one of them cut short."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for answer in ("Yes.", "No, and that is why it is not so.", "", "Well <|im_end|>"):
        turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]
        found.append(tokenizer.apply_chat_template(turns, tokenize=False))
    return [*found, found[1][:40], found[1][:50]]


def plain(folder: Path) -> Any:
    """The model in a folder, read by transformers and peft as its README says."""
    if (folder / "config.json").is_file():
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    return AutoPeftModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=pad
    ).eval()


@torch.no_grad()
def plain_scores(model: Any, tokenizer: Any, rows: list[str], batch: int) -> list[float]:
    found: list[float] = []
    for start in range(0, len(rows), batch):
        inputs = tokenizer(
            rows[start : start + batch], padding=True, padding_side="right", add_special_tokens=False,
            return_tensors="pt",
        )  # fmt: skip
        found += (
            model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits[:, 0].tolist()
        )
    return found


def scores(model: RewardModel, tokenizer: Any, rows: list[str]) -> list[float]:
    return model.score_rows([tokenizer.encode(row, add_special_tokens=False) for row in rows])


def end_padded_model(folder: Path, end: str = "<|im_end|>") -> Path:
    """A tiny model whose padding token is its end token, as in many chat models."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = end
    model = make_model(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# chatml ends a turn with the end token and a newline, llama3 with the end token.
@pytest.mark.parametrize(
    ("kind", "pads", "template"),
    rest_is_slow(
        [
            ("lora", "own", "chatml"),
            ("lora", "end", "chatml"),
            ("lora", "end", "llama3"),
            ("full", "end", "chatml"),
            ("freeze", "own", "llama3"),
        ],
        [
            ("lora", "own", "llama3"),
            *(("full", *it) for it in (("own", "chatml"), ("own", "llama3"), ("end", "llama3"))),
            *(("freeze", *it) for it in (("own", "chatml"), ("end", "chatml"), ("end", "llama3"))),
        ],
    ),
)
def test_transformers_and_peft_score_the_same(
    kind: str, pads: str, template: str, configure: Callable[..., Path], tmp_path: Path, tiny_model: Path
) -> None:
    end = "<|im_end|>\n" if template == "chatml" else "<|eot_id|>"
    base = tiny_model if pads == "own" else end_padded_model(tmp_path / "base", end.strip())
    run(configure(**KINDS[kind], model_name_or_path=str(base), template=template))
    out = tmp_path / "out"
    model, tokenizer = load_reward_model(out), AutoTokenizer.from_pretrained(out)
    assert model.proof == 0 and model.offset == 0
    rows = texts(out)
    assert rows[0].endswith(end)
    own = scores(model, tokenizer, rows)
    assert len(set(own)) == len(own)
    other = plain(out)
    for batch in (1, 4):
        assert plain_scores(other, tokenizer, rows, batch) == pytest.approx(own, abs=1e-5)
    if kind == "lora":
        two_steps = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, pad_token_id=tokenizer.pad_token_id
        )
        adapted = PeftModel.from_pretrained(two_steps, out).eval()
        assert plain_scores(adapted, tokenizer, rows, 4) == pytest.approx(own, abs=1e-5)
        assert read(out / "adapter_config.json")["task_type"] == "SEQ_CLS"
        assert read(out / "adapter_config.json")["modules_to_save"] == ["score"]
    else:
        assert read(out / "config.json")["architectures"] == ["LlamaForSequenceClassification"]
        assert read(out / "config.json")["pad_token_id"] == tokenizer.pad_token_id


def test_the_end_token_as_padding_would_be_read_elsewhere(
    configure: Callable[..., Path], tmp_path: Path
) -> None:
    """The control of the test above: with the base's own padding transformers reads another place."""
    base = end_padded_model(tmp_path / "base")
    run(configure(**KINDS["full"], model_name_or_path=str(base), template="chatml"))
    out = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = [text.rstrip("\n") for text in texts(out)[:4]]  # they end in the end token
    model = AutoModelForSequenceClassification.from_pretrained(out, pad_token_id=2).eval()
    own = scores(load_reward_model(out), tokenizer, rows)
    assert plain_scores(model, tokenizer, rows, 1) != pytest.approx(own, abs=1e-3)


@pytest.mark.parametrize("kind", rest_is_slow(["lora", "full"], ["freeze"]))
def test_a_run_leaves_its_files(kind: str, configure: Callable[..., Path], tmp_path: Path) -> None:
    keys = {"eval_dataset": "held_out", "do_eval": True, "do_predict": True, "max_steps": 8, "save_steps": 4}
    printed = run(configure(**KINDS[kind], **keys, plot_loss=True))
    out = tmp_path / "out"
    assert "Held out: reward accuracy 1.000" in printed
    found = read(out / "eval_results.json")
    names = ("chosen", "rejected", "margins", "accuracies")
    assert {name for name in found if "rewards" in name} == {f"eval_rewards/{name}" for name in names}
    assert not [name for name in found if "logps" in name]
    lines = [json.loads(line) for line in (out / "generated_predictions.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"chosen", "rejected", "source"}] * 4
    assert lines[0]["source"].endswith("held_out.json:1")
    margins = [line["chosen"] - line["rejected"] for line in lines]
    assert sum(margins) / 4 == pytest.approx(found["eval_rewards/margins"], rel=1e-6)
    assert sum(margins) / 4 == pytest.approx(read(out / "calibration.json")["mean_margin"])
    assert (out / "calibration.png").is_file() and (out / "training_curves.png").is_file()
    record = read(out / "prefkit.json")
    assert (record["loss"], record["reference"]) == ("bradley-terry", "none")
    assert "SequenceClassification" in (out / "README.md").read_text()
    assert losses(out)[-1] < losses(out)[0] - 0.05
    head = HEAD_IN_ADAPTER if kind == "lora" else HEAD_WEIGHT
    for folder in (out, out / "checkpoint-4", out / "checkpoint-8"):
        assert weights(folder)[head].shape == (1, 32)
    assert torch.equal(weights(out)[head], weights(out / "checkpoint-8")[head])
    last, final = (load_reward_model(folder).score_rows([[9, 8]]) for folder in (out / "checkpoint-8", out))
    assert last == final


def test_predictions_are_the_scores_of_the_model_to_1e_5(
    configure: Callable[..., Path], tmp_path: Path
) -> None:
    """One number for a row: in training's shared layout, in evaluation, and from the saved model."""
    seen: dict[str, Any] = {}
    original = PrefTrainer.predict_rows

    def note(self: PrefTrainer, examples: Any) -> Any:
        seen["rows"] = list(examples)
        return original(self, examples)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(PrefTrainer, "predict_rows", note)
        run(configure(eval_dataset="held_out", do_predict=True, per_device_eval_batch_size=4))
    out = tmp_path / "out"
    model = load_reward_model(out)
    lines = (out / "generated_predictions.jsonl").read_text().splitlines()
    for line, row in zip(map(json.loads, lines), seen["rows"], strict=True):
        found = model.score_rows([[*row.prompt_ids, *ids] for ids in row.response_ids])
        assert found == pytest.approx([line["chosen"], line["rejected"]], abs=1e-5)


def test_layouts_train_the_same(configure: Callable[..., Path], tmp_path: Path) -> None:
    for layout in ("shared", "repeat"):
        run(configure(batch_layout=layout, max_steps=4, output_dir=str(tmp_path / layout)))
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "repeat"), rel=1e-5)


def test_margins_and_rm_center_coefficient_change_the_loss(
    configure: Callable[..., Path], dataset_dir: Path, tmp_path: Path
) -> None:
    row = {"instruction": "Q", "chosen": "a good answer", "rejected": "bad"}
    (dataset_dir / "marked.json").write_text(json.dumps([{**row, "margin": 1.5}]))
    info = read(dataset_dir / "dataset_info.json")
    info["marked"] = {"file_name": "marked.json", "ranking": True, "columns": {"margin": "margin"}}
    info["plain"] = {"file_name": "marked.json", "ranking": True}
    (dataset_dir / "dataset_info.json").write_text(json.dumps(info))
    found = {}
    cases: dict[str, dict[str, Any]] = {
        "plain": {"dataset": "plain"},
        "margin": {"dataset": "marked"},
        "center": {"dataset": "plain", "rm_center_coefficient": 0.5},
    }
    for name, keys in cases.items():
        run(configure(**keys, max_steps=1, output_dir=str(tmp_path / name)))
        (found[name],) = (
            it for it in read(tmp_path / name / "trainer_state.json")["log_history"] if "loss" in it
        )
    chosen, rejected = (found["plain"][f"rewards/{side}"] for side in ("chosen", "rejected"))
    margin = chosen - rejected
    assert found["plain"]["loss"] == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-5)
    assert found["margin"]["loss"] == pytest.approx(math.log1p(math.exp(1.5 - margin)), rel=1e-5)
    assert found["center"]["loss"] == pytest.approx(
        found["plain"]["loss"] + 0.5 * (chosen + rejected) ** 2, rel=1e-5
    )


def test_the_best_model_is_loaded_with_its_head(configure: Callable[..., Path], tmp_path: Path) -> None:
    keys = {"eval_dataset": "held_out", "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/margins", "max_steps": 4}
    # The rate is such that the best is not the last.
    for kind in KINDS:
        out = tmp_path / kind
        run(configure(**{**KINDS[kind], "learning_rate": 0.3}, **keys, **best, output_dir=str(out)))
        state = read(out / "trainer_state.json")
        chosen = Path(state["best_model_checkpoint"])
        margins = {it["step"]: it["eval_rewards/margins"] for it in state["log_history"] if "eval_loss" in it}
        assert chosen.name == f"checkpoint-{max(margins, key=lambda step: margins[step])}"
        assert all(torch.equal(it, weights(out)[name]) for name, it in weights(chosen).items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_run(kind: str, configure: Callable[..., Path], tmp_path: Path) -> None:
    keys = {**KINDS[kind], "max_steps": 6, "save_steps": 4}
    run(configure(**keys))
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    for name in ("adapter_model.safetensors", "model.safetensors"):
        (tmp_path / "out" / name).unlink(missing_ok=True)
    unfinish(tmp_path / "out")
    assert "checkpoint-4" in run(configure(**keys))
    assert same(tmp_path / "whole", tmp_path / "out")
    assert losses(tmp_path / "whole") == losses(tmp_path / "out")


@pytest.mark.parametrize("kind", rest_is_slow(["lora", "full"], ["freeze"]))
def test_a_checkpoint_without_its_head_is_refused(
    kind: str, configure: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**KINDS[kind], "max_steps": 4, "save_steps": 2}
    run(configure(**keys))
    unfinish(tmp_path / "out")
    (file,) = (tmp_path / "out" / "checkpoint-2").glob("*model.safetensors")
    lose(file, HEAD_IN_ADAPTER if kind == "lora" else HEAD_WEIGHT)
    # As if it had been saved so.
    for module in ("checkpoint", "checkpoint_files"):
        monkeypatch.setattr(f"prefkit.train.{module}.verify_checkpoint", lambda folder: None)
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=rf"{file.name}: LookupError: .*{HEAD_WEIGHT} is missing"):
        run(configure(**keys))


def test_going_on_with_a_reward_model(configure: Callable[..., Path], tmp_path: Path) -> None:
    one, full = tmp_path / "one", tmp_path / "full"
    run(configure(output_dir=str(one), max_steps=6))
    run(configure(adapter_name_or_path=str(one), output_dir=str(tmp_path / "more")))
    assert losses(tmp_path / "more")[0] < losses(one)[0] - 0.05
    merged = {"adapter_name_or_path": str(one), "create_new_adapter": True}
    run(configure(**merged, output_dir=str(tmp_path / "upon"), max_steps=1))
    assert losses(tmp_path / "upon")[0] == pytest.approx(losses(tmp_path / "more")[0], rel=1e-5)
    assert load_reward_model(tmp_path / "upon").proof == 0
    run(configure(**KINDS["full"], output_dir=str(full), max_steps=8))
    run(configure(model_name_or_path=str(full), output_dir=str(tmp_path / "adapted")))
    assert losses(tmp_path / "adapted")[0] < losses(full)[0] - 0.05
    assert load_reward_model(tmp_path / "adapted").proof == 0
    measured = {"do_train": False, "dataset": ..., "do_eval": True, "eval_dataset": "held_out"}
    printed = run(configure(**measured, model_name_or_path=str(full), output_dir=str(tmp_path / "m")))
    assert "Held out: reward accuracy" in printed
    with pytest.raises(ModelError, match="has no head for scores: it is no reward model"):
        run(configure(**measured, output_dir=str(tmp_path / "no-head")))


def test_another_head_or_base_is_refused(
    configure: Callable[..., Path], tmp_path: Path, tiny_model: Path
) -> None:
    """By the scores that were saved, wherever the weights are used again."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_model, base)
    run(configure(model_name_or_path=str(base)))
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[HEAD_IN_ADAPTER] = tensors[HEAD_IN_ADAPTER] * 1.01
    save_file(tensors, file, {"format": "pt"})
    go_on = configure(
        model_name_or_path=str(base), adapter_name_or_path=str(out), output_dir=str(tmp_path / "x")
    )
    for use in (lambda: load_reward_model(out), lambda: run(go_on)):
        with pytest.raises(ModelError, match="is not the reward model that was trained"):
            use()
    tensors[HEAD_IN_ADAPTER] = tensors[HEAD_IN_ADAPTER] / 1.01
    save_file(tensors, file, {"format": "pt"})
    load_reward_model(out)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="is not the reward model that was trained"):
        load_reward_model(out)


def test_no_reward_model(tiny_model: Path, tmp_path: Path, configure: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="has no head for scores: it is no reward model"):
        load_reward_model(tiny_model)
    with pytest.raises(UserError, match="holds neither a model"):
        load_reward_model(tmp_path)
    run(configure(stage="dpo"))
    with pytest.raises(ModelError, match="is of a language model and brings no head for scores"):
        load_reward_model(tmp_path / "out")


def test_the_bias_of_llamafactorys_head_is_added(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(tiny_model, folder)
    put_value_head(folder, bias=0.0)
    without = load_reward_model(folder).score_rows([[9, 8, 7]])
    weight = put_value_head(folder, bias=0.75)
    model = load_reward_model(folder)
    assert model.proof is None
    assert model.score_rows([[9, 8, 7]]) == pytest.approx([without[0] + 0.75])
    ids = torch.tensor([[9, 8, 7]])
    hidden = make_model()(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
    assert without[0] == pytest.approx((weight @ hidden).item(), abs=1e-5)
    assert (folder / VALUE_HEAD).is_file()


@forks
def test_two_processes_are_one_with_twice_the_batch(configure: Callable[..., Path], tmp_path: Path) -> None:
    keys = {"max_steps": 3, "learning_rate": 1e-3, "rm_center_coefficient": 0.1}
    keys |= {"eval_dataset": "held_out", "do_eval": True}
    run(configure(per_device_train_batch_size=2, output_dir=str(tmp_path / "one"), **keys))
    two = configure(per_device_train_batch_size=1, output_dir=str(tmp_path / "two"), **keys)
    run_in_two(tmp_path, "train", two)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, other = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all((one[name] - other[name]).norm() <= 1e-5 * one[name].norm() + 1e-7 for name in one)
    found = [read(tmp_path / name / "eval_results.json") for name in ("one", "two")]
    for name in ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen"):
        assert found[1][f"eval_{name}"] == pytest.approx(found[0][f"eval_{name}"], rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_ends_the_run(
    value: float, configure: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = reward.response_scores

    def spoil(model: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        found = original(model, batch)
        return found * torch.tensor([value, 1.0, 1.0, 1.0]) if len(calls) == 3 else found

    monkeypatch.setattr(reward, "response_scores", spoil)
    config = configure(max_steps=4, save_steps=1)
    with pytest.raises(NotFinite, match=r"rm, step 3: .*\n  rewards/chosen is (NaN|infinite) for \S+pairs"):
        run(config)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]


def test_out_of_memory_gives_the_same_gradients_in_pieces(
    configure: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3}
    run(configure(**keys, output_dir=str(tmp_path / "whole")))
    original = reward.response_scores

    def scores_of(model: Any, batch: Any) -> torch.Tensor:
        if len(batch["rows"]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(model, batch)

    monkeypatch.setattr(reward, "response_scores", scores_of)
    limit = 1
    assert "micro-batches are now computed in 4 pieces" in run(configure(**keys))
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    limit = 0
    with pytest.raises(OutOfMemory, match=r"a single row does not fit: .*pairs"):
        run(configure(**keys, output_dir=str(tmp_path / "none")))
