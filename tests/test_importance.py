"""Importance diagnostics against their closed forms."""

import math

import arviz
import pyro.distributions as dist
import pytest
import torch

from pyro_ae.diagnostics.importance import effective_sample_size, pareto_k
from pyro_ae.diagnostics.units import active_units


def test_effective_sample_size() -> None:
    assert effective_sample_size(torch.full((40, 3), -700.0)).tolist() == pytest.approx([40.0] * 3)
    one = torch.zeros(40)
    one[7] = 900.0
    assert float(effective_sample_size(one)) == pytest.approx(1.0)
    w = torch.tensor([1.0, 2.0, 3.0])
    assert float(effective_sample_size(w.log() - 300.0)) == pytest.approx(36 / 14, rel=1e-4)


@pytest.mark.parametrize("scale", [0.9, 0.8, 0.6])
def test_pareto_k_of_a_normal_guide_that_is_too_narrow(scale: float) -> None:
    """For p = N(0, 1) and q = N(0, s^2), w ~ exp(z^2 (1 / s^2 - 1) / 2), so P(w > t) ~ t^(-1 / (1 - s^2))."""
    z = scale * torch.randn(4000, 60)
    k = pareto_k(dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.0, scale).log_prob(z))
    assert k.shape == (60,)
    assert float(k.mean()) == pytest.approx(1 - scale**2, abs=0.1)


@pytest.mark.parametrize("k", [0.3, 0.7, 1.2])
def test_pareto_k_of_pareto_weights(k: float) -> None:
    log_w = -k * torch.rand(4000, 20, 2).log()
    found = pareto_k(log_w)
    assert found.shape == (20, 2)
    assert float(found.mean()) == pytest.approx(k, abs=0.05)
    torch.testing.assert_close(pareto_k(log_w - 800.0), found, atol=1e-3, rtol=0)
    assert float(pareto_k(log_w[:, 3, 1])) == pytest.approx(float(found[3, 1]), abs=1e-5)


def test_pareto_k_of_weights_without_a_tail() -> None:
    two_values = torch.where(torch.rand(1000) < 0.5, 0.0, -1.0)
    equal = torch.zeros(1000) + 1e-6 * torch.randn(1000)
    bounded = -torch.rand(1000)
    one = torch.zeros(1000)
    one[3] = 50.0
    nan = torch.randn(1000)
    nan[0] = torch.nan
    found = pareto_k(torch.stack([two_values, equal, bounded, one, nan], 1))
    assert found[:2].tolist() == [-math.inf, -math.inf]
    assert found[2] < 0
    assert found[3] == math.inf
    assert found[4].isnan()


def test_pareto_k_refuses_few_draws_and_leaves_its_argument() -> None:
    with pytest.raises(ValueError, match="50 draws or more, got 49"):
        pareto_k(torch.randn(49))
    log_w = torch.randn(50, dtype=torch.float64)
    before = log_w.clone()
    pareto_k(log_w)
    assert torch.equal(log_w, before)


@pytest.mark.parametrize("draws", [50, 200, 1000, 5000])
def test_pareto_k_is_that_of_arviz(draws: int) -> None:
    if "psislw" not in vars(arviz):
        pytest.skip("this ArviZ has no psislw")
    light = 3 * torch.rand(40) * torch.randn(draws, 40)
    heavy = -torch.rand(40) * torch.rand(draws, 40).log()
    log_w = torch.cat([light, heavy], 1)
    expected = torch.as_tensor(arviz.psislw(log_w.double().T.numpy())[1]).float()
    torch.testing.assert_close(pareto_k(log_w), expected, rtol=0, atol=1e-5)


def test_active_units() -> None:
    means = torch.stack([torch.randn(100), torch.full((100,), 3.0), 0.05 * torch.randn(100)], 1)
    assert active_units(means).tolist() == [True, False, False]
    assert active_units(means, threshold=1e-4).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="at least two rows"):
        active_units(means[:1])
