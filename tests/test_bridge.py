"""Bridge sampling, where the evidence is known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from truth import (
    NOISE,
    gaussian_mean,
    gaussian_mean_evidence,
    gaussian_mean_posterior,
    ppca,
    regression,
    regression_posterior,
    regression_rows,
    untrained,
)

from pyro_ae import fit, nuts
from pyro_ae.diagnostics.bridge import Evidence, bridge_sampling

Y = torch.tensor([2.1, 0.4, 3.3, 1.2, 2.8])


def of_mean(chains: int = 4, draws: int = 1000, y: Tensor = Y) -> Evidence:
    mean, sd = gaussian_mean_posterior(y)
    return bridge_sampling(untrained(gaussian_mean, None, y, draws={"mu": mean + sd * torch.randn(chains, draws)}))


def test_exact_draws_of_a_normal() -> None:
    found = of_mean()
    assert found.log_evidence == pytest.approx(float(gaussian_mean_evidence(Y)), abs=0.01)
    assert found.error < 0.01 and "nats" in str(found)


def test_draws_of_nuts() -> None:
    posterior = fit(gaussian_mean, Y, method=nuts(draws=1000, warmup=300), seed=0, progress=False)
    found = bridge_sampling(posterior)
    assert found.log_evidence == pytest.approx(float(gaussian_mean_evidence(Y)), abs=0.01) and found.error < 0.01


def regression_evidence(x: Tensor, y: Tensor) -> float:
    covariance = x.double() @ x.double().T + NOISE**2 * torch.eye(len(y), dtype=torch.float64)
    return float(dist.MultivariateNormal(torch.zeros(len(y)).double(), covariance).log_prob(y.double()))


def test_regression_with_correlated_weights() -> None:
    x, y = regression_rows()
    x = x + x[:, :1]
    mean, covariance = regression_posterior(x, y)
    draws = dist.MultivariateNormal(mean, covariance).sample((4, 1000))
    found = bridge_sampling(untrained(regression, None, (x, y), draws={"w": draws}))
    assert found.log_evidence == pytest.approx(regression_evidence(x, y), abs=0.01)


def rates(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


COUNTS = torch.tensor([3.0, 1.0, 4.0, 2.0, 2.0])


def rates_evidence() -> float:
    a, b = 2.0 + float(COUNTS.sum()), 1.5 + len(COUNTS)
    prior = 2.0 * math.log(1.5) - math.lgamma(2.0)
    return prior + math.lgamma(a) - a * math.log(b) - float(torch.lgamma(COUNTS + 1).sum())


def test_constrained_site_and_the_error() -> None:
    """The error is what repetition with new draws shows."""
    exact = dist.Gamma(2.0 + COUNTS.sum(), 1.5 + len(COUNTS))
    posteriors = [untrained(rates, None, COUNTS, draws={"rate": exact.sample((4, 500))}) for _ in range(30)]
    found = [bridge_sampling(posterior, seed=i) for i, posterior in enumerate(posteriors)]
    values = torch.tensor([f.log_evidence for f in found])
    claimed = sum(f.error for f in found) / len(found)
    assert float(values.mean()) == pytest.approx(rates_evidence(), abs=4 * float(values.std()) / math.sqrt(30))
    assert 0.6 < float(values.std()) / claimed < 1.6 and claimed < 0.01


def test_error_of_slow_chains() -> None:
    """It grows with their autocorrelation, as repetition does."""
    z = torch.randn(20, 4, 1000)
    for t in range(1, 1000):
        z[..., t] = 0.9 * z[..., t - 1] + math.sqrt(1 - 0.9**2) * z[..., t]
    found = [bridge_sampling(untrained(rates, None, COUNTS, draws={"rate": rate})) for rate in gamma(z)]
    values = torch.tensor([f.log_evidence for f in found])
    claimed = sum(f.error for f in found) / len(found)
    assert 0.5 < float(values.std()) / claimed < 1.5
    assert float(values.mean()) == pytest.approx(rates_evidence(), abs=float(values.std()))


def gamma(z: Tensor) -> Tensor:
    """Normal numbers as draws of the posterior of the rate."""
    from scipy.stats import gamma as law

    chance = dist.Normal(0.0, 1.0).cdf(z.double()).numpy()
    return torch.as_tensor(law(2.0 + float(COUNTS.sum()), scale=1 / (1.5 + len(COUNTS))).ppf(chance)).float()


def test_a_shift_of_model_and_data_changes_nothing() -> None:
    def model(y: Tensor, centre: float) -> None:
        mu = pyro.sample("mu", dist.Normal(centre, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.5), obs=y)

    mean, sd = gaussian_mean_posterior(Y)
    draws = mean + sd * torch.randn(2, 500)
    near, far = (
        bridge_sampling(untrained(model, None, {"y": Y + by, "centre": 1.0 + by}, draws={"mu": draws + by}))
        for by in (0.0, 64.0)
    )
    assert near.log_evidence == pytest.approx(far.log_evidence, abs=1e-3)
    assert near.log_evidence == pytest.approx(float(gaussian_mean_evidence(Y)), abs=0.01)


def test_latents_of_rows_are_allowed() -> None:
    model, x = ppca(40)
    exact = model.posterior(x)
    found = bridge_sampling(untrained(model, None, x, draws={"z": exact.sample((4, 500))}))
    assert found.log_evidence == pytest.approx(float(model.marginal().log_prob(x).sum()), abs=4 * found.error + 0.05)
    assert found.error < 0.2


def test_model_that_vmap_cannot_run() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
        loc = mu if mu > -1e9 else -mu
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.5), obs=y)

    mean, sd = gaussian_mean_posterior(Y)
    with pytest.warns(UserWarning, match="they take turns"):
        found = bridge_sampling(untrained(model, None, Y, draws={"mu": mean + sd * torch.randn(2, 100)}))
    assert found.log_evidence == pytest.approx(float(gaussian_mean_evidence(Y)), abs=0.05)


def test_random_states_stay() -> None:
    mean, sd = gaussian_mean_posterior(Y)
    generator = torch.Generator().manual_seed(1)
    posterior = untrained(gaussian_mean, None, Y, draws={"mu": mean + sd * torch.randn(2, 100, generator=generator)})
    before = torch.get_rng_state()
    assert bridge_sampling(posterior) == bridge_sampling(posterior)
    assert torch.equal(before, torch.get_rng_state())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="that of a guide: see its log_evidence"):
        bridge_sampling(untrained(gaussian_mean, AutoNormal(gaussian_mean), Y))
    for draws, message in (
        ({"mu": torch.randn(2, 20)}, "needs 100 draws or more"),
        ({"mu": torch.randn(50, 4)}, "8 of each chain"),
        ({"mu": torch.randn(2, 200).index_fill(1, torch.tensor(3), math.nan)}, "'mu' has draws that are not finite"),
        ({"mu": torch.ones(2, 200)}, "all the same"),
        ({"nu": torch.randn(2, 200)}, "no draws of 'mu'"),
    ):
        with pytest.raises(ValueError, match=message):
            bridge_sampling(untrained(gaussian_mean, None, Y, draws=draws))
    x, y = regression_rows()
    with pytest.raises(ValueError, match="exactly linear in each other"):
        bridge_sampling(untrained(regression, None, (x, y), draws={"w": torch.randn(2, 200, 1).expand(2, 200, 3)}))
    model, x = ppca(40)
    with pytest.raises(ValueError, match="too few for a normal of 80 dims: take 320"):
        bridge_sampling(untrained(model, None, x, draws={"z": torch.randn(2, 100, 40, 2)}))
    with pytest.raises(ValueError, match="on the edge of their support"):
        bridge_sampling(untrained(rates, None, COUNTS, draws={"rate": torch.zeros(2, 200)}))

    def improper(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.5), obs=y)

    with pytest.raises(ValueError, match="the prior of 'mu' is improper"):
        bridge_sampling(untrained(improper, None, Y, draws={"mu": torch.randn(2, 200)}))
    with pytest.raises(ValueError, match="does not settle"):
        far = torch.cat([torch.randn(2, 100), torch.randn(2, 100) + 1e8], 1)  # another place in the second half
        bridge_sampling(untrained(gaussian_mean, None, Y, draws={"mu": far}))
