"""An exported reward model gives the scores of the trained one, for whoever reads it."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefkit.config import ConfigError
from prefkit.config.errors import UserError
from prefkit.config.schema import TuningConfig
from prefkit.config.uses import EXPORT, TALKING
from prefkit.model.adapter import add_lora
from prefkit.model.errors import ModelError
from prefkit.model.reward import HEAD_WEIGHT, VALUE_HEAD
from prefkit.model.reward_model import EXACT
from prefkit.runs.use import read_use_config
from prefkit.serve import export_reward
from prefkit.serve.load import load_assistant, load_model
from tests.conftest import make_model, make_tokenizer
from tests.model.test_reward import make_reward_model, put_value_head
from tests.serve.test_export import write
from tests.train.runs import load_reward_model, read, run, weights
from tests.train.test_kills import rest_is_slow
from tests.train.test_reward import KINDS, end_padded_model, plain_scores, scores, texts

CODE = re.compile(r"\n\n((?:    .*\n)+)")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that trains without further keys leaves its reward model for the others."""
    return tmp_path_factory.mktemp("kept") / "out"


@pytest.fixture
def train(write_config: Callable[..., Path], tmp_path: Path, kept: Path) -> Callable[..., Path]:
    """Trains a reward model in `out`; arguments are keys."""

    def trained(**keys: Any) -> Path:
        given = {"stage": "rm", "template": "chatml", "max_steps": 4, **keys}
        if keys:
            run(write_config(**given))
            return tmp_path / "out"
        if not kept.exists():
            run(write_config(**given, output_dir=str(kept)))
        return Path(shutil.copytree(kept, tmp_path / "out"))

    return trained


def value_head_adapter(folder: Path, base: Path, bias: float = 0.0) -> Path:
    """What LLaMA-Factory leaves of a reward model: an adapter of a language model, a value head beside it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    policy: Any = add_lora(model, TuningConfig(lora_rank=2))
    torch.manual_seed(1)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    policy.save_pretrained(str(folder))
    put_value_head(folder, bias)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "keys",
    rest_is_slow(
        [{}, {"model": "end"}, {"pissa_init": True, "pissa_iter": 4}, KINDS["full"]],
        [
            {"use_dora": True, "use_rslora": True},
            {"add_special_tokens": "<|a|>,<|b|>"},
            {"rope_scaling": "yarn", "cutoff_len": 1000},
            KINDS["freeze"],
        ],
    ),
    ids=str,
)
def test_plain_transformers_scores_as_the_trained_model(
    train: Callable[..., Path], tmp_path: Path, keys: dict[str, Any]
) -> None:
    given = dict(keys)
    if given.pop("model", None):
        given["model_name_or_path"] = str(end_padded_model(tmp_path / "base"))
    source, folder = train(**given), tmp_path / "exported"
    said = write(source, folder)
    assert f"`prefkit score {folder} data.jsonl -o scores.jsonl` scores with it." in said
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = texts(folder)
    own = scores(load_reward_model(source), tokenizer, rows)
    assert len(set(own)) == len(own)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for batch in (1, 4):
        assert plain_scores(model, tokenizer, rows, batch) == pytest.approx(own, abs=1e-5)
    again = load_reward_model(folder)
    assert again.proof == 0 and again.offset == 0
    assert scores(again, tokenizer, rows) == pytest.approx(own, abs=1e-5)
    config = read(folder / "config.json")
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "right"
    assert set(weights(folder)) == set(model.state_dict())


def test_the_folder_has_all_that_a_reader_needs(train: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    write(train(template="qwen3", enable_thinking=False), folder)
    names = {path.name for path in folder.iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == wanted | {"chat_template.jinja", "README.md", "prefkit.json", "probe.json"}
    record = read(folder / "prefkit.json")
    assert (record["stage"], record["run"]["loss"]) == ("rm", "bradley-terry")
    assert record["usage"]["template"] == "qwen3" and record["usage"]["enable_thinking"] is False
    assert record["proof"]["score"] < 1e-4 < record["proof"]["moved_by_training"]
    assert "bradley-terry loss on pairs (12 pairs)" in (folder / "README.md").read_text()
    again = read_use_config(str(folder), [], EXPORT._replace(errors=())).config
    assert (again.data.template, again.data.enable_thinking) == ("qwen3", False)
    assert read(folder / "probe.json")["tolerance"] == EXACT


def test_the_cards_score(
    train: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their code as it stands, one of them in a process that knows nothing of prefkit."""
    source = train()
    codes = {}
    for form in ("", "full", "lora"):
        folder = tmp_path / f"exported{form}"
        write(source, folder, *([f"export_value_head={form}"] if form else []))
        (lines,) = CODE.findall((folder / "README.md").read_text())
        codes[form] = textwrap.dedent(lines).replace("path/to/this/folder", folder.name)
    afresh = [sys.executable, "-I", "-c", codes[""]]
    done = subprocess.run(afresh, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    for form in ("full", "lora"):
        exec(codes[form], {})
    printed = (done.stdout + capsys.readouterr().out).splitlines()
    tokenizer = AutoTokenizer.from_pretrained(source)
    turns = [{"role": "user", "content": "Is water wet?"}, {"role": "assistant", "content": "Yes."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    (own,) = scores(load_reward_model(source), tokenizer, [text])
    found = [float(line.removeprefix("tensor([").removesuffix("])")) for line in printed]
    assert found == pytest.approx([own] * 3, abs=1e-4)


@pytest.mark.parametrize("kind", rest_is_slow(["lora", "tied"], ["freeze", "full"]))
def test_a_value_head_beside_a_merged_language_model(
    train: Callable[..., Path], tmp_path: Path, tiny_model: Path, kind: str
) -> None:
    base = tiny_model
    if kind == "tied":
        base = tmp_path / "base"
        make_model(tie_word_embeddings=True).save_pretrained(base)
        make_tokenizer().save_pretrained(base)
    source, folder = train(**KINDS.get(kind, {}), model_name_or_path=str(base)), tmp_path / "exported"
    said = write(source, folder, "export_value_head=full")
    assert "`prefkit score " in said
    head = load_file(folder / VALUE_HEAD)
    assert {name: (tuple(it.shape), it.dtype) for name, it in head.items()} == {
        "v_head.summary.weight": ((1, 32), torch.float32),
        "v_head.summary.bias": ((1,), torch.float32),
    }
    rows = [[9, 8, 7], [2, 30, 31, 2, 40]]
    trained = load_reward_model(source)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for row, score in zip(rows, trained.score_rows(rows), strict=True):
        hidden = model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0, -1]
        found = hidden @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"]
        assert found.item() == pytest.approx(score, abs=1e-5)
    again = load_reward_model(folder)
    assert again.proof == 0 and again.score_rows(rows) == pytest.approx(trained.score_rows(rows), abs=1e-5)
    untrained = make_model(tie_word_embeddings=kind == "tied")
    if kind != "full":  # which may have trained the embedding, where that is the head
        assert torch.equal(model.lm_head.weight, untrained.lm_head.weight)
    config = read(folder / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"] and "id2label" not in config
    assert "`reward_model_type: full`" in (folder / "README.md").read_text()


def test_a_value_head_beside_an_adapter(train: Callable[..., Path], tmp_path: Path, tiny_model: Path) -> None:
    """As LLaMA-Factory reads it: a second adapter upon the policy's language model."""
    source, folder = train(additional_target="embed_tokens"), tmp_path / "exported"
    said = write(source, folder, "export_value_head=lora")
    assert "Merging" not in said and "score the same before and after" in said
    config = read(folder / "adapter_config.json")
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", ["embed_tokens"])
    assert not [name for name in weights(folder) if "score" in name]
    policy: Any = add_lora(AutoModelForCausalLM.from_pretrained(tiny_model), TuningConfig(lora_rank=4))
    assert isinstance(policy, PeftModel)
    policy.load_adapter(str(folder), "reward")
    policy.set_adapter("reward")
    head = load_file(folder / VALUE_HEAD)
    trained, row = load_reward_model(source), [9, 8, 7]
    hidden = policy(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0, -1]
    found = hidden @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"]
    assert found.item() == pytest.approx(trained.score_rows([row])[0], abs=1e-5)
    again = load_reward_model(folder)
    assert again.proof == pytest.approx(0, abs=EXACT)
    assert again.score_rows([row]) == pytest.approx(trained.score_rows([row]), abs=1e-5)
    assert "library_name: peft" in (folder / "README.md").read_text()
    write(folder, tmp_path / "whole")
    assert load_reward_model(tmp_path / "whole").score_rows([row]) == pytest.approx(
        trained.score_rows([row]), abs=1e-5
    )


def test_an_adapter_knows_how_its_base_was_read(train: Callable[..., Path], tmp_path: Path) -> None:
    source, folder = train(rope_scaling="yarn", cutoff_len=1000, dtype="float32"), tmp_path / "exported"
    write(source, folder, "export_value_head=lora")
    usage = read(folder / "prefkit.json")["usage"]
    assert (usage["rope_scaling"], usage["cutoff_len"], usage["dtype"]) == ("yarn", 1000, "float32")
    assert load_reward_model(folder).proof == pytest.approx(0, abs=EXACT)
    again = read_use_config(str(folder), ["export_dir=x"], EXPORT).config
    assert (again.model.rope_scaling, again.data.cutoff_len, again.model.dtype) == ("yarn", 1000, "float32")


@pytest.mark.parametrize("form", ["full", "lora"])
@pytest.mark.parametrize("key", ["v_head.summary.weight", "v_head.summary.bias"])
def test_a_head_that_has_changed_is_refused(
    train: Callable[..., Path], tmp_path: Path, form: str, key: str
) -> None:
    folder = tmp_path / "exported"
    write(train(), folder, f"export_value_head={form}")
    tensors = load_file(folder / VALUE_HEAD)
    tensors[key] = tensors[key] * 1.01 + 1e-3
    save_file(tensors, folder / VALUE_HEAD)
    with pytest.raises(ModelError, match="is not the reward model that was trained"):
        load_reward_model(folder)
    with pytest.raises(ModelError, match="is not the reward model that was trained"):
        write(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_whole_model_whose_head_has_changed_is_refused(train: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    write(train(), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {HEAD_WEIGHT: tensors[HEAD_WEIGHT] * 1.01}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match="is not the reward model that was trained"):
        load_reward_model(folder)
    del tensors[HEAD_WEIGHT]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"the weights lack score.weight"):
        write(folder, tmp_path / "again")
    assert not list(tmp_path.glob("*again*"))


@pytest.mark.parametrize("beside", ["model", "adapter"])
def test_a_reward_model_of_llamafactory(tmp_path: Path, tiny_model: Path, beside: str) -> None:
    folder = tmp_path / "theirs"
    if beside == "model":
        shutil.copytree(tiny_model, folder)
        put_value_head(folder, bias=0.75)
    else:
        value_head_adapter(folder, tiny_model, bias=0.75)
    rows = [[9, 8, 7], [12, 40, 41, 13]]
    theirs = load_reward_model(folder).score_rows(rows)
    said = write(folder, tmp_path / "score", "template=chatml")
    assert "has a value head beside it and is exported as a reward model" in said
    assert f"warning: {VALUE_HEAD} has a bias, 0.75" in said and "every score is 0.75 lower" in said
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "score").eval()
    found = [plain(torch.tensor([row])).logits.item() for row in rows]
    assert found == pytest.approx([score - 0.75 for score in theirs], abs=1e-5)
    for form in ("full", "lora") if beside == "adapter" else ("full",):
        said = write(folder, tmp_path / form, "template=chatml", f"export_value_head={form}")
        assert "bias" not in said
        again = load_reward_model(tmp_path / form)
        assert again.offset == 0.75 and again.score_rows(rows) == pytest.approx(theirs, abs=1e-5)
        assert torch.equal(
            load_file(tmp_path / form / VALUE_HEAD)["v_head.summary.bias"], torch.tensor([0.75])
        )
    (folder / VALUE_HEAD).unlink()
    assert "prefkit chat" in write(folder, tmp_path / "language", "template=chatml")
    (folder / "value_head.bin").write_bytes(b"pickled")
    with pytest.raises(ModelError, match="is a pickle, which is not opened"):
        write(folder, tmp_path / "pickled", "template=chatml")


def test_a_value_head_of_a_run_of_ppo_makes_no_reward_model(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(tiny_model, folder)
    put_value_head(folder)
    (folder / "prefkit.json").write_text(json.dumps({"stage": "ppo"}))
    assert "prefkit chat" in write(folder, tmp_path / "exported")


def test_adapters_upon_each_other(train: Callable[..., Path], write_config: Any, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(output_dir=str(one))
    train(output_dir=str(two), adapter_name_or_path=str(one), create_new_adapter=True)
    write(two, tmp_path / "exported")
    row = [[9, 8, 7]]
    own = load_reward_model(two).score_rows(row)
    assert load_reward_model(tmp_path / "exported").score_rows(row) == pytest.approx(own, abs=1e-5)
    with pytest.raises(UserError, match=r"lora is for one adapter .* and .*two has 2 adapters: write full"):
        write(two, tmp_path / "lora", "export_value_head=lora")
    with pytest.raises(UserError, match=r"exported has no adapter: write full"):
        write(tmp_path / "exported", tmp_path / "lora", "export_value_head=lora")
    train(output_dir=str(tmp_path / "three"), model_name_or_path=str(tmp_path / "exported"))
    with pytest.raises(UserError, match=r"three has one upon a reward model: write full"):
        write(tmp_path / "three", tmp_path / "lora", "export_value_head=lora")
    write(tmp_path / "three", tmp_path / "full", "export_value_head=full")  # its head is that of one's base
    assert load_reward_model(tmp_path / "full").proof == 0


def test_no_head_of_a_language_model_is_to_be_found(tmp_path: Path) -> None:
    make_reward_model().save_pretrained(tmp_path / "reward")
    make_tokenizer().save_pretrained(tmp_path / "reward")
    with pytest.raises(
        ModelError, match=r"full is a language model with its own head.* none in .*reward: export"
    ):
        write(tmp_path / "reward", tmp_path / "exported", "export_value_head=full")
    assert not list(tmp_path.glob("*exported*"))


def test_a_written_model_that_scores_otherwise_is_not_left(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = export_reward._merge
    source = train()

    def wrong_weights(*given: Any) -> Any:
        merged: Any = original(*given)
        merged.model.layers[1].mlp.up_proj.weight.data *= 1.02
        return merged

    def without_matrices(model: Any, *rest: Any) -> Any:
        return model.unload()

    for wrong in (wrong_weights, without_matrices):
        monkeypatch.setattr(export_reward, "_merge", wrong)
        with pytest.raises(
            ModelError, match=r"The written reward model is not .*out: scores of the probe rows"
        ):
            write(source, tmp_path / "exported")
        assert not list(tmp_path.glob("*exported*"))


def test_a_padding_token_that_a_row_ends_in_is_noticed(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = train(
        template="llama3", model_name_or_path=str(end_padded_model(tmp_path / "base", "<|eot_id|>"))
    )

    def end_token(tokenizer: Any, *rest: Any) -> None:
        tokenizer.pad_token = "<|eot_id|>"

    monkeypatch.setattr(export_reward, "set_pad_token", end_token)
    with pytest.raises(ModelError, match="The written reward model is not"):
        write(source, tmp_path / "exported")


def test_bfloat16_is_measured_and_said(train: Callable[..., Path], tmp_path: Path) -> None:
    source = train(learning_rate=3e-4)
    said = write(source, tmp_path / "exported", "dtype=bfloat16")
    assert "are 0.0e+00 apart" in said and "warning: rounding to bfloat16 takes" in said
    config, probe = read(tmp_path / "exported" / "config.json"), read(tmp_path / "exported" / "probe.json")
    assert config["dtype"] == probe["dtype"] == "bfloat16" and probe["tolerance"] >= 2**-8
    assert {it.dtype for it in weights(tmp_path / "exported").values()} == {torch.bfloat16}
    assert load_reward_model(tmp_path / "exported").proof == 0
    write(source, tmp_path / "head", "dtype=bfloat16", "export_value_head=full")
    assert load_file(tmp_path / "head" / VALUE_HEAD)["v_head.summary.weight"].dtype == torch.float32
    model = load_reward_model(tmp_path / "head").model
    assert (model.dtype, model.score.weight.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(UserError, match=r"dtype: an adapter is written as it is, upon a base in float32"):
        write(source, tmp_path / "adapter", "dtype=bfloat16", "export_value_head=lora")


def test_trained_in_bfloat16_it_is_merged_without_rounding_where_float32_is_asked_for(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    source = train(dtype="bfloat16")
    for dtype, name in ((torch.bfloat16, "as-trained"), (torch.float32, "exact")):
        given = ["dtype=float32"] if name == "exact" else []
        write(source, tmp_path / name, *given)
        assert {it.dtype for it in weights(tmp_path / name).values()} == {dtype}
        assert load_reward_model(tmp_path / name).proof == 0
    apart = {
        name: read(tmp_path / name / "prefkit.json")["proof"]["score"] for name in ("as-trained", "exact")
    }
    assert apart["exact"] < 1e-5 < 1e-3 < apart["as-trained"]


def test_rounding_that_takes_half_of_the_training_is_refused(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    source = train(learning_rate=1e-5)
    with pytest.raises(ModelError, match=r"Nothing was written. Write dtype: float32"):
        write(source, tmp_path / "exported", "dtype=bfloat16")
    assert not list(tmp_path.glob("*exported*"))
    write(source, tmp_path / "exported")


def test_keys_that_do_not_apply(train: Callable[..., Path], write_config: Any, tmp_path: Path) -> None:
    run(write_config(output_dir=str(tmp_path / "language")))
    with pytest.raises(UserError, match=r"export_value_head: .*language is a language model and has no head"):
        write(tmp_path / "language", tmp_path / "exported", "export_value_head=full")
    given = [f"export_dir={tmp_path / 'exported'}", "export_value_head=lora", "export_size=2"]
    warnings = read_use_config(str(train()), given, EXPORT).warnings
    assert warnings == ("without effect: export_size (needs a merged model)",)
    with pytest.raises(ConfigError, match="an exported model keeps the numbers of its base"):
        write(tmp_path / "out", tmp_path / "exported", "quantization_bit=4")
    with pytest.raises(ConfigError, match=r"export_value_head: .*full.*lora"):
        write(tmp_path / "out", tmp_path / "exported", "export_value_head=true")


def test_nothing_is_merged_into_a_quantised_base(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = train()
    original = export_reward.open_reward_model

    def quantized(*given: Any) -> Any:
        reward = original(*given)
        reward.model.get_base_model().is_quantized = True
        return reward

    monkeypatch.setattr(export_reward, "open_reward_model", quantized)
    with pytest.raises(
        UserError, match=r"is quantised, and nothing can be merged into it.*export_value_head: lora"
    ):
        write(source, tmp_path / "exported")


@pytest.mark.parametrize("form", ["out", "score", "full", "lora"])
def test_it_writes_no_text(train: Callable[..., Path], tmp_path: Path, form: str) -> None:
    source = train()
    if form != "out":
        write(source, tmp_path / form, *([f"export_value_head={form}"] if form != "score" else []))
    config = read_use_config(str(tmp_path / form), [], TALKING).config
    with pytest.raises(UserError) as caught:
        load_model(config)
    folder = tmp_path / form
    assert str(caught.value) == (
        f"{folder} is a reward model, which gives scores and writes no text: `prefkit score {folder} "
        f"data.jsonl -o scores.jsonl` scores a file, `prefkit serve {folder}` answers requests"
    )


def test_a_value_head_beside_what_talks_is_named(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(tiny_model, folder)
    put_value_head(folder)
    with caplog.at_level(logging.WARNING):
        load_assistant(read_use_config(str(folder), ["template=chatml"], TALKING).config)
    assert f"{VALUE_HEAD} beside it is not used; if this is a reward model, `prefkit score`" in caplog.text
