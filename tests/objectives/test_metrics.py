"""The numbers a step reports for each pair, and the rewards they are made of."""

import pytest
import torch

from prefkit.objectives.logps import PairLogps
from prefkit.objectives.metrics import auc, held_out_metrics, judged_metrics, pairwise_metrics
from prefkit.objectives.pairwise import LOSSES, Rewards

# The two pairs of test_pairwise.py: log-ratios of chosen 2, -1 and of rejected -3, 2.
POLICY = PairLogps(*torch.tensor([[-4.0, -4.0], [-9.0, -3.0], [2.0, 4.0], [3.0, 1.0]]))
REFERENCE = PairLogps(*torch.tensor([[-6.0, -3.0], [-6.0, -5.0], [2.0, 4.0], [3.0, 1.0]]))


def test_names_and_values_by_hand():
    metrics = pairwise_metrics(POLICY, Rewards(torch.tensor([0.5, -0.25]), torch.tensor([-1.0, 0.25])))
    assert {name: value.tolist() for name, value in metrics.items()} == {
        "rewards/chosen": [0.5, -0.25],
        "rewards/rejected": [-1.0, 0.25],
        "rewards/accuracies": [1.0, 0.0],
        "rewards/margins": [1.5, -0.5],
        "logps/chosen": [-4.0, -4.0],
        "logps/rejected": [-9.0, -3.0],
    }


def test_a_tie_is_not_an_accurate_pair():
    tied = torch.tensor([0.0, 0.3])
    assert pairwise_metrics(POLICY, Rewards(tied, tied))["rewards/accuracies"].tolist() == [0.0, 0.0]


def test_no_metric_carries_a_gradient_and_all_keep_the_dtype():
    policy = PairLogps(*(x.double().requires_grad_() for x in vars(POLICY).values()))
    loss = LOSSES["orpo"]
    for value in pairwise_metrics(policy, loss.rewards(policy, None, beta=0.1), loss.parts).values():
        assert not value.requires_grad
        assert value.dtype == torch.float64


def test_orpo_reports_its_two_terms():
    loss = LOSSES["orpo"]
    metrics = pairwise_metrics(POLICY, loss.rewards(POLICY, None, beta=0.1), loss.parts)
    torch.testing.assert_close(metrics["sft_loss"], torch.tensor([2.0, 1.0]))
    # ln(1 + e^-1.0943443), ln(1 + e^-2.4076060): test_pairwise.py says where these come from
    torch.testing.assert_close(metrics["odds_ratio_loss"], torch.tensor([0.2887508, 0.0862057]))
    torch.testing.assert_close(
        metrics["sft_loss"] + 0.1 * metrics["odds_ratio_loss"], loss.fn(POLICY, beta=0.1)
    )


def test_only_orpo_reports_terms():
    assert [name for name, loss in LOSSES.items() if loss.parts] == ["orpo"]


@pytest.mark.parametrize(
    ("name", "numbers", "chosen", "rejected"),
    [
        ("sigmoid", {"beta": 0.1, "label_smoothing": 0.2}, [0.2, -0.1], [-0.3, 0.2]),
        ("hinge", {"beta": 0.1}, [0.2, -0.1], [-0.3, 0.2]),
        ("kto_pair", {"beta": 0.1, "kl_chosen": 0.5, "kl_rejected": 0.2}, [0.2, -0.1], [-0.3, 0.2]),
        ("ipo", {"beta": 0.1, "average": True}, [0.1, -0.025], [-0.1, 0.2]),
        ("ipo", {"beta": 0.1}, [0.1, -0.025], [-0.1, 0.2]),
        ("ipo", {"beta": 0.1, "average": False}, [0.2, -0.1], [-0.3, 0.2]),
        ("orpo", {"beta": 0.1}, [-0.2, -0.1], [-0.3, -0.3]),
        ("simpo", {"beta": 2.0, "gamma": 0.5}, [-4.0, -2.0], [-6.0, -6.0]),
    ],
)
def test_rewards_by_hand(name, numbers, chosen, rejected):
    rewards = LOSSES[name].rewards(POLICY, REFERENCE, **numbers)
    torch.testing.assert_close(rewards.chosen, torch.tensor(chosen))
    torch.testing.assert_close(rewards.rejected, torch.tensor(rejected))


def test_judged_rows_are_averaged_by_label_and_counted():
    rows = judged_metrics(
        torch.tensor([-4.0, -6.0, -9.0, -3.0]),
        torch.tensor([1.0, -2.0, 0.5, 3.0], requires_grad=True),
        torch.tensor([True, False, False, True]),
        torch.tensor(0.25),
    )
    assert not any(value.requires_grad for value in rows.values())
    assert held_out_metrics(rows) == {
        "rewards/chosen": 2.0,
        "rewards/rejected": -0.75,
        "rewards/margins": 2.75,
        "rewards/auc": 1.0,
        "logps/chosen": -3.5,
        "logps/rejected": -7.5,
        "kl": 0.25,
        "count/chosen": 2,
        "count/rejected": 2,
    }


@pytest.mark.parametrize(("label", "name"), [(1.0, "chosen"), (0.0, "rejected")])
def test_what_no_row_has_is_left_out(label, name):
    one = torch.ones(1)
    found = held_out_metrics({"rewards": one, "logps": -one, "desirable": label * one})
    other = "rejected" if name == "chosen" else "chosen"
    assert found == {f"rewards/{name}": 1.0, f"logps/{name}": -1.0, f"count/{name}": 1, f"count/{other}": 0}


def test_pairs_are_averaged_as_they_are():
    assert held_out_metrics({"loss": torch.tensor([1.0, 2.0])}) == {"loss": 1.5}


def test_auc_is_the_share_of_ordered_pairs():
    torch.manual_seed(0)
    higher, lower = torch.randint(0, 9, (2, 40)).float().unbind(0)
    higher = higher[:25]
    expected = sum(float(h > x) + 0.5 * float(h == x) for h in higher for x in lower) / 1000
    assert auc(higher, lower) == pytest.approx(expected)
    assert auc(torch.zeros(3), torch.zeros(2)) == 0.5
