"""Annealed importance sampling and its reverse, where log p(x) is known."""

import math
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from truth import banana, biased_guide, exact_guide, ladder, moons, on_a_grid, ppca, stubborn, untrained

from pyro_ae import batch_plate, observe
from pyro_ae.data import Call
from pyro_ae.diagnostics.annealing import Path, adapted, anneal, temperatures
from pyro_ae.diagnostics.evidence import annealed_importance_sampling, bidirectional
from pyro_ae.diagnostics.importance import effective_sample_size
from pyro_ae.program import validation

# ---------------------------------------------------------------------------------------- models in closed form


def counts(x: Tensor | None = None, *, size: int = 1) -> Tensor:
    """A rate with a gamma prior for each row of three counts."""
    with batch_plate(x, size):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        return observe("x", dist.Poisson(rate.unsqueeze(-1).expand(*rate.shape, 3)).to_event(1), x)


def counts_evidence(x: Tensor) -> Tensor:
    shape, rate = 2.0 + x.sum(1), torch.tensor(0.5 + 3)
    prior = 2.0 * math.log(0.5) - math.lgamma(2.0)
    return prior - torch.lgamma(x + 1).sum(1) + torch.lgamma(shape) - shape * rate.log()


def shares(x: Tensor) -> None:
    """Two shares with a Dirichlet prior, of each row's ten trials, and a chance with a beta prior of four more."""
    with batch_plate(x):
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 0.5])))
        pyro.sample("x", dist.Multinomial(10, p), obs=x[:, :3])
        chance = pyro.sample("chance", dist.Beta(2.0, 0.5))
        pyro.sample("y", dist.Binomial(4, chance), obs=x[:, 3])


def shares_evidence(x: Tensor) -> Tensor:
    first = dist.DirichletMultinomial(torch.tensor([1.0, 2.0, 0.5]), 10).log_prob(x[:, :3])
    return first + dist.BetaBinomial(2.0, 0.5, 4).log_prob(x[:, 3])


def shares_rows(rows: int) -> Tensor:
    p = dist.Dirichlet(torch.tensor([1.0, 2.0, 0.5])).sample((rows,))
    ten = torch.stack([dist.Multinomial(10, row).sample() for row in p])
    return torch.cat([ten, dist.BetaBinomial(2.0, 0.5, 4).sample((rows, 1))], 1)


def off_by(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """The mean error over rows, and its standard error."""
    error = (found - truth.detach()).double()
    return float(error.mean()), float(error.std() / math.sqrt(len(error)))


# ------------------------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_bad_guide_is_corrected(start: str) -> None:
    model, x = ppca(20)
    posterior = untrained(model, biased_guide(model, shift=2.0, stretch=1.0), x)
    truth = model.marginal().log_prob(x)
    assert float((truth - posterior.log_evidence(particles=200)).mean()) > 2.0
    found = annealed_importance_sampling(posterior, start=start, temperatures=80)
    mean, error = off_by(found.log_evidence, truth)
    assert -0.4 < mean < 3 * error and float((found.log_evidence - truth).abs().max()) < 2.5
    assert float(found.acceptance.mean()) == pytest.approx(0.65, abs=0.05)
    assert float(found.ess.median()) > 5


def test_exact_guide_needs_no_temperatures() -> None:
    model, x = ppca(10)
    posterior = untrained(model, exact_guide(model), x)
    for count in (1, 10):
        found = annealed_importance_sampling(posterior, chains=4, temperatures=count)
        assert torch.allclose(found.log_evidence, model.marginal().log_prob(x), atol=1e-4)
        assert torch.allclose(found.ess, torch.tensor(4.0)) and float(found.error.max()) < 1e-3


def test_weights_average_to_the_evidence_with_few_temperatures() -> None:
    """The kernels are fixed, so this holds however few temperatures there are; it is the test of their invariance."""
    x = torch.tensor([0.0, 1.5, 3.0]).unsqueeze(1)

    def model(x: Tensor) -> None:
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 0.5).to_event(1), obs=x)

    truth = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x[:, 0])
    posterior = untrained(model, partial(normal, loc=0.5, scale=0.8), x)
    for start in ("prior", "guide"):
        found = annealed_importance_sampling(posterior, chains=40_000, temperatures=3, leapfrog=2, start=start)
        ratio = (found.log_weights.double() - truth).exp()
        error = ratio.std(0) / math.sqrt(len(ratio))
        assert ((ratio.mean(0) - 1).abs() < 4 * error).all(), (start, ratio.mean(0), error)
        assert (error < 0.02).all()


def normal(x: Tensor, loc: float, scale: float) -> None:
    with batch_plate(x):
        pyro.sample("z", dist.Normal(torch.full((len(x),), loc), scale))


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_constrained_latents(start: str) -> None:
    """Without their Jacobians the chains would go to another place."""

    def guide(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("rate", dist.LogNormal(x.mean(1).clamp(min=0.5).log(), 1.0))

    x = counts(size=60)
    posterior = untrained(counts, guide, x)
    found = annealed_importance_sampling(posterior, start=start, temperatures=15, chains=200)
    mean, error = off_by(found.log_evidence, counts_evidence(x))
    assert abs(mean) < 4 * error + 0.005 and error < 0.01


def test_several_latents_of_other_shapes() -> None:
    x = shares_rows(40)
    posterior = untrained(shares, None, x, draws={})
    found = annealed_importance_sampling(posterior, start="prior", temperatures=15, chains=200)
    mean, error = off_by(found.log_evidence, shares_evidence(x))
    assert abs(mean) < 4 * error + 0.01 and error < 0.02


def wide(x: Tensor | None = None, *, size: int = 1) -> None:
    with batch_plate(x, size):
        rows = size if x is None else len(x)
        pyro.sample("z", dist.Normal(torch.zeros(rows, 2), 1.0).to_event(1))


@pytest.mark.parametrize("model", [banana, moons])
def test_bent_posteriors(model: Callable) -> None:
    x = model(size=24)
    found = annealed_importance_sampling(untrained(model, wide, x), start="prior", chains=32, temperatures=60)
    mean, error = off_by(found.log_evidence, on_a_grid(model, x))
    assert abs(mean) < 4 * error + 0.02 and error < 0.05


def test_layers_and_missing_values() -> None:
    model, x, evidence = ladder(missing=True)
    posterior = untrained(model, None, x, draws={})
    found = annealed_importance_sampling(posterior, start="prior", temperatures=60, rows=30)
    mean, error = off_by(found.log_evidence, evidence[found.index])
    assert abs(mean) < 4 * error + 0.03 and error < 0.05


# ------------------------------------------------------------------------------------------------ both ways


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_bounds_hold_the_evidence(start: str) -> None:
    model, x = ppca(20)
    posterior = untrained(model, biased_guide(model, shift=1.5, stretch=1.0), x)
    gaps = []
    for count in (3, 40):
        found = bidirectional(posterior, rows=60, chains=8, temperatures=count, start=start, particles=100)
        truth = model.marginal().log_prob(found.x)
        (below, low_error), (above, high_error) = off_by(found.lower, truth), off_by(found.upper, truth)
        assert below < 3 * low_error and above > -3 * high_error
        assert found.importance is not None
        gaps.append(found.gap)
    assert gaps[0] > 0.2 and gaps[1] < 0.3 * gaps[0]
    assert below > -0.3 and above < 0.3
    assert off_by(found.importance, truth)[0] < -0.5  # which the bounds show
    assert "between" in str(found) and "importance sampling" in str(found)


def test_simulated_rows_are_those_of_the_model() -> None:
    model, x = ppca(20)
    found = bidirectional(untrained(model, exact_guide(model), x), rows=2000, chains=1, temperatures=1)
    truth = model.marginal()
    assert torch.allclose(found.x.mean(0), truth.mean, atol=5 * float(truth.stddev.max()) / math.sqrt(2000))
    assert torch.allclose(found.x.T.cov(), truth.covariance_matrix, atol=0.3)
    residual = found.x - found.latents["z"] @ model.weight.T - model.mean
    assert float(residual.std()) == pytest.approx(0.7, rel=0.05)
    assert found.importance is not None and torch.allclose(found.lower, found.importance, atol=1e-3)
    assert torch.allclose(found.upper, found.importance, atol=1e-3)


def test_reverse_weights_average_to_one_over_the_evidence() -> None:
    """From exact draws back to the start, with few temperatures and the same kernels."""
    model, x = ppca(3)
    posterior = untrained(model, biased_guide(model, shift=0.3, stretch=2.0), x)
    with torch.no_grad(), posterior.program.active(), validation(False):
        path = Path(posterior.program, Call((x,)), "guide")
        kernels = adapted(path, temperatures(3), 16, 3)
        exact = model.posterior(x).sample((40_000,))
        log_w, _ = anneal(path, kernels, path.pack({"z": exact}), reverse=True)
    ratio = (model.marginal().log_prob(x) - log_w).exp()
    error = ratio.std(0) / math.sqrt(len(ratio))
    assert ((ratio.mean(0) - 1).abs() < 4 * error).all() and (error < 0.04).all(), (ratio.mean(0), error)


def test_covariates_stay_and_dicts_are_data() -> None:
    def model(t: Tensor, y: Tensor) -> None:
        with batch_plate(t):
            slope = pyro.sample("slope", dist.Normal(1.0, 0.5))
            pyro.sample("y", dist.Normal(slope * t, 0.3), obs=y)

    data = {"t": torch.linspace(-1.0, 2.0, 30), "y": torch.zeros(30)}
    found = bidirectional(untrained(model, None, data, draws={}), rows=30, temperatures=50, start="prior")
    t, y = found.x["t"], found.x["y"]
    assert torch.equal(t, data["t"]) and float(y.std()) > 0.1 and found.importance is None
    truth = dist.Normal(t, (0.25 * t**2 + 0.09).sqrt()).log_prob(y)
    (below, low_error), (above, high_error) = off_by(found.lower, truth), off_by(found.upper, truth)
    assert abs(below) < 0.05 + 3 * low_error and abs(above) < 0.05 + 3 * high_error


def test_values_that_are_no_entry_of_the_data_cannot_be_simulated() -> None:
    def model(y: Tensor) -> None:
        with batch_plate(y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.3), obs=y.log())

    posterior = untrained(model, None, torch.rand(10), draws={})
    with pytest.raises(ValueError, match="observe what is no entry of the data"):
        bidirectional(posterior, rows=5, start="prior")


# --------------------------------------------------------------------------------------------------- details


def test_rows_parts_and_seeds() -> None:
    model, x = ppca(40)
    posterior = untrained(model, biased_guide(model), x)
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    found = annealed_importance_sampling(posterior, rows=5, chains=8, temperatures=10, seed=3)
    again = annealed_importance_sampling(posterior, rows=5, chains=8, temperatures=10, seed=3)
    assert torch.equal(found.log_weights, again.log_weights)
    assert torch.equal(states[0], torch.get_rng_state()) and states[2] == random.getstate()
    assert (states[1] == np.random.get_state()[1]).all()
    assert found.index.tolist() == [0, 10, 20, 29, 39] and found.log_weights.shape == (8, 5)
    assert torch.allclose(found.ess, effective_sample_size(found.log_weights), rtol=1e-4)
    assert "8 chains each" in str(found)
    loader = DataLoader(x, batch_size=7)
    assert annealed_importance_sampling(posterior, loader, chains=2, temperatures=2).log_evidence.shape == (7,)


def test_error_is_what_repetition_shows() -> None:
    model, x = ppca(4)
    posterior = untrained(model, biased_guide(model), x)
    few, many = (annealed_importance_sampling(posterior, chains=n, temperatures=4) for n in (50, 5000))
    spread = many.log_weights.reshape(100, 50, 4).logsumexp(1).std(0)
    assert torch.allclose(few.error, spread, rtol=0.5)
    assert torch.allclose(many.error, spread / math.sqrt(100), rtol=0.3)


def test_model_that_takes_one_particle_at_a_time() -> None:
    model, x = ppca(6)
    with pytest.warns(UserWarning, match="do(es)? not broadcast"):
        found = annealed_importance_sampling(
            untrained(stubborn(model), exact_guide(model), x), chains=3, temperatures=3, leapfrog=2
        )
    assert torch.allclose(found.log_evidence, model.marginal().log_prob(x), atol=1e-3)


def test_graph_is_the_program() -> None:
    model, x = ppca(6)
    posterior = untrained(model, biased_guide(model), x)
    for start in ("guide", "prior"):
        with torch.no_grad(), posterior.program.active(), validation(False):
            path = Path(posterior.program, Call((x,)), start)  # type: ignore[arg-type]
            v = path.draw(3)
            found = path(v)
            assert path._graphs[3] is not None
            logs, slopes = path._evaluate(v)
            assert torch.allclose(found.logs, logs, atol=1e-4) and torch.allclose(found.slopes, slopes, atol=1e-4)
            bump = torch.zeros(2)
            bump[0] = 1e-2
            difference = (path._evaluate(v + bump)[0] - path._evaluate(v - bump)[0]) / 2e-2
        assert torch.allclose(slopes[..., 0], difference, atol=2e-2, rtol=1e-2)


def test_discrete_latents_are_summed_out() -> None:
    def model(x: Tensor) -> None:
        with batch_plate(x):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.tensor([-1.0, 1.0])[c], 0.5))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.linspace(-2.0, 2.0, 20)
    pair = dist.Normal(torch.tensor([-1.0, 1.0]), math.sqrt(0.5)).log_prob(x.unsqueeze(1))
    truth = (pair + torch.tensor([0.3, 0.7]).log()).logsumexp(1)
    for start, guide in (("guide", partial(normal, loc=0.0, scale=1.0)), ("prior", None)):
        state = {"draws": {}} if guide is None else {}
        found = annealed_importance_sampling(
            untrained(model, guide, x, **state), start=start, chains=100, temperatures=10
        )
        mean, error = off_by(found.log_evidence, truth)
        assert abs(mean) < 4 * error + 0.01 and error < 0.04, start


def test_refusals() -> None:
    model, x = ppca(6)
    posterior = untrained(model, exact_guide(model), x)
    for options, message in (
        ({"chains": 0}, "chains must be at least 1"),
        ({"temperatures": 0}, "temperatures must be at least 1"),
        ({"leapfrog": 0}, "leapfrog must be at least 1"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"start": "posterior"}, "start must be 'guide' or 'prior'"),
    ):
        with pytest.raises(ValueError, match=message):
            annealed_importance_sampling(posterior, **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            bidirectional(posterior, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="particles must be at least 1"):
        bidirectional(posterior, particles=0)
    with pytest.raises(ValueError, match="log-weights of 1 of 6 rows are not finite, row 2 first"):
        annealed_importance_sampling(
            posterior, x.index_fill(0, torch.tensor(2), math.inf), temperatures=2, start="prior"
        )
    with pytest.raises(ValueError, match="start='prior'"):
        annealed_importance_sampling(untrained(model, None, x, draws={}))


def test_models_without_rows_of_their_own_are_refused() -> None:
    def shared(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def silent(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def factored(x: Tensor) -> None:
        silent(x)
        pyro.factor("all", -x.square().sum())

    def no_latent(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = torch.zeros(4)
    for model, message in (
        (shared, "'w' stand outside plate 'data'"),
        (silent, "the model observes nothing"),
        (factored, "'all' stand outside plate 'data'"),
        (no_latent, "the model has no latent for each row"),
    ):
        with pytest.raises(ValueError, match=message):
            annealed_importance_sampling(untrained(model, None, x, draws={}), start="prior")


def test_guides_without_a_density_are_refused_as_a_start() -> None:
    def pointed(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Delta(torch.zeros(len(x), 2), event_dim=1))

    model, x = ppca(4)
    posterior = untrained(model, pointed, x)
    with pytest.raises(ValueError, match="no density of site 'z'"):
        annealed_importance_sampling(posterior)
    found = bidirectional(posterior, rows=4, start="prior", temperatures=3)
    assert found.importance is None
