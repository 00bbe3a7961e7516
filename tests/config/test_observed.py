"""Every key changes something that a named test observes."""

import re

import pytest

from prefkit.config.foreign import FOREIGN
from prefkit.config.schema import KEYS
from tests.config.observed import OBSERVED, PASSED_ON, ROOT, text_of
from tests.train.test_arguments import PASSED

# Tests that come with what reads the data: to be taken out of here when they are there.
PENDING = {
    "tests/data/test_dataset.py",
    "tests/train/test_data.py",
    "tests/data/test_encode.py::test_truncation",
}


def test_every_key_has_a_test():
    refused = {name for name in KEYS if name in FOREIGN}
    assert KEYS.keys() - OBSERVED.keys() - {*PASSED} <= refused
    assert OBSERVED.keys() <= KEYS.keys()
    assert not OBSERVED.keys() & {*PASSED}
    assert 'parametrize("name", PASSED)' in text_of(PASSED_ON)


@pytest.mark.parametrize("key", OBSERVED)
def test_the_named_test_is_there_and_speaks_of_the_key(key):
    test = OBSERVED[key]
    if test in PENDING or test.partition("::")[0] in PENDING:
        pytest.skip(f"{test} is not written yet")
    words = re.findall(r"\w+", text_of(test).replace("\\n", " "))
    assert key in words, f"{test} does not mention {key}"


def test_nothing_is_pending_that_is_there():
    for test in PENDING:
        file, _, function = test.partition("::")
        assert not (ROOT / file).is_file() or (function and function not in (ROOT / file).read_text())
