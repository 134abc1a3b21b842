"""The NUTS engine: moments of known targets, sampler statistics, and refusals."""

import json
import math

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from truth import gaussian_mean, gaussian_mean_posterior

from pyro_ae import fit, nuts


def error(draws: torch.Tensor, kind: str = "mean") -> float:
    """The Monte Carlo standard error of chains ``[chains, draws]``, from their own effective sample size."""
    return float(arviz.mcse(draws.double().numpy(), method=kind))


def agrees(draws: torch.Tensor, mean: float, sd: float) -> None:
    """Mean and standard deviation within four Monte Carlo errors."""
    assert abs(float(draws.mean()) - mean) < 4 * error(draws)
    assert abs(float(draws.std()) - sd) < 4 * error(draws, "sd")


def test_a_conjugate_target():
    y = torch.randn(20) + 2
    posterior = fit(gaussian_mean, y, method=nuts(draws=400, warmup=200, chains=2), seed=0, progress=False)
    loc, scale = gaussian_mean_posterior(y)
    agrees(posterior.draws["mu"], loc.item(), scale.item())
    assert posterior.draws["mu"].shape == (2, 400)
    assert posterior.draws["mu"][0].unique().numel() > 100


def test_a_skewed_target_with_a_positive_support():
    """Gamma(3, 2): the Jacobian of the log transform counts, or the mean is off."""

    def model():
        pyro.sample("g", dist.Gamma(3.0, 2.0))

    posterior = fit(model, None, method=nuts(draws=600, warmup=300, chains=2), seed=0, progress=False)
    agrees(posterior.draws["g"], 1.5, math.sqrt(3) / 2)


def test_sampler_statistics_in_arvizs_names():
    y = torch.randn(20)
    posterior = fit(gaussian_mean, y, method=nuts(draws=60, warmup=60, chains=2), seed=0, progress=False)
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
    assert (stats["energy"] >= -stats["lp"].roll(1, -1))[:, 1:].all(), "kinetic energy is not negative"


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

    method = nuts(draws=150, warmup=50, chains=1, target_accept=0.6)
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


def test_interruption_keeps_complete_chains():
    def stop(event):
        if event.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # outside the chain it is the user's own business
        fit(gaussian_mean, torch.ones(5), method=nuts(10, 10, 2), callbacks=[stop], progress=False)

    calls = []

    def model(y):
        calls.append(1)
        if len(calls) == 400:
            raise KeyboardInterrupt
        gaussian_mean(y)

    posterior = fit(model, torch.ones(5), method=nuts(draws=20, warmup=20, chains=50), seed=0, progress=False)
    assert posterior.interrupted
    assert 1 <= posterior.draws["mu"].shape[0] < 50
    assert posterior.draws["mu"].shape[1] == 20


def test_refusals():
    y = torch.zeros(8)
    with pytest.raises(ValueError, match="nuts needs all data at once"):
        fit(gaussian_mean, y, method="nuts", batch_size=4, progress=False)
    with pytest.raises(ValueError, match="'k' is discrete"):
        fit(lambda: pyro.sample("k", dist.Poisson(1.0)), None, method="nuts", progress=False)
    for bad in ({"draws": 0}, {"target_accept": 1.0}, {"init": "map"}, {"warmup": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            nuts(**bad)

    def impossible(y):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(s, 1.0).expand([len(y)]).to_event(1), obs=y * float("nan"))

    with pytest.raises(ValueError, match="'y'"):
        fit(impossible, y, method="nuts", progress=False)


def schools(J, y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", J):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def test_eight_schools_agrees_with_posteriordb(data_root):
    """Means and standard deviations within four Monte Carlo errors of the reference draws."""
    folder = data_root / "posteriordb"
    if not folder.is_dir():
        pytest.skip("needs posteriordb in the folder of data sets")
    data = json.loads((folder / "data" / "eight_schools.json").read_text())
    reference = json.loads((folder / "summaries" / "eight_schools-eight_schools_noncentered.json").read_text())
    method = nuts(draws=400, warmup=300, chains=4, target_accept=0.9)
    posterior = fit(schools, data, method=method, seed=0, progress=False)
    idata = posterior.to_arviz(groups=["posterior"])
    assert float(arviz.rhat(idata.posterior)[["mu", "tau"]].to_array().max()) < 1.02
    draws = {n: idata.posterior[n].values for n in ("mu", "tau", "theta")}
    columns = {"mu": draws["mu"], "tau": draws["tau"]}
    columns |= {f"theta[{i + 1}]": draws["theta"][..., i] for i in range(8)}
    for name, values in columns.items():
        mean, sd, size = (reference[name][k] for k in ("mean", "sd", "ess_bulk"))
        ours, theirs = arviz.mcse(values), sd / np.sqrt(size)
        assert abs(values.mean() - mean) < 4 * np.hypot(ours, theirs), name
        assert abs(np.log(values.std() / sd)) < 0.12, name


@pytest.mark.slow
def test_simulation_based_calibration():
    """The rank of a parameter among draws given data that it made is uniform (Talts et al., 2018)."""

    def model(y=None):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", 5):
            return pyro.sample("y", dist.Exponential(rate), obs=y)

    ranks = []
    for seed in range(100):
        torch.manual_seed(seed)
        trace = pyro.poutine.trace(model).get_trace()
        method = nuts(draws=180, warmup=60, chains=1)
        draws = fit(model, trace.nodes["y"]["value"], method=method, seed=seed, progress=False).draws["rate"][0, ::20]
        ranks.append(int((draws < trace.nodes["rate"]["value"]).sum()))
    counts = np.bincount(np.array(ranks) // 2, minlength=5)  # nine draws: ranks 0 to 9, in five pairs
    statistic = ((counts - 20) ** 2 / 20).sum()
    assert statistic < 18.5, counts  # the 99.9% quantile of chi-squared with 4 degrees of freedom
