"""A run from YAML to files, resumed, refused and repeated, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefkit.config.errors import UserError
from prefkit.objectives.pairwise import LOSSES
from prefkit.train.trainer import PrefTrainer
from tests.train.forks import forks, run_in_two
from tests.train.runs import losses, read, run, same, weights
from tests.train.test_kills import rest_is_slow


def test_results_are_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while they are written leaves the ones before, which the next start reads."""
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(output_dir=tmp_path), is_world_process_zero=lambda: True
    )
    PrefTrainer.save_metrics(trainer, "train", {"a": 1.0})

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("prefkit.files.fsync", die)
        with pytest.raises(KeyboardInterrupt):
            PrefTrainer.save_metrics(trainer, "eval", {"b": 2.0})
    assert read(tmp_path / "all_results.json") == {"a": 1.0}
    PrefTrainer.save_metrics(trainer, "eval", {"b": 2.0})
    assert read(tmp_path / "all_results.json") == {"a": 1.0, "b": 2.0}
    assert read(tmp_path / "eval_results.json") == {"b": 2.0}


def test_a_run_leaves_its_files(write_config, tmp_path: Path, tiny_model: Path) -> None:
    config = write_config(
        eval_dataset="held_out",
        do_eval=True,
        do_predict=True,
        plot_loss=True,
        sample_prompts=2,
        save_steps=2,
        max_steps=4,
        sample_max_new_tokens=5,
    )
    printed = run(config)
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "trainer_log.jsonl",
        "trainer_state.json",
        "train_results.json",
        "eval_results.json",
        "all_results.json",
        "predictions.jsonl",
        "predict_results.json",
        "training_loss.png",
        "training_rewards_accuracies.png",
        "samples.md",
        "samples.jsonl",
        "config.yaml",
        "prefkit.json",
        "data_report.json",
        "checkpoint-2",
        "checkpoint-4",
    }
    pickles = {".bin", ".pt", ".pth", ".pkl"}
    assert not [path for path in out.rglob("*") if path.suffix in pickles]
    record = read(out / "prefkit.json")
    assert record["finished"] and record["loss"] == "sigmoid" and record["batch_layout"] == "shared"
    assert record["data"][0]["rows"] == 12 and len(record["data"][0]["sha256"]) == 64
    lines = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["current_steps"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert lines[0].keys() >= {"total_steps", "loss", "accuracy", "lr", "epoch", "percentage", "elapsed_time"}
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 4
    assert read(out / "eval_results.json").keys() >= {"eval_loss", "eval_rewards/margins"}
    assert f"Reference: {tiny_model} with the adapter switched off" in printed
    assert "Held out: reward accuracy" in printed and "samples.md" in printed


def test_the_saved_adapter_is_what_was_trained(write_config, tmp_path: Path, tiny_model: Path) -> None:
    """Plain peft loads it, and gives the log-probs that the run reported."""
    run(write_config(eval_dataset="held_out", do_predict=True))
    out = tmp_path / "out"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    row = read(tmp_path / "data" / "held_out.json")[0]
    messages = [{"role": "user", "content": row["instruction"]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    response = tokenizer.encode(row["chosen"] + "<|im_end|>\n", add_special_tokens=False)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    logps = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum().item()
    reported = json.loads((out / "predictions.jsonl").read_text().splitlines()[0])
    assert logps == pytest.approx(reported["logps/chosen"], rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_and_starts_where_its_formula_says(write_config, tmp_path: Path, loss: str) -> None:
    run(write_config(pref_loss=loss, pref_beta=2.0 if loss == "simpo" else 0.1, max_steps=6))
    found = losses(tmp_path / "out")
    start = {"sigmoid": 0.693147, "hinge": 1.0, "ipo": 25.0, "kto_pair": 0.5}
    if loss in start:
        assert found[0] == pytest.approx(start[loss], rel=1e-4)
    assert min(found) < 0.9 * found[0]


def test_first_losses_are_pinned(write_config, tmp_path: Path) -> None:
    """A change here changes what users train: the commit must say why."""
    run(write_config(max_steps=4))
    assert losses(tmp_path / "out") == pytest.approx(PINNED, abs=2e-4)


PINNED = [0.693147, 0.260097, 0.256606, 0.079311]


@pytest.mark.parametrize(
    "extra", rest_is_slow([{"pref_bco_weight": 0.5}], [{}, {"pref_ftx": 0.5, "ld_alpha": 0.5}])
)
def test_batch_1_x_accumulation_4_is_batch_4(write_config, tmp_path: Path, extra: dict) -> None:
    for name, batch, accumulation in (("a", 4, 1), ("b", 1, 4), ("c", 2, 2)):
        run(
            write_config(
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                max_steps=3,
                output_dir=str(tmp_path / name),
                learning_rate=1e-3,
                **extra,
            )
        )
    for name in ("b", "c"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "a"), rel=1e-5)
        for key, expected in weights(tmp_path / "a").items():
            torch.testing.assert_close(weights(tmp_path / name)[key], expected, atol=2e-6, rtol=1e-4)


def test_a_short_last_accumulation_weighs_every_pair_the_same(write_config, tmp_path: Path) -> None:
    """12 pairs in steps of 8 and 4: the second step is the mean of 4 pairs, not of 4 / 8."""
    for name, batch, accumulation in (("a", 8, 1), ("b", 2, 4)):
        run(
            write_config(
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                max_steps=2,
                output_dir=str(tmp_path / name),
                disable_shuffling=True,
                pref_loss="orpo",
            )
        )
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-4)


def test_layouts_train_the_same(write_config, tmp_path: Path) -> None:
    for layout in ("shared", "repeat"):
        run(write_config(batch_layout=layout, output_dir=str(tmp_path / layout), max_steps=4))
    assert losses(tmp_path / "repeat") == pytest.approx(losses(tmp_path / "shared"), abs=1e-4)


def test_gradient_checkpointing_trains_the_same(write_config, tmp_path: Path) -> None:
    for name, keys in {"off": {}, "on": {"gradient_checkpointing": True}}.items():
        run(write_config(output_dir=str(tmp_path / name), lora_dropout=0.1, **keys))
    assert same(tmp_path / "off", tmp_path / "on")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "kto_pair"])
def test_a_killed_run_resumes_bit_for_bit(write_config, tmp_path: Path, loss: str) -> None:
    keys = {
        "max_steps": 7,
        "save_steps": 2,
        "lora_dropout": 0.1,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "pref_loss": loss,
        "pref_bco_weight": 0.3,
    }
    run(write_config(output_dir=str(tmp_path / "whole"), **keys))
    config = write_config(**keys)
    code = (
        "import os, sys\n"
        "from prefkit.train.trainer import PrefTrainer\n"
        "original = PrefTrainer.compute_loss\n"
        "def dies(self, *args, **kwargs):\n"
        "    if self.state.global_step == 5: os._exit(9)\n"
        "    return original(self, *args, **kwargs)\n"
        "PrefTrainer.compute_loss = dies\n"
        "import torch; torch.set_num_threads(1)\n"
        "from prefkit.cli import main\n"
        "sys.argv = ['prefkit', 'train', sys.argv[1]]\n"
        "main()\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, config], capture_output=True, text=True, timeout=200)
    assert killed.returncode == 9, killed.stderr
    printed = run(config)
    assert f"Resuming from {tmp_path / 'out' / 'checkpoint-4'}" in printed
    assert same(tmp_path / "out", tmp_path / "whole")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["current_steps"] for line in lines] == list(range(1, 8))


def test_a_finished_run_says_so(write_config, tmp_path: Path) -> None:
    config = write_config()
    run(config)
    before = (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns
    assert "is finished" in run(config)
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"a run of another config:\n  pref_beta: 0.1 -> 0.2"):
        run(config, "pref_beta=0.2")
    assert "is finished" in run(config, "save_steps=100")
    assert "is finished" not in run(config, "pref_beta=0.2", "overwrite_output_dir=true")


def test_an_unfinished_run_goes_on_with_its_own_config_only(write_config, tmp_path: Path) -> None:
    config = write_config()
    run(config)
    record = tmp_path / "out" / "prefkit.json"
    record.write_text(record.read_text().replace('"finished": true', '"finished": false'))
    with pytest.raises(UserError, match=r"learning_rate: 0\.01 -> 0\.001"):
        run(config, "learning_rate=1e-3")
    assert "Resuming from" in run(config)


def test_overwriting_waits_until_model_and_data_are_read(write_config, tmp_path: Path) -> None:
    config = write_config(plot_loss=True)
    run(config)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    for wrong in ("template=qwen9", "dataset=nothing", "lora_target=nothing"):
        with pytest.raises(UserError):
            run(config, "overwrite_output_dir=true", wrong)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert "is finished" in run(config)
    run(config, "overwrite_output_dir=true", "plot_loss=false")
    assert not list((tmp_path / "out").glob("training_*.png"))


def test_curves_that_cannot_be_drawn_are_missed_aloud(write_config) -> None:
    assert "No curves: the log has fewer than two lines" in run(write_config(plot_loss=True, logging_steps=2))


def test_overwrite_starts_afresh(write_config, tmp_path: Path) -> None:
    config = write_config(max_steps=4, save_steps=2)
    run(config)
    printed = run(config, "overwrite_output_dir=true", "max_steps=2", "save_strategy=no")
    assert "Resuming" not in printed
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert len((tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()) == 2


def test_a_named_checkpoint_is_resumed_also_in_another_folder(write_config, tmp_path: Path) -> None:
    run(write_config(max_steps=4, save_steps=2))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    config = write_config(max_steps=4, output_dir=str(tmp_path / "b"), resume_from_checkpoint=str(checkpoint))
    assert f"Resuming from {checkpoint}." in run(config)
    assert same(tmp_path / "b", tmp_path / "out")
    (checkpoint / "optimizer.safetensors").write_bytes(b"short")
    again = ["overwrite_output_dir=false", f"output_dir={tmp_path / 'c'}"]
    with pytest.raises(UserError, match=r"checkpoint-2.*optimizer\.safetensors"):
        run(config, *again)
    assert "Resuming" not in run(config, "resume_from_checkpoint=false", f"output_dir={tmp_path / 'd'}")


def test_a_damaged_checkpoint_is_named_and_passed_over(write_config, tmp_path: Path) -> None:
    config = write_config(max_steps=6, save_steps=2)
    run(config)
    record = tmp_path / "out" / "prefkit.json"
    record.write_text(record.read_text().replace('"finished": true', '"finished": false'))
    (tmp_path / "out" / "checkpoint-6" / "scheduler.json").write_text("{}")
    printed = run(config)
    assert "Passing over checkpoint-6" in printed and "scheduler.json" in printed
    assert f"Resuming from {tmp_path / 'out' / 'checkpoint-4'}." in printed


def test_a_foreign_folder_is_refused(write_config, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not from a prefkit run"):
        run(write_config())
    run(write_config(overwrite_output_dir=True))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_a_wrong_reference_stops_the_run(write_config, tmp_path: Path, monkeypatch) -> None:
    """Here the reference reads weights that are not those the policy starts from."""
    from prefkit.model import reference

    original = reference.AdapterOff.logps

    def wrong(self, model, batch):
        head = self.policy.get_base_model().model.norm.weight
        with torch.no_grad():
            head.mul_(1.05)
            logps = original(self, model, batch)
            head.div_(1.05)
        return logps

    monkeypatch.setattr(reference.AdapterOff, "logps", wrong)
    with pytest.raises(UserError, match=r"policy and reference must agree.*pairs\.json:"):
        run(write_config())
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "keys", [{"bf16": True}, {"dtype": "bfloat16"}, {"use_dora": True, "dtype": "bfloat16"}]
)
def test_low_precision_on_a_cpu(write_config, tmp_path: Path, keys: dict) -> None:
    run(write_config(**keys))
    assert losses(tmp_path / "out")[0] == pytest.approx(0.6931, abs=0.01)


def test_lora_keys_reach_the_adapter(write_config, tmp_path: Path) -> None:
    run(
        write_config(
            lora_rank=4,
            lora_alpha=6,
            lora_dropout=0.2,
            lora_target="q_proj,down_proj",
            use_rslora=True,
            additional_target="norm",
        )
    )
    found = read(tmp_path / "out" / "adapter_config.json")
    assert (found["r"], found["lora_alpha"], found["lora_dropout"], found["use_rslora"]) == (4, 6, 0.2, True)
    assert sorted(found["target_modules"]) == ["down_proj", "q_proj"]
    assert found["modules_to_save"] == ["norm"]


def test_all_means_every_linear_layer_but_the_head(write_config, tmp_path: Path) -> None:
    run(write_config(max_steps=1))
    found = read(tmp_path / "out" / "adapter_config.json")
    assert sorted(found["target_modules"]) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert (found["r"], found["lora_alpha"]) == (8, 16)


def test_warmup_ratio_keeps_its_meaning(write_config, tmp_path: Path) -> None:
    run(write_config(warmup_ratio=0.5, max_steps=4, learning_rate=0.01))
    lines = [json.loads(line) for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.005])


def test_val_size_holds_out_rows(write_config, tmp_path: Path) -> None:
    assert "8 pairs to train on, 4 held out" in run(write_config(val_size=4, do_eval=True))
    assert "9 pairs to train on, 3 held out" in run(
        write_config(val_size=0.25, do_eval=True, output_dir=str(tmp_path / "b"))
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_name_or_path": "no/such/folder"}, "the folder no/such/folder does not exist"),
        ({"dataset": "nothing"}, "no data set 'nothing'.*it has: pairs, held_out"),
        ({"template": "qwen9"}, "unknown template 'qwen9'"),
        ({"report_to": "trackio"}, r"trackio is not installed: pip install 'trackio'"),
        ({"lora_target": "q_prj"}, "no module named q_prj; linear layers here: down_proj"),
    ],
)
def test_what_the_user_can_mend_is_said(write_config, keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(write_config(**keys))


def test_an_output_folder_that_cannot_be_written(write_config) -> None:
    with pytest.raises(UserError, match="cannot write to /proc/prefkit"):
        run(write_config(output_dir="/proc/prefkit"))


@forks
def test_two_processes_are_one_with_twice_the_batch(write_config, tmp_path: Path) -> None:
    keys = {
        "max_steps": 3,
        "learning_rate": 1e-3,
        "pref_bco_weight": 0.3,
        "eval_dataset": "held_out",
        "do_eval": True,
    }
    one = write_config(per_device_train_batch_size=2, output_dir=str(tmp_path / "one"), **keys)
    run(one)
    two = write_config(per_device_train_batch_size=1, output_dir=str(tmp_path / "two"), **keys)
    run_in_two(tmp_path, "train", two)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for key, expected in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[key], expected, atol=2e-6, rtol=1e-4)
    a, b = (read(tmp_path / name / "eval_results.json") for name in ("one", "two"))
    assert b["eval_rewards/margins"] == pytest.approx(a["eval_rewards/margins"], rel=1e-4)
