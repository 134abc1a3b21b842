"""What leaving a row out does, against fits without it in closed form."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from scipy.stats import ttest_1samp
from torch import Tensor
from truth import NOISE, exact_guide, ppca, regression, regression_posterior, regression_rows, untrained

from pyro_ae import fit, nuts
from pyro_ae.diagnostics.attribution import attribution, case_influence, influence, t_test


def removed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Changes of the posterior mean without each row: exact, and by the derivative in its weight; ``[N, 3]``. And of
    the expected loss on the rows themselves, exact, ``[N, N]``."""
    mean, covariance = regression_posterior(x, y)
    keep = 1 - torch.eye(len(x))
    precision = torch.einsum("jn,na,nb->jab", keep, x, x) / NOISE**2 + torch.eye(3)
    without = torch.linalg.solve(precision, torch.einsum("jn,na,n->ja", keep, x, y) / NOISE**2)
    slopes = -(x @ covariance) * ((y - x @ mean) / NOISE**2).unsqueeze(1)

    def loss(mean: Tensor, covariance: Tensor) -> Tensor:
        spread = torch.einsum("na,jab,nb->jn", x, covariance, x)
        return ((y - mean @ x.T) ** 2 + spread) / (2 * NOISE**2)

    losses = loss(without, torch.linalg.inv(precision)) - loss(mean.unsqueeze(0), covariance.unsqueeze(0))
    return without - mean, slopes, losses


def drawn(x: Tensor, y: Tensor, draws: int = 20_000) -> Any:
    """The posterior of the regression with exact, independent draws."""
    mean, covariance = regression_posterior(x, y)
    w = dist.MultivariateNormal(mean, covariance).sample((4, draws // 4))
    return untrained(regression, None, (x, y), draws={"w": w})


def within(found: Tensor, expected: Tensor, error: Tensor) -> None:
    """Errors are standard errors: nearly all within 4, and not all far below 1."""
    ratio = (found - expected) / error
    assert float(ratio.abs().max()) < 5.0
    assert 0.7 < float(ratio.square().mean().sqrt()) < 1.4


def test_rows_of_a_regression_are_left_out() -> None:
    x, y = regression_rows(25)
    y[3] += 4.0  # an outlier
    exact, slopes, losses = removed(x, y)
    posterior = drawn(x, y)
    first, full = (influence(posterior, "w", weighted=weighted) for weighted in (False, True))
    within(first.change, slopes, first.error)
    calm = full.pareto_k < 0.4
    assert calm.sum() > 20
    within(full.change[calm], exact[calm], full.error[calm])
    assert float((full.change - exact).norm()) < float((slopes - exact).norm()), "the derivative is not all of it"
    top = [set(change.norm(dim=1).topk(2).indices.tolist()) for change in (full.change, exact)]
    assert top[0] == top[1] and 3 in top[0]

    found = attribution(posterior, (x, y), weighted=True)
    assert found.change.shape == (25, 25)
    within(found.change[calm], losses[calm], found.error[calm])
    assert (found.change.diagonal() > 0).all()  # a row helps to predict itself


def test_a_function_of_the_draws_and_the_derivative_of_attribution() -> None:
    x, y = regression_rows(25)
    posterior = drawn(x, y)
    by_name = influence(posterior, "w")
    as_function = influence(posterior, lambda draws: draws["w"][:, 1:].exp().log())
    torch.testing.assert_close(as_function.change, by_name.change[:, 1:], atol=1e-5, rtol=1e-3)
    logs = posterior.log_likelihood()["y"].double()
    torch.testing.assert_close(attribution(posterior, (x, y)).change.double(), logs.T.cov(), atol=1e-4, rtol=1e-3)


def test_chains_and_guides() -> None:
    x, y = regression_rows(25)
    exact, slopes, _ = removed(x, y)
    chains = fit(regression, (x, y), method=nuts(draws=500, warmup=300), seed=0, progress=False)
    found = influence(chains, "w")
    assert float(((found.change - slopes) / found.error).abs().max()) < 5.5

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        mean, covariance = regression_posterior(*regression_rows(25))
        pyro.sample("w", dist.MultivariateNormal(mean, covariance))

    given = untrained(regression, guide, (x, y))
    state = torch.get_rng_state()
    found = influence(given, "w", draws=20_000)
    assert torch.equal(torch.get_rng_state(), state)
    within(found.change, slopes, found.error)
    assert torch.equal(influence(given, "w", draws=20_000).change, found.change)
    assert not torch.equal(influence(given, "w", draws=20_000, seed=1).change, found.change)


@pytest.mark.parametrize("weighted", [False, True])
def test_errors_are_the_spread_of_what_is_found(weighted: bool) -> None:
    """Where theta is standard normal and a row's log-likelihood a theta, leaving it out moves the mean to -a."""
    a = torch.tensor([0.3, 0.8])
    changes, errors = [], []
    for _ in range(300):
        theta = 2.0 + torch.randn(1000)
        found = case_influence(theta, theta.unsqueeze(1) * a, weighted=weighted)
        changes.append(found.change)
        errors.append(found.error)
    change = torch.stack(changes)
    torch.testing.assert_close(change.mean(0), -a, atol=0.03, rtol=0)
    torch.testing.assert_close(torch.stack(errors).mean(0), change.std(0), rtol=0.15, atol=0)


def test_rows_that_move_the_posterior_too_far_are_told() -> None:
    theta = torch.randn(20_000)
    k = case_influence(theta, -0.25 * theta.unsqueeze(1) ** 2 * torch.tensor([1.0, 1.8])).pareto_k
    torch.testing.assert_close(k, torch.tensor([0.5, 0.9]), atol=0.15, rtol=0)  # P(1 / p > t) ~ t^(-1 / k)


def test_errors_of_draws_that_are_alike() -> None:
    """Each draw sixteen times over says no more than once, and errors that took them as new would be a quarter."""
    theta = torch.randn(20_000)
    logs = -0.5 * (theta.unsqueeze(1) - torch.tensor([0.5, 2.0])) ** 2 / 10
    once, often = (case_influence(theta.repeat_interleave(k), logs.repeat_interleave(k, 0)).error for k in (1, 16))
    torch.testing.assert_close(often, once, rtol=0.25, atol=0)


def test_rows_with_latents_of_their_own_and_several_sites() -> None:
    """y_j = mu + z_j + noise, twice over: leaving a row out is the same as where z is summed out."""
    y = torch.tensor([0.1, -0.4, 0.3, 2.5, 0.0])

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, math.sqrt(2)), obs=y)
            with pyro.plate("again", 2, dim=-2):
                pyro.sample("more", dist.Normal(z, 2.0), obs=y.expand(2, -1))

    # both sites together see z with precision 1/2 + 2/4 = 1, so y is normal around mu with variance 2
    keep = torch.cat([torch.ones(1, 5), 1 - torch.eye(5)])
    means = (keep @ y / 2) / (0.25 + keep.sum(1) / 2)
    mu = means[0] + (1 / (0.25 + 2.5)) ** 0.5 * torch.randn(40_000)
    z = (mu.unsqueeze(1) + y) / 2 + 0.5**0.5 * torch.randn(40_000, 5)
    posterior = untrained(model, None, y, draws={"mu": mu[None], "z": z[None]})
    found = influence(posterior, "mu", weighted=True)
    assert float(((found.change - (means[1:] - means[0])) / found.error).abs().max()) < 4.0
    assert float(found.error.max()) < 0.05
    with pytest.raises(ValueError, match="'z' of their own"):
        attribution(posterior, y)


def test_t_test() -> None:
    values = torch.randn(7, 3, 4).double() + torch.arange(4) / 2
    found, scipy = t_test(values), ttest_1samp(values.numpy(), 0.0)
    torch.testing.assert_close(found.p_value, torch.as_tensor(scipy.pvalue))
    torch.testing.assert_close(found.mean, values.mean(0))
    torch.testing.assert_close(found.sd, values.std(0))
    same = t_test(torch.tensor([[0.0, 1.0]] * 3))
    assert same.p_value.tolist() == [1.0, 0.0]
    false_alarms = (t_test(torch.randn(5, 20_000)).p_value < 0.1).double().mean()
    assert float(false_alarms) == pytest.approx(0.1, abs=0.01)
    with pytest.raises(ValueError, match="two draws or more"):
        t_test(values[:1])


def test_bad_input_is_refused() -> None:
    x, y = regression_rows(25)
    posterior = drawn(x, y, 400)
    with pytest.raises(ValueError, match="no latent 'v' was drawn; there are 'w'"):
        influence(posterior, "v")
    with pytest.raises(ValueError, match="needs 8 or more, got 7"):
        influence(posterior, "w", draws=7)
    assert torch.isnan(influence(posterior, "w", draws=40).pareto_k).all()
    with pytest.raises(ValueError, match="values has 400 of 400 numbers"):
        influence(posterior, lambda draws: draws["w"].sum(-1) * torch.nan)
    with pytest.raises(ValueError, match=r"got shapes \(3,\) and \(4, 2\)"):
        case_influence(torch.zeros(3), torch.zeros(4, 2))
    model, rows = ppca()
    with pytest.raises(ValueError, match="the rows share no latent"):
        influence(untrained(model, exact_guide(model), rows), "z")

    def alone(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu.unsqueeze(-1).expand(*mu.shape, len(y)), 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="'y' is not in plate 'data'"):
        influence(untrained(alone, AutoNormal(alone), y), "mu")

    def blind(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="observes nothing"):
        influence(untrained(blind, AutoNormal(blind), y), "mu")
