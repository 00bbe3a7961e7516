"""Every key changes something that a named test observes."""

import re

import pytest

from prefkit.config.foreign import FOREIGN
from prefkit.config.schema import KEYS
from tests.config.observed import OBSERVED, PASSED_ON, text_of
from tests.train.test_arguments import PASSED


def test_every_key_has_a_test():
    refused = {name for name in KEYS if name in FOREIGN}
    assert KEYS.keys() - OBSERVED.keys() - {*PASSED} <= refused
    assert OBSERVED.keys() <= KEYS.keys()
    assert not OBSERVED.keys() & {*PASSED}
    assert 'parametrize("name", PASSED)' in text_of(PASSED_ON)


@pytest.mark.parametrize("key", OBSERVED)
def test_the_named_test_is_there_and_speaks_of_the_key(key):
    test = OBSERVED[key]
    words = re.findall(r"\w+", text_of(test).replace("\\n", " "))
    assert key in words, f"{test} does not mention {key}"
