"""What data does in a run: streams, several evaluations, margins, weights and ranked responses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from prefkit.data.readers import DataError
from tests.train.forks import forks, run_in_two
from tests.train.runs import losses, read, run, same, unfinish

PAIR = {"instruction": "Q", "chosen": "a good answer", "rejected": "bad"}


def register(dataset_dir: Path, name: str, rows: list[Any], **entry: Any) -> None:
    (dataset_dir / f"{name}.json").write_text(json.dumps(rows))
    file = dataset_dir / "dataset_info.json"
    info = json.loads(file.read_text())
    info[name] = {"file_name": f"{name}.json", "ranking": True, **entry}
    file.write_text(json.dumps(info))


def test_eval_on_each_dataset(write_config, tmp_path: Path) -> None:
    keys = {"eval_dataset": "held_out,pairs", "do_eval": True, "eval_strategy": "steps", "eval_steps": 1}
    printed = run(write_config(**keys, eval_on_each_dataset=True, plot_loss=True, do_predict=True))
    assert "held out (held_out): loss" in printed and "Held out (pairs): reward accuracy" in printed
    results = read(tmp_path / "out" / "eval_results.json")
    assert {"eval_held_out_loss", "eval_pairs_rewards/margins"} <= results.keys()
    lines = [json.loads(line) for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()]
    evaluated = [line["eval_dataset"] for line in lines if "eval_loss" in line]
    assert evaluated == ["held_out", "pairs"] * 2
    assert (tmp_path / "out" / "training_eval_held_out_loss.png").is_file()
    # Together they are the mean over all pairs: 4 of the one and 12 of the other.
    run(write_config(**keys, output_dir=str(tmp_path / "together")))
    whole = read(tmp_path / "together" / "eval_results.json")["eval_loss"]
    assert whole == pytest.approx((4 * results["eval_held_out_loss"] + 12 * results["eval_pairs_loss"]) / 16)


STREAM = {"streaming": True, "max_steps": 8, "save_steps": 2, "buffer_size": 3, "lora_dropout": 0.1}


def test_a_stream_trains_and_resumes_bit_for_bit(write_config, tmp_path: Path) -> None:
    """Eight steps of two rows go through the twelve rows and on into the second pass."""
    printed = run(write_config(**STREAM))
    assert "streamed as alpaca rows" in printed and "12 pairs to train on" in printed
    (ledger,) = read(tmp_path / "out" / "data_report.json")["data_sets"]
    assert (ledger["rows"], ledger["trained"], ledger["repeats"]) == (12, 12, 4)
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    unfinish(tmp_path / "again")
    printed = run(write_config(**STREAM, output_dir=str(tmp_path / "again")))
    assert "Resuming from" in printed
    assert same(tmp_path / "out", tmp_path / "again")
    assert losses(tmp_path / "out") == losses(tmp_path / "again")
    assert read(tmp_path / "again" / "data_report.json") == read(tmp_path / "out" / "data_report.json")


def test_a_stream_of_part_of_the_rows_says_how_many_it_read(write_config, tmp_path: Path) -> None:
    run(write_config(**{**STREAM, "max_steps": 2}))
    (ledger,) = read(tmp_path / "out" / "data_report.json")["data_sets"]
    assert ledger["trained"] == 4
    assert ledger["rows"] == 4 + ledger["not_sampled"]["max_steps"] < 12


def test_a_stream_in_file_order_is_the_data_set_in_file_order(write_config, tmp_path: Path) -> None:
    keys = {"disable_shuffling": True, "max_steps": 6}
    run(write_config(**keys, output_dir=str(tmp_path / "whole")))
    run(write_config(**keys, streaming=True, output_dir=str(tmp_path / "stream")))
    assert same(tmp_path / "whole", tmp_path / "stream")


@forks
def test_data_workers_share_a_stream(write_config, tmp_path: Path) -> None:
    """Each reads all of it, and no row is trained on by way of both."""
    keys = {"streaming": True, "max_steps": 4, "buffer_size": 3, "gradient_accumulation_steps": 2}
    for number in (0, 2):
        run(write_config(**keys, dataloader_num_workers=number, output_dir=str(tmp_path / str(number))))
    assert same(tmp_path / "0", tmp_path / "2")


@forks
def test_two_processes_share_a_stream(write_config, tmp_path: Path) -> None:
    keys = {"streaming": True, "max_steps": 3, "learning_rate": 1e-3, "disable_shuffling": True}
    run(write_config(per_device_train_batch_size=2, output_dir=str(tmp_path / "one"), **keys))
    two = write_config(per_device_train_batch_size=1, output_dir=str(tmp_path / "two"), **keys)
    run_in_two(tmp_path, "train", two)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    reports = [read(tmp_path / name / "data_report.json")["data_sets"][0] for name in ("one", "two")]
    assert reports[0]["trained"] == reports[1]["trained"] == 6


def first_loss(write_config, dataset_dir: Path, folder: Path, rows: list[Any], **keys: Any) -> float:
    columns = {name: name for name in ("margin", "weight") if name in rows[0]}
    register(dataset_dir, "marked", rows, **({"columns": columns} if columns else {}))
    shutil.rmtree(folder / "out", ignore_errors=True)
    run(write_config(dataset="marked", max_steps=1, per_device_train_batch_size=len(rows), **keys))
    return losses(folder / "out")[0]


def test_margin_is_the_lead_that_chosen_must_have(write_config, dataset_dir: Path, tmp_path: Path) -> None:
    """At the reference the loss is -log sigmoid(-margin)."""
    found = first_loss(write_config, dataset_dir, tmp_path, [{**PAIR, "margin": 1.5}, {**PAIR, "margin": 0}])
    margins = torch.tensor([1.5, 0.0])
    assert found == pytest.approx(-torch.nn.functional.logsigmoid(-margins).mean().item(), abs=1e-5)
    with pytest.raises(DataError, match=r"pref_loss: hinge has no place for the margin.*pref_loss: sigmoid"):
        first_loss(write_config, dataset_dir, tmp_path, [{**PAIR, "margin": 1.5}], pref_loss="hinge")


def test_weight_multiplies_the_loss(write_config, dataset_dir: Path, tmp_path: Path) -> None:
    rows = [{**PAIR, "weight": 3}, {**PAIR, "weight": 0.5}]
    for loss, start in (("sigmoid", 0.693147), ("hinge", 1.0)):
        found = first_loss(write_config, dataset_dir, tmp_path, rows, pref_loss=loss)
        assert found == pytest.approx(start * 3.5 / 2, abs=1e-5)


def test_a_group_of_ranked_responses_is_its_pairs(write_config, dataset_dir: Path, tmp_path: Path) -> None:
    """One example with three pairs takes the step of three examples with one pair each."""
    responses = {"instruction": "Q", "responses": ["first", "second one", "the third"], "ranks": [1, 2, 3]}
    register(dataset_dir, "ranked", [responses])
    keys = {"dataset": "ranked", "max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-3}
    for how in ("group", "pairs"):
        run(write_config(**keys, ranked_responses=how, output_dir=str(tmp_path / how)))
    group, pairs = (losses(tmp_path / how) for how in ("group", "pairs"))
    assert group == pytest.approx(pairs, rel=1e-4) and group[1] < group[0]
    report = read(tmp_path / "group" / "data_report.json")["totals"]
    assert (report["rows"], report["trained"], report["pairs"]) == (1, 1, 3)


def test_encoded_rows_are_used_by_the_next_run(write_config, tmp_path: Path) -> None:
    keys = {"tokenized_path": str(tmp_path / "tokens")}
    assert "encoded rows read" not in run(write_config(**keys))
    assert "encoded rows read" in run(write_config(**keys, output_dir=str(tmp_path / "next")))
    assert same(tmp_path / "out", tmp_path / "next")
