"""Samplers by stochastic gradients: their stationary moments by closed form, and the energies that they follow."""

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import nn
from truth import NOISE, regression, regression_posterior, regression_rows

from pyro_ae import (
    batch_plate,
    bayesian,
    ensemble,
    entropy_sghmc,
    fit,
    laplace,
    map_,
    sghmc,
    sgld,
    sgnht,
    swag,
)
from pyro_ae.data import Call, as_rows, observe
from pyro_ae.energy import Energy
from pyro_ae.engines.stacked import StackedEnergy
from pyro_ae.engines.stream import Stream
from pyro_ae.plates import Scaled

SHORT = {"warmup": 5, "draws": 6, "thinning": 2}
SAMPLERS = {
    "sgld": sgld(lr=1e-2),
    "sgld-preconditioned": sgld(lr=3e-3, preconditioned=True),
    "sghmc": sghmc(lr=5e-4),
    "sghmc-plain": sghmc(lr=2e-3, adaptive=False),
    "sgnht": sgnht(lr=2e-3),
    "entropy_sghmc": entropy_sghmc(lr=5e-4, flatness=1e-2, keep="posterior"),
    "cycles": sgld(lr=2e-2, cycles=5, thinning=60),
}


def quick(engine, model=regression, given=None, **kwargs):
    given = regression_rows() if given is None else given
    return fit(model, given, method=engine, **({"seed": 0, "progress": False} | kwargs))


# -- stationary moments ------------------------------------------------------------------------------------------


def standard():
    pyro.sample("z", dist.Normal(torch.zeros(()), 2.0))


def spread(engine):
    posterior = fit(standard, None, method=engine, seed=0, progress=False)
    z = posterior.draws["z"]
    assert abs(z.mean()) < 0.1
    return float(z.var())


MANY = {"chains": 4000, "draws": 10, "thinning": 20, "init": "prior"}


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_sgld_has_the_variance_of_its_own_recursion(temperature):
    """On N(0, s^2) it is an autoregression, of variance T s^2 / (1 - lr / (2 s^2)): the bias in the step size."""
    for lr in (0.1, 2.0):
        found = spread(sgld(lr=lr, warmup=100 if lr > 1 else 400, temperature=temperature, **MANY))
        assert abs(found / (temperature * 4.0 / (1 - lr / 8.0)) - 1) < 0.05


def stationary(transition, noise):
    return solve_discrete_lyapunov(np.array(transition), np.array(noise))[0, 0]


def test_sghmc_and_its_thermostat_have_the_variance_of_their_recursions():
    """p' = (1 - a) p - lr z / s^2 + noise, z' = z + p', whose stationary covariance solves a Lyapunov equation."""
    for lr, friction in ((0.05, 0.1), (0.5, 0.5)):
        first, second = [1 - friction, -lr / 4.0], [1 - friction, 1 - lr / 4.0]
        q = 2 * friction * lr
        expected = stationary([second[::-1], first[::-1]], [[q, q], [q, q]])
        found = spread(sghmc(lr=lr, friction=friction, adaptive=False, warmup=300, **MANY))
        assert abs(found / expected - 1) < 0.05
    found = spread(sgnht(lr=0.05, friction=0.1, warmup=300, **MANY))
    assert abs(found / 4.0 - 1) < 0.1  # the friction moves, so only the limit of small steps is known


def test_the_prior_alone_is_tempered_where_that_is_asked():
    found = spread(sgld(lr=0.1, warmup=1000, prior_temperature=0.5, **MANY))
    assert abs(found / (2.0 / (1 - 0.1 / 4.0)) - 1) < 0.05


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("batch_size", [None, 50])
def test_finds_a_conjugate_posterior(name, batch_size):
    engine = replace(SAMPLERS[name], draws=100, chains=60)
    posterior = quick(engine, batch_size=batch_size)
    mean, covariance = regression_posterior(*regression_rows())
    w = posterior.sample()["w"]
    deviation = (w.mean(0) - mean) / covariance.diagonal().sqrt()
    assert deviation.abs().max() < 0.15
    ratio = w.std(0) / covariance.diagonal().sqrt()
    widest = 1.12 if batch_size is None else 1.3  # the noise of minibatches is not known to sgld and comes on top
    assert ratio.min() > 0.9 and ratio.max() < widest


def test_finds_a_skewed_posterior_with_a_positive_support():
    """Gamma prior, exponential observations: the posterior is Gamma, sampled as a logarithm with its Jacobian."""
    y = dist.Exponential(2.0).sample((8,))

    def model(y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    expected = dist.Gamma(2.0 + len(y), 1.0 + y.sum())
    for engine in (sgld(lr=0.02), sghmc(lr=2e-2, adaptive=False), sghmc(lr=5e-3), sgnht(lr=0.02)):
        engine = replace(engine, chains=400, draws=20, warmup=1000, thinning=20)
        rate = quick(engine, model, y).sample()["rate"]
        assert abs(rate.mean() / expected.mean - 1) < 0.03, engine
        assert abs(rate.std() / expected.stddev - 1) < 0.06, engine
        third = ((rate - rate.mean()) ** 3).mean() / rate.std() ** 3
        assert abs(third - 2 / (2.0 + len(y)) ** 0.5) < 0.25, engine


def test_entropy_mcmc_smooths_the_posterior_of_its_auxiliary():
    """On a Gaussian, the auxiliary has the variance of the posterior plus the flatness."""
    engine = entropy_sghmc(lr=0.02, adaptive=False, flatness=1.0, warmup=1000, chains=1000, draws=20, init="prior")
    posterior = fit(standard, None, method=engine, seed=0, progress=False)
    z, smoothed = posterior.draws["z"].chunk(2)
    assert abs(z.var() / 4.0 - 1) < 0.08 and abs(smoothed.var() / 5.0 - 1) < 0.08
    assert len(quick(entropy_sghmc(keep="smoothed", **SHORT)).draws["w"]) == 4


@pytest.mark.parametrize("structure", ["full", "diagonal", "low_rank", "kronecker"])
def test_laplace_is_exact_where_the_posterior_is_gaussian(structure):
    """The Hessian of a linear regression is constant; the Fisher information is its mean over drawn values."""
    x, y = regression_rows(2000)
    mean, covariance = regression_posterior(x, y)
    engine = laplace(structure=structure, draws=4000, rank=3, at=map_(steps=600, lr=0.05))
    w = quick(engine, given=(x, y)).sample()["w"]
    sd = covariance.diagonal().sqrt()
    if structure in ("diagonal", "kronecker"):
        sd = torch.linalg.inv(covariance).diagonal().rsqrt()
    assert ((w.mean(0) - mean) / sd).abs().max() < 0.1
    assert (w.std(0) / sd - 1).abs().max() < 0.1


@pytest.mark.parametrize("structure", ["full", "diagonal", "kronecker"])
def test_laplace_leaves_out_missing_values(structure):
    """Derivatives by vmap cannot look for NaN, so the engine tells `observe` whether there is any."""
    x, y = regression_rows(1000)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with batch_plate(x):
            observe("y", dist.Normal((x * w).sum(-1), NOISE), y)

    def draws(rows):
        engine = laplace(structure=structure, draws=2000, at=map_(steps=300, lr=0.05))
        return quick(engine, model, rows).sample()["w"]

    missing = torch.where(torch.arange(1000) < 500, y, torch.nan)
    half, found, all_of_them = draws((x[:500], y[:500])), draws((x, missing)), draws((x, y))
    torch.testing.assert_close(found.mean(0), half.mean(0), rtol=0, atol=0.1 * float(half.std(0).min()))
    torch.testing.assert_close(found.std(0), half.std(0), rtol=0.1, atol=0)
    assert (all_of_them.std(0) < 0.85 * half.std(0)).all()


def test_kronecker_curvature_is_exact_for_one_layer_of_independent_outputs():
    """With unit noise F = I (x) sum of x x', a Kronecker product by itself."""
    x = torch.randn(1500, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.4]])
    net = bayesian(nn.Linear(2, 3, bias=False))

    def model(x, y=None):
        mean = net(x)
        with batch_plate(x):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    engine = laplace(structure="kronecker", draws=4000, at=map_(steps=10))
    w = fit(model, (x, torch.randn(1500, 3)), method=engine, seed=0, progress=False).sample()["w.weight"]
    expected = torch.linalg.inv(x.T @ x + torch.eye(2))
    for row in range(3):
        torch.testing.assert_close(w[:, row].T.cov(), expected, rtol=0.12, atol=0.05 * float(expected.max()))
    assert abs(torch.corrcoef(torch.stack([w[:, 0, 0], w[:, 1, 0]]))[0, 1]) < 0.06


def test_laplace_of_some_sites_leaves_the_others_at_the_maximum():
    net = bayesian(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))

    def model(x, y=None):
        mean = net(x).squeeze(-1)
        with batch_plate(x):
            pyro.sample("y", dist.Normal(mean, NOISE), obs=y)

    draws = quick(laplace(sites=("w.2.*",), at=map_(steps=50)), model).sample()
    assert (draws["w.0.weight"] == draws["w.0.weight"][0]).all() and (draws["w.2.weight"].std(0) > 0).all()
    with pytest.raises(ValueError, match="match no latent; there are w.0.weight"):
        quick(laplace(sites=("head.*",), at=map_(steps=2)), model)


def test_swag_has_the_moments_of_its_snapshots():
    kept = torch.randn(2, 30, 4) * torch.tensor([1.0, 2.0, 0.5, 0.1])
    engine = swag(chains=2, snapshots=30, rank=30, draws=20_000)
    found = engine.finish(kept)
    assert found.shape == (2, 20_000, 4)
    centred = kept - kept.mean(1, keepdim=True)
    expected = 0.5 * centred.square().mean(1).diag_embed() + 0.5 * centred.mT @ centred / 29
    for c in range(2):
        torch.testing.assert_close(found[c].mean(0), kept[c].mean(0), rtol=0, atol=0.06)
        torch.testing.assert_close(found[c].T.cov(), expected[c], rtol=0.1, atol=0.05)


def test_the_density_of_a_draw_is_its_own():
    """SWAG keeps that of its snapshots, and draws others, even where there are as many."""
    assert "lp" not in quick(swag(warmup=5, snapshots=6, rank=3, thinning=2, draws=6)).stats
    assert "lp" in quick(sgld(lr=1e-3, warmup=5, draws=6)).stats


def test_an_ensemble_ends_at_the_maxima_and_map_is_one_of_it():
    mean, _ = regression_posterior(*regression_rows())
    draws = quick(ensemble(members=4, steps=500, lr=0.05)).sample()["w"]
    assert draws.shape == (4, 3) and (draws - mean).abs().max() < 1e-2
    assert quick(map_(steps=500, lr=0.05)).sample()["w"].shape == (1, 3)


# -- energies ----------------------------------------------------------------------------------------------------


def minibatched(model, given, size):
    rows = as_rows(given)
    first = rows.first(size)
    return Energy(Scaled(model, "data", rows.size), first), rows


def test_minibatch_energies_average_to_the_full_one_with_the_prior_counted_once():
    energy, rows = minibatched(regression, regression_rows(), 20)
    v = {"w": torch.tensor([0.3, -1.0, 2.0])}
    batches = [energy(v, batch) for batch in rows.batches(20)]
    full = Energy(regression, rows.call())(v)
    torch.testing.assert_close(torch.stack(batches).mean(), full)
    x, y = regression_rows()
    log_joint = dist.Normal(x @ v["w"], NOISE).log_prob(y).sum() + dist.Normal(0.0, 1.0).log_prob(v["w"]).sum()
    torch.testing.assert_close(full, -log_joint)


@pytest.mark.parametrize("own", [False, True])
def test_chains_together_are_what_they_are_alone_eager_and_replayed(own):
    energy, rows = minibatched(regression, regression_rows(), 20)
    position = torch.randn(4, 3)
    batch = next(Stream(rows, 20, torch.device("cpu"), chains=4 if own else None))
    alone = []
    for c, v in enumerate(position):
        v = v.clone().requires_grad_()
        mine = Call(tuple(t[c] for t in batch.args)) if own else batch
        u = energy({"w": v}, mine)
        alone.append((u.detach(), torch.autograd.grad(u, v)[0]))
    stacked = StackedEnergy(energy, own=own)
    for settled in (False, True, True):
        if settled:
            stacked.settle()
        found = stacked(position, batch)
        for i in range(2):
            torch.testing.assert_close(found[i], torch.stack([a[i] for a in alone]), rtol=1e-4, atol=1e-4)
    assert not stacked.eager and not stacked.serial and len(stacked._graphs) == 1


def test_a_replay_follows_the_batch_and_not_the_first_one():
    energy, rows = minibatched(regression, regression_rows(), 20)
    stacked = StackedEnergy(energy)
    stacked.settle()
    batches = list(rows.batches(20))
    for batch in batches[:3]:
        torch.testing.assert_close(
            stacked(torch.ones(1, 3), batch)[0][0], energy({"w": torch.ones(3)}, batch), rtol=1e-4, atol=1e-3
        )


def test_what_is_no_graph_runs_as_it_is_and_says_so_once():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        scale = 2.0 if float(x[0, 0]) > 0 else 1.0  # an if on the batch, which a graph could not follow
        with batch_plate(x):
            pyro.sample("y", dist.Normal(x @ w, scale), obs=y)

    with pytest.warns(UserWarning, match="no graph"):
        stepwise = quick(sgld(lr=1e-3, **SHORT), model, batch_size=20).sample()["w"]
    assert torch.isfinite(stepwise).all()


def test_what_vmap_cannot_run_takes_turns_and_says_so_once():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        scale = 2.0 if w[0].item() > 1e9 else NOISE
        with batch_plate(x):
            pyro.sample("y", dist.Normal(x @ w, scale), obs=y)

    with pytest.warns(UserWarning, match="take turns"):
        slow = quick(sgld(lr=1e-3, **SHORT), model).sample()["w"]
    torch.testing.assert_close(slow, quick(sgld(lr=1e-3, **SHORT)).sample()["w"])


def test_missing_values_are_left_out():
    x, y = regression_rows(40)
    y[::3] = float("nan")
    from pyro_ae import observe

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with batch_plate(x):
            observe("y", dist.Normal((x * w).sum(-1), NOISE), y)

    w = quick(sghmc(lr=2e-4, chains=40, warmup=500, draws=50), model, (x, y)).sample()["w"]
    keep = ~y.isnan()
    mean, covariance = regression_posterior(x[keep], y[keep])
    assert ((w.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max() < 0.15


@pytest.mark.parametrize("compile", ["replay", False])
def test_chains_are_the_same_however_their_steps_are_run(compile):
    method = sghmc(lr=2e-4, chains=3, warmup=20, draws=20, thinning=2)
    options = {"method": method, "batch_size": 16, "seed": 0, "progress": False, "check": False}
    draws = [fit(regression, regression_rows(), compile=c, **options).sample()["w"] for c in ("auto", compile)]
    torch.testing.assert_close(*draws)


def test_chains_are_not_captured_where_that_is_not_wanted(monkeypatch):
    monkeypatch.setattr("pyro_ae.engines.stacked.record", None)
    with pytest.warns(UserWarning, match="no graph"):
        quick(sgld(lr=1e-3, **SHORT))
    quick(sgld(lr=1e-3, **SHORT), compile=False)


@pytest.mark.slow
def test_compiled_chains_are_replayed_ones():
    energy, rows = minibatched(regression, regression_rows(), 20)
    batch, position = next(iter(rows.batches(20))), torch.randn(4, 3)
    found = []
    for compile in ("replay", "inductor"):
        stacked = StackedEnergy(energy, compile=compile)
        stacked.settle()
        stacked(position, batch)
        found.append(stacked(position, batch))
        assert not stacked.eager
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
