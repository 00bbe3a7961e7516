"""`prefkit keys`: one key, several, or all."""

import pytest

from prefkit.config.describe import explain, readers
from prefkit.config.errors import UserError
from prefkit.config.foreign import FOREIGN
from prefkit.config.schema import KEYS


def test_one_key():
    assert explain("pref_beta").splitlines() == [
        "pref_beta",
        "  Strength of the pull to the reference; scale of the reward in simpo, lambda in orpo.",
        "  type          float, 0 < x",
        "  default       0.1",
        "  read by       dpo, kto",
    ]
    assert explain("Pref-Beta") == explain("pref_beta")


def test_what_differs_from_llama_factory_and_what_is_not_yet_there():
    assert "  LLaMA-Factory false" in explain("ld_alpha_reference").splitlines()
    assert "  not yet       oft" in explain("finetuning_type").splitlines()
    assert "  default       none: it must be given" in explain("stage").splitlines()


def test_a_key_that_is_not_here_says_what_to_do():
    text = " ".join(explain("packing").split())
    assert text == (
        "packing Absent or off it says nothing; otherwise it is an error: preference pairs are not packed: "
        "remove the key; batch_layout: shared saves the same work."
    )
    assert "At its default (1) it says nothing; otherwise it is an error" in explain("num_beams")
    assert "is ignored with a warning" in explain("use_ipex")
    assert "read by" not in explain("hub_token")


def test_a_part_of_a_name_a_synonym_and_a_slip():
    found = explain("lora_").splitlines()
    assert found[0].endswith("keys with lora_ in their names:")
    assert [line.split()[0] for line in found[2:]] == [n for n in (*KEYS, *FOREIGN) if "lora_" in n]
    assert "this one is meant, it seems:\n\nlearning_rate\n" in explain("lr")
    beta = explain("beta")
    assert "\n\npref_beta\n" in beta and beta.endswith("In their names: pref_beta, adam_beta1, adam_beta2")
    assert "\n\nlora_rank\n" in explain("lora_rnak")
    with pytest.raises(UserError, match="no key has zzzz in its name: `prefkit keys` lists them all"):
        explain("zzzz")


def test_all_keys_are_listed_by_group():
    text = explain()
    lines = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert {*KEYS} <= {*lines}
    assert all(name in text for name in FOREIGN)
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("name", [*KEYS, *FOREIGN])
def test_every_key_can_be_asked_for(name):
    assert explain(name).startswith(name + "\n")


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("template", ("dpo", "kto", "rm", "ppo", "chat", "api", "score", "serve", "export")),
        ("truncation", ("dpo", "kto", "rm", "ppo", "score", "serve")),
        ("streaming", ("dpo", "kto", "rm", "ppo")),
        ("kto_chosen_weight", ("kto",)),
        ("top_p", ("ppo", "chat", "api")),
        ("export_size", ("export",)),
        ("learning_rate", ("dpo", "kto", "rm", "ppo")),
    ],
)
def test_who_reads_a_key(name, who):
    assert readers(KEYS[name]) == who
