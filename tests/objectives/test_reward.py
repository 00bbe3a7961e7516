"""The loss of a reward model against numbers derived by hand and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from prefkit.objectives.reward import bradley_terry_loss


def loss(chosen: float, rejected: float, margin: float = 0.0, center: float = 0.0) -> float:
    values = (torch.tensor([it], dtype=torch.float64) for it in (chosen, rejected, margin))
    return bradley_terry_loss(*values, center).item()


def test_by_hand() -> None:
    assert loss(0.0, 0.0) == pytest.approx(math.log(2))
    # log(1 + e^-(s_c - s_r - m))
    assert loss(1.0, 0.0) == pytest.approx(0.3132616875)
    assert loss(0.0, 1.0) == pytest.approx(1.3132616875)
    assert loss(3.0, 1.0, margin=1.0) == pytest.approx(0.3132616875)
    assert loss(2.0, 1.0, center=0.1) == pytest.approx(0.3132616875 + 0.1 * 9)
    assert loss(-500.0, 500.0) == pytest.approx(1000.0)


def test_a_constant_added_to_all_scores_is_seen_by_the_centre_alone() -> None:
    assert loss(7.0, 6.0) == pytest.approx(loss(1.0, 0.0))
    assert loss(7.0, 6.0, center=0.1) > loss(0.5, -0.5, center=0.1) == pytest.approx(loss(1.0, 0.0))


@pytest.mark.parametrize("center", [0.0, 0.3])
def test_the_gradient_is_that_of_finite_differences(center: float) -> None:
    chosen, rejected = torch.tensor([[0.3, -2.0], [1.1, 0.4]], dtype=torch.float64).requires_grad_().unbind(0)
    margins = torch.tensor([0.0, 0.7], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda c, r: bradley_terry_loss(c, r, margins, center), (chosen, rejected)
    )
