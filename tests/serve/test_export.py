"""An exported model is the trained one, for whoever reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefkit.config import ConfigError
from prefkit.config.errors import UserError
from prefkit.config.uses import EXPORT
from prefkit.data.encode import TokenizedExample
from prefkit.model.errors import ModelError
from prefkit.model.generate import generate_responses
from prefkit.runs.use import read_use_config
from prefkit.serve import export as export_module
from prefkit.serve.export import export
from prefkit.serve.load import load_model
from tests.train.runs import read, run
from tests.train.test_kills import rest_is_slow


def write(source: Path, folder: Path, *overrides: str) -> str:
    said: list[str] = []
    config = read_use_config(str(source), [f"export_dir={folder}", *overrides], EXPORT).config
    export(config, said.append)
    return "\n".join(said)


@pytest.mark.parametrize(
    "keys",
    rest_is_slow(
        [
            {},
            {"pissa_init": True, "pissa_iter": 4},
            {"add_special_tokens": "<|a|>,<|b|>", "template": "qwen3", "enable_thinking": False},
            {"finetuning_type": "full", "learning_rate": 1e-3},
        ],
        [
            {"use_dora": True, "use_rslora": True},
            {"additional_target": "lm_head"},
            {"rope_scaling": "yarn", "cutoff_len": 1000},
        ],
    ),
    ids=str,
)
def test_plain_transformers_answers_as_the_adapter_does(
    write_config, tmp_path: Path, keys: dict[str, Any]
) -> None:
    run(write_config(max_steps=6, **keys))
    said = write(tmp_path / "out", tmp_path / "exported")
    assert "probe rows agree before and after within" in said
    tuned = load_model(read_use_config(str(tmp_path / "out"), ["export_dir=x"], EXPORT).config)
    messages = [{"role": "user", "content": "Say 3 please"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    plain = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    prompt = TokenizedExample(inputs["input_ids"][0].tolist(), [], (), "")
    assert [plain] == generate_responses(tuned.model, tuned.template, [prompt], 20)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, tuned.model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_the_folder_has_all_that_a_reader_needs(write_config, tmp_path: Path) -> None:
    run(write_config(template="qwen3", enable_thinking=False))
    write(tmp_path / "out", tmp_path / "exported")
    names = {path.name for path in (tmp_path / "exported").iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert names >= wanted | {"tokenizer_config.json", "chat_template.jinja", "README.md", "prefkit.json"}
    record = read(tmp_path / "exported" / "prefkit.json")
    assert record["usage"] == {
        "template": "qwen3",
        "default_system": None,
        "tool_format": None,
        "enable_thinking": False,
        "preserve_thinking": False,
    }
    assert record["proof"]["nats_per_token"] < 1e-4 < record["proof"]["moved_by_training"]
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "sigmoid loss on pairs (12 pairs)" in card and "| thinking | off |" in card
    generation = read(tmp_path / "exported" / "generation_config.json")
    assert make_end_id(tmp_path / "exported") in generation["eos_token_id"]
    again = read_use_config(str(tmp_path / "exported"), [], EXPORT._replace(errors=())).config
    assert (again.data.template, again.data.enable_thinking) == ("qwen3", False)


def make_end_id(folder: Path) -> int:
    return int(AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>"))


def test_export_device_is_where_adapters_are_merged(
    write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    run(write_config())
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda: asked.append("asked") or torch.device("cpu")
    )
    write(tmp_path / "out", tmp_path / "one", "export_device=cpu")
    assert not asked
    write(tmp_path / "out", tmp_path / "other", "export_device=auto")
    assert asked


def test_files_are_no_larger_than_asked(
    write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[str] = []
    original = export_module._write

    def note(model: Any, *rest: Any) -> None:
        save = model.save_pretrained

        def saved(folder: str, max_shard_size: str) -> None:
            sizes.append(max_shard_size)
            save(folder, max_shard_size="50KB")

        model.save_pretrained = saved
        original(model, *rest)

    monkeypatch.setattr(export_module, "_write", note)
    run(write_config())
    write(tmp_path / "out", tmp_path / "exported", "export_size=2")
    assert sizes == ["2GB"]
    assert len(list((tmp_path / "exported").glob("model-*.safetensors"))) > 1


def test_an_export_that_is_not_the_trained_model_is_not_written(
    write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = export_module._write

    def wrong(model: Any, *rest: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight.data *= 1.02
        original(model, *rest)

    monkeypatch.setattr(export_module, "_write", wrong)
    run(write_config())
    with pytest.raises(ModelError, match="The merged model is not the one with adapters"):
        write(tmp_path / "out", tmp_path / "exported")
    assert not (tmp_path / "exported").exists() and not list(tmp_path.glob(".exported*"))


def test_an_adapter_without_a_probe_is_proved_on_questions_of_ours(write_config, tmp_path: Path) -> None:
    run(write_config())
    (tmp_path / "out" / "probe.json").unlink()
    said = write(tmp_path / "out", tmp_path / "exported")
    assert "3 probe rows agree" in said and "are those of the training" not in said


def test_dtype_says_how_the_weights_are_written(write_config, tmp_path: Path) -> None:
    run(write_config())
    write(tmp_path / "out", tmp_path / "exported", "dtype=bfloat16")
    assert read(tmp_path / "exported" / "config.json")["dtype"] == "bfloat16"


def test_a_folder_with_files_is_refused(write_config, tmp_path: Path) -> None:
    run(write_config())
    with pytest.raises(UserError, match="is not an empty folder"):
        write(tmp_path / "out", tmp_path / "out")
    with pytest.raises(ConfigError, match="export_dir: missing"):
        read_use_config(str(tmp_path / "out"), [], EXPORT)
