"""KTO: the stage against the formula, and runs that do not depend on how rows are batched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefkit.config import MethodConfig
from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import Layout, pack
from prefkit.data.readers import DataError
from prefkit.data.splitting import split
from prefkit.model import partners
from prefkit.model.partners import judged_logps
from prefkit.model.policy import response_logps
from prefkit.objectives.kto import kto_loss
from prefkit.objectives.logps import ResponseLogps, sum_by_response
from prefkit.train import policy
from prefkit.train.guard import NotFinite
from prefkit.train.kto import KtoStage
from prefkit.train.stages import IdentityError
from tests.conftest import make_model, make_tokenizer
from tests.train.forks import forks, run_in_two
from tests.train.given import GivenReference, model_and_reference
from tests.train.runs import losses, read, run, same, unfinish, weights
from tests.train.test_kills import rest_is_slow

# Response, partner, response, partner: tokens 0-1 | 2 | 3 | 4-5.
OWNER = torch.tensor([0, 0, 1, 2, 3, 3])
POLICY = torch.tensor([-1.0, -2.0, -5.0, -4.0, -1.0, -2.0])
REFERENCE = torch.tensor([-3.0, -2.0, -6.0, -3.0, -2.0, -4.0])
BATCH: dict[str, Any] = {
    "owner": OWNER,
    "labels": ("desirable", "partner", "undesirable", "partner"),
    "rows": ("f:1", "f:2"),
}


def given_policy(model: Any, batch: Any) -> ResponseLogps:
    return sum_by_response(POLICY, OWNER, 4)


def compute(gather: Any = None, **method: Any) -> Any:
    stage = KtoStage(
        MethodConfig(stage="kto", **method), GivenReference(REFERENCE, OWNER), given_policy, torch.float32
    )
    stage.gather = gather or stage.gather
    return stage.compute(torch.nn.Module(), BATCH)


def s(x: float) -> float:
    return torch.tensor(x).sigmoid().item()


def test_numbers_derived_by_hand() -> None:
    """Log-ratios 2 and -1; of partners 1 and 3, so that z is 2."""
    output = compute(pref_beta=0.5)
    assert output.losses.tolist() == pytest.approx([1 - s(0.0), 1 - s(1.5)])
    assert output.metrics["rewards"].tolist() == [1.0, -0.5]
    assert output.metrics["logps"].tolist() == [-3.0, -4.0]
    assert output.metrics["kl"].tolist() == [2.0, 2.0]
    assert output.metrics["desirable"].tolist() == [1.0, 0.0]


def test_kto_weights_are_those_of_the_labels() -> None:
    plain = compute().losses
    weighed = compute(kto_chosen_weight=2.0, kto_rejected_weight=0.5).losses
    assert (weighed / plain).tolist() == pytest.approx([2.0, 0.5])


def test_pref_ftx_adds_the_mean_likelihood_of_desirable() -> None:
    added = compute(pref_ftx=2.0).losses - compute().losses
    assert added.tolist() == pytest.approx([2 * 1.5, 0.0])


def test_the_kl_is_of_the_partners_of_all_ranks() -> None:
    """Another rank has one partner, of log-ratio 5, and z is (1 + 3 + 5) / 3."""
    output = compute(lambda own: torch.cat([own, torch.tensor([5.0, 1.0])]))
    assert output.metrics["kl"].tolist() == [3.0, 3.0]


def test_identity_is_checked() -> None:
    stage = KtoStage(MethodConfig(stage="kto"), GivenReference(REFERENCE, OWNER), given_policy, torch.float32)
    stage.expects_identity = True
    with pytest.raises(IdentityError, match=r"f:1, f:2.*given by hand"):
        stage.compute(torch.nn.Module(), BATCH)


# On a model


def make_stage(layout: Layout) -> tuple[KtoStage, Any]:
    model, reference = model_and_reference(layout, 1.1)
    return KtoStage(MethodConfig(stage="kto"), reference, judged_logps, torch.float32), model


def make_batch(layout: Layout) -> dict[str, Any]:
    torch.manual_seed(1)

    def ids(number: int) -> list[int]:
        return torch.randint(7, 264, (number,)).tolist()

    labels = ("desirable", "undesirable", "desirable")
    return pack(
        [
            TokenizedExample(ids(3 + n), [ids(4 - n), ids(2 + n)], (), f"f:{n}", labels=(label, "partner"))  # type: ignore[arg-type]
            for n, label in enumerate(labels)
        ],
        layout,
    ).to_dict()


def gradients(loss: torch.Tensor, model: Any) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("layout", ["shared", "repeat"])
def test_gradients_are_those_with_the_kl_as_a_constant(layout: Layout) -> None:
    stage, model = make_stage(layout)
    batch = make_batch(layout)
    output = stage.compute(model, batch)
    kl = output.metrics["kl"][0].item()
    assert kl > 0
    policy, reference = response_logps(model, batch), stage.reference.logps(model, batch)
    logratios = (policy.logps - reference.logps)[[0, 2, 4]]
    expected = kto_loss(logratios, torch.tensor([True, False, True]), kl=kl, beta=0.1)
    torch.testing.assert_close(output.losses, expected)
    torch.testing.assert_close(gradients(output.losses.sum(), model), gradients(expected.sum(), model))
    # A control: through the partners there would be another gradient.
    through = kto_loss(logratios, torch.tensor([True, False, True]),
                       kl=(policy.logps - reference.logps)[[1, 3, 5]].mean(), beta=0.1)  # fmt: skip
    difference = gradients(through.sum(), model) - gradients(expected.sum(), model)
    assert difference.norm() > 0.01 * gradients(expected.sum(), model).norm()


def test_layouts_agree() -> None:
    (shared, model), (repeat, other) = make_stage("shared"), make_stage("repeat")
    one = shared.compute(model, make_batch("shared"))
    two = repeat.compute(other, make_batch("repeat"))
    torch.testing.assert_close(one.losses, two.losses)
    torch.testing.assert_close(gradients(one.losses.sum(), model), gradients(two.losses.sum(), other))


@pytest.mark.parametrize("layout", ["shared", "repeat"])
def test_pieces_have_the_kl_of_the_whole(layout: Layout) -> None:
    stage, model = make_stage(layout)
    batch = make_batch(layout)
    whole, pieces = stage.compute(model, batch), split(batch, 3)
    statistics = stage.statistics(model, pieces)
    found = [stage.compute(model, {**piece, "statistics": statistics}).losses for piece in pieces]
    torch.testing.assert_close(torch.cat(found), whole.losses)


# Runs

KEYS: dict[str, Any] = {
    "stage": "kto",
    "dataset": "judged",
    "eval_dataset": "judged_held_out",
    "do_eval": True,
    "do_predict": True,
    "max_steps": 4,
}
Write = Callable[..., Path]


def log(folder: Path) -> list[dict[str, Any]]:
    return read(folder / "trainer_state.json")["log_history"]


@pytest.mark.parametrize("finetuning_type", ["lora", "freeze", "full"])
def test_it_trains_and_starts_at_half(write_config: Write, tmp_path: Path, finetuning_type: str) -> None:
    printed = run(write_config(**KEYS, finetuning_type=finetuning_type))
    out = tmp_path / "out"
    first, *_, last = (line for line in log(out) if "loss" in line)
    assert first["loss"] == pytest.approx(0.5, abs=1e-4) and first["kl"] == pytest.approx(0, abs=1e-4)
    assert last["loss"] < 0.5
    metrics = read(out / "eval_results.json")
    assert 0 <= metrics["eval_rewards/auc"] <= 1 and metrics["eval_count/chosen"] == 3
    assert "AUC of the reward" in printed and "12 rows to train on, 4 held out" in printed
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [row["desirable"] for row in rows] == [1.0, 0.0, 1.0, 1.0]
    assert read(out / "prefkit.json")["loss"] == "kto"
    lines = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    assert "kl" in lines[0] and lines[-1].keys() >= {"eval_auc", "eval_kl", "eval_loss"}


def test_batch_1_with_shuffling_logs_what_there_is(write_config: Write, tmp_path: Path) -> None:
    """A step of one row has one label: its line has neither the other's numbers nor a margin."""
    run(write_config(**KEYS, per_device_train_batch_size=1))
    for line in log(tmp_path / "out"):
        if "loss" not in line:
            continue
        counts = line["count/chosen"], line["count/rejected"]
        assert sorted(counts) == [0, 1] and "rewards/margins" not in line
        assert ("rewards/chosen" in line, "logps/rejected" in line) == tuple(map(bool, counts))


def test_a_window_is_averaged_over_the_rows_of_each_label(write_config: Write, tmp_path: Path) -> None:
    """Steps of one row, logged one by one and all at once."""
    keys = KEYS | {"per_device_train_batch_size": 1, "max_steps": 12}
    run(write_config(**keys))
    single = [line for line in log(tmp_path / "out") if "loss" in line]
    run(write_config(**keys, output_dir=str(tmp_path / "once"), logging_steps=12))
    (once,) = (line for line in log(tmp_path / "once") if "loss" in line)
    assert (once["count/chosen"], once["count/rejected"]) == (8, 4)
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl"):
        values = [line[name] for line in single if name in line]
        assert once[name] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert once["rewards/margins"] == pytest.approx(once["rewards/chosen"] - once["rewards/rejected"])


def test_streaming_trains(write_config: Write, tmp_path: Path) -> None:
    run(write_config(**KEYS, streaming=True, buffer_size=4))
    assert losses(tmp_path / "out")[-1] < 0.5


def test_rows_of_a_stream_may_be_held_out(write_config: Write, tmp_path: Path) -> None:
    run(write_config(**KEYS | {"eval_dataset": ..., "val_size": 4}, streaming=True))
    metrics = read(tmp_path / "out" / "eval_results.json")
    assert metrics["eval_count/chosen"] + metrics["eval_count/rejected"] == 4


@pytest.mark.parametrize("finetuning_type", rest_is_slow(["lora"], ["full"]))
def test_the_cache_covers_partners(
    write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finetuning_type: str
) -> None:
    """With one row a batch the bits are the same; in a second run nothing is computed again."""
    keys = {**KEYS, "max_samples": 6, "max_steps": 8, "finetuning_type": finetuning_type}
    keys["per_device_train_batch_size"] = 1
    run(write_config(**keys, ref_cache=False))
    cached = tmp_path / "cached"
    run(write_config(**keys, ref_cache=True, output_dir=str(cached)))
    assert same(tmp_path / "out", cached)
    printed = run(write_config(**keys, ref_cache=True, output_dir=str(tmp_path / "again")))
    assert "10 of 10 rows found" in printed
    assert same(cached, tmp_path / "again")


def test_a_resumed_run_ends_with_the_same_bits(write_config: Write, tmp_path: Path) -> None:
    config = write_config(**KEYS, save_steps=2, lora_dropout=0.1)
    run(config)
    before = weights(tmp_path / "out")
    unfinish(tmp_path / "out")
    run(config)
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "out").items())


@pytest.mark.parametrize("metric", ["rewards/auc", "kl"])
def test_the_best_model_and_an_early_end(write_config: Write, tmp_path: Path, metric: str) -> None:
    keys = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "early_stopping_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": False}
    run(write_config(**KEYS | keys | best | {"max_steps": 12}))
    state = read(tmp_path / "out" / "trainer_state.json")
    values = [line[f"eval_{metric}"] for line in state["log_history"] if f"eval_{metric}" in line]
    assert state["best_metric"] == min(values)


def test_each_data_set_is_evaluated_also_with_one_label(
    write_config: Write, dataset_dir: Path, tmp_path: Path
) -> None:
    rows = json.loads((dataset_dir / "judged_held_out.json").read_text())
    for name, label in (("good", True), ("bad", False)):
        (dataset_dir / f"{name}.json").write_text(json.dumps([r for r in rows if r["kto_tag"] is label]))
    info = json.loads((dataset_dir / "dataset_info.json").read_text())
    info |= {name: {"file_name": f"{name}.json"} for name in ("good", "bad")}
    (dataset_dir / "dataset_info.json").write_text(json.dumps(info))
    keys = KEYS | {"eval_dataset": "good,bad", "eval_on_each_dataset": True, "eval_strategy": "epoch"}
    printed = run(write_config(**keys))
    found = read(tmp_path / "out" / "eval_results.json")
    assert found["eval_good_count/chosen"] == 3 and found["eval_bad_count/rejected"] == 1
    assert "Held out (good)" in printed and "held out (bad): loss" in printed


def test_a_margin_column_is_refused(write_config: Write, dataset_dir: Path) -> None:
    info = json.loads((dataset_dir / "dataset_info.json").read_text())
    info["judged"]["columns"] = {"kto_tag": "kto_tag", "margin": "m"}
    (dataset_dir / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="judged responses have no margin"):
        run(write_config(**KEYS))


@pytest.mark.parametrize("forward", [0, 1], ids=["of the judged", "of the partners"])
def test_out_of_memory_changes_nothing(
    write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: int
) -> None:
    """Batches of four, one label in the second half of some, of the first of which a forward fails once."""
    keys = KEYS | {"per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 1.0}
    run(write_config(**keys))
    original, calls = partners.response_logps, iter(range(10**6))

    def fails_once(*args: Any) -> ResponseLogps:
        if next(calls) == forward:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(*args)

    monkeypatch.setattr(partners, "response_logps", fails_once)
    printed = run(write_config(**keys, output_dir=str(tmp_path / "pieces")))
    assert "computed in 2 pieces, with the same gradients" in printed
    one, two = weights(tmp_path / "out"), weights(tmp_path / "pieces")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=1e-5)
    for a, b in zip(log(tmp_path / "out"), log(tmp_path / "pieces"), strict=True):
        for name in a.keys() & {"loss", "kl", "rewards/chosen", "rewards/rejected", "logps/chosen"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5)


def test_a_partner_that_is_not_finite_ends_the_run(
    write_config: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = judged_logps, iter(range(10**6))

    def spoiled(model: Any, batch: Any) -> ResponseLogps:
        found = original(model, batch)
        found.logps[1] += float("nan") if next(calls) == 1 else 0.0
        return found

    monkeypatch.setattr(policy, "judged_logps", spoiled)
    with pytest.raises(NotFinite, match=r"kto, step 2.*\n.*partner's logps is NaN for .*judged.json:\d+"):
        run(write_config(**KEYS))


def test_where_log_probs_depend_on_the_batch_policy_and_reference_have_the_same(
    write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Angles that follow the longest row: apart, responses have others than in the reference's batch."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = make_model(rope_parameters=rope, max_position_embeddings=32)
    model.save_pretrained(tmp_path / "dynamic")
    make_tokenizer().save_pretrained(tmp_path / "dynamic")
    config = write_config(**KEYS, model_name_or_path=str(tmp_path / "dynamic"))
    run(config)
    assert losses(tmp_path / "out")[0] == pytest.approx(0.5, abs=1e-4)
    monkeypatch.setattr(policy, "response_logps", judged_logps)
    with pytest.raises(IdentityError):
        run(write_config(**KEYS, model_name_or_path=str(tmp_path / "dynamic"), overwrite_output_dir=True))


@forks
def test_two_processes_are_one_with_twice_the_batch(write_config: Write, tmp_path: Path) -> None:
    """Steps of one row on each rank, so that most have one label alone there."""
    keys = KEYS | {"max_steps": 6, "disable_shuffling": True, "logging_steps": 2}
    run(write_config(**keys, per_device_train_batch_size=2, output_dir=str(tmp_path / "one")))
    config = write_config(**keys, per_device_train_batch_size=1, output_dir=str(tmp_path / "two"))
    run_in_two(tmp_path, "train", config)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-5)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        timeless = [
            name for name in a if "runtime" not in name and "per_second" not in name and "flos" not in name
        ]
        assert a.keys() == b.keys() - {"work_imbalance", "work_imbalance/undealt"}
        assert [a[name] for name in timeless] == pytest.approx([b[name] for name in timeless], abs=1e-4)
