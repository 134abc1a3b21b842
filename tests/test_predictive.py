"""Predictive checks and rows that are left out, where the answers are known."""

import math
from collections.abc import Callable
from typing import Any

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from truth import exact_guide, gaussian_mean, gaussian_mean_posterior, ppca, regression, regression_posterior

from pyro_ae import Posterior, batch_plate, observe
from pyro_ae.data import as_rows
from pyro_ae.diagnostics.elpd import loo, waic
from pyro_ae.diagnostics.predictive import predictive_check
from pyro_ae.models.ppca import PPCA
from pyro_ae.program import Program

OLD = "psislw" in vars(arviz)  # ArviZ 0.x


def posterior_of(model: Callable, guide: Callable | None, data: Any, **state: Any) -> Posterior:
    """A guide as it is, not trained."""
    rows = as_rows(data)
    program = Program(model, guide, total=rows.size)
    program.build(rows.first(None))
    return Posterior(program, data=rows, method="given", **state)


# --------------------------------------------------------------------------------------------- the check


def poisson(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with batch_plate(y):
        observe("y", dist.Poisson(rate), y)


def poisson_guide(y: Tensor) -> None:
    there = y[~y.isnan()]
    pyro.sample("rate", dist.Gamma(2.0 + there.sum(), 1.0 + len(there)))


def negative_binomial(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with batch_plate(y):
        observe("y", dist.GammaPoisson(0.5, 0.5 / rate), y)


def counts(overdispersed: bool, rows: int = 200) -> Tensor:
    return torch.poisson(dist.Gamma(0.5, 0.25).sample((rows,)) if overdispersed else torch.full((rows,), 2.0))


def test_overdispersed_counts_are_found() -> None:
    found = predictive_check(posterior_of(poisson, poisson_guide, counts(True)))
    assert list(found.p_values) == ["mean(y)", "sd(y)", "min(y)", "max(y)", "zeros(y)"]
    for name in ("sd(y)", "max(y)", "zeros(y)"):
        assert found.p_values[name] < 0.01 and found.observed[name] > float(found.replicated[name].quantile(0.99))
    assert found.p_values["mean(y)"] > 0.3  # which the model has a parameter for
    assert not found.ok() and str(found).splitlines()[1].split()[0] in ("sd(y)", "max(y)", "zeros(y)")


def test_the_right_model_passes() -> None:
    assert predictive_check(posterior_of(poisson, poisson_guide, counts(False))).ok()
    y = counts(True)
    rate = y.mean() * dist.Gamma(40.0, 40.0).sample((2, 100))  # about as much as the data tell
    found = predictive_check(posterior_of(negative_binomial, None, y, draws={"rate": rate}))
    assert found.ok() and found.replicated["sd(y)"].shape == (200,)


def test_p_values_are_two_sided_and_by_hand() -> None:
    y = counts(False, 20)
    found = predictive_check(posterior_of(poisson, poisson_guide, y), ["mean", "sd"], draws=300)
    for name, value in (("mean(y)", y.mean()), ("sd(y)", y.std())):
        replicated = found.replicated[name]
        above, below = int((replicated >= value).sum()), int((replicated <= value).sum())
        assert found.observed[name] == pytest.approx(float(value))
        assert found.p_values[name] == pytest.approx(min(1, 2 * (1 + min(above, below)) / 301))


def test_p_values_of_the_prior_are_uniform() -> None:
    """Each replicate is checked against the prior that it came from."""
    p = []
    for seed in range(60):
        torch.manual_seed(100 + seed)
        y = torch.poisson(dist.Gamma(2.0, 1.0).sample().expand(30))
        posterior = posterior_of(poisson, poisson_guide, y)
        p.append(predictive_check(posterior, ["mean"], draws=100, prior=True, seed=seed).p_values["mean(y)"])
    share = [sum(v <= level for v in p) / 60 for level in (0.2, 0.5, 0.8)]
    assert share == pytest.approx([0.2, 0.5, 0.8], abs=4 * (0.25 / 60) ** 0.5)


def test_missing_values_are_left_out_of_the_replicates() -> None:
    y = counts(False, 60)
    y[:20] = torch.nan
    sizes = []
    found = predictive_check(
        posterior_of(poisson, poisson_guide, y),
        {"sum": lambda v: sizes.append(v.shape) or v.sum(), "mean": torch.mean},
        draws=100,
    )
    assert set(sizes) == {(40,)}
    assert found.observed["sum(y)"] == float(y.nansum()) and found.ok()
    assert float(found.replicated["sum(y)"].mean()) == pytest.approx(float(y.nansum()), rel=0.15)


def test_several_sites_and_functions_that_look_at_values() -> None:
    def two(y: Tensor, k: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with batch_plate(y):
            pyro.sample("y", dist.Normal(mu.unsqueeze(-1).expand((*mu.shape, 2)), 1.0).to_event(1), obs=y)
            pyro.sample("k", dist.Bernoulli(0.5), obs=k)

    def guide(y: Tensor, k: Tensor) -> None:
        pyro.sample("mu", dist.Normal(0.0, 0.1))

    def longest(v: Tensor) -> int:
        return len(v) if float(v.sum()) > 1e9 else 7

    y, k = torch.randn(50, 2), torch.bernoulli(torch.full((50,), 0.5))
    found = predictive_check(posterior_of(two, guide, (y, k)), ["mean", longest], draws=50)
    assert list(found.p_values) == ["mean(y)", "longest(y)", "mean(k)", "longest(k)"]
    assert found.p_values["longest(y)"] == 1.0 and found.observed["mean(k)"] == pytest.approx(float(k.mean()))
    assert list(predictive_check(posterior_of(two, guide, (y, k))).p_values)[-1] == "max(k)"  # not zeros: no counts


def test_replicates_of_rows_with_latents() -> None:
    model, x = ppca(200)
    posterior = posterior_of(model, exact_guide(model), x)
    assert predictive_check(posterior).ok()
    worse = PPCA(5, 2, noise=0.1).requires_grad_(False)
    worse.weight.copy_(model.weight), worse.mean.copy_(model.mean)
    assert not predictive_check(posterior_of(worse, exact_guide(worse), x), ["sd"], prior=True).ok()


def test_parts_make_no_difference_to_what_is_replicated(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = posterior_of(poisson, poisson_guide, counts(False, 50))
    whole = predictive_check(posterior, draws=100)
    monkeypatch.setattr("pyro_ae.particles.CHUNK", 50 * 7)
    parts = predictive_check(posterior, draws=100)
    assert parts.replicated["mean(y)"].shape == (100,)
    one, other = (found.replicated["mean(y)"] for found in (whole, parts))
    assert float(one.mean()) == pytest.approx(float(other.mean()), abs=4 * float(one.std()) * (2 / 100) ** 0.5)


def test_seed_and_global_random_state() -> None:
    posterior = posterior_of(poisson, poisson_guide, counts(False, 50))
    before = torch.get_rng_state()
    first, second, other = (predictive_check(posterior, ["mean"], seed=s).replicated["mean(y)"] for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("statistics", "words"),
    [
        (["median"], "unknown statistic 'median'; known are 'mean'"),
        ([], "no statistic to check"),
        ([lambda y: y.mean(), lambda y: y.std()], "two statistics are called '<lambda>'"),
        ({"log": lambda y: (y - 100).log().mean()}, "'log' of site 'y' must be a number for each data set, and is NaN"),
        ({"all": lambda y: y}, r"and is of shape \(50,\)"),
    ],
)
def test_bad_statistics_are_refused(statistics: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        predictive_check(posterior_of(poisson, poisson_guide, counts(False, 50)), statistics)


def test_what_cannot_be_checked_is_refused() -> None:
    posterior = posterior_of(poisson, poisson_guide, counts(False, 50))
    with pytest.raises(ValueError, match="20 draws or more, got 5"):
        predictive_check(posterior, draws=5)
    with pytest.raises(ValueError, match="DataLoader brings it in batches"):
        predictive_check(posterior, data=DataLoader(TensorDataset(counts(False, 50)), batch_size=10))

    def flat(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with batch_plate(y):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    improper = posterior_of(flat, lambda y: pyro.sample("mu", dist.Normal(0.0, 1.0)), torch.randn(9))
    with pytest.raises(ValueError, match="cannot be replicated from the prior"):
        predictive_check(improper, prior=True)
    nothing = posterior_of(
        lambda: pyro.sample("mu", dist.Normal(0.0, 1.0)), lambda: pyro.sample("mu", dist.Normal(0.0, 1.0)), None
    )
    with pytest.raises(ValueError, match="observes nothing"):
        predictive_check(nothing)


# ----------------------------------------------------------------------------------- rows that are left out


def gaussian(rows: int = 30) -> tuple[Tensor, Posterior]:
    y = 1 + 1.5 * torch.randn(rows)
    mean, sd = gaussian_mean_posterior(y)
    return y, posterior_of(gaussian_mean, lambda y: pyro.sample("mu", dist.Normal(mean, sd)), y)


def left_out(y: Tensor) -> Tensor:
    """Exact log p(y_n | the others) of :func:`gaussian_mean`."""
    found = []
    for n in range(len(y)):
        mean, sd = gaussian_mean_posterior(torch.cat([y[:n], y[n + 1 :]]))
        found.append(dist.Normal(mean, (sd**2 + 1.5**2) ** 0.5).log_prob(y[n]))
    return torch.stack(found)


def test_loo_is_exact_for_a_conjugate_model() -> None:
    y, posterior = gaussian()
    exact, found = left_out(y), loo(posterior, draws=8000)
    assert found.pointwise.tolist() == pytest.approx(exact.tolist(), abs=0.01)
    assert found.elpd == pytest.approx(float(exact.sum()), abs=0.05)
    assert found.se == pytest.approx(float((30 * exact.var(correction=0)).sqrt()), abs=0.05)
    assert found.p == pytest.approx(1.0, abs=0.5) and found.bad.shape == (0, 1)
    assert "guide's" in found.notes[0] and "elpd -" in str(found)
    assert waic(posterior, draws=8000).pointwise.tolist() == pytest.approx(exact.tolist(), abs=0.02)


def test_loo_of_a_regression_is_exact() -> None:
    x, y = torch.randn(25, 3), torch.randn(25)
    draws = dist.MultivariateNormal(*regression_posterior(x, y)).sample((4, 2000))
    found = loo(posterior_of(regression, None, (x, y), draws={"w": draws}))
    exact = []
    for n in range(25):
        rest = torch.arange(25) != n
        mean, covariance = regression_posterior(x[rest], y[rest])
        exact.append(dist.Normal(x[n] @ mean, (x[n] @ covariance @ x[n] + 0.8**2) ** 0.5).log_prob(y[n]))
    assert found.pointwise.tolist() == pytest.approx([float(v) for v in exact], abs=0.05)
    assert not found.notes


@pytest.mark.filterwarnings("ignore:Estimated shape parameter", "ignore:For one or more samples")
def test_both_are_those_of_arviz() -> None:
    x, y = torch.randn(25, 3), torch.randn(25)
    draws = dist.MultivariateNormal(*regression_posterior(x, y)).sample((4, 200))
    posterior = posterior_of(regression, None, (x, y), draws={"w": draws})
    data = posterior.to_arviz(groups=["posterior", "log_likelihood"])
    theirs, ours = arviz.loo(data, pointwise=True), loo(posterior)
    assert ours.elpd == pytest.approx(theirs.elpd_loo if OLD else theirs.elpd, rel=1e-4)
    assert ours.se == pytest.approx(theirs.se, rel=1e-4)
    pointwise = (theirs.loo_i if OLD else theirs.elpd_i).values.tolist()
    assert ours.pointwise.tolist() == pytest.approx(pointwise, rel=1e-4)
    assert ours.trouble.tolist() == pytest.approx(theirs.pareto_k.values.tolist(), abs=1e-3)
    if OLD:  # 1.x has no WAIC
        theirs, ours = arviz.waic(data, pointwise=True), waic(posterior)
        assert (ours.elpd, ours.se, ours.p) == pytest.approx((theirs.elpd_waic, theirs.se, theirs.p_waic), rel=1e-4)


def test_rows_that_cannot_be_left_out_are_named() -> None:
    y, _ = gaussian()
    y[4] = 60.0
    mean, sd = gaussian_mean_posterior(y)
    posterior = posterior_of(gaussian_mean, lambda y: pyro.sample("mu", dist.Normal(mean, sd)), y)
    found = loo(posterior)
    assert found.bad.tolist() == [[4]] and float(found.trouble[4]) > 0.7
    assert "K-hat is above 0.7 at 1 of 30 places (4)" in found.notes[0]
    found = waic(posterior)
    assert [4] in found.bad.tolist() and "The variance is above 0.4 at " in found.notes[0]


def test_missing_rows_are_not_counted() -> None:
    y = counts(False, 40)
    y[[3, 9]] = torch.nan
    found, without = (loo(posterior_of(poisson, poisson_guide, rows), draws=4000) for rows in (y, y[~y.isnan()]))
    assert found.pointwise.isnan().nonzero().flatten().tolist() == [3, 9]
    assert found.elpd == pytest.approx(without.elpd, abs=0.2) and found.se == pytest.approx(without.se, abs=0.1)
    assert math.isfinite(waic(posterior_of(poisson, poisson_guide, y)).elpd)


def test_latents_of_rows() -> None:
    model, x = ppca()
    with pytest.raises(ValueError, match=r"all latents \('z'\) belong to single rows .*posterior.log_evidence"):
        loo(posterior_of(model, exact_guide(model), x))

    def hierarchy(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with batch_plate(y):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(y.mean(), 0.1))
        with batch_plate(y):
            pyro.sample("z", dist.Normal((y + mu) / 2, 0.5**0.5))

    found = loo(posterior_of(hierarchy, guide, torch.randn(20)))
    assert "for itself ('z')" in " ".join(found.notes)


def test_what_has_no_densities_is_refused() -> None:
    def two(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with batch_plate(y):
            pyro.sample("a", dist.Normal(mu, 1.0), obs=y)
            pyro.sample("b", dist.Normal(mu, 2.0), obs=y)

    y = torch.randn(10)
    posterior = posterior_of(two, lambda y: pyro.sample("mu", dist.Normal(0.0, 0.3)), y)
    with pytest.raises(ValueError, match="site must be one of 'a', 'b', got None"):
        loo(posterior)
    assert loo(posterior, site="b").pointwise.shape == (10,)
    with pytest.raises(ValueError, match="50 draws and 2 places of site 'a' or more, got 10 and 10"):
        loo(posterior, site="a", draws=10)
    with pytest.raises(ValueError, match="a single point"):
        loo(posterior_of(two, lambda y: pyro.sample("mu", dist.Delta(y.mean())), y), site="a")
    with pytest.raises(ValueError, match="no draws of latents"):
        loo(
            posterior_of(
                lambda y: pyro.sample("y", dist.Normal(0.0, 1.0).expand([10]).to_event(1), obs=y), lambda y: None, y
            )
        )
