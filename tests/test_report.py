"""A report that tells good posteriors from poor ones."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from truth import untrained

from pyro_ae import Posterior, batch_plate, fit, nuts, svi
from pyro_ae.data import LoadedRows
from pyro_ae.diagnostics.report import Report, report
from pyro_ae.guides import together
from pyro_ae.models import ppca

# ----------------------------------------------------------------------------------------------- the guides


def scaled(model: ppca.PPCA, scale: float, shift: float = 0.0) -> Callable:
    """The exact posterior of PPCA, with another scale."""

    def guide(x: Tensor) -> None:
        with batch_plate(x):
            exact = model.posterior(x)
            pyro.sample("z", dist.MultivariateNormal(exact.mean + shift, scale**2 * exact.covariance_matrix))

    return guide


def ppca_report(scale: float, **options: Any) -> Report:
    model, _, x = ppca.example()
    return report(untrained(model, scaled(model, scale), x), **options)


def reasons(found: Report, what: str) -> list[str]:
    return [reason for reason in found.reasons if what in reason]


def test_exact_posterior_is_good() -> None:
    found = ppca_report(1.0)
    assert found.verdict == "good"
    assert found.figures["k_hat_above_0.7"] == 0 and found.figures["k_hat_median"] < 0
    assert found.figures["ess_share"] == pytest.approx(1.0, abs=1e-3)
    assert found.figures["gap"] == pytest.approx(0.0, abs=1e-3)
    model, _, x = ppca.example()
    assert found.figures["iwae"] == pytest.approx(float(model.marginal().log_prob(x).mean().detach()), abs=1e-3)
    assert (found.figures["rows"], found.figures["particles"]) == (16, 1000)
    assert (found.figures["units"], found.figures["active_units"]) == (2, 2)


def test_narrow_guide_is_poor() -> None:
    found = ppca_report(0.3)
    assert found.verdict == "poor"
    assert found.figures["k_hat_above_0.7"] > 0.5
    assert "k-hat is above 0.7 in" in found.reasons[0] and "richer guide" in found.reasons[0]


@pytest.mark.parametrize(("scale", "verdict"), [(0.8, "good"), (1.25, "good"), (2.0, "usable"), (20.0, "poor")])
def test_gap_is_the_divergence_of_the_guide(scale: float, verdict: str) -> None:
    found = ppca_report(scale)
    assert found.verdict == verdict
    if scale < 3:  # KL(q || p) of two dims
        assert found.figures["gap"] == pytest.approx(scale**2 - 1 - 2 * math.log(scale), rel=0.1)
    if 1 < scale < 3:  # E[w]^2 / E[w^2]
        assert found.figures["ess_share"] == pytest.approx((2 * scale**2 - 1) / scale**4, rel=0.1)


def test_misplaced_guide_is_not_good() -> None:
    model, _, x = ppca.example()
    found = report(untrained(model, scaled(model, 1.0, shift=3.0), x))
    assert found.verdict == "poor"
    assert found.figures["gap"] > 1


def test_some_rows_spread_evenly() -> None:
    model, _, _ = ppca.example()
    x = model.marginal().sample((300,)).detach()
    seen = []

    def guide(x: Tensor) -> None:
        seen.append(x)
        scaled(model, 1.0)(x)

    posterior = untrained(model, guide, x)
    seen.clear()
    found = report(posterior, rows=4)
    assert found.figures["rows"] == 4
    assert all(torch.equal(rows, x[[0, 100, 199, 299]]) for rows in seen)
    assert report(posterior, x[:10]).figures["rows"] == 10


def test_guide_with_parameters_for_each_row() -> None:
    model, _, _ = ppca.example()
    x = model.marginal().sample((60,)).detach()
    where = model.posterior(x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 60):
            # right for the even rows alone
            scale = torch.where(torch.arange(60) % 2 == 0, 1.0, 0.2).reshape(60, 1, 1)
            pyro.sample("z", dist.MultivariateNormal(where.mean, scale**2 * where.covariance_matrix))

    found = report(untrained(model, guide, x), rows=30)
    assert found.figures["rows"] == 30
    assert 0.2 < found.figures["k_hat_above_0.7"] < 0.8


def gaussian(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(y.shape[-1]), 1.0).to_event(1))
    with batch_plate(y):
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


@pytest.mark.parametrize(("scale", "verdict"), [(1.0, "good"), (0.3, "poor")])
def test_shared_latents_are_judged_jointly(scale: float, verdict: str) -> None:
    y = torch.randn(9, 10)
    total = y.sum(0)

    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(total / 10, scale * 0.1**0.5).to_event(1))

    found = report(untrained(gaussian, guide, y), rows=4)  # but it takes all rows together
    assert found.verdict == verdict
    assert reasons(found, "joint k-hat")
    assert (found.figures["joint_k_hat"] > 0.7) == (verdict == "poor")
    assert found.figures["joint_gap"] == pytest.approx(0.0, abs=1e-3) or verdict == "poor"
    assert "rows" not in found.figures


def test_rows_given_the_shared_latents() -> None:
    """The joint weights of many rows fail where those of each row are fine, and the report says which is which."""
    model, _, _ = together.example()
    x = torch.randn(400, 3)

    def guide(scale: float) -> Callable:
        def run(x: Tensor) -> None:
            variance = 1 / (1 / 0.25 + 1)
            mean = pyro.sample("mean", dist.Normal(x.mean(0), 0.05).to_event(1))
            with batch_plate(x):
                pyro.sample("z", dist.Normal((x - mean) * variance / 0.25, scale * variance**0.5).to_event(1))

        return run

    fine, narrow = (report(untrained(model, guide(scale), x), rows=40) for scale in (1.1, 0.3))
    assert fine.figures["joint_k_hat"] > 0.7
    assert fine.figures["k_hat_above_0.7"] == 0 and fine.figures["rows"] == 40
    assert fine.verdict == "usable"
    assert narrow.verdict == "poor" and narrow.figures["k_hat_above_0.7"] > 0.5
    assert reasons(narrow, "given one draw of the shared latents")


def test_collapsed_dimension_is_inactive() -> None:
    model, _, x = ppca.example()
    with torch.no_grad():
        model.weight[:, 1] = 0.0
    found = report(untrained(model, scaled(model, 1.0), x))
    assert (found.figures["units"], found.figures["active_units"]) == (2, 1)
    assert reasons(found, "1 of 2 latent dimensions are inactive")
    assert found.verdict == "good"  # as the exact posterior is, even so
    with torch.no_grad():
        model.weight.zero_()
    assert report(untrained(model, scaled(model, 1.0), x)).verdict == "usable"


def test_point_is_no_posterior() -> None:
    found = report(untrained(gaussian, AutoDelta(gaussian), torch.randn(5, 3)))
    assert found.verdict == "poor"
    assert reasons(found, "same value of 'mu'")


def test_weights_that_are_not_finite() -> None:
    def model(y: Tensor) -> None:
        with batch_plate(y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("wall", torch.where(z > 0, 0.0, -torch.inf))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with batch_plate(y):
            pyro.sample("z", dist.Normal(-5.0, 0.01))

    found = report(untrained(model, guide, torch.randn(4)))
    assert found.verdict == "poor"
    assert reasons(found, "not finite in 4 of 4 rows")
    assert not reasons(found, "k-hat") and "k_hat_median" not in found.figures


def test_what_cannot_be_weighed_is_said() -> None:
    @config_enumerate
    def mixture(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with batch_plate(y):
            c = pyro.sample("c", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("y", dist.Normal(Vindex(loc)[..., c], 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor([-1.0, 1.0])), 0.1).to_event(1))

    method = svi(loss=TraceEnum_ELBO(max_plate_nesting=1), steps=2)
    enumerated = report(fit(mixture, torch.randn(5), guide=guide, method=method, progress=False))
    assert enumerated.verdict == "usable" and reasons(enumerated, "'c' are enumerated")

    def likelihood(y: Tensor) -> None:
        with batch_plate(y):
            pyro.sample("y", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=y)

    maximum = report(untrained(likelihood, lambda y: None, torch.randn(4)))
    assert maximum.verdict == "usable" and reasons(maximum, "maximum likelihood")


def test_loader_and_interruption() -> None:
    model, _, x = ppca.example()
    data = LoadedRows(DataLoader(TensorDataset(x), batch_size=8))
    found = report(untrained(model, scaled(model, 1.0), data, interrupted=True))
    assert found.figures["rows"] == 8
    assert found.verdict == "usable" and reasons(found, "interrupted")
    data = LoadedRows(DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=4))
    found = report(untrained(gaussian, AutoNormal(gaussian), data))
    assert found.verdict == "usable" and reasons(found, "pass all rows at once")


# ----------------------------------------------------------------------------------------------- the chains


@pytest.fixture
def sampled() -> Posterior:
    """Chains whose draws are made up, and independent."""
    stats = {
        "diverging": torch.zeros(2, 400, dtype=torch.bool),
        "energy": torch.randn(2, 400),
        "tree_depth": torch.full((2, 400), 3),
    }
    return untrained(gaussian, None, torch.randn(4, 3), draws={"mu": torch.randn(2, 400, 3)}, stats=stats)


def changed(posterior: Posterior, draws: Callable = lambda v: v, **stats: Tensor) -> Report:
    assert posterior.draws is not None
    again = Posterior(
        posterior.program,
        data=posterior.data,
        method=posterior.method,
        draws={n: draws(v.clone()) for n, v in posterior.draws.items()},
        stats={**posterior.stats, **stats},
    )
    return report(again)


def test_nuts_on_a_gaussian_is_good() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)

    method = nuts(draws=600, warmup=50, chains=2)
    found = fit(model, torch.zeros(3), method=method, seed=0, progress=False).report()
    assert found.verdict == "good", str(found)
    assert found.figures["divergences"] == 0 and found.figures["tree_depth_saturated"] == 0
    assert found.figures["e_bfmi"] > 0.3


def test_independent_draws_are_good(sampled: Posterior) -> None:
    found = report(sampled)
    assert found.verdict == "good", str(found)
    assert found.figures["r_hat"] < 1.01
    assert found.figures["ess_bulk"] > 400 and found.figures["ess_tail"] > 400
    assert (found.figures["chains"], found.figures["draws"], found.figures["entries"]) == (2, 400, 3)


def test_chains_apart_are_poor(sampled: Posterior) -> None:
    def apart(v: Tensor) -> Tensor:
        v[0, :, 1] += 5.0
        return v

    found = changed(sampled, apart)
    assert found.verdict == "poor"
    assert found.figures["r_hat"] > 1.5
    assert "R-hat" in found.reasons[0] and "mu[1]" in found.reasons[0] and "warmup" in found.reasons[0]


@pytest.mark.parametrize(
    ("draws", "verdict", "what"),
    [
        (lambda v: v[:1], "usable", "single chain"),
        (lambda v: v[:, :90], "usable", "fewer than 100 a chain"),
        (lambda v: v[:, :3], "poor", "3 draws"),
        (lambda v: v[:, :1].expand_as(v), "poor", "R-hat is "),
        (lambda v: torch.zeros_like(v), "poor", "never moved"),
        (lambda v: v / (v != v[0, 5, 0]), "poor", "not finite"),
        (lambda v: v.cumsum(1), "poor", "effective sample size"),
    ],
)
def test_what_is_wrong_with_chains(sampled: Posterior, draws: Callable, verdict: str, what: str) -> None:
    found = changed(sampled, draws)
    assert found.verdict == verdict, str(found)
    assert reasons(found, what), str(found)


def test_numbers_that_the_support_fixes_are_left_out(sampled: Posterior) -> None:
    found = changed(sampled, lambda v: torch.cat([v, torch.zeros_like(v[..., :1])], -1))
    assert found.verdict == "good"
    assert found.figures["entries"] == 3


def test_statistics_of_the_sampler(sampled: Posterior) -> None:
    few, many = torch.zeros(2, 400, dtype=torch.bool), torch.zeros(2, 400, dtype=torch.bool)
    few[0, :2], many[0, :50] = True, True
    assert changed(sampled, diverging=few).verdict == "usable"
    found = changed(sampled, diverging=many)
    assert found.verdict == "poor" and reasons(found, "50 of 800 draws diverged")
    walk = torch.randn(2, 400).cumsum(1)
    found = changed(sampled, energy=walk)
    assert found.verdict == "usable" and reasons(found, "E-BFMI") and found.figures["e_bfmi"] < 0.3
    found = changed(sampled, tree_depth=torch.full((2, 400), 10))
    assert found.verdict == "usable" and reasons(found, "max_tree_depth=10")


# ----------------------------------------------------------------------------------------------- the report


def test_random_states_stay_and_reports_repeat() -> None:
    model, _, x = ppca.example()
    posterior = untrained(model, scaled(model, 0.8), x)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first, again, other = report(posterior), report(posterior), report(posterior, seed=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    assert first == again
    assert first.figures["gap"] != other.figures["gap"]


def test_report_on_one_screen() -> None:
    found = ppca_report(0.3)
    lines = str(found).splitlines()
    assert lines[0] == "This posterior is poor."
    assert len(lines) <= 40 and max(map(len, lines)) <= 110
    page = Report("poor", ("a < b",), {"x & y": 1.0})._repr_html_()
    assert "a &lt; b" in page and "x &amp; y" in page and "<b>poor</b>" in page


@pytest.mark.parametrize(("options", "message"), [({"rows": 0}, "rows"), ({"particles": 49}, "particles")])
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} must be at least"):
        ppca_report(1.0, **options)


def test_posterior_report_is_this_one() -> None:
    model, _, x = ppca.example()
    posterior = untrained(model, scaled(model, 0.8), x)
    assert posterior.report() == report(posterior)
    assert posterior.report(x[:5]).figures["rows"] == 5


def test_automatic_guide_of_a_model_that_does_not_broadcast() -> None:
    """eta's event is as long as many draws may be: the weights must not depend on how they are run."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        eta = pyro.sample("eta", dist.Normal(torch.zeros(60), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu + 0.0 * eta, 1.0).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(y.sum() / 61, (1 / 61) ** 0.5))
        pyro.sample("eta", dist.Normal(torch.zeros(60), 1.0).to_event(1))

    with pytest.warns(UserWarning, match="does not broadcast"):
        found = report(untrained(model, guide, torch.randn(60)), particles=60)
    assert found.figures["joint_gap"] == pytest.approx(0.0, abs=1e-3)
    assert found.verdict == "good"


def test_automatic_guide() -> None:
    y = torch.randn(30, 3)
    posterior = fit(gaussian, y, method=svi(lr=0.05, steps=400, schedule="linear"), seed=0, progress=False)
    assert posterior.report().verdict == "good", str(posterior.report())
    assert isinstance(posterior.guide, AutoNormal)
