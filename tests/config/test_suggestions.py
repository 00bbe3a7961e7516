"""A slip of one character leads back to the key that was meant."""

import random
import string

import pytest

from prefkit.config.foreign import FOREIGN
from prefkit.config.schema import KEYS
from prefkit.config.suggest import SYNONYMS, edit_distance, nearest

CANDIDATES = [*KEYS, *FOREIGN]
LETTERS = string.ascii_lowercase + string.digits + "_"


def slips(word: str) -> list[str]:
    """Every word one deletion, swap, substitution or insertion away, that is no key itself."""
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    found = {a + b[1:] for a, b in cuts if b}
    found |= {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    found |= {a + letter + b[1:] for a, b in cuts if b for letter in LETTERS}
    found |= {a + letter + b for a, b in cuts for letter in LETTERS}
    return sorted(found - set(CANDIDATES))


def test_at_least_97_of_100_slips_are_understood():
    sample = random.Random(0)
    pairs = [(slip, key) for key in KEYS for slip in sample.sample(slips(key), 8)]
    right = sum(nearest(slip, CANDIDATES) == key for slip, key in pairs)
    assert len(pairs) > 1000
    assert right / len(pairs) >= 0.97


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("pref_bta", "pref_beta"),
        ("Pref-Beta", "pref_beta"),
        ("learning_rat", "learning_rate"),
        ("learn_rate", "learning_rate"),
        ("lora_rnak", "lora_rank"),
        ("bp16", "bf16"),
        ("eval_stategy", "eval_strategy"),
        ("quantisation_bit", "quantization_bit"),
        ("xyzzy_plugh", None),
        ("", None),
    ],
)
def test_nearest(word, key):
    assert nearest(word, CANDIDATES) == key


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("abc", "abc", 0),
        ("", "abc", 3),
        ("ca", "ac", 1),
        ("kitten", "sitting", 3),
        ("ca", "abc", 3),
    ],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b, 9) == edit_distance(b, a, 9) == distance
    assert edit_distance(a, b, 0) == min(distance, 1)


def test_synonyms_are_no_keys_and_lead_to_keys():
    assert all(word not in CANDIDATES and key in KEYS for word, key in SYNONYMS.items())
