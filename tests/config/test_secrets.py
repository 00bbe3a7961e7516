"""A secret is refused wherever it stands in a config, and never shown."""

import pytest

from prefkit.config import dump_yaml
from tests.config.conftest import MINIMAL

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    "key", ["hub_token", "hf_hub_token", "ms_hub_token", "om_hub_token", "swanlab_api_key"]
)
def test_secrets_are_refused_and_never_shown(problems, key):
    (problem,) = problems(f"{key}: {SECRET}")
    assert "a secret belongs into the environment" in problem
    assert SECRET not in problem


@pytest.mark.parametrize(
    ("lines", "overrides"),
    [
        ("", ["--hub_token", SECRET]),
        ("", [f"--hub_token={SECRET}"]),
        ("", [f"hub_token={SECRET}"]),
        ("", [f"hub_tokn={SECRET}"]),
        ("", [f"accelerator_config.comet.api_key={SECRET}"]),
        (f"accelerator_config: {{comet: {{api_key: {SECRET}}}}}", []),
        (f"pref_beta: {SECRET}", []),
        (f"pref_loss: {SECRET}", []),
        (f"hub_token: [{SECRET}]", []),
        (f"hub_token: {SECRET}: x", []),
        (f"hub_token: '{SECRET}\n", []),
    ],
)
def test_no_message_echoes_a_secret(problems, lines, overrides):
    found = problems(lines, *overrides)
    assert found
    assert SECRET not in "".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "ref_model: https://me:secretword@hub.example/model",
        "ref_model: https://secretword@hub.example/model",
        "ref_model: ssh://me:secretword@host/model",
        "dataset: 'https://host/rows.json?token=secretword'",
        "lora_target: [q_proj, 'https://secretword@host']",
        "accelerator_config: {tracker: 'https://host/?api_key=secretword'}",
        "default_system: My key is sk-abcdefghijklmnop12345secretword",
        "run_name: ghp_abcdefghijklmnop12345secretword",
    ],
)
def test_a_secret_within_a_text_is_refused_and_never_shown(problems, line):
    base = MINIMAL.replace("dataset: pairs\n", "") if line.startswith("dataset") else MINIMAL
    (problem,) = problems(line, base=base)
    assert problem.startswith(line.partition(":")[0])
    assert "holds what looks like a secret: put it into the environment, never into a config" in problem
    assert "secretword" not in problem


@pytest.mark.parametrize(
    "line",
    [
        "run_name: task-preferences-of-many-kinds",
        "ref_model: /models/hf_llama_base_instruct_v2",
        "ref_model: https://hub.example/models?rev=main",
        "run_name: me@host.example",
        "hub_model_id: git@host:me/model",
    ],
)
def test_what_only_resembles_a_secret_is_taken(load, line):
    assert load(line).warnings == ()


def test_secrets_never_reach_the_saved_config(load):
    config = load("hub_token: null").config
    config.training["hub_token"] = SECRET
    assert SECRET not in dump_yaml(config.to_yaml_dict())
