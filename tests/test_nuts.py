"""The NUTS engine: moments of known targets, sampler statistics, and refusals."""

import math

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from truth import gaussian_mean, gaussian_mean_posterior

from pyro_ae import fit, hmc, nuts, svi


def error(draws: torch.Tensor, kind: str = "mean") -> float:
    """The Monte Carlo standard error of chains ``[chains, draws]``, from their own effective sample size."""
    return float(arviz.mcse(draws.double().numpy(), method=kind))


def agrees(draws: torch.Tensor, mean: float, sd: float) -> None:
    """Mean and standard deviation within four Monte Carlo errors."""
    assert abs(float(draws.mean()) - mean) < 4 * error(draws)
    assert abs(float(draws.std()) - sd) < 4 * error(draws, "sd")


BACKENDS = ["numpyro", "pyro"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("engine", [nuts, hmc], ids=lambda e: e.__name__)
def test_a_conjugate_target(engine, backend):
    y = torch.randn(20) + 2
    method = engine(draws=400, warmup=200, chains=2, backend=backend)
    posterior = fit(gaussian_mean, y, method=method, seed=0, progress=False)
    loc, scale = gaussian_mean_posterior(y)
    agrees(posterior.draws["mu"], loc.item(), scale.item())
    assert posterior.draws["mu"].shape == (2, 400)
    assert posterior.draws["mu"][0].unique().numel() > 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skewed_target_with_a_positive_support(backend):
    """Gamma(3, 2): the Jacobian of the log transform counts, or the mean is off."""

    def model():
        pyro.sample("g", dist.Gamma(3.0, 2.0))

    method = nuts(draws=600, warmup=300, chains=2, backend=backend)
    posterior = fit(model, None, method=method, seed=0, progress=False)
    agrees(posterior.draws["g"], 1.5, math.sqrt(3) / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampler_statistics_in_arvizs_names(backend):
    y = torch.randn(20)
    method = nuts(draws=60, warmup=60, chains=2, backend=backend)
    posterior = fit(gaussian_mean, y, method=method, seed=0, progress=False)
    stats = posterior.stats
    assert set(stats) == {
        "diverging",
        "energy",
        "tree_depth",
        "acceptance_rate",
        "step_size",
        "n_steps",
        "lp",
    }
    assert all(v.shape == (2, 60) for v in stats.values())
    assert stats["diverging"].dtype == torch.bool
    assert ((stats["acceptance_rate"] >= 0) & (stats["acceptance_rate"] <= 1 + 1e-6)).all()
    assert (stats["n_steps"] < 2 ** stats["tree_depth"]).all()
    assert (stats["n_steps"] >= 2 ** (stats["tree_depth"] - 1)).all()
    assert (stats["step_size"] == stats["step_size"][:, :1]).all(), "the step size is fixed after warm-up"
    mu = posterior.draws["mu"]
    lp = dist.Normal(1.0, 2.0).log_prob(mu) + dist.Normal(mu[..., None], 1.5).log_prob(y).sum(-1)
    torch.testing.assert_close(stats["lp"].float(), lp, atol=1e-3, rtol=1e-4)
    # the energy is NumPyro's of the draw itself, and Pyro's of where the trajectory began
    potential = -(stats["lp"] if backend == "numpyro" else stats["lp"].roll(1, -1))
    assert (stats["energy"] >= potential - 1e-4)[:, 1:].all(), "kinetic energy is not negative"


def test_same_seed_same_draws_and_chains_differ():
    runs = [
        fit(gaussian_mean, torch.ones(5), method=nuts(draws=20, warmup=20, chains=2), seed=s, progress=False).draws[
            "mu"
        ]
        for s in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0], runs[0][1])


def test_divergences_are_counted():
    """Neal's funnel with a large step size diverges."""

    def funnel():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(9), (v / 2).exp()).to_event(1))

    method = nuts(draws=300, warmup=100, chains=4, target_accept=0.5)
    posterior = fit(funnel, None, method=method, seed=0, progress=False)
    assert posterior.stats["diverging"].sum() > 0
    assert "divergences" in repr(posterior)


def test_local_latents_are_sampled_too():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.tensor([-2.0, 0.0, 2.0])
    posterior = fit(model, y, method=nuts(draws=400, warmup=200, chains=2), seed=0, progress=False)
    for i in range(3):
        agrees(posterior.draws["z"][..., i], y[i].item() / 2, math.sqrt(0.5))
    torch.testing.assert_close(posterior.encode(), y / 2, atol=0.15, rtol=0)
    with pytest.raises(ValueError, match="'z' for the rows of the fit only"):
        posterior.sample(data=torch.zeros(4))


def test_an_improper_prior_and_one_that_stays_positive_by_itself():
    """The first cannot be drawn from; the second must not be tried where it never is."""

    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        sigma = pyro.sample("sigma", dist.Normal(10.0, 0.1))
        pyro.sample("y", dist.Normal(mu, sigma).expand([len(y)]).to_event(1), obs=y)

    y = 5.0 + torch.arange(4.0)
    posterior = fit(model, y, method=nuts(draws=100, warmup=100, chains=2), seed=0, progress=False)
    agrees(posterior.draws["mu"], 6.5, 5.0)


def test_interruption_keeps_what_is_drawn():
    def interrupt(event):
        if event.metrics["drawn"] >= at:
            raise KeyboardInterrupt

    method = nuts(draws=100, warmup=100, chains=3)
    at = 20
    posterior = fit(gaussian_mean, torch.ones(5), method=method, callbacks=[interrupt], progress=False)
    assert posterior.interrupted
    chains, draws = posterior.draws["mu"].shape
    assert chains == 3
    assert 20 <= draws < 100
    at = 0
    with pytest.raises(KeyboardInterrupt, match="during the warm-up"):
        fit(gaussian_mean, torch.ones(5), method=method, callbacks=[interrupt], progress=False)
    stopped = fit(
        gaussian_mean, torch.ones(5), method=method, callbacks=[lambda e: e.metrics["drawn"] > 0], progress=False
    )
    assert not stopped.interrupted
    assert stopped.draws["mu"].shape[1] < 100


def test_pyros_interruption_keeps_complete_chains():
    calls = []

    def model(y):
        calls.append(1)
        if len(calls) == 400:
            raise KeyboardInterrupt
        gaussian_mean(y)

    method = nuts(draws=20, warmup=20, chains=50, backend="pyro")
    posterior = fit(model, torch.ones(5), method=method, seed=0, progress=False)
    assert posterior.interrupted
    assert 1 <= posterior.draws["mu"].shape[0] < 50
    assert posterior.draws["mu"].shape[1] == 20


def test_refusals():
    y = torch.zeros(8)
    with pytest.raises(ValueError, match="nuts needs all data at once"):
        fit(gaussian_mean, y, method="nuts", batch_size=4, progress=False)
    with pytest.raises(ValueError, match="'k' is discrete"):
        fit(lambda: pyro.sample("k", dist.Poisson(1.0)), None, method="nuts", progress=False)
    with pytest.raises(ValueError, match="no latent site"):
        fit(lambda y: pyro.sample("y", dist.Normal(0.0, 1.0).expand([8]).to_event(1), obs=y), y, method="nuts")
    for bad in ({"draws": 0}, {"target_accept": 1.0}, {"init": "map"}, {"warmup": -1}, {"backend": "stan"}):
        for engine in (nuts, hmc):
            with pytest.raises(ValueError, match=next(iter(bad))):
                engine(**bad)
    with pytest.raises(ValueError, match="float64 is for backend='numpyro'"):
        nuts(float64=True, backend="pyro")
    with pytest.raises(ValueError, match="trajectory_length must be positive"):
        hmc(trajectory_length=0.0)

    def branching(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        loc = mu if mu > 0 else -mu
        pyro.sample("y", dist.Normal(loc, 1.0).expand([len(y)]).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"depends on the values.*nuts\(backend='pyro'\)"):
        fit(branching, y, method="nuts", progress=False)
    assert fit(branching, y, method=nuts(draws=5, warmup=5, chains=1, backend="pyro"), progress=False).draws

    def impossible(y):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(s, 1.0).expand([len(y)]).to_event(1), obs=y * float("nan"))

    with pytest.raises(ValueError, match="'y'"):
        fit(impossible, y, method="nuts", progress=False)


def test_discrete_latents_are_summed_out():
    """A mixture with known parts: the weight's posterior has one dimension, and is taken on a grid."""
    y = torch.tensor([-1.1, 2.2, 1.7, 1.9, -0.8, 2.4, 0.4])

    def mixture(y):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(p))
            pyro.sample("y", dist.Normal(3 * k - 1, 1.0), obs=y)

    grid = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    parts = torch.stack([dist.Normal(-1.0, 1.0).log_prob(y).exp(), dist.Normal(2.0, 1.0).log_prob(y).exp()]).double()
    log_p = ((1 - grid[:, None]) * parts[0] + grid[:, None] * parts[1]).log().sum(1) + (grid * (1 - grid)).log()
    mass = log_p.softmax(0)
    mean = (mass * grid).sum()
    sd = ((mass * grid**2).sum() - mean**2).sqrt()
    posterior = fit(mixture, y, method=nuts(draws=500, warmup=300, chains=2), seed=0, progress=False)
    agrees(posterior.draws["p"], mean.item(), sd.item())
    assert set(posterior.draws) == {"p"}
    assert posterior.predict(draws=20)["y"].shape == (20, 7)
    # each row's likelihood is summed as well, and not that of a component drawn from the prior
    p = posterior.draws["p"].flatten()[:, None]
    exact = ((1 - p) * parts[0] + p * parts[1]).log()
    torch.testing.assert_close(posterior.log_likelihood()["y"].double(), exact, atol=1e-4, rtol=1e-4)


def test_a_warm_start_from_a_fitted_guide():
    """Initial points and scales are those of the guide, so a short warm-up does where scales are far from one."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), torch.tensor([1000.0, 1.0, 0.001])).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu[..., 1], 1.0), obs=y)

    y = torch.randn(10) + 1
    guided = fit(model, y, method=svi(lr=0.05, steps=2000), seed=0, progress=False)
    for dense in (False, True):
        method = nuts(draws=200, warmup=10, chains=2, init=guided, dense_mass=dense)
        warm = fit(model, y, method=method, seed=0, progress=False)
        assert warm.stats["n_steps"].double().mean() < 120
    cold = fit(model, y, method=nuts(draws=200, warmup=10, chains=2), seed=0, progress=False)
    assert cold.stats["n_steps"].double().mean() > 300
    assert "<a posterior by svi" in repr(method)
    with pytest.raises(ValueError, match="lacks 'mu'"):
        other = fit(lambda y: gaussian_mean_named(y), y, method=svi(steps=2), progress=False)
        fit(model, y, method=nuts(init=other), progress=False)


def gaussian_mean_named(y):
    m = pyro.sample("m", dist.Normal(1.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(m, 1.5), obs=y)


def test_double_precision_on_request():
    """A narrow posterior far from zero: its spread is less than float32 can tell apart there."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1e6))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1e-3), obs=y)

    y = 1000.0 + torch.zeros(4)
    method = nuts(draws=300, warmup=300, chains=2, float64=True)
    posterior = fit(model, y, method=method, seed=0, progress=False)
    agrees(posterior.draws["mu"] - 1000.0, 0.0, 0.0005)


def test_one_compilation_serves_other_data_and_seeds():
    from pyro_ae.engines import numpyro_chains

    method = nuts(draws=30, warmup=30, chains=2)
    numpyro_chains._cache.clear()
    runs = [fit(gaussian_mean, y, method=method, seed=1, progress=False) for y in (torch.zeros(6), torch.ones(6))]
    assert len(numpyro_chains._cache) == 1
    assert not torch.equal(runs[0].draws["mu"], runs[1].draws["mu"])
    fit(gaussian_mean, torch.ones(7), method=method, seed=1, progress=False)
    assert len(numpyro_chains._cache) == 2


def test_sites_under_reparam_are_values_of_others():
    """A handler of Pyro turns a latent into a function of a new one; it is still a quantity of the posterior."""
    from pyro.infer.reparam import LocScaleReparam

    def model(y):
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("data", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    y = torch.tensor([0.3, -0.2, 1.1])
    decentred = pyro.poutine.reparam(model, {"theta": LocScaleReparam(0.0)})
    method = nuts(draws=50, warmup=50, chains=2)
    posterior = fit(decentred, y, method=method, seed=0, progress=False)
    found = posterior.to_arviz(groups=["posterior"]).posterior
    assert set(found.data_vars) == {"tau", "theta_decentered", "theta"}
    np.testing.assert_allclose(found["theta"], found["tau"].values[..., None] * found["theta_decentered"], rtol=1e-4)


def test_a_hidden_markov_likelihood_reaches_arviz():
    """The batch shape of Pyro's DiscreteHMM is a plain tuple."""

    def model(y):
        move = pyro.sample("move", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        emission = dist.Normal(torch.tensor([0.0, 2.0]), 1.0)
        pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), move.log(), emission), obs=y)

    y = torch.tensor([0.1, 1.9, 2.2, -0.3])
    posterior = fit(model, y, method=nuts(draws=10, warmup=10, chains=2), seed=0, progress=False, plate=None)
    with pytest.warns(UserWarning, match="one by one"):
        found = posterior.to_arviz(groups=["posterior", "log_likelihood"])
    assert found.log_likelihood["y"].shape[:2] == (2, 10)


def exponential(y=None):
    rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", 5):
        return pyro.sample("y", dist.Exponential(rate), obs=y)


def hierarchical(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("data", 6):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(mu + tau * eta, 0.5), obs=y)


def two_parts(y=None):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("data", 8):
        k = pyro.sample("k", dist.Bernoulli(p))
        return pyro.sample("y", dist.Normal(2 * k, 1.0), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name"), [(exponential, "rate"), (hierarchical, "mu"), (hierarchical, "tau"), (two_parts, "p")]
)
def test_simulation_based_calibration(model, name):
    """The rank of a parameter among draws given data that it made is uniform (Talts et al., 2018)."""
    ranks = []
    for seed in range(100):
        torch.manual_seed(seed)
        trace = pyro.poutine.trace(model).get_trace()
        method = nuts(draws=180, warmup=150, chains=1, target_accept=0.9)
        draws = fit(model, trace.nodes["y"]["value"], method=method, seed=seed, progress=False).draws[name][0, ::20]
        ranks.append(int((draws < trace.nodes[name]["value"]).sum()))
    counts = np.bincount(np.array(ranks) // 2, minlength=5)  # nine draws: ranks 0 to 9, in five pairs
    statistic = ((counts - 20) ** 2 / 20).sum()
    assert statistic < 18.5, counts  # the 99.9% quantile of chi-squared with 4 degrees of freedom
