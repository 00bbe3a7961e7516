"""The config of a use: which file, default or override holds, and what it does not read."""

import pytest

from prefkit.config import ConfigError, dump_yaml, load_use_config
from prefkit.config.uses import EXPORT, SCORING, TALKING
from tests.config.test_secrets import SECRET

USE = "model_name_or_path: m\ntemplate: t\ntemperature: 0.5\n"


def test_in_a_use_an_override_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "use.yaml"
    path.write_text(USE)
    defaults = {"model_name_or_path": "d", "template": "d", "temperature": 0.1, "adapter_name_or_path": ["d"]}
    config, warnings = load_use_config(path, ["template=o", "max_new_tokens=7"], defaults, TALKING)
    assert warnings == ()
    assert (config.model.model_name_or_path, config.model.adapter_name_or_path) == ("m", ("d",))
    assert (config.data.template, config.data.cutoff_len) == ("o", 2048)
    assert (config.generation.temperature, config.generation.max_new_tokens) == (0.5, 7)
    assert config.generation.top_p == 0.7


def test_null_takes_a_default_of_a_use_away():
    defaults = {"model_name_or_path": "d", "adapter_name_or_path": ["a"], "enable_thinking": False}
    config = load_use_config(None, ["adapter_name_or_path=null"], defaults, TALKING).config
    assert (config.model.adapter_name_or_path, config.data.enable_thinking) == ((), False)


def test_the_problems_of_a_use_are_those_of_its_own_verb(tmp_path):
    path = tmp_path / "use.yaml"
    path.write_text("temprature: 1\ntop_p: 2\n")
    with pytest.raises(ConfigError) as caught:
        load_use_config(path, ["export_size=0"], {}, EXPORT)
    assert caught.value.problems == [
        "temprature: unknown key; did you mean temperature? (line 1)",
        "top_p: must be in the range 0 < top_p <= 1, not 2.0 (line 2)",
        "export_size: must be in the range 1 <= export_size, not 0 (command line)",
        "model_name_or_path: missing; write model_name_or_path: Qwen/Qwen3-8B",
        "export_dir: missing; write export_dir: models/my-model",
    ]


def test_without_a_file_the_command_line_is_blamed():
    with pytest.raises(ConfigError) as caught:
        load_use_config(None, [], {"model_name_or_path": "m"}, EXPORT)
    assert str(caught.value) == (
        "command line: 1 problem\n  export_dir: missing; write export_dir: models/my-model"
    )


def test_a_use_never_echoes_a_secret():
    with pytest.raises(ConfigError) as caught:
        load_use_config(None, [f"hf_hub_token={SECRET}"], {"model_name_or_path": "m"}, TALKING)
    assert caught.value.problems == [
        "hf_hub_token: a secret belongs into the environment, never into a config: set HF_TOKEN, or run "
        "`hf auth login` (command line)"
    ]


def test_the_file_of_a_run_serves_a_use(tmp_path, load):
    """Each key of a saved config is read or named as not used."""
    path = tmp_path / "saved.yaml"
    path.write_text(dump_yaml(load("lora_rank: 4\ntemplate: t\nval_size: 0.1").config.to_yaml_dict()))
    config, warnings = load_use_config(path, [], {}, TALKING)
    assert (config.model.model_name_or_path, config.data.template) == ("m", "t")
    unused = "dataset, do_train, lora_rank, output_dir, stage, val_size"
    hint = "; to use what this file trains, name its output_dir"
    assert warnings == (f"not used here: {unused}{hint}",)


def test_a_use_does_not_read_what_concerns_training_alone(tmp_path):
    """The inference YAML of another tool may name its stage."""
    file = tmp_path / "infer.yaml"
    file.write_text("model_name_or_path: m\nstage: sft\nlearning_rate: fast\n")
    loaded = load_use_config(file, [], {}, TALKING)
    assert loaded.warnings == ("not used here: learning_rate, stage",)
    with pytest.raises(ConfigError, match="did you mean learning_rate"):
        load_use_config(file, ["learning_rat=1"], {}, TALKING)


def test_what_cannot_be_scored_with():
    with pytest.raises(ConfigError, match="must be 4 or 8"):
        load_use_config(None, ["quantization_bit=6"], {"model_name_or_path": "m"}, SCORING)


def test_scoring_reads_how_rows_are_encoded_and_not_how_text_is_drawn():
    given = ["truncation=llamafactory", "cutoff_len=64", "dataset_dir=d", "temperature=0.5"]
    loaded = load_use_config(None, given, {"model_name_or_path": "m"}, SCORING)
    assert (loaded.config.data.truncation, loaded.config.data.cutoff_len) == ("llamafactory", 64)
    assert loaded.warnings == ("not used here: temperature",)
