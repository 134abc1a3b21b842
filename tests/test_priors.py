"""Priors over weights: their densities by hand, their parameters, and which tensor has which."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_ae import batch_plate, fit, svi
from pyro_ae.bayesian import bayesian
from pyro_ae.priors import fan_in, hierarchical, horseshoe, learnable, normal
from pyro_ae.sites import Recorder, site_log_prob

X = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
NETWORK = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def site_densities(net: nn.Module, values: dict[str, Tensor], x: Tensor = X) -> dict[str, Tensor]:
    with Recorder(values) as r:
        net(x)
    return {s["name"]: site_log_prob(s) for s in r.scored}


def half_cauchy(value: Tensor, scale: float) -> Tensor:
    return (2 / (math.pi * scale * (1 + (value / scale) ** 2))).log()


def gaussian(value: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (2 * math.pi * variance).log() - value**2 / (2 * variance)


def test_hierarchical_density_by_hand():
    net = bayesian(nn.Linear(3, 1), hierarchical())
    values = {"w.weight.scale": torch.tensor(0.7), "w.bias.scale": torch.tensor(2.0)}
    values |= {"w.weight": torch.randn(1, 3), "w.bias": torch.randn(1)}
    found = site_densities(net, values)
    assert set(found) == set(values)
    for part in ("w.weight", "w.bias"):
        scale = values[f"{part}.scale"]
        torch.testing.assert_close(found[f"{part}.scale"], half_cauchy(scale, 1.0))
        torch.testing.assert_close(found[part], gaussian(values[part], scale**2).sum())
    other = bayesian(nn.Linear(3, 1), hierarchical(dist.Gamma(2.0, 3.0)))
    expected = torch.distributions.Gamma(2.0, 3.0).log_prob(torch.tensor(0.7))
    torch.testing.assert_close(site_densities(other, values)["w.weight.scale"], expected)


def test_horseshoe_density_by_hand():
    net = bayesian(nn.Linear(3, 1, bias=False), horseshoe(0.2, slab=1.5, degrees=5.0))
    w, local, tau, c2 = torch.randn(1, 3), torch.rand(1, 3) + 0.1, torch.tensor(0.4), torch.tensor(1.3)
    found = site_densities(net, {"w.weight": w, "w.weight.local": local, "w.weight.global": tau, "w.weight.slab": c2})
    regularised = c2 * local**2 / (c2 + tau**2 * local**2)
    a, b = 5.0 / 2, 5.0 * 1.5**2 / 2
    expected = {
        "w.weight.global": half_cauchy(tau, 0.2),
        "w.weight.local": half_cauchy(local, 1.0).sum(),
        "w.weight.slab": a * math.log(b) - math.lgamma(a) - (a + 1) * c2.log() - b / c2,
        "w.weight": gaussian(w, tau**2 * regularised).sum(),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_fan_in_follows_the_width():
    net = bayesian(nn.Sequential(nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 1)), fan_in(3.0))
    scales = {w.site: net._prior(w).stddev for w in net.weights}
    wanted = {"w.0.weight": 3 / 6, "w.0.bias": 3.0, "w.2.weight": 3 / 8**0.5, "w.2.bias": 3.0}
    assert {name: pytest.approx(s.unique().item()) for name, s in scales.items()} == wanted


@pytest.mark.parametrize("per", ["tensor", "weight"])
def test_gradients_reach_a_learnable_prior(per):
    net = bayesian(nn.Linear(3, 1, bias=False), learnable(log_variance=math.log(2.0), per=per))
    w = torch.randn(1, 3)
    parameters = dict(net.named_parameters())
    assert len(parameters) == 2
    loc, log_variance = parameters.values()
    assert loc.shape == log_variance.shape == (() if per == "tensor" else (1, 3))
    site_densities(net, {"w.weight": w})["w.weight"].backward()
    by_loc, by_log_variance = w / 2.0, 0.5 * (w**2 / 2.0 - 1)  # at loc 0
    wanted = (by_loc, by_log_variance) if per == "weight" else (by_loc.sum(), by_log_variance.sum())
    torch.testing.assert_close((loc.grad, log_variance.grad), wanted)
    plain = nn.Linear(3, 1)
    start = dict(bayesian(plain, learnable("module", per=per)).named_parameters())["priors.0.loc.w-weight"]
    torch.testing.assert_close(start, plain.weight if per == "weight" else plain.weight.mean())


def test_type_two_maximum_likelihood_finds_the_scale_of_the_weights():
    """Where the weights are all but observed, the prior's variance goes to their mean square."""
    prior = learnable()
    net = bayesian(nn.Linear(200, 1, bias=False), prior)
    w = 3.0 * torch.randn(1, 200)

    def model(y: Tensor) -> None:
        f = net(torch.eye(200)).squeeze(-1)
        with batch_plate(y):
            pyro.sample("y", dist.Normal(f, 0.1), obs=y)

    fit(model, w[0], method=svi(steps=400, lr=0.1), seed=0, progress=False)
    torch.testing.assert_close(prior.log_variance["w-weight"].detach(), w.var(correction=0).log(), atol=0.15, rtol=0)
    torch.testing.assert_close(prior.loc["w-weight"].detach(), w.mean(), atol=0.3, rtol=0)


def test_priors_by_pattern_and_the_first_that_matches():
    def by_size(name: str, tensor: Tensor):
        assert name == "w.2.weight"
        return torch.distributions.Normal(torch.zeros_like(tensor), 5.0 * torch.ones_like(tensor))

    priors = {"*.bias": torch.distributions.Laplace(0.0, 4.0), "0": normal(0.0, 3.0), "2.weight": by_size}
    net = bayesian(NETWORK, priors)
    trace = poutine.trace(net).get_trace(X)
    scales = {n: trace.nodes[n]["fn"].base_dist.scale.unique().item() for n in trace.stochastic_nodes}
    assert scales == {"w.0.weight": 3.0, "w.0.bias": 4.0, "w.2.weight": 5.0, "w.2.bias": 4.0}
    shown = repr(net)
    assert "w.0.weight [4, 3]: normal(loc=0.0, scale=3.0)" in shown and "by_size" in shown
    assert "21 stochastic and 0 deterministic weights" in shown
    assert "learnable(loc='zero'" in repr(bayesian(NETWORK, learnable()))


@pytest.mark.parametrize("prior", [dist.HalfNormal(1.0), torch.distributions.Normal(0.0, 1.0), normal(), horseshoe()])
def test_priors_follow_the_dtype_of_the_network(prior):
    trace = poutine.trace(bayesian(nn.Linear(3, 1), prior).double()).get_trace(X.double())
    assert all(trace.nodes[n]["value"].dtype == torch.float64 for n in trace.stochastic_nodes)
