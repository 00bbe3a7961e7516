"""Every pairwise loss: numbers derived by hand, signs, limits, finite differences, batch splits."""

import dataclasses
import itertools
import json
import math
import random

import pytest
import torch

from prefkit.objectives import pairwise
from prefkit.objectives.kto import kl_estimate
from prefkit.objectives.logps import PairLogps
from prefkit.objectives.pairwise import LOSSES, RunningMean

# Two pairs. Log-ratios: chosen +2, -1; rejected -3, +2; margins 5, -3.
# Means: c' = -2, -1; r' = -3, -3; margins of means 2/2 + 3/3 = 2, -1/4 - 2/1 = -9/4.
POLICY = [(-4.0, -9.0, 2, 3), (-4.0, -3.0, 4, 1)]
REFERENCE = [(-6.0, -6.0, 2, 3), (-3.0, -5.0, 4, 1)]

NUMBERS = {
    "sigmoid": {"beta": 0.1, "label_smoothing": 0.2},
    "hinge": {"beta": 0.1},
    "ipo": {"beta": 0.25, "average": True},
    "kto_pair": {"beta": 0.1, "kl_chosen": 0.5, "kl_rejected": 0.25},
    "orpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 0.5},
}
ALL = {**{name: loss.fn for name, loss in LOSSES.items()}, "bco": pairwise.bco_loss}
ALL_NUMBERS = {**NUMBERS, "bco": {"beta": 0.1, "shift": 0.05}}
EXTREMES = (0.0, -1e-8, -50.0, -1e4)


def make_pairs(rows, dtype=torch.float64):
    return PairLogps(*torch.tensor(rows, dtype=dtype).unbind(1))


def random_rows(num_pairs, seed):
    draw = random.Random(seed)
    return [
        (draw.uniform(-60, -0.5), draw.uniform(-60, -0.5), draw.randint(1, 30), draw.randint(1, 30))
        for _ in range(num_pairs)
    ]


def near_reference(rows, seed):
    draw = random.Random(seed)
    return [(min(c + draw.gauss(0, 3), -0.1), min(r + draw.gauss(0, 3), -0.1), n, m) for c, r, n, m in rows]


# The formulas once more, in plain Python floats, for one pair.


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def log_odds(x):
    return x - math.log(-math.expm1(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def margin(p, q):
    return (p[0] - q[0]) - (p[1] - q[1])


# of policy row p = (c, r, Nc, Nr), reference row q and the numbers k
PLAIN = {
    "sigmoid": lambda p, q, k: (
        (1 - k["label_smoothing"]) * softplus(-k["beta"] * margin(p, q))
        + k["label_smoothing"] * softplus(k["beta"] * margin(p, q))
    ),
    "hinge": lambda p, q, k: max(0.0, 1 - k["beta"] * margin(p, q)),
    "ipo": lambda p, q, k: ((p[0] - q[0]) / p[2] - (p[1] - q[1]) / p[3] - 0.5 / k["beta"]) ** 2,
    "kto_pair": lambda p, q, k: (
        0.5 * (1 - sigmoid(k["beta"] * (p[0] - q[0] - k["kl_rejected"])))
        + 0.5 * (1 - sigmoid(k["beta"] * (k["kl_chosen"] - (p[1] - q[1]))))
    ),
    "orpo": lambda p, q, k: (
        -p[0] / p[2] + k["beta"] * softplus(log_odds(p[1] / p[3]) - log_odds(p[0] / p[2]))
    ),
    "simpo": lambda p, q, k: softplus(k["gamma"] - k["beta"] * (p[0] / p[2] - p[1] / p[3])),
    "bco": lambda p, q, k: (
        softplus(k["shift"] - k["beta"] * (p[0] - q[0])) + softplus(k["beta"] * (p[1] - q[1]) - k["shift"])
    ),
}


@pytest.mark.parametrize(
    ("name", "numbers", "expected"),
    [
        # ln(1 + e^-0.5), ln(1 + e^0.3)
        ("sigmoid", {"beta": 0.1}, [0.4740770, 0.8543552]),
        # 0.8 ln(1 + e^-0.5) + 0.2 ln(1 + e^0.5), 0.8 ln(1 + e^0.3) + 0.2 ln(1 + e^-0.3)
        ("sigmoid", {"beta": 0.1, "label_smoothing": 0.2}, [0.5740770, 0.7943552]),
        # 1 - 0.5, 1 + 0.3; at beta 0.5 the first is past the hinge: 1 - 2.5 < 0, 1 + 1.5
        ("hinge", {"beta": 0.1}, [0.5, 1.3]),
        ("hinge", {"beta": 0.5}, [0.0, 2.5]),
        # target 1 / (2 * 0.25) = 2: (2 - 2)^2, (-9/4 - 2)^2; sums: (5 - 2)^2, (-3 - 2)^2
        ("ipo", {"beta": 0.25}, [0.0, 18.0625]),
        ("ipo", {"beta": 0.25, "average": False}, [9.0, 25.0]),
        # (1 - s(0.175) + 1 - s(0.35)) / 2, (1 - s(-0.125) + 1 - s(-0.15)) / 2
        ("kto_pair", {"beta": 0.1, "kl_chosen": 0.5, "kl_rejected": 0.25}, [0.4348719, 0.5343196]),
        # log-odds of e^-1, e^-2, e^-3: -0.5413249, -1.8545865, -2.9489308
        # 2 + 0.1 ln(1 + e^-1.0943443), 1 + 0.1 ln(1 + e^-2.4076060)
        ("orpo", {"beta": 0.1}, [2.0288751, 1.0086206]),
        # ln(1 + e^-(2 * 1 - 0.5)), ln(1 + e^-(2 * 2 - 0.5))
        ("simpo", {"beta": 2.0, "gamma": 0.5}, [0.2014133, 0.0297504]),
        # rewards 0.2, -0.3 and -0.1, 0.2: ln(1 + e^-0.15) + ln(1 + e^-0.35), ln(1 + e^0.15) + ln(1 + e^0.15)
        ("bco", {"beta": 0.1, "shift": 0.05}, [1.1543392, 1.5419141]),
    ],
)
def test_values_by_hand(name, numbers, expected):
    loss = ALL[name](make_pairs(POLICY), make_pairs(REFERENCE), **numbers)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_formula_in_plain_floats(name, seed):
    reference = random_rows(50, seed)
    policy = near_reference(reference, seed)
    numbers = ALL_NUMBERS[name]
    expected = [PLAIN[name](p, q, numbers) for p, q in zip(policy, reference, strict=True)]
    loss = ALL[name](make_pairs(policy), make_pairs(reference), **numbers)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "numbers", "expected"),
    [
        ("sigmoid", {"beta": 0.1}, 0.69314718),  # ln 2
        ("sigmoid", {"beta": 5.0, "label_smoothing": 0.3}, 0.69314718),
        ("hinge", {"beta": 0.1}, 1.0),
        ("ipo", {"beta": 0.1}, 25.0),  # 1 / (4 beta^2)
        ("ipo", {"beta": 0.1, "average": False}, 25.0),
        ("kto_pair", {"beta": 0.1, "kl_chosen": 0.0, "kl_rejected": 0.0}, 0.5),
        ("bco", {"beta": 0.1, "shift": 0.0}, 1.38629436),  # 2 ln 2
    ],
)
def test_values_at_the_reference(name, numbers, expected):
    reference = make_pairs(REFERENCE)
    loss = ALL[name](reference, reference, **numbers)
    torch.testing.assert_close(loss, torch.full((2,), expected, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "kto_pair"])
def test_beta_to_zero_is_the_value_at_the_reference(name):
    policy, reference = make_pairs(POLICY), make_pairs(REFERENCE)
    numbers = {**NUMBERS[name], "beta": 1e-12}
    torch.testing.assert_close(
        LOSSES[name].fn(policy, reference, **numbers), LOSSES[name].fn(reference, reference, **numbers)
    )


def test_label_smoothing_of_a_half_takes_no_side():
    policy, reference = make_pairs(POLICY), make_pairs(REFERENCE)
    swapped = [
        PairLogps(p.rejected, p.chosen, p.rejected_lengths, p.chosen_lengths) for p in (policy, reference)
    ]
    numbers = {"beta": 0.1, "label_smoothing": 0.5}
    torch.testing.assert_close(
        pairwise.sigmoid_loss(policy, reference, **numbers), pairwise.sigmoid_loss(*swapped, **numbers)
    )


@pytest.mark.parametrize("name", ALL)
def test_raising_chosen_and_lowering_rejected_lowers_the_loss(name):
    policy = make_pairs(REFERENCE)
    chosen, rejected = policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
    ALL[name](policy, make_pairs(REFERENCE), **ALL_NUMBERS[name]).sum().backward()
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0).all()


@pytest.mark.parametrize("name", ALL)
def test_gradients_equal_finite_differences(name):
    reference = make_pairs(random_rows(6, seed=7))
    start = make_pairs(near_reference(random_rows(6, seed=7), seed=8))

    def loss(chosen, rejected):
        policy = dataclasses.replace(start, chosen=chosen, rejected=rejected)
        return ALL[name](policy, reference, **ALL_NUMBERS[name])

    torch.autograd.gradcheck(
        loss, (start.chosen.requires_grad_(), start.rejected.requires_grad_()), rtol=1e-6
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("beta", [1e-3, 10.0])
@pytest.mark.parametrize("origin", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_logps_give_finite_losses_and_gradients(name, beta, origin):
    logps = torch.tensor(list(itertools.product(EXTREMES, repeat=4)), dtype=origin)
    logps = logps.to(torch.promote_types(origin, torch.float32))
    chosen, rejected, reference_chosen, reference_rejected = (x.clone() for x in logps.unbind(1))
    ones = torch.ones_like(chosen)
    policy = PairLogps(chosen.requires_grad_(), rejected.requires_grad_(), ones, ones)
    reference = PairLogps(reference_chosen, reference_rejected, ones, ones)
    loss = ALL[name](policy, reference, **{**ALL_NUMBERS[name], "beta": beta})
    loss.sum().backward()
    assert loss.dtype == logps.dtype
    assert loss.shape == (256,)
    for values in (loss, chosen.grad, rejected.grad):
        assert values.isfinite().all()
    if name not in ("ipo", "sigmoid"):  # these two pull too wide a margin back (sigmoid: label smoothing)
        assert (chosen.grad <= 0).all()
        assert (rejected.grad >= 0).all()


def test_log_odds_where_fp32_cannot_tell_the_probability_from_one():
    logps = torch.tensor([0.0, -1e-8, 1e-9], requires_grad=True)
    odds = pairwise.log_odds(logps)
    odds.sum().backward()
    torch.testing.assert_close(odds, torch.full((3,), 15.942385))  # -ln(2^-23)
    assert logps.grad.tolist() == [1.0, 1.0, 1.0]


def test_log_odds_in_fp64_near_both_ends():
    # p = 1 - 1e-8: ln(1e8); p = e^-50: -50
    odds = pairwise.log_odds(torch.tensor([-1e-8, -50.0, -1e4], dtype=torch.float64))
    torch.testing.assert_close(
        odds, torch.tensor([18.42068073, -50.0, -1e4], dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_kto_pair_gradient_treats_the_kls_as_constants():
    reference = make_pairs(REFERENCE)
    gradients = []
    for from_batch in (True, False):
        policy = make_pairs(POLICY)
        chosen = policy.chosen.requires_grad_()
        total = (chosen - reference.chosen).sum()  # of 2 and -1
        kl = kl_estimate(total, torch.tensor(2)) if from_batch else 0.5
        pairwise.kto_pair_loss(policy, reference, beta=0.1, kl_chosen=kl, kl_rejected=0.0).sum().backward()
        gradients.append(chosen.grad)
    torch.testing.assert_close(*gradients)
    # beta/2 * -s'(0.1 * 2), beta/2 * -s'(0.1 * -1) with s' = s (1 - s)
    expected = torch.tensor([-0.0123758, -0.0124688], dtype=torch.float64)
    torch.testing.assert_close(gradients[0], expected, rtol=0, atol=1e-7)


def test_running_mean_is_the_mean_of_everything_and_survives_json():
    running = RunningMean()
    assert running.mean == 0.0
    assert running.update(3.0, 1).mean == 3.0
    for batch in ([1.0, 2.0, 6.0], [], [-1.0]):
        running = running.update(sum(batch), len(batch))
    assert running == RunningMean(total=8.0, count=4)
    assert running.mean == 2.0
    assert RunningMean(**json.loads(json.dumps(dataclasses.asdict(running)))) == running


def test_mix_bco_by_hand():
    loss, bco = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.0])
    torch.testing.assert_close(pairwise.mix_bco(loss, bco, 0.5), torch.tensor([4 / 3, 2.0]))
    assert pairwise.mix_bco(loss, bco, 0.0).equal(loss)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(5))
def test_order_and_split_of_the_batch_change_nothing(name, seed):
    rows = random_rows(24, seed)
    policy, reference = make_pairs(near_reference(rows, seed)), make_pairs(rows)
    whole = ALL[name](policy, reference, **ALL_NUMBERS[name])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(24, generator=generator)
    cuts = torch.randint(1, 24, (4,), generator=generator).sort().values.tolist()
    for micro_batch in order.tensor_split(cuts):
        p, q = (
            PairLogps(*(getattr(x, f.name)[micro_batch] for f in dataclasses.fields(x)))
            for x in (policy, reference)
        )
        torch.testing.assert_close(ALL[name](p, q, **ALL_NUMBERS[name]), whole[micro_batch])


def test_the_table_names_every_number_a_loss_takes():
    assert list(LOSSES) == ["sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo"]
    for name, loss in LOSSES.items():
        kls = ("kl_chosen", "kl_rejected") if loss.needs_batch_kl else ()
        keywords = set(loss.fn.__kwdefaults__ or {}) - ({"offset"} if loss.takes_offset else set())
        assert {*loss.params, *kls} == set(NUMBERS[name]) >= keywords


@pytest.mark.parametrize("name", ["orpo", "simpo"])
def test_losses_without_reference_ignore_it(name):
    policy = make_pairs(POLICY)
    loss = LOSSES[name]
    assert not loss.needs_reference
    assert loss.fn(policy, **NUMBERS[name]).equal(loss.fn(policy, make_pairs(REFERENCE), **NUMBERS[name]))


def test_an_offset_is_a_lead_that_does_not_count():
    """ODPO: -log s(0.1 * margin - offset), margins 5 and -3."""
    policy, reference = make_pairs(POLICY), make_pairs(REFERENCE)
    found = pairwise.sigmoid_loss(policy, reference, beta=0.1, offset=torch.tensor([0.5, -0.3]).double())
    assert found.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)
    assert LOSSES["sigmoid"].takes_offset and not LOSSES["hinge"].takes_offset
