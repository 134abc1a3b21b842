"""The implicit posterior: densities against closed forms, fits against known posteriors, particles and files."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from truth import regression, regression_posterior, regression_rows

from pyro_ae import Posterior, elbo, fit, importance, svi
from pyro_ae.density import weigh
from pyro_ae.guides.implicit import Implicit, Matrices
from pyro_ae.plates import particle_plate
from pyro_ae.sites import Recorder, inspect_sites


def flat(size: int):
    """A model of so many latents and nothing else."""
    return lambda: pyro.sample("w", dist.Normal(torch.zeros(size), 1.0).to_event(1))


def built(guide: Implicit) -> Implicit:
    guide()
    return guide


def draws(guide: Implicit, particles: int) -> tuple[Tensor, Tensor]:
    """Values ``[K, n]`` and their log-densities by the guide ``[K]``."""
    with particle_plate(particles, 0), Recorder() as r:
        guide()
    (site,) = [s for s in r.sites.values() if s["infer"].get("is_auxiliary")]
    assert site["infer"]["estimated"]
    return site["value"], site["fn"].log_density


def gaussian(guide: Implicit) -> dist.MultivariateNormal:
    """What a linear generator stands for."""
    factor = guide.spread[:, None] * guide.generator.weight
    loc = guide.center + guide.spread * guide.generator.bias
    covariance = factor @ factor.T + guide.noise**2 * torch.eye(len(loc))
    return dist.MultivariateNormal(loc.double(), covariance.double())


def linear(latent: int, size: int, noise: float, **options) -> Implicit:
    return built(Implicit(flat(size), latent, generator=nn.Linear, noise=noise, **options))


# ---------------------------------------------------------------------------------------------- density


@pytest.mark.parametrize(("latent", "size"), [(3, 7), (5, 5), (6, 4), (1, 1)])
@pytest.mark.parametrize("noise", [0.3, 1e-3])
def test_a_linear_generator_has_the_density_of_its_gaussian(latent, size, noise):
    guide = linear(latent, size, noise).double()
    values, log_q = draws(guide, 50)
    torch.testing.assert_close(log_q, gaussian(guide).log_prob(values), rtol=1e-6, atol=1e-5)
    assert values.shape == (50, size) and values.std(0).min() > 0


def test_single_precision_does_for_many_latents_and_little_noise():
    """The same draws in double precision: what is subtracted is 1e9 times what is left."""
    torch.manual_seed(0)
    guide = linear(8, 3000, 1e-4, scale=1.0)
    values, log_q = draws(guide, 5)
    whole = gaussian(guide.double())
    factor = guide.spread[:, None] * guide.generator.weight
    exact = torch.distributions.LowRankMultivariateNormal(whole.loc, factor, torch.full((3000,), 1e-8).double())
    # a value is rounded to 1e-7 of itself, and so is in units of sigma at 1e-3
    torch.testing.assert_close(log_q.double(), exact.log_prob(values.double()), rtol=1e-3, atol=0)
    reference = -(3000 - 8) * math.log(1e-4) - 0.5 * torch.logdet(factor.T @ factor) - 3000 / 2 * math.log(2 * math.pi)
    assert ((log_q - reference + 1500).abs() < 5 * 1500**0.5).all(), "half the squares of 3000 normal numbers are left"


class Bent(nn.Module):
    """One to one, and curved: (a, b) to (a, b + a^2 / 2 + sin a)."""

    def forward(self, z: Tensor) -> Tensor:
        a, b = z.unbind(-1)
        return torch.stack([a, b + a**2 / 2 + a.sin()], -1)


def test_a_curved_generator_has_the_density_of_a_change_of_variables():
    """Up to the noise, in which the density of a line is not that of the curve."""
    torch.manual_seed(0)
    errors = []
    for noise in (1e-1, 1e-2, 1e-3):
        guide = built(Implicit(flat(2), 2, generator=lambda d, n: Bent(), noise=noise)).double()
        with torch.no_grad():
            guide.center.zero_(), guide.spread.fill_(1.0)
        values, log_q = draws(guide, 2000)
        a, b = values.unbind(-1)
        z = torch.stack([a, b - a**2 / 2 - a.sin()], -1)  # the inverse, whose Jacobian has determinant one
        errors.append((log_q - dist.Normal(0.0, 1.0).log_prob(z).sum(-1)).abs().mean().item())
    assert errors[2] < 0.005
    assert errors[0] > 5 * errors[1] > 25 * errors[2], "of the order of the noise"


def test_the_smallest_singular_value_bounds_the_density_from_above():
    torch.manual_seed(0)
    guide = built(Implicit(flat(20), 4)).double()
    exact, found = [], []
    for guide.smallest, out in ((False, exact), (True, found)):
        torch.manual_seed(1)
        out += draws(guide, 30)
    torch.testing.assert_close(exact[0], found[0])
    assert (found[1] > exact[1]).all()
    # for singular values all alike it is no looser
    pyro.clear_param_store()  # in which another guide would find the first one's parameters
    guide = linear(3, 3, 0.1, scale=1.0).double()
    with torch.no_grad():
        guide.generator.weight.copy_(torch.linalg.qr(torch.randn(3, 3).double())[0]), guide.spread.fill_(1.0)
    guide.smallest = True
    values, log_q = draws(guide, 30)
    torch.testing.assert_close(log_q, gaussian(guide).log_prob(values))


@pytest.mark.parametrize("smallest", [False, True])
def test_gradients_are_those_of_the_density_and_finite(smallest):
    guide = built(Implicit(flat(4), 2, noise=0.1, smallest=smallest)).double()
    parameter = guide.generator.layers[2].weight

    def value() -> Tensor:
        torch.manual_seed(3)
        return draws(guide, 400)[1].mean()

    value().backward()
    still = ("center", "generator.layers.4.bias")  # which move the draws, and leave their densities as they are
    assert all(p.grad.isfinite().all() for n, p in guide.named_parameters() if n not in still)
    at = parameter.grad.abs().argmax()
    with torch.no_grad():
        flat_parameter, step = parameter.view(-1), 1e-5
        flat_parameter[at] += step
        above = value()
        flat_parameter[at] -= 2 * step
        below = value()
    difference = (above - below) / (2 * step)
    # with ``smallest`` the residual has no gradient, whose mean is of the order of the noise squared
    torch.testing.assert_close(parameter.grad.view(-1)[at], difference, rtol=0.1 if smallest else 1e-5, atol=0)


# ---------------------------------------------------------------------------------------------- fits


@pytest.mark.parametrize("generator", [nn.Linear, None])
def test_the_fit_finds_a_conjugate_posterior_with_its_correlations(generator):
    x, y = regression_rows()
    x = x @ torch.tensor([[1.0, 0.0, 0.8], [0.0, 1.0, 0.5], [0.0, 0.0, 0.6]]).T  # so that the weights are correlated
    mean, covariance = regression_posterior(x, y)
    scale = covariance.diagonal().sqrt()
    guide = Implicit(regression, 3, noise=1e-3, **({} if generator is None else {"generator": generator}))
    method = svi(loss=importance(elbo, 10), lr=3e-2, schedule="cosine", steps=300)
    w = fit(regression, (x, y), guide=guide, method=method, seed=0, progress=False).sample(20000)["w"]
    assert ((w.mean(0) - mean) / scale).abs().max() < 0.1
    found, exact = (c / scale / scale[:, None] for c in (torch.cov(w.T), covariance))
    assert exact.tril(-1).abs().max() > 0.5
    torch.testing.assert_close(found, exact, atol=0.15, rtol=0)


def banana() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(a**2, 0.2))


def test_a_banana_is_fitted_where_a_mean_field_is_not():
    """Its evidence is one, so that an ELBO is minus the divergence."""
    method = svi(loss=importance(elbo, 10), lr=1e-2, schedule="cosine", steps=400)
    found = {}
    for name, guide in (("implicit", Implicit(banana, 2, noise=0.01)), ("mean field", AutoNormal(banana))):
        posterior = fit(banana, None, guide=guide, method=method, seed=0, progress=False)
        with torch.no_grad():
            found[name] = weigh(banana, guide, None, 4000).log_weights.mean().item()
        w = posterior.sample(4000)
        curve = torch.corrcoef(torch.stack([w["a"] ** 2, w["b"]]))[0, 1]
        assert curve > 0.6 if name == "implicit" else curve < 0.1
    # the best of mean fields is a = N(0, s^2) with s = 0.14 or so, and misses by log(1 / s) - 1 / 2 and more
    assert -0.45 < found["implicit"] < 0.05
    assert found["mean field"] < found["implicit"] - 0.5


def test_matrices_reach_every_latent_with_few_parameters():
    torch.manual_seed(0)
    network = Matrices(3, 10_001, 4)
    assert network(torch.randn(6, 1, 3)).shape == (6, 1, 10_001)
    assert sum(p.numel() for p in network.parameters()) < 2500
    guide = built(Implicit(flat(1001), 3, generator=lambda d, n: Matrices(d, n, 4)))
    values, log_q = draws(guide, 40)
    assert values.std(0).min() > 0.03 and values.std(0).max() < 0.3
    assert (values.mean(0) - guide._init_loc()).abs().max() < 0.15
    log_q.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for n, p in guide.named_parameters() if n != "center")


# ---------------------------------------------------------------------------------------------- particles and files


def mixed(y: Tensor) -> None:
    """Latents of several supports and shapes, one of them of the rows."""
    a = pyro.sample("a", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    s = pyro.sample("s", dist.Exponential(1.0))
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + (a.sum(-2) * p).sum(-1), s), obs=y)


def test_particles_together_are_particles_one_by_one(monkeypatch):
    y = torch.randn(4)
    guide = Implicit(mixed, 3, noise=0.1, plate=None)
    layout = inspect_sites(mixed, guide, (y,))
    weigh(mixed, guide, (y,), 2, layout=layout)
    assert layout.serial is None
    size = len(guide.center)
    assert size == 6 + 1 + 2 + 4
    numbers = {n: torch.randn(5, 1, n) for n in (3, size)}
    monkeypatch.setattr(torch, "randn", lambda *shape: numbers[shape[-1]].reshape(shape))
    together = weigh(mixed, guide, (y,), 5, layout=layout)
    assert len(together.passes) == 1, "all at once"
    alone = []
    for k in range(5):
        monkeypatch.setattr(torch, "randn", lambda *shape, k=k: numbers[shape[-1]][k, 0].reshape(shape))
        alone.append(weigh(mixed, guide, (y,), 1, layout=layout).log_weights[0])
    torch.testing.assert_close(together.log_weights, torch.stack(alone))
    assert together.log_weights.std() > 0.1


def test_weights_of_a_constrained_latent_have_the_density_of_its_transform():
    guide = built(Implicit(lambda: pyro.sample("s", dist.Exponential(1.0)), 1, generator=nn.Linear, noise=0.1))
    normal = gaussian(guide)
    run = weigh(guide.model, guide, None, 50).passes[0]
    s = run.values["s"].flatten().double()
    exact = -s - dist.LogNormal(normal.loc, normal.covariance_matrix[0] ** 0.5).log_prob(s)
    torch.testing.assert_close((run.log_p - run.log_q).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_posterior_is_saved_and_loaded(tmp_path):
    y = torch.randn(4)
    posterior = fit(mixed, y, guide=Implicit(mixed, 3, plate=None), method=svi(steps=5), seed=0, progress=False)
    path = posterior.save(tmp_path / "posterior")
    loaded = Posterior.load(path, mixed, Implicit(mixed, 3, plate=None), data=y)
    found = []
    for one in (posterior, loaded):
        torch.manual_seed(3)
        found.append(one.sample(6))
    assert {n: tuple(v.shape) for n, v in found[0].items()} == {"a": (6, 2, 3), "s": (6,), "p": (6, 3), "z": (6, 4)}
    torch.testing.assert_close(*found)
    assert torch.isfinite(loaded.log_evidence(y, 20))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Implicit(banana, 0), "latent=0 must be at least 1"),
        (lambda: Implicit(banana, noise=0.0), "noise=0.0 .* positive"),
        (lambda: Implicit(banana, noise=math.nan), "noise=nan .* positive"),
        (lambda: Implicit(banana, scale=-1.0), "scale=-1.0 positive"),
        (lambda: Implicit(lambda: None)(), "no guide of shared latents .* no latent variables"),
        (lambda: Implicit(lambda: pyro.sample("k", dist.Poisson(1.0)))(), "discrete sample site 'k'"),
    ],
)
def test_mistakes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
