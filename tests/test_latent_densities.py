"""Densities of codes against scikit-learn and closed forms; rows that are generated from them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import nn
from truth import exact_guide, ppca

from pyro_ae import batch_plate, bayesian, fit, sghmc, svi
from pyro_ae.latent_densities import flow, gaussian, mixture, nearest
from pyro_ae.models import vae

ALL = [gaussian(), mixture(3), mixture(8, dirichlet_process=True), nearest(), flow(steps=10)]


def banana(rows=800):
    first = torch.randn(rows)
    return torch.stack([first, first.square() + 0.2 * torch.randn(rows)], 1)


@pytest.mark.parametrize("density", ALL, ids=lambda d: f"{d}"[:30])
def test_is_a_distribution_of_codes_and_leaves_the_global_state(density):
    validated = torch.distributions.Distribution._validate_args
    fitted = density(banana())
    assert torch.distributions.Distribution._validate_args == validated
    assert fitted.sample((7,)).shape == (7, 2) and fitted.log_prob(torch.zeros(5, 2)).shape == (5,)
    grid = torch.cartesian_prod(torch.linspace(-8, 8, 300), torch.linspace(-8, 20, 500))
    mass = fitted.log_prob(grid).exp().sum() * (16 / 299) * (28 / 499)
    assert abs(mass - 1) < 0.03


def test_a_gaussian_has_the_moments_of_the_codes():
    codes = banana()
    fitted = gaussian()(codes)
    torch.testing.assert_close(fitted.mean, codes.mean(0))
    torch.testing.assert_close(fitted.covariance_matrix, codes.T.cov(), atol=1e-4, rtol=1e-4)
    assert gaussian()(codes[:, :1]).sample((3,)).shape == (3, 1)


def test_a_mixture_is_scikit_learns():
    codes = torch.cat([torch.randn(100, 2), 8.0 + 0.5 * torch.randn(200, 2)])
    fitted, expected = mixture(2)(codes), GaussianMixture(2, random_state=0).fit(codes.double().numpy())
    new = torch.randn(20, 2)
    torch.testing.assert_close(
        fitted.log_prob(new).double(),
        torch.as_tensor(expected.score_samples(new.double().numpy())),
        atol=1e-2,
        rtol=1e-3,
    )
    process = mixture(8, dirichlet_process=True)(codes)
    assert (process.mixture_distribution.probs > 0.02).sum() <= 4  # it does not need them all


def test_a_mixture_of_few_codes_of_many_dims_is_a_density():
    torch.manual_seed(0)
    codes = torch.randn(200, 10) @ torch.randn(10, 50) * 30.0  # singular, as codes of a wide latent are
    for density in (mixture(5), mixture(20, dirichlet_process=True)):
        assert torch.isfinite(density(codes).sample((100,))).all()


def test_the_widths_of_kernels_are_distances_to_neighbours():
    codes = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    kernels = nearest(k=1, scale=0.5)(codes).component_distribution
    torch.testing.assert_close(kernels.base_dist.scale[:, 0], 0.5 * torch.tensor([1.0, 1.0, 2.0, 4.0]))


def test_a_flow_sees_what_a_gaussian_cannot():
    torch.manual_seed(0)
    codes, new = banana(2000), banana(1000)
    gain = flow(steps=400, lr=3e-3)(codes).log_prob(new).mean() - gaussian()(codes).log_prob(new).mean()
    assert gain > 0.7


def test_rows_are_decoded_from_codes_of_the_density():
    """PPCA with the code's distribution known: the covariance of new rows is W C W' + noise."""
    torch.manual_seed(0)
    model, x = ppca(rows=400)
    x[:, 0] *= 3.0
    posterior = fit(model, x, guide=exact_guide(model), method=svi(steps=1), progress=False) if False else None
    del posterior
    fitted = _fitted(model, x)
    rows = fitted.generate(50_000, density=gaussian())
    codes = fitted.encode()
    noise = (2 * model.log_noise).exp()
    expected = model.weight @ codes.T.cov() @ model.weight.T + noise * torch.eye(5)
    torch.testing.assert_close(rows.T.cov(), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(rows.mean(0), codes.mean(0) @ model.weight.T + model.mean, rtol=0, atol=0.05)
    means = fitted.generate(50_000, density=gaussian(), mean=True)
    torch.testing.assert_close(means.T.cov(), expected - noise * torch.eye(5), rtol=0.1, atol=0.1)


def _fitted(model, x):
    from pyro_ae.engines.run import Run
    from pyro_ae.posterior import Posterior
    from pyro_ae.program import Program

    program = Program(model, exact_guide(model), total=len(x))
    rows = Run(data=_rows(x)).data
    program.build(rows.call())
    return Posterior(program, data=rows, method="exact")


def _rows(x):
    from pyro_ae.data import as_rows

    return as_rows(x)


def test_any_autoencoder_generates_from_any_density():
    model, guide, x = vae.example()
    posterior = fit(model, x, guide=guide, method=svi(steps=2), seed=0, progress=False)
    for density in (gaussian(), mixture(2), nearest(), flow(steps=2)):
        assert posterior.generate(9, density=density).shape == (9, 12)
    assert posterior.generate(9, density=gaussian(), code="z", data=x[:12]).shape == (9, 12)


def test_codes_of_an_autoencoder_whose_weights_are_latent():
    encoder, decoder = bayesian(nn.Linear(6, 2), name="encoder"), bayesian(nn.Linear(2, 6), name="decoder")

    def model(x=None, *, size=1):
        with batch_plate(x, size):
            z = None if x is not None else pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if x is not None:
            z = pyro.deterministic("z", encoder(x), event_dim=1)
        logits = decoder(z)
        with batch_plate(x, size):
            return pyro.sample("x", dist.Normal(logits, 0.1).to_event(1), obs=x)

    x = torch.randn(30, 6)
    posterior = fit(model, x, method=sghmc(warmup=5, draws=4, thinning=1, chains=2), seed=0, progress=False)
    assert posterior.generate(11).shape == (11, 6)
    assert posterior.generate(11, density=gaussian(), code="z").shape == (11, 6)
    assert posterior.generate(11, density=gaussian()).shape == (11, 6)
    with pytest.raises(ValueError, match="no site 'code'"):
        posterior.generate(3, density=gaussian(), code="code")


@pytest.mark.parametrize(
    "make",
    [
        lambda: mixture(0),
        lambda: nearest(0),
        lambda: flow(transforms=0),
        lambda: gaussian()(torch.zeros(5)),
        lambda: nearest(9)(torch.zeros(5, 2)),
        lambda: gaussian()(torch.full((5, 2), torch.nan)),
    ],
)
def test_out_of_range_is_refused(make):
    with pytest.raises(ValueError, match=r"must be|expected codes|at least|not finite"):
        make()
