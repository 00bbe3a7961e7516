"""A stage against the formulas, on log-probs given by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefkit.config import MethodConfig
from prefkit.objectives.logps import ResponseLogps, sum_by_response
from prefkit.train import dpo
from prefkit.train.dpo import DpoStage
from prefkit.train.stages import IdentityError
from tests.train.given import GivenReference

# Two pairs: response tokens 0-1 | 2 | 3 | 4-6, pairs (0, 1) and (2, 3).
OWNER = torch.tensor([0, 0, 1, 2, 3, 3, 3])
POLICY = torch.tensor([-1.0, -2.0, -5.0, -1.0, -1.0, -2.0, -3.0])
REFERENCE = torch.tensor([-2.0, -2.0, -4.0, -2.0, -1.0, -1.0, -2.0])
BATCH: dict[str, Any] = {
    "pairs": torch.tensor([[0, 1], [2, 3]]),
    "margins": torch.zeros(2),
    "weights": torch.ones(2),
    "rows": ("f:1", "f:2"),
}


def compute(monkeypatch: pytest.MonkeyPatch, **method: Any) -> tuple[DpoStage, Any]:
    monkeypatch.setattr(dpo, "response_logps", lambda model, batch: sum_by_response(POLICY, OWNER, 4))
    config = MethodConfig(stage="dpo", **method)
    stage = DpoStage(config, GivenReference(REFERENCE, OWNER), torch.float32)
    return stage, stage.compute(torch.nn.Module(), BATCH)


def logsigmoid(x: float) -> float:
    return torch.nn.functional.logsigmoid(torch.tensor(x)).item()


def test_sigmoid(monkeypatch) -> None:
    # log-ratios: 1, -1 | 1, -2; margins 2 and 3
    _, output = compute(monkeypatch, pref_beta=0.5)
    assert output.losses.tolist() == pytest.approx([-logsigmoid(1.0), -logsigmoid(1.5)])
    assert output.metrics["rewards/chosen"].tolist() == pytest.approx([0.5, 0.5])
    assert output.metrics["rewards/margins"].tolist() == pytest.approx([1.0, 1.5])
    assert output.metrics["logps/rejected"].tolist() == [-5.0, -6.0]


def test_dpo_label_smoothing_weighs_both_signs(monkeypatch) -> None:
    _, output = compute(monkeypatch, pref_beta=0.5, dpo_label_smoothing=0.2)
    expected = [-0.8 * logsigmoid(x) - 0.2 * logsigmoid(-x) for x in (1.0, 1.5)]
    assert output.losses.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("average", "margins"), [(True, [1.5, 5 / 3]), (False, [2.0, 3.0])])
def test_ipo_average_takes_means_or_sums(monkeypatch, average: bool, margins: list[float]) -> None:
    """Log-ratios per token: 1 / 2, -1 | 1, -2 / 3."""
    _, output = compute(monkeypatch, pref_loss="ipo", pref_beta=0.5, ipo_average=average)
    assert output.losses.tolist() == pytest.approx([(margin - 1) ** 2 for margin in margins])


def test_simpo_gamma_is_a_margin_of_rewards(monkeypatch) -> None:
    """Log-probs per token: -1.5, -5 | -1, -2."""
    _, output = compute(monkeypatch, pref_loss="simpo", pref_beta=2.0, simpo_gamma=0.25)
    assert output.losses.tolist() == pytest.approx([-logsigmoid(7.0 - 0.25), -logsigmoid(2.0 - 0.25)])


@pytest.mark.parametrize(("both", "margins"), [(True, [2.0, 2.0]), (False, [3.0, 0.5])])
def test_ld_alpha_on_one_side_or_both(monkeypatch, both: bool, margins: list[float]) -> None:
    """alpha 0.5 on the second token of response 0 and the last two of response 3.

    Policy: -2, -5 | -1, -3.5. Reference weighed: -3, -4 | -2, -2.5; as it is: -4, -4 | -2, -4.
    """
    _, output = compute(monkeypatch, pref_beta=1.0, ld_alpha=0.5, ld_alpha_reference=both)
    assert output.metrics["rewards/margins"].tolist() == pytest.approx(margins)
    assert output.metrics["logps/chosen"].tolist() == [-3.0, -1.0]  # as they are


def test_pref_ftx_adds_the_mean_likelihood_of_chosen(monkeypatch) -> None:
    plain = compute(monkeypatch)[1].losses
    added = compute(monkeypatch, pref_ftx=2.0)[1].losses
    assert (added - plain).tolist() == pytest.approx([2 * 1.5, 2 * 1.0])


def test_bco_mean_moves_after_the_step_and_comes_back_from_a_checkpoint(monkeypatch) -> None:
    stage, output = compute(monkeypatch, pref_beta=0.5, pref_bco_weight=1.0)
    sigmoid, bco = -logsigmoid(1.0), -logsigmoid(0.5) - logsigmoid(0.5)
    assert output.losses[0].item() == pytest.approx((sigmoid + bco) / 2)
    assert stage.reward_mean.mean == 0
    stage.end_step()
    # rewards 0.5, 0.5, -0.5, -1.0
    assert stage.reward_mean.mean == pytest.approx(-0.125)
    other = DpoStage(MethodConfig(stage="dpo"), None, torch.float32)
    other.load_state(stage.state())
    assert other.reward_mean == stage.reward_mean


def test_kto_pair_uses_the_kl_of_all_ranks(monkeypatch) -> None:
    """Chosen log-ratios 1, 1, rejected -1, -2: KL of the two sides 1 and 0."""
    _, output = compute(monkeypatch, pref_loss="kto_pair", pref_beta=1.0)

    def s(x: float) -> float:
        return 1 / (1 + torch.tensor(-x).exp().item())

    expected = [((1 - s(1 - 0)) + (1 - s(1 - r))) / 2 for r in (-1, -2)]
    assert output.losses.tolist() == pytest.approx(expected)


def test_a_reference_free_loss_reads_none(monkeypatch) -> None:
    monkeypatch.setattr(dpo, "response_logps", lambda model, batch: sum_by_response(POLICY, OWNER, 4))
    stage = DpoStage(MethodConfig(stage="dpo", pref_loss="orpo"), None, torch.float32)
    metrics = stage.compute(torch.nn.Module(), BATCH).metrics
    assert metrics.keys() >= {"sft_loss", "odds_ratio_loss"}


def test_identity_is_checked_once_and_named(monkeypatch) -> None:
    monkeypatch.setattr(dpo, "response_logps", lambda model, batch: sum_by_response(POLICY, OWNER, 4))
    stage = DpoStage(MethodConfig(stage="dpo"), GivenReference(REFERENCE, OWNER), torch.float32)
    stage.expects_identity = True
    with pytest.raises(IdentityError, match=r"f:1, f:2.*given by hand"):
        stage.compute(torch.nn.Module(), BATCH)


def test_a_loss_that_does_not_start_at_its_own_value_is_found(monkeypatch) -> None:
    monkeypatch.setattr(dpo, "response_logps", lambda model, batch: sum_by_response(REFERENCE, OWNER, 4))
    stage = DpoStage(
        MethodConfig(stage="dpo", pref_loss="hinge"), GivenReference(REFERENCE, OWNER), torch.float32
    )
    stage.expects_identity = True
    assert stage.compute(torch.nn.Module(), BATCH).losses.tolist() == [1.0, 1.0]
    stage.expects_identity = True
    monkeypatch.setattr(stage, "_weigh", lambda r, pairs, alpha: r if r is reference else double(r))
    reference = stage.reference.logps(None, None)  # type: ignore[union-attr]
    monkeypatch.setattr(stage.reference, "logps", lambda model, batch: reference)
    with pytest.raises(IdentityError, match=r"loss must be 1\.0000.*but it is"):
        stage.compute(torch.nn.Module(), BATCH)


def double(responses: ResponseLogps) -> ResponseLogps:
    return sum_by_response(2 * responses.token_logps, OWNER, 4)
