"""What the policy is measured against: which weights, unmoved by training, with and without the cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import prefkit.train.run as run_module
from prefkit.config import load_config
from prefkit.config.errors import UserError
from prefkit.data.encode import TokenizedExample
from prefkit.data.packing import pack
from prefkit.model.adapter import freeze_initial
from prefkit.model.errors import ModelError
from prefkit.model.ref_cache import CachedReference
from prefkit.model.reference import AdapterOff, FrozenModel, InitialAdapter
from prefkit.train.trainer import PrefTrainer
from tests.conftest import make_model
from tests.model.test_reward_adapter import make_policy
from tests.train.forks import forks, run_in_two
from tests.train.runs import losses, run, same, unfinish, weights
from tests.train.test_kills import rest_is_slow


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what the first test that needs it makes for all of them."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def adapter(write_config, tmp_path: Path, kept: Path) -> str:
    """A trained adapter of the tiny model, of which each test may change its copy."""
    if not (kept / "first").exists():
        run(write_config(output_dir=str(kept / "first"), max_steps=6))
    shutil.copytree(kept / "first", tmp_path / "first")
    return str(tmp_path / "first")


@pytest.fixture
def other_model(tmp_path: Path) -> str:
    """The tiny model with other weights."""
    model = make_model()
    for parameter in model.parameters():
        parameter.data += 0.01
    model.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(reference, its log-probs of the training rows) before and after each training."""
    seen: list[Any] = []
    original = PrefTrainer.train

    def watched(self: PrefTrainer, *args: Any, **kwargs: Any) -> Any:
        reference = self.stage.reference
        batch = self.data_collator.packer(list(self.train_dataset))

        def note() -> None:
            inner = reference.reference if isinstance(reference, CachedReference) else reference
            seen.append((reference, (inner or reference).logps(self.model, batch).token_logps.clone()))

        note()
        result = original(self, *args, **kwargs)
        note()
        return result

    monkeypatch.setattr(PrefTrainer, "train", watched)
    return seen


KINDS: dict[str, tuple[dict[str, Any], type, str]] = {
    "fresh adapter": ({}, AdapterOff, "with the adapter switched off"),
    "continued adapter": (
        {"adapter_name_or_path": "ADAPTER"},
        InitialAdapter,
        "with a frozen copy of ADAPTER",
    ),
    "continued, against the base": (
        {"adapter_name_or_path": "ADAPTER", "ref_model": "BASE"},
        AdapterOff,
        "with the adapter switched off",
    ),
    "new upon old": (
        {"adapter_name_or_path": "ADAPTER", "create_new_adapter": True},
        AdapterOff,
        "BASE with ADAPTER merged in, and the new adapter switched off",
    ),
    "pissa": ({"pissa_init": True, "pissa_iter": 4}, InitialAdapter, "the adapter that pissa_init made"),
    "full": ({"finetuning_type": "full", "learning_rate": 1e-3}, FrozenModel, "a frozen copy of BASE"),
    "freeze": ({"finetuning_type": "freeze", "freeze_trainable_layers": 1}, FrozenModel, "a frozen copy of"),
    "explicit": ({"ref_model": "OTHER"}, FrozenModel, "OTHER (a second model in memory)"),
    "explicit with adapter": (
        {"ref_model": "BASE", "ref_model_adapters": "ADAPTER"},
        FrozenModel,
        "BASE with ADAPTER",
    ),
    "explicit, quantised": ({"ref_model": "BASE", "ref_model_quantization_bit": 4}, FrozenModel, "BASE"),
}


@pytest.fixture
def fill_in(adapter: str, other_model: str, tiny_model: Path) -> Callable[[Any], Any]:
    names = {"ADAPTER": adapter, "OTHER": other_model, "BASE": str(tiny_model)}

    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        if isinstance(value, str):
            for name, path in names.items():
                value = value.replace(name, path)
        return value

    return replace


RARE = ("continued, against the base", "freeze", "explicit with adapter", "explicit, quantised")


@pytest.mark.parametrize("kind", rest_is_slow([kind for kind in KINDS if kind not in RARE], RARE))
def test_the_reference_is_the_one_named_and_does_not_move(
    write_config, tmp_path: Path, watch: list[Any], fill_in, kind: str
) -> None:
    """Its log-probs before and after six steps, and after a resume, are the same bits.

    Training starts at ln 2 where it is what training starts from, anywhere else where it is another model.
    """
    keys, expected_type, words = KINDS[kind]
    keys = {"ref_cache": False, "max_steps": 6, "save_steps": 4, **fill_in(keys)}
    watch.clear()
    printed = run(write_config(**keys))
    (reference, before), (_, after) = watch
    assert type(reference) is expected_type and fill_in(words) in printed
    is_start = not any(word in kind for word in ("explicit", "against"))
    assert (abs(losses(tmp_path / "out")[0] - 0.693147) < 2e-4) is is_start
    assert torch.equal(before, after)
    record = json.loads((tmp_path / "out" / "prefkit.json").read_text())
    assert record["reference"] == reference.describe()
    unfinish(tmp_path / "out")
    finished = weights(tmp_path / "out")
    watch.clear()
    assert "Resuming from" in run(write_config(**keys))
    assert [torch.equal(found, before) for _, found in watch] == [True, True]
    assert all(torch.equal(finished[name], found) for name, found in weights(tmp_path / "out").items())


CACHED = {
    "lora": {},
    "two rows a batch": {"per_device_train_batch_size": 2},
    "repeat layout": {"batch_layout": "repeat"},
    "continued": {"adapter_name_or_path": "ADAPTER"},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3},
    "explicit": {"ref_model": "OTHER"},
    "length-desensitised": {"ld_alpha": 0.5},
}


@pytest.mark.parametrize("kind", rest_is_slow([*CACHED][:5], [*CACHED][5:]))
def test_cached_and_uncached_runs_give_identical_weights(
    write_config, tmp_path: Path, fill_in, kind: str
) -> None:
    keys: dict[str, Any] = {"per_device_train_batch_size": 1, "max_steps": ..., "num_train_epochs": 2}
    keys |= {"max_samples": 4, "eval_dataset": "held_out", "do_eval": True, **fill_in(CACHED[kind])}
    run(write_config(output_dir=str(tmp_path / "without"), ref_cache=False, **keys))
    first = run(write_config(output_dir=str(tmp_path / "with"), **keys))
    second = run(write_config(output_dir=str(tmp_path / "again"), **keys))
    assert "0 of 8 rows found" in first and "8 of 8 rows found" in second
    assert same(tmp_path / "with", tmp_path / "without") and same(tmp_path / "again", tmp_path / "without")
    results = [
        {k: v for k, v in json.loads((tmp_path / name / "eval_results.json").read_text()).items() if "/" in k}
        for name in ("with", "without", "again")
    ]
    assert results[0] == results[1] == results[2]


# In four steps.
EACH_ROW_TWICE: dict[str, Any] = {
    "max_steps": ...,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 6,
}


def test_a_sweep_over_losses_reads_the_cache_and_computes_no_reference(
    write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = EACH_ROW_TWICE
    run(write_config(**keys))

    def refuse(self: AdapterOff, *args: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(AdapterOff, "logps", refuse)
    for number, loss in enumerate(("hinge", "ipo", "sigmoid")):
        run(write_config(output_dir=str(tmp_path / str(number)), pref_loss=loss, pref_beta=0.3, **keys))
    with pytest.raises(AssertionError, match="computed again"):
        run(write_config(output_dir=str(tmp_path / "new"), cutoff_len=50, **keys))


def change_response(folder: Path, config: dict[str, Any]) -> None:
    rows = json.loads((folder / "pairs.json").read_text())
    rows[3]["rejected"] += "!"
    (folder / "pairs.json").write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("name", "found"),
    rest_is_slow([("response", 11), ("adapter", 0), ("nothing", 12)], [("template", 0), ("truncation", 5)]),
)
def test_what_has_changed_is_computed_again(
    write_config, tmp_path: Path, dataset_dir: Path, adapter: str, name: str, found: int
) -> None:
    keys: dict[str, Any] = {**EACH_ROW_TWICE, "adapter_name_or_path": adapter}
    assert "0 of 12 rows found" in run(write_config(**keys))
    if name == "response":
        change_response(dataset_dir, keys)
    elif name == "template":
        keys["template"] = "default"
    elif name == "truncation":
        keys["cutoff_len"] = 50
    elif name == "adapter":
        (Path(adapter) / "probe.json").unlink()
        file = Path(adapter) / "adapter_model.safetensors"
        save_file({key: tensor * 1.01 for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    printed = run(write_config(output_dir=str(tmp_path / "second"), **keys))
    assert f"{found} of 12 rows found" in printed
    run(write_config(output_dir=str(tmp_path / "plain"), ref_cache=False, **keys))
    assert same(tmp_path / "second", tmp_path / "plain")


def test_a_damaged_cache_is_said_aloud_and_computed_again(write_config, tmp_path: Path) -> None:
    keys = EACH_ROW_TWICE
    run(write_config(output_dir=str(tmp_path / "one"), **keys))
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    printed = run(write_config(output_dir=str(tmp_path / "two"), **keys))
    assert "is damaged (wrong hash); its rows are computed again" in printed and "0 of 12 rows" in printed
    assert same(tmp_path / "one", tmp_path / "two")


def test_the_cache_is_on_where_rows_are_seen_again(write_config, tmp_path: Path) -> None:
    for keys, expected in (
        ({"max_steps": 2}, False),
        ({"max_steps": 3}, True),
        ({"max_steps": ..., "num_train_epochs": 1}, False),
        ({"max_steps": ..., "num_train_epochs": 1, "ref_cache": True}, True),
        ({"max_steps": ..., "num_train_epochs": 2, "ref_cache": False}, False),
    ):
        printed = run(write_config(overwrite_output_dir=True, per_device_train_batch_size=6, **keys))
        assert ("Reference cache" in printed) is expected, keys


def test_a_cached_full_run_holds_one_model(write_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefkit.train.references.copy", None)  # whoever copies the model fails
    printed = run(write_config(finetuning_type="full", **EACH_ROW_TWICE))
    assert "from the cache (no second model in memory)" in printed
    with pytest.raises(AttributeError, match="deepcopy"):
        run(write_config(finetuning_type="full", overwrite_output_dir=True))


@forks
@pytest.mark.parametrize("tuning", rest_is_slow(["lora"], ["full"]))
def test_two_processes_fill_and_read_one_cache(write_config, tmp_path: Path, tuning: str) -> None:
    keys = {**EACH_ROW_TWICE, "max_samples": 6, "per_device_train_batch_size": 1, "learning_rate": 1e-3}
    config = write_config(**keys, finetuning_type=tuning)
    printed = {}
    for name, cached in (("without", "false"), ("filled", "true"), ("read", "true")):
        more = [f"output_dir={tmp_path / name}", f"ref_cache={cached}"]
        printed[name] = run_in_two(tmp_path, "train", config, *more)
    assert "0 of 6 rows found" in printed["filled"] and "6 of 6 rows found" in printed["read"]
    assert same(tmp_path / "filled", tmp_path / "without") and same(tmp_path / "read", tmp_path / "without")


def test_a_wrong_cache_stops_the_run_before_the_first_update(
    write_config, tmp_path: Path, monkeypatch
) -> None:
    """The first batch compares policy and reference, wherever the latter comes from."""
    keys = EACH_ROW_TWICE
    run(write_config(output_dir=str(tmp_path / "one"), **keys))
    monkeypatch.setattr("prefkit.model.ref_cache.LogpsStore.get", lambda self, key: self._rows[key] - 0.01)
    with pytest.raises(UserError, match="policy and reference must agree"):
        run(write_config(output_dir=str(tmp_path / "two"), **keys))


def test_a_killed_run_finds_what_its_checkpoints_kept(write_config, tmp_path: Path, monkeypatch) -> None:
    keys: dict[str, Any] = {"max_steps": 7, "save_steps": 4, "per_device_train_batch_size": 2}
    run(write_config(output_dir=str(tmp_path / "whole"), ref_cache=False, **keys))
    original = PrefTrainer.compute_loss

    def dies(self: PrefTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PrefTrainer, "compute_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        run(write_config(**keys))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "8 of 12 rows found" in run(write_config(**keys))
    assert same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_a_run_does_not_go_on_upon_other_weights(
    write_config, tmp_path: Path, adapter: str, other_model: str, what: str
) -> None:
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    tokenizer = Path(str(load_config(write_config()).config.model.model_name_or_path))
    for file in tokenizer.glob("*token*"):
        (base / file.name).write_bytes(file.read_bytes())
    (base / "chat_template.jinja").write_bytes((tokenizer / "chat_template.jinja").read_bytes())
    keys = {"model_name_or_path": str(base), "adapter_name_or_path": adapter, "max_steps": 4, "save_steps": 2}
    run(write_config(**keys))
    record = json.loads((tmp_path / "out" / "prefkit.json").read_text())
    (tmp_path / "out" / "prefkit.json").write_text(json.dumps(record | {"finished": False}))
    (Path(adapter) / "probe.json").unlink()
    changed = base / "model.safetensors" if what == "base" else Path(adapter) / "adapter_model.safetensors"
    tensors = load_file(changed)
    save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, changed, {"format": "pt"})
    with pytest.raises(UserError, match=f"something else:\n  model {changed.parent}: "):
        run(write_config(**keys))


def test_an_adapter_of_a_base_that_was_changed_is_refused(
    write_config, adapter: str, other_model: str, tiny_model: Path
) -> None:
    for file in [*tiny_model.glob("*token*"), tiny_model / "chat_template.jinja"]:
        (Path(other_model) / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"is not the model that was trained: .* nats per token away"):
        run(write_config(model_name_or_path=other_model, adapter_name_or_path=adapter))


def test_references_that_do_not_fit_are_refused(write_config, tmp_path: Path) -> None:
    make_model(vocab_size=100).save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match="small: the tokenizer has 263 tokens and the model 100 rows"):
        run(write_config(ref_model=str(tmp_path / "small")))
    make_model("mistral", sliding_window=16).save_pretrained(tmp_path / "window")
    with pytest.raises(UserError, match=r"ref_model: .*window of 16.*write batch_layout: repeat"):
        run(write_config(ref_model=str(tmp_path / "window")))
    assert "Reference" in run(write_config(ref_model=str(tmp_path / "window"), batch_layout="repeat"))


def test_evaluation_without_training(write_config, tmp_path: Path, adapter: str, tiny_model: Path) -> None:
    keys = {
        "do_train": False,
        "do_eval": True,
        "do_predict": True,
        "eval_dataset": "held_out",
        "dataset": ...,
    }
    printed = run(write_config(adapter_name_or_path=adapter, **keys))
    assert f"{tiny_model} with the adapter switched off" in printed
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert abs(results["eval_rewards/margins"]) > 0.1
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert run_module.FILES["eval_results.json"] in printed


@pytest.mark.parametrize("learns", [False, True])
def test_a_reference_leaves_to_the_policy_who_needs_a_gradient(learns: bool, tiny_model: Path) -> None:
    """peft would have the adapter learn again, also where the policy is only measured."""
    policy = make_policy(tiny_model)
    policy.requires_grad_(learns)
    freeze_initial(policy)
    before = [(name, it.requires_grad) for name, it in policy.named_parameters()]
    batch = pack([TokenizedExample([7, 8], [[1, 2]], (), "f:1")], "shared").to_dict()
    for reference in (AdapterOff(policy), InitialAdapter(policy, "it")):
        reference.logps(policy, batch)
        assert [(name, it.requires_grad) for name, it in policy.named_parameters()] == before
