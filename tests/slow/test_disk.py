"""Every file operation of a run killed, or failing, and every size of a disk that is too small for it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.train.forks import FORKS
from tests.train.runs import same
from tests.train.test_crashes import kill_and_run_again, sweep, whole
from tests.train.test_disk import PAGE, fail_and_run_again, run_on_small_disk, save_with_errors

pytestmark = [pytest.mark.slow, *FORKS]
__all__ = ["whole"]  # a fixture


def test_a_kill_at_every_operation_of_a_run(whole: tuple[Path, Path]) -> None:
    assert sweep(lambda operation: kill_and_run_again(*whole, operation), itertools.count(1)) > 150


def test_a_failure_of_every_operation_of_a_run(whole: tuple[Path, Path]) -> None:
    assert sweep(lambda operation: fail_and_run_again(*whole, operation), itertools.count(1)) > 150


def test_an_error_at_every_operation_of_a_save(tmp_path: Path) -> None:
    assert save_with_errors(tmp_path, first=1, stride=1) > 36


def test_every_size_of_a_disk_that_is_too_small(whole: tuple[Path, Path], tmp_path: Path) -> None:
    config, reference = whole

    def is_too_small(pages: int) -> bool:
        code = run_on_small_disk(config, tmp_path / f"{pages}", pages * PAGE)
        assert code in (0, 74) and same(tmp_path / f"{pages}", reference), pages
        return code == 74

    assert sweep(is_too_small, itertools.count(1)) > 50
