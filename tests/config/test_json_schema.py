"""The schema for editors takes what prefkit takes, key by key, and nothing else."""

import json
from pathlib import Path

import jsonschema
import pytest

from prefkit.config.foreign import FOREIGN
from prefkit.config.json_schema import make_json_schema
from prefkit.config.schema import KEYS
from prefkit.config.source import read_file
from prefkit.config.values import convert

ROOT = Path(__file__).parents[2]
EXAMPLES = [*ROOT.glob("examples/*.yaml")]
FILES = [*EXAMPLES, *ROOT.glob("tests/spec/*.yaml")]
VALUES = [
    *(0, 1, 3, 5000, -1, 0.5, 0.05, 1.5, 500.0, True, False, "word", "a,b", "0.5,0.5", "0.5"),
    *([], ["a", "b"], [0.5, 0.5], [True], ["a", 1], {}, {"a": 1}, "${pref_beta}", "${env:X}/y"),
]


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads((ROOT / "docs" / "prefkit.schema.json").read_text())
    assert schema == make_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def raw(path: Path) -> dict[str, object]:
    """A file as an editor with YAML 1.2 reads it, `no` being text."""
    return {entry.key: entry.value for entry in read_file(path)[0]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_that_are_there_are_valid(validator, path):
    assert not list(validator.iter_errors(raw(path)))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_a_slip_in_any_key_is_found(validator, path):
    for name, value in raw(path).items():
        assert list(validator.iter_errors({name + "x": value})), name
        assert list(validator.iter_errors({"x" + name: value})), name


@pytest.mark.parametrize("name", [name for name in KEYS if name not in FOREIGN])
def test_a_value_is_valid_where_it_converts(validator, name):
    for value in VALUES:
        is_reference = isinstance(value, str) and "${" in value
        try:
            convert(KEYS[name], value)
            fits = True
        except ValueError:
            fits = is_reference
        found = validator.is_valid({name: value})
        assert found is fits, f"{name}: {value} {'is' if found else 'is not'} valid"
    assert validator.is_valid({name: None}) is not KEYS[name].required


@pytest.mark.parametrize("name", [name for name in FOREIGN if name not in KEYS])
def test_a_refused_key_may_only_be_off(validator, name):
    row = FOREIGN[name]
    assert validator.is_valid({name: row.default}) and validator.is_valid({name: None})
    for value in ("x", 17, True, False):
        assert validator.is_valid({name: value}) is (row.verdict == "ignore" or row.is_off(value)), value


@pytest.mark.parametrize(
    ("document", "valid"),
    [
        ({"lr_scheduler_kwargs.num_cycles": 2}, True),
        ({"seed.x": 2}, False),
        ({"hub_token": "hf_x"}, False),
        ({"pref_loss": "sigmoyd"}, False),
        ({"eval_strategy": "no"}, True),
        ({"bf16": "on", "fp16": "no"}, True),
        ([], False),
    ],
)
def test_single_documents(validator, document, valid):
    assert validator.is_valid(document) is valid


def test_every_key_is_described(validator):
    for name, entry in validator.schema["properties"].items():
        assert entry["description"], name
