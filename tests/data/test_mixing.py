"""Which rows are used, how often and in which order."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from prefkit.data.mixing import hold_out, mix, sample_rows


def mixed(strategy: str, probs: tuple[float, ...] = (), sizes: tuple[int, ...] = (2, 5, 3)) -> str:
    starts = [lambda k=k, n=n: iter(f"{'abc'[k]}{i}" for i in range(n)) for k, n in enumerate(sizes)]
    return " ".join(mix(starts, strategy, probs, seed=0))


def test_in_turn() -> None:
    assert mixed("concat") == "a0 a1 b0 b1 b2 b3 b4 c0 c1 c2"
    assert mixed("interleave_under") == "a0 b0 c0 a1 b1 c1"
    assert mixed("interleave_over") == "a0 b0 c0 a1 b1 c1 a0 b2 c2 a1 b3 c0 a0 b4 c1"
    assert mixed("interleave_once") == "a0 b0 c0 a1 b1 c1 b2 c2 b3 b4"


def test_drawn_by_probabilities() -> None:
    probs = (0.6, 0.3, 0.1)
    once = mixed("interleave_once", probs).split()
    assert sorted(once) == sorted(mixed("concat").split()) and once != mixed("concat").split()
    under = mixed("interleave_under", probs).split()
    assert any(name in under for name in ("a1", "b4", "c2")), "it ends with the last row of some set"
    over = Counter(mixed("interleave_over", probs, (2, 2, 2)).split())
    assert over.keys() == {"a0", "a1", "b0", "b1", "c0", "c1"} and over["a0"] > over["c0"]
    assert mixed("interleave_over", probs) == mixed("interleave_over", probs)


def test_shares_follow_the_probabilities() -> None:
    items = mixed("interleave_under", (0.7, 0.2, 0.1), (7000, 7000, 7000)).split()
    shares = Counter(item[0] for item in items)
    assert shares["a"] / len(items) == pytest.approx(0.7, abs=0.02)


def test_an_empty_data_set_is_passed_over() -> None:
    assert mixed("interleave_once", (), (0, 1, 2)) == "b0 c0 c1"
    assert mixed("interleave_over", (0.9, 0.05, 0.05), (0, 1, 1)).split()[-1] in ("b0", "c0")
    assert mixed("interleave_once", (), (0, 0, 0)) == ""


def test_sampling_draws_all_before_any_twice() -> None:
    assert sample_rows(5, None, 0) == [1] * 5
    assert sorted(sample_rows(5, 3, 0)) == [0, 0, 1, 1, 1]
    assert sorted(sample_rows(5, 12, 0)) == [2, 2, 2, 3, 3]
    assert sample_rows(50, 20, 0) != sample_rows(50, 20, 1)


def test_held_out_rows() -> None:
    assert (
        hold_out(10, 0.2, 0).sum() == 2 and hold_out(10, 3, 0).sum() == 3 and hold_out(10, 0.01, 0).sum() == 1
    )
    assert np.array_equal(hold_out(10, 3, 5), hold_out(10, 3, 5))
    with pytest.raises(ValueError, match="3 holds out 3 of 3 rows; none is left"):
        hold_out(3, 3, 0)
