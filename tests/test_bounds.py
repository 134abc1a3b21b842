"""Bounds: tight at the posterior, ordered, and right about log K."""

import math

import pytest
import torch
from truth import biased_guide, exact_guide, ppca

from pyro_ae import bounds, elbo, iwae, log_weights

BOUNDS = [elbo, iwae]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("particles", [1, 2, 17])
def test_tight_at_the_posterior(bound, particles):
    """With q = p(z | x) every weight equals p(x), so a bound does too, without Monte Carlo error."""
    model, x = ppca()
    log_w, scale = log_weights(model, exact_guide(model), x, particles=particles)
    assert scale == 1
    torch.testing.assert_close(bound(log_w), model.marginal().log_prob(x), atol=1e-4, rtol=0)


def test_lower_bounds_are_below_the_evidence_and_ordered():
    model, x = ppca(rows=200)
    evidence = model.marginal().log_prob(x).mean()
    log_w, _ = log_weights(model, biased_guide(model), x, particles=1024)
    by_particles = [iwae(log_w.unflatten(0, (k, -1))).mean() for k in (1, 4, 16, 64)]
    assert all(a < b for a, b in zip(by_particles, [*by_particles[1:], evidence], strict=True))
    torch.testing.assert_close(by_particles[0], elbo(log_w).mean())


def test_iwae_is_the_log_of_the_mean_weight():
    log_w = torch.randn(7, 3, 2)
    torch.testing.assert_close(iwae(log_w), log_w.exp().mean(0).log())
    torch.testing.assert_close(iwae(torch.full((5, 2), 800.0)), torch.full((2,), 800.0))  # no overflow


def test_bias_of_iwae_is_the_known_one():
    """log w ~ N(m, s^2) has E[w] = exp(m + s^2/2); K = 1 gives m, many particles approach the log of that mean."""
    log_w = 0.8 * torch.randn(200_000, 1, dtype=torch.float64)
    assert abs(elbo(log_w).item()) < 0.01
    assert abs(iwae(log_w).item() - 0.32) < 0.01


def test_only_the_elbo_is_linear():
    assert [b.__name__ for b in BOUNDS if bounds.is_linear(b)] == ["elbo"]
    log_w = torch.randn(6, 4)
    torch.testing.assert_close(elbo(3 * log_w + 1), 3 * elbo(log_w) + 1)
    assert not torch.allclose(iwae(3 * log_w + 1), 3 * iwae(log_w) + 1)
    assert math.isclose(iwae(torch.zeros(4, 1)).item(), 0.0)
