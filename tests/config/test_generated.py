"""The generated files say what the code and the installed transformers say."""

import importlib.util
import json
from pathlib import Path

import pytest

from prefkit.config.schema import KEYS
from prefkit.config.training import TRAINING_FILE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "tools" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_arguments_are_those_of_the_installed_transformers(generate):
    assert json.loads(TRAINING_FILE.read_text()) == generate.describe_training_arguments()
    assert TRAINING_FILE.read_text() == generate.render_arguments()


def test_the_page_of_keys_is_up_to_date(generate):
    assert (ROOT / "docs" / "keys.md").read_text() == generate.render_keys_doc()


@pytest.mark.parametrize(
    ("name", "types", "nullable", "default"),
    [
        ("learning_rate", ("float",), False, 5e-5),
        ("warmup_steps", ("int", "float"), False, 0),
        ("eval_steps", ("int", "float"), True, None),
        ("report_to", ("str", "list"), True, "none"),
        ("include_for_metrics", ("list",), False, []),
        ("lr_scheduler_kwargs", ("str", "dict"), True, None),
        ("bf16", ("bool",), False, False),
        ("save_strategy", ("str",), False, "steps"),
        ("fsdp", ("bool", "str"), True, None),
    ],
)
def test_types_of_training_arguments(name, types, nullable, default):
    key = KEYS[name]
    assert (key.types, key.nullable, key.default) == (types, nullable, default)


def test_choices_come_from_the_enums():
    assert KEYS["eval_strategy"].choices == ("no", "steps", "epoch")
    assert {"cosine", "linear", "warmup_stable_decay"} < set(KEYS["lr_scheduler_type"].choices)
    assert KEYS["output_dir"].required


def test_trackers_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    from prefkit.config.checks import _TRACKERS

    assert {"all", "none", *INTEGRATION_TO_CALLBACK} == _TRACKERS
