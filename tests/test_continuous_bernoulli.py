"""The continuous Bernoulli against numerical integrals and torch's own, where that is precise."""

import pyro.distributions as dist
import torch

from pyro_ae.continuous_bernoulli import ContinuousBernoulli

LOGITS = torch.tensor([-300.0, -20.0, -3.0, -0.5, -0.39, -0.002, 0.0, 1e-3, 9e-4, 0.41, 2.0, 25.0, 90.0])


def integrals():
    """The density on a grid, in double precision, and the grid: tilted so that it is fine where the density is."""
    eta = LOGITS.double()
    grid = torch.linspace(0.0, 1.0, 400_001, dtype=torch.float64)[:, None]
    weight = (grid * eta - eta.clamp(min=0.0)).exp()
    area = torch.trapezoid(weight, grid, dim=0)
    return grid, weight / area, eta.clamp(min=0.0) + area.log()


def test_density_and_moments_are_those_of_the_integrals():
    grid, density, log_area = integrals()
    ours, x = ContinuousBernoulli(LOGITS), torch.tensor(0.3)
    torch.testing.assert_close(ours.log_prob(x).double(), 0.3 * LOGITS.double() - log_area, rtol=1e-5, atol=1e-6)
    mean = torch.trapezoid(grid * density, grid, dim=0)
    variance = torch.trapezoid((grid - mean) ** 2 * density, grid, dim=0)
    torch.testing.assert_close(ours.mean.double(), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.variance.double(), variance, rtol=0, atol=2e-6)
    entropy = -torch.trapezoid(torch.special.xlogy(density, density), grid, dim=0)
    torch.testing.assert_close(ours.entropy().double(), entropy, rtol=1e-4, atol=1e-5)


def test_gradients_are_precise_where_torchs_are_not():
    grid, density, _ = integrals()
    mean = torch.trapezoid(grid * density, grid, dim=0)
    logits, x = LOGITS.clone().requires_grad_(), 0.3
    (gradient,) = torch.autograd.grad(ContinuousBernoulli(logits).log_prob(torch.tensor(x)).sum(), logits)
    torch.testing.assert_close(gradient.double(), x - mean, rtol=0, atol=1e-5)


def test_draws_have_the_distribution_and_its_gradient():
    grid, density, _ = integrals()
    u = torch.tensor([0.1, 0.5, 0.9])[:, None]
    logits = LOGITS.clone().requires_grad_()
    x = ContinuousBernoulli(logits).icdf(u)
    ours = ContinuousBernoulli(LOGITS.double())
    step = torch.expm1(x.detach().double() * LOGITS.double()) / torch.expm1(LOGITS.double())
    usual = LOGITS.abs() > 1e-2
    torch.testing.assert_close(step[:, usual], u.double().expand(3, int(usual.sum())), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(x.sum(), logits)
    with torch.no_grad():  # by differences, in double precision
        up, down = (ContinuousBernoulli(LOGITS.double() + h).icdf(u.double()).sum(0) for h in (1e-5, -1e-5))
    torch.testing.assert_close(gradient.double(), (up - down) / 2e-5, rtol=1e-3, atol=2e-3)
    torch.manual_seed(0)
    draws = ours.rsample((40_000,))
    assert draws.min() >= 0 and draws.max() <= 1
    error = ((draws.mean(0) - ours.mean) / (ours.variance / 40_000).sqrt()).abs()
    assert error.max() < 4.5


def test_it_is_torchs_elsewhere():
    logits = torch.tensor([-4.0, -1.0, 1.5])
    ours, theirs = ContinuousBernoulli(logits), dist.ContinuousBernoulli(logits=logits)
    x = torch.tensor([[0.0, 0.2, 1.0], [0.3, 0.9, 0.5]])
    for name in ("mean", "variance", "probs"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.icdf(x), theirs.icdf(x), rtol=1e-4, atol=1e-5)
    assert ours.expand((2, 3)).sample((5,)).shape == (5, 2, 3)
    assert ours.to_event(1).log_prob(x).shape == (2,)
