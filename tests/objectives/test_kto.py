"""KTO against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch

from prefkit.objectives.kto import kl_estimate, kto_loss

# s(0.1) = 0.524979, s(0.2) = 0.549834, s(0.5) = 0.622459, s(1) = 0.731059.
DESIRABLE = torch.tensor([True, True, False, False])


def test_numbers_derived_by_hand() -> None:
    """beta 0.1, z 2: leads of 0.1 (3 - 2), 0.1 (-8 - 2), 0.1 (4 - 2), 0.1 (-3 - 2)."""
    logratios = torch.tensor([3.0, -8.0, 4.0, -3.0])
    losses = kto_loss(logratios, DESIRABLE, kl=2.0, beta=0.1)
    assert losses.tolist() == pytest.approx([0.475021, 0.731059, 0.549834, 0.377541], abs=1e-6)
    weighed = kto_loss(logratios, DESIRABLE, kl=2.0, beta=0.1, chosen_weight=2.0, rejected_weight=0.5)
    assert weighed.tolist() == pytest.approx([0.950042, 1.462117, 0.274917, 0.188771], abs=1e-6)


def test_half_the_weight_at_the_reference() -> None:
    losses = kto_loss(torch.zeros(4), DESIRABLE, kl=0.0, beta=0.3, chosen_weight=1.5, rejected_weight=3.0)
    assert losses.tolist() == [0.75, 0.75, 1.5, 1.5]


@pytest.mark.parametrize("label", [True, False])
def test_one_label_alone(label: bool) -> None:
    losses = kto_loss(torch.tensor([1.0]), torch.tensor([label]), kl=0.0, beta=1.0)
    assert losses.item() == pytest.approx(0.268941 if label else 0.731059, abs=1e-6)


def test_the_gradient_is_that_of_the_formula() -> None:
    """d/dr w (1 - s(b (r - z))) = -w b s (1 - s), and the opposite sign for undesirable."""
    logratios = torch.tensor([3.0, -8.0, 4.0, -3.0], dtype=torch.float64, requires_grad=True)
    kto_loss(logratios, DESIRABLE, kl=2.0, beta=0.1, chosen_weight=2.0, rejected_weight=0.5).sum().backward()
    s = [1 / (1 + math.exp(-lead)) for lead in (0.1, -1.0, 0.2, -0.5)]
    signed = [-2.0, -2.0, 0.5, 0.5]
    assert logratios.grad is not None
    assert logratios.grad.tolist() == pytest.approx(
        [w * 0.1 * x * (1 - x) for w, x in zip(signed, s, strict=True)]
    )


def test_far_apart_it_stays_finite() -> None:
    logratios = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    losses = kto_loss(logratios, DESIRABLE, kl=0.0, beta=1.0)
    assert losses.tolist() == [0.0, 1.0, 1.0, 0.0]
    (gradient,) = torch.autograd.grad(losses.sum(), logratios)
    assert gradient.isfinite().all()


def test_the_kl_is_never_negative_and_has_no_gradient() -> None:
    total = torch.tensor(6.0, requires_grad=True)
    assert kl_estimate(total, torch.tensor(4.0)).item() == 1.5
    assert not kl_estimate(total, torch.tensor(4.0)).requires_grad
    assert kl_estimate(-total, torch.tensor(4.0)).item() == 0.0
