"""Kinds of latent dimensions, collapse, and the test of two samples, on made-up numbers."""

import math
from collections.abc import Callable

import pytest
import torch

from pyro_ae.diagnostics.permutation import permutation_test
from pyro_ae.diagnostics.units import collapsed, kinds
from pyro_ae.divergences import mmd, sliced_wasserstein


def test_kinds_of_made_up_variances() -> None:
    n = 100
    noise = 0.05 * torch.rand(n)
    halves = torch.where(torch.arange(n) % 2 == 0, 0.02, 1.0)
    known, unknown, half = 0.02 + noise, 0.97 + noise, torch.full((n,), 0.5)
    variances = torch.stack([known, halves, unknown, half, torch.full((n,), 1.3)], 1)
    found = kinds(variances)
    assert found.names == ["active", "mixed", "passive", "mixed", "mixed"]
    assert torch.equal(found.active.int() + found.mixed.int() + found.passive.int(), torch.ones(5, dtype=torch.int32))
    assert kinds(9 * variances, prior=9.0).names == found.names, "in units of the prior"
    assert kinds(variances, tolerance=0.5).names == ["active", "passive", "passive", "active", "passive"]
    assert kinds(variances.unsqueeze(-1)).active.shape == (5, 1)


def test_wide_tolerance_does_not_make_a_dimension_two_things() -> None:
    found = kinds(torch.full((3, 1), 0.6), tolerance=0.7)
    assert found.names == ["active"] and not found.passive.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kinds(torch.ones(1, 2)), "at least two rows"),
        (lambda: kinds(torch.ones(3, 2), 0.0), "tolerance"),
        (lambda: kinds(torch.tensor([[1.0], [math.nan]])), "finite"),
        (lambda: kinds(torch.tensor([[-1.0], [-2.0]])), "logarithms"),
        (lambda: collapsed(torch.tensor([[0.1], [math.nan]])), "1 of the divergences are NaN"),
        (lambda: collapsed(torch.zeros(0, 2)), "rows"),
        (lambda: collapsed(torch.zeros(3, 2), epsilon=0.0), "epsilon"),
        (lambda: collapsed(torch.zeros(3, 2), delta=1.0), "delta"),
    ],
)
def test_kinds_and_collapse_refuse(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_collapsed_counts_rows() -> None:
    kl = torch.zeros(20, 3)
    kl[0, 0], kl[:2, 1], kl[:, 2] = 5.0, 5.0, 0.02
    assert collapsed(kl).tolist() == [True, False, False], "one row of 20 may be above, not two"
    assert collapsed(kl, delta=0.1).tolist() == [True, True, False]
    assert collapsed(kl, epsilon=0.03).tolist() == [True, False, True]
    assert collapsed(torch.full((2, 1), math.inf)).tolist() == [False]


def test_permutation_test_is_of_the_known_divergences() -> None:
    a, b = torch.randn(40, 3), torch.randn(40, 3) + 0.5
    found, _ = permutation_test(a, b)
    assert found.value == pytest.approx(float(mmd()(a, b)), abs=1e-5)
    _, found = permutation_test(a[:, :1], b[:, :1])
    assert found.value == pytest.approx(float(sliced_wasserstein()(a[:, :1], b[:, :1])), abs=1e-5)


def test_permutation_test_raises_as_many_false_alarms_as_it_says() -> None:
    samples = torch.randn(400, 2, 20, 2)
    p = torch.tensor([[d.p_value for d in permutation_test(a, b, splits=39, projections=5)] for a, b in samples])
    alarms = (p <= 0.1).double().mean(0)
    assert (alarms > 0.04).all() and (alarms < 0.16).all(), alarms  # four standard errors


def test_permutation_test_refuses() -> None:
    for a, b, message in (
        (torch.zeros(3, 2), torch.zeros(4, 2), "one size"),
        (torch.zeros(1, 2), torch.zeros(1, 2), "at least 2 rows"),
        (torch.full((3, 2), math.nan), torch.zeros(3, 2), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            permutation_test(a, b)
