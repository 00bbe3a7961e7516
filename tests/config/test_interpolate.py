"""`${env:NAME}` and `${other_key}`, in files, on the command line and inside lists and mappings."""

import json
from pathlib import Path

import pytest

from prefkit.config import ConfigError, dump_yaml, load_config, load_use_config
from prefkit.config.interpolate import escape
from prefkit.config.uses import TALKING

BASE = "model_name_or_path: m\nstage: dpo\ndo_train: true\ndataset: pairs\noutput_dir: out\n"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Load BASE with more lines, some variables being set."""
    for name, text in {
        "RATE": "1e-6",
        "RANK": "4",
        "SETS": "a,b",
        "OFF": "off",
        "CLOCK": "12:30",
        "EMPTY": "",
        "HF_TOKEN": TOKEN,
        "SHORT_TOKEN": "abc",
        "INNOCENT": TOKEN,
        "ADDRESS": "https://me:secretword@host/model",
    }.items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv("NOT_SET", raising=False)

    def run(lines: str = "", *overrides: str, base: str = BASE, name: str = "run.yaml"):
        path = tmp_path / name
        path.write_text(base + lines, encoding="utf-8")
        return load_config(path, overrides)

    return run


@pytest.mark.parametrize(
    ("lines", "key", "value"),
    [
        ("learning_rate: ${env:RATE}", "learning_rate", 1e-6),
        ("lora_rank: ${env:RANK}", "lora_rank", 4),
        ("lora_rank: '${ env:RANK }'", "lora_rank", 4),
        ("bf16: ${env:OFF}", "bf16", False),
        ("run_name: ${env:CLOCK}", "run_name", "12:30"),
        ("cutoff_len: ${env:EMPTY}", "cutoff_len", 2048),
        ("lora_target: ${env:SETS}", "lora_target", ("a", "b")),
        ("run_name: r${env:RANK}-${env:RATE}", "run_name", "r4-1e-6"),
        ("lora_rank: 6\nlora_alpha: ${lora_rank}", "lora_alpha", 6),
        ("bf16: true\ntf32: ${bf16}", "tf32", True),
        ("lora_target: [q, v]\nadditional_target: ${lora_target}", "additional_target", ("q", "v")),
        ("lora_target: [q, v]\nrun_name: ${lora_target}-${bf16}", "run_name", "q,v-false"),
        ("run_name: ${pref_loss} at ${pref_beta}", "run_name", "sigmoid at 0.1"),
        ("pref_beta: 0.5\nrun_name: ${model_name_or_path}/b${pref_beta}", "run_name", "m/b0.5"),
        ("run_name: ${hub_model_id}\nhub_model_id: ${env:RANK}x", "run_name", "4x"),
        ("template: null\nrun_name: ${template}", "run_name", None),
        ("run_name: $${env:RANK}", "run_name", "${env:RANK}"),
        ("run_name: a$$${x}", "run_name", "a$${x}"),
        ("run_name: cost $5 {x}", "run_name", "cost $5 {x}"),
        ("default_system: Solve ${x}$ and $${y}", "default_system", "Solve ${x}$ and $${y}"),
        ("lora_target:\n- ${pref_loss}\n- v${env:RANK}", "lora_target", ("sigmoid", "v4")),
        ("lora_target: ['${pref_loss}', x]", "lora_target", ("sigmoid", "x")),
        (
            "lr_scheduler_kwargs: {power: '${env:RANK}', deep: {a: ['${pref_beta}', x]}}",
            "lr_scheduler_kwargs",
            {"power": 4, "deep": {"a": [0.1, "x"]}},
        ),
    ],
)
def test_values_are_filled_in(load, lines, key, value):
    config = load(lines).config
    assert config.value(key) == value
    assert type(config.value(key)) is type(value)
    again = load(base=dump_yaml(config.to_yaml_dict()))
    assert again.config == config, "the saved config holds what was filled in"


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (
            "run_name: ${env:NOT_SET}",
            "run_name: ${env:NOT_SET} is not set in the environment: export NOT_SET=..., or write the value "
            "(line 6)",
        ),
        ("run_name: x${env:}", "run_name: ${env:} is not set in the environment: export NAME="),
        ("lora_rank: ${lora_rnak}", "lora_rank: ${lora_rnak} names no key; did you mean ${lora_rank}?"),
        ("run_name: ${}", "run_name: ${} names no key; write a key of docs/keys.md, or ${env:NAME}"),
        ("run_name: ${RANK}", "${RANK} names no key: a variable of the environment is written ${env:RANK}"),
        ("run_name: ${oc.env:RANK}", "is written ${env:RANK}"),
        ("run_name: a ${lora_rank", "run_name: a ${ without its }: write ${env:NAME}, ${other_key}, or $${"),
        ("run_name: ${run_name}", "run_name: ${run_name} is the key itself: write a value (line 6)"),
        (
            "run_name: ${template}\ntemplate: a ${hub_model_id}\nhub_model_id: ${run_name}",
            "run_name: leads back to itself (run_name -> template -> hub_model_id -> run_name): write",
        ),
        ("run_name: a ${template}", "run_name: ${template} has no value, which cannot stand within a text"),
        (
            "lr_scheduler_kwargs: {a: 1}\nrun_name: a ${lr_scheduler_kwargs}",
            "is a mapping, which cannot stand",
        ),
        ("lora_rank: ${pref_loss}", 'lora_rank: a whole number is wanted, such as 8, not "sigmoid"'),
        ("lora_rank: ${env:CLOCK}", 'lora_rank: a whole number is wanted, such as 8, not "12:30"'),
        ("lr_scheduler_kwargs: {a: ['${env:NOT_SET}']}", "lr_scheduler_kwargs: ${env:NOT_SET} is not set"),
        ("hf_hub_token: ${env:HF_TOKEN}", "hf_hub_token: a secret belongs into the environment"),
        ("hub_token: ${env:NOT_SET}", "hub_token: a secret belongs into the environment"),
        ("run_name: ${hub_token}", "run_name: ${hub_token} is a secret, which no config holds"),
        ("run_name: ${env:SHORT_TOKEN}", "run_name: ${env:SHORT_TOKEN} would write a secret into the saved"),
        ("run_name: ${env:INNOCENT}", "run_name: ${env:INNOCENT} holds what looks like a secret"),
        ("lora_rank: ${env:INNOCENT}", "lora_rank: ${env:INNOCENT} holds what looks like a secret"),
        ("ref_model: ${env:ADDRESS}", "ref_model: ${env:ADDRESS} holds what looks like a secret"),
    ],
)
def test_what_cannot_be_filled_in_is_said_once(load, lines, problem):
    with pytest.raises(ConfigError) as caught:
        load(lines)
    (found,) = caught.value.problems
    assert problem in found
    assert TOKEN not in found and "secretword" not in found


def test_overrides_name_keys_of_the_file_and_the_other_way_round(load):
    config = load("lora_rank: 4\nrun_name: r${lora_rank}", "lora_rank=16", "project=${run_name}-x").config
    assert (config.value("run_name"), config.value("project")) == ("r16", "r16-x")
    assert load("", "run_name=a b ${env:RANK}").config.value("run_name") == "a b 4"
    with pytest.raises(ConfigError, match=r"\$\{env:NOT_SET\} is not set .*\(command line\)"):
        load("", "run_name=${env:NOT_SET}")


def test_a_whole_value_that_is_missing_is_missing(load):
    base = BASE.replace("output_dir: out", "output_dir: ${env:EMPTY}")
    with pytest.raises(ConfigError, match="output_dir: missing"):
        load(base=base)


def test_json_is_filled_in_too(load):
    values = dict(line.split(": ", 1) for line in BASE.splitlines()) | {"do_train": True}
    values |= {"lora_rank": "${env:RANK}", "run_name": "${lora_rank} of ${stage}", "project": "$${x}"}
    config = load(base=json.dumps(values), name="run.json").config
    assert (config.tuning.lora_rank, config.value("run_name")) == (4, "4 of dpo")
    assert config.value("project") == "${x}"


def test_quotes_are_asked_for_within_brackets(load):
    with pytest.raises(ConfigError, match=r'not valid YAML: .*; inside \[ \] and \{ \} write "\$\{...\}" in'):
        load("lora_target: [${pref_loss}, x]")


def test_a_use_fills_in_what_it_reads_alone(load, tmp_path, monkeypatch):
    load()
    path = tmp_path / "use.yaml"
    path.write_text(
        "model_name_or_path: models/${env:RANK}\nrun_name: ${env:NOT_SET}\nexport_dir: out/${template}\n"
    )
    config = load_use_config(path, [], {"template": "${qwen}"}, TALKING).config
    assert config.model.model_name_or_path == "models/4"
    assert (config.data.template, config.export.export_dir) == ("${qwen}", "out/${qwen}")


def test_escape_comes_back():
    for text in ("${x}", "$${x}", "$$${", "a$b", "${", "$"):
        assert escape([text])[0].replace("$${", "${") == text
