"""Simulation-based calibration: exact inference passes it, and each way to be wrong does not."""

import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from truth import (
    biased_guide,
    exact_guide,
    gaussian_mean,
    gaussian_mean_posterior,
    ppca,
    regression,
    regression_rows,
)

from pyro_ae import Posterior, batch_plate, fit, nuts, observe, svi
from pyro_ae.data import as_rows
from pyro_ae.diagnostics.calibration import simulated_coverage
from pyro_ae.diagnostics.ranks import Ranks
from pyro_ae.diagnostics.simulation import LOG_JOINT, refit_calibration, simulate, simulation_based_calibration
from pyro_ae.models.ppca import PPCA
from pyro_ae.program import Program


def posterior_of(model: Callable, guide: Callable | None, data: Any, **state: Any) -> Posterior:
    """A guide as it is, not trained."""
    rows = as_rows(data)
    program = Program(model, guide, total=rows.size)
    program.build(rows.first(None))
    return Posterior(program, data=rows, method="given", **state)


def prior_guide(x: Tensor) -> None:
    with batch_plate(x):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def point_guide(x: Tensor) -> None:
    with batch_plate(x):
        pyro.sample("z", dist.Delta(x[:, :2]).to_event(1))


# ------------------------------------------------------------------------------------------ amortised guides


def test_exact_guide_passes() -> None:
    model, x = ppca()
    posterior = posterior_of(model, exact_guide(model), x)
    found = [simulation_based_calibration(posterior, 100, 50, seed=seed).ranks for seed in range(40)]
    together = Ranks({name: torch.stack([ranks[name] for ranks in found], -1) for name in found[0]}, 50)
    p = torch.cat([v.reshape(-1) for v in together.p_values().values()])
    assert float((p < 0.05).double().mean()) < 0.05 + 4 * (0.05 * 0.95 / 40) ** 0.5
    assert simulation_based_calibration(posterior, 500).ok()


@pytest.mark.parametrize(
    ("shift", "stretch", "found"),
    [(0.0, 0.25, "too narrow"), (0.0, 4.0, "too wide"), (0.4, 1.0, "too high")],
)
def test_wrong_guides_do_not_pass(shift: float, stretch: float, found: str) -> None:
    model, x = ppca()
    ranks = simulation_based_calibration(posterior_of(model, biased_guide(model, shift, stretch), x))
    assert not ranks.ok()
    assert [text for text in ranks.findings() if text.startswith("z[") and found in text]
    assert "not uniform" in str(ranks)


def test_only_the_log_joint_sees_a_guide_that_is_the_prior() -> None:
    model, x = ppca()
    ranks = simulation_based_calibration(posterior_of(model, prior_guide, x), 500)
    p = ranks.p_values()
    assert bool((p["z"] > 0.01).all()) and float(p[LOG_JOINT]) < 1e-6 and not ranks.ok()


def test_the_log_joint_is_that_of_each_simulated_row() -> None:
    model, x = ppca()
    found = simulate(posterior_of(model, exact_guide(model), x), 30, 20)  # fewer rows than the fit's, unscaled
    z = torch.cat([found.truths["z"][None], found.draws["z"]])
    likelihood = dist.Normal(z @ model.weight.T + model.mean, 0.7).log_prob(found.data).sum(-1)
    wanted = likelihood + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    assert found.log_joint.shape == (21, 30) and torch.allclose(found.log_joint, wanted, atol=1e-3)


def test_coverage_of_simulated_rows() -> None:
    model, x = ppca()
    exact, narrow = (posterior_of(model, g, x) for g in (exact_guide(model), biased_guide(model, 0.0, 0.25)))
    assert simulated_coverage(exact, 500)["z"].ok() and not simulated_coverage(narrow, 500)["z"].ok()
    central = simulation_based_calibration(narrow, 4000).coverage()["z"]
    middle = int((central.levels - 0.5).abs().argmin())
    wanted = 2 * dist.Normal(0.0, 1.0).cdf(dist.Normal(0.0, 1.0).icdf(torch.tensor(0.75)) / 2) - 1  # half the scale
    # a mixture of normals with half their scale: exact by the same argument for each row
    assert central.coverage[middle].tolist() == pytest.approx([float(wanted)] * 2, abs=0.035)


def test_references_may_depend_on_the_rows() -> None:
    model, x = ppca()
    blind = posterior_of(model, prior_guide, x)
    assert simulated_coverage(blind, 1000)["z"].ok()  # the guide that is the prior, which such references do not show
    assert not simulated_coverage(blind, 1000, references=lambda x: {"z": model.posterior(x).mean})["z"].ok()


class Conditional(nn.Module):
    """A latent of each row whose prior depends on a covariate, with missing values in what is observed."""

    def forward(self, c: Tensor, x: Tensor) -> None:
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(3 * c, 1.0))
            observe("x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, 2), 1.0).to_event(1), x)


def conditional_guide(use: Callable[[Tensor], Tensor]) -> Callable:
    def guide(c: Tensor, x: Tensor) -> None:
        there = ~x.isnan()
        precision = 1 + there.sum(-1)
        with batch_plate(x):
            pyro.sample("z", dist.Normal((3 * use(c) + x.nan_to_num().sum(-1)) / precision, precision**-0.5))

    return guide


def test_covariates_and_missing_values_stay() -> None:
    c, x = torch.linspace(-1, 1, 60), torch.randn(60, 2)
    x[::3, 1] = torch.nan
    right, wrong = (
        simulation_based_calibration(posterior_of(Conditional(), conditional_guide(use), (c, x)), 300)
        for use in (lambda c: c, torch.zeros_like)
    )
    assert right.ok() and not wrong.ok()

    seen: list = []
    simulation_based_calibration(
        posterior_of(Conditional(), conditional_guide(lambda c: c), (c, x)),
        60,
        quantities={"z x": lambda latents, data: seen.append(data) or latents["z"] * data[1].nan_to_num().sum(-1)},
    )
    assert torch.equal(seen[0][0], c) and torch.equal(seen[0][1].isnan(), x.isnan())
    there = ~x.isnan()
    assert not torch.isclose(seen[0][1][there], x[there]).any()


def test_models_are_run_without_the_rows_where_they_can_be() -> None:
    """A likelihood that looks at what it observes, as one that predicts the next value, is simulated without it."""

    def looking(x: Tensor | None = None, *, size: int = 1) -> Tensor:
        with batch_plate(x, size):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            first = pyro.sample("_", dist.Normal(z, 1.0).to_event(1).mask(False)) if x is None else x  # its own draw
            return observe("x", dist.Normal(first, 0.1).to_event(1), x)

    def guide(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))

    rows = torch.full((20, 1), 50.0)
    seen: list = []
    quantities = {"x": lambda latents, x: seen.append(x) or latents["z"][..., 0] + x[:, 0]}
    simulation_based_calibration(posterior_of(looking, guide, rows), 50, quantities=quantities)
    assert float(seen[0].abs().max()) < 10


def discrete_model(x: Tensor | None = None, *, size: int = 1) -> Tensor:
    with batch_plate(x, size):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        return observe("x", dist.Normal(k.to(torch.float), 0.7), x)


def discrete_guide(temper: float) -> Callable:
    def guide(x: Tensor) -> None:
        logits = torch.tensor([0.5, 0.3, 0.2]).log() + dist.Normal(torch.arange(3.0), 0.7).log_prob(x.unsqueeze(-1))
        with batch_plate(x):
            pyro.sample("k", dist.Categorical(logits=temper * logits))

    return guide


def test_discrete_latents() -> None:
    x = discrete_model(size=30)
    assert simulation_based_calibration(posterior_of(discrete_model, discrete_guide(1.0), x), 400).ok()
    assert not simulation_based_calibration(posterior_of(discrete_model, discrete_guide(3.0), x), 400).ok()


def test_global_random_states_stay() -> None:
    model, x = ppca()
    posterior = posterior_of(model, exact_guide(model), x)
    before = torch.get_rng_state()
    first, second, other = (simulation_based_calibration(posterior, 20, 20, seed=seed).ranks for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[n], second[n]) for n in first) and not torch.equal(first["z"], other["z"])


def test_what_cannot_be_simulated_is_refused() -> None:
    model, x = ppca()
    posterior = posterior_of(model, exact_guide(model), x)
    with pytest.raises(ValueError, match="10 replications and draws"):
        simulation_based_calibration(posterior, 5)
    chains = posterior_of(model, None, x, draws={"z": torch.zeros(2, 20, 40, 2)})
    with pytest.raises(ValueError, match=r"chains hold draws for the rows of the fit only.*refit_calibration"):
        simulation_based_calibration(chains)
    y = torch.randn(9)
    shared = posterior_of(gaussian_mean, lambda y: pyro.sample("mu", dist.Normal(0.0, 1.0)), y)
    with pytest.raises(ValueError, match=r"'mu' stand outside plate 'data'.*refit_calibration"):
        simulation_based_calibration(shared)
    loc = torch.zeros(40, 2)

    def of_rows(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    for replications in (40, 50):  # as many as the rows of the fit, where nothing breaks by itself
        with pytest.raises(ValueError, match="use an amortised guide"):
            simulation_based_calibration(posterior_of(model, of_rows, x), replications)
    with pytest.raises(ValueError, match="gives 'z' a single point"):
        simulation_based_calibration(posterior_of(model, point_guide, x))
    with pytest.raises(ValueError, match="cannot be called 'z'"):
        simulation_based_calibration(posterior, quantities={"z": lambda latents, x: latents["z"]})
    with pytest.raises(ValueError, match=r"quantity 'q' has shape \(\)"):
        simulation_based_calibration(posterior, quantities={"q": lambda latents, x: latents["z"].sum()})

    def factored(x: Tensor) -> None:
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.factor("f", -z.sum(-1))
            pyro.sample("x", dist.Normal(z @ torch.ones(2, 5), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="'f' are part of the density and cannot be simulated"):
        simulation_based_calibration(posterior_of(factored, exact_guide(model), x))


def test_two_hundred_replications_of_a_vae_are_quick() -> None:
    from pyro_ae.quickstart import build

    model, guide = build()
    posterior = posterior_of(model, guide, torch.randint(0, 17, (300, 8, 8)).float())
    start = time.perf_counter()
    ranks = simulation_based_calibration(posterior)
    assert time.perf_counter() - start < 30
    assert ranks.ranks["z"].shape == (200, 16)


# ------------------------------------------------------------------------------------------ any inference


def conjugate(shift: float = 0.0, scale: float = 1.0) -> Callable:
    def infer(y: Tensor) -> dict[str, Tensor]:
        mean, sd = gaussian_mean_posterior(y)
        return {"mu": mean + shift + scale * sd * torch.randn(100)}

    return infer


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.0, 0.5), (0.0, 2.0), (0.5, 1.0)])
def test_refits(shift: float, scale: float) -> None:
    ranks = refit_calibration(gaussian_mean, conjugate(shift, scale), torch.zeros(8), 150, progress=False)
    assert ranks.ok() == (shift == 0 and scale == 1)
    assert ranks.ranks["mu"].shape == (150,) and set(ranks.ranks) == {"mu", LOG_JOINT}


def test_refits_see_an_inference_that_ignores_the_data_by_the_log_joint_alone() -> None:
    ranks = refit_calibration(
        gaussian_mean, lambda y: {"mu": 1 + 2 * torch.randn(100)}, torch.zeros(8), 300, progress=False
    )
    p = ranks.p_values()
    assert float(p["mu"]) > 0.01 and float(p[LOG_JOINT]) < 1e-6


def test_refits_keep_covariates() -> None:
    x, y = regression_rows(15)
    seen = []

    def infer(data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        seen.append(data)
        precision = data[0].T @ data[0] / 0.8**2 + torch.eye(3)
        mean = torch.linalg.solve(precision, data[0].T @ data[1] / 0.8**2)
        return {"w": dist.MultivariateNormal(mean, precision_matrix=precision).sample((100,))}

    quantities = {"fit": lambda latents, data: -(data[1] - latents["w"] @ data[0].T).square().sum(-1)}
    ranks = refit_calibration(regression, infer, (x, y), 200, quantities=quantities, progress=False)
    assert ranks.ok() and ranks.ranks["w"].shape == (200, 3) and ranks.ranks["fit"].shape == (200,)
    assert all(torch.equal(data[0], x) and not torch.equal(data[1], y) for data in seen)


def test_chains_count_as_many_draws_as_they_are_worth() -> None:
    """Draws that each stand for twelve in a row would give ranks that are not uniform, were they not thinned."""

    def infer(y: Tensor) -> Posterior:
        mean, sd = gaussian_mean_posterior(y)
        held = mean + sd * torch.randn(2, 10).repeat_interleave(12, 1)
        return posterior_of(gaussian_mean, None, y, draws={"mu": held})

    ranks = refit_calibration(gaussian_mean, infer, torch.zeros(8), 120, 240, progress=False)
    assert ranks.ok() and ranks.effective is not None and 1 <= ranks.effective < 40
    assert "take more of them" in str(ranks)


def test_refits_refuse() -> None:
    y = torch.zeros(8)
    with pytest.raises(ValueError, match="infer gave 100 draws, fewer than draws=200"):
        refit_calibration(gaussian_mean, conjugate(), y, 20, 200, progress=False)
    with pytest.raises(ValueError, match=r"'mu': \(\).* and gave \{'mu': \(100, 3\)\}"):
        refit_calibration(gaussian_mean, lambda y: {"mu": torch.zeros(100, 3)}, y, 20, progress=False)

    def flat(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ValueError, match="Give the model proper priors"):
        refit_calibration(flat, conjugate(), y, 20, progress=False)

    def squared(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y**2 + 1)

    with pytest.raises(ValueError, match="'y' observe what is no entry of the data"):
        refit_calibration(squared, conjugate(), y, 20, progress=False)


def test_refits_refuse_an_inference_that_trains_the_model() -> None:
    model = PPCA(features=5, latent=2)
    x = model.marginal().sample((30,)).detach()

    def infer(x: Tensor) -> Posterior:
        guide = exact_guide(model)
        return fit(model, x, guide=guide, method=svi(steps=2), progress=False)

    with pytest.raises(ValueError, match=r"infer changed the model's parameters .*log_noise"):
        refit_calibration(model, infer, x, 20, progress=False)
    model.requires_grad_(False)
    assert refit_calibration(model, lambda x: posterior_of(model, exact_guide(model), x), x, 20, progress=False).ok()


@pytest.mark.slow
def test_nuts_passes() -> None:
    data = regression_rows(20)

    def infer(data: tuple[Tensor, Tensor]) -> Posterior:
        return fit(regression, data, method=nuts(draws=200, warmup=300, chains=2), progress=False)

    ranks = refit_calibration(regression, infer, data, 25, 99, progress=False)
    assert ranks.ok(), str(ranks)
