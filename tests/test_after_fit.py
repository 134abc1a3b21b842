"""A report as text, page and dictionary, and the look at a posterior right after its fit."""

import json
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot
from pyro.infer.autoguide import AutoDelta
from torch import Tensor
from truth import biased_guide, untrained

from pyro_ae import Posterior, PosteriorWarning, batch_plate, elbo, fit, importance, nuts, svi
from pyro_ae.diagnostics import after_fit
from pyro_ae.diagnostics.report import report
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.full_rank import FullRank
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.models import ppca
from pyro_ae.nn import MLP


def gaussian(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(y.shape[-1]), 1.0).to_event(1))
    with batch_plate(y):
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


# -- in which forms it comes -----------------------------------------------------------------------------------


def funnel(centred: bool) -> Callable:
    """Neal's funnel, sampled as it is or by the standard normals that it is made of."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        if centred:
            pyro.sample("x", dist.Normal(torch.zeros(9), (v / 2).exp()).to_event(1))
        else:
            noise = pyro.sample("noise", dist.Normal(torch.zeros(9), 1.0).to_event(1))
            pyro.deterministic("x", noise * (v / 2).exp(), event_dim=1)

    return model


@pytest.fixture(scope="module")
def funnels() -> dict[bool, Posterior]:
    method = nuts(draws=1000, warmup=500)
    return {c: fit(funnel(c), None, method=method, seed=0, progress=False) for c in (True, False)}


def test_a_funnel_is_flagged_and_passes_once_it_is_reparameterised(funnels: dict[bool, Posterior]) -> None:
    bad, good = funnels[True].report(), funnels[False].report()
    assert bad.verdict == "poor" and bad.figures["divergences"] > 0
    assert "reparameterise" in " ".join(bad.reasons)
    assert good.verdict == "good" and good.figures["divergences"] == 0
    assert good.figures["mcse_mean_in_sd"] < 0.05 < bad.figures["mcse_mean_in_sd"]
    titles = [picture.title for picture in bad.pictures]
    assert titles == ["Trace", "Ranks", "Where draws diverged", "Energy"]
    assert [picture.title for picture in good.pictures] == ["Trace", "Ranks", "Energy"]


def test_a_report_as_a_page(funnels: dict[bool, Posterior], tmp_path: Path) -> None:
    found = funnels[True].report()
    text = found.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text
    assert text.count("<img") == 4 and 'class="verdict poor"' in text
    assert "What was fitted" in text and "largest R-hat" in text
    assert "http" not in text.replace("https://arxiv.org", ""), "nothing is fetched"
    assert not pyplot.get_fignums()


def test_a_report_as_a_dictionary() -> None:
    model, _, x = ppca.example()
    found = report(untrained(model, biased_guide(model, 0.0, 0.09), x), rows=5)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["verdict"] == "poor" and plain["reasons"] == list(found.reasons)
    assert plain["figures"].keys() == found.figures.keys()
    assert plain["rows"]["row"] == [0, 4, 8, 11, 15]
    torch.testing.assert_close(torch.tensor(plain["rows"]["k_hat"]), found.rows["k_hat"])
    assert (found.rows["gap"] > 0).all() and (found.rows["ess_share"] <= 1).all()
    assert float(found.rows["gap"].mean()) == pytest.approx(found.figures["gap"], rel=1e-5)


def test_rows_keep_their_numbers_whatever_the_guide_needs() -> None:
    """A guide that is right for all rows but one, and has parameters for each."""
    model, _, _ = ppca.example()
    x = model.marginal().sample((60,)).detach()
    where = model.posterior(x)
    off = 59

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 60):
            scale = torch.where(torch.arange(60) == off, 0.1, 1.0).reshape(60, 1, 1)
            pyro.sample("z", dist.MultivariateNormal(where.mean, scale**2 * where.covariance_matrix))

    found = report(untrained(model, guide, x), rows=30)
    assert int(found.rows["row"][found.rows["k_hat"].argmax()]) == off


@pytest.mark.parametrize(
    ("method", "verdict", "words"),
    [("map", "poor", "single point"), ("ensemble", "usable", "held out"), ("laplace", "usable", "compare them")],
)
def test_draws_without_chains_are_not_judged_as_chains(method: str, verdict: str, words: str) -> None:
    posterior = fit(gaussian, torch.randn(9, 2), method=method, seed=0, progress=False)
    found = posterior.report()
    assert found.verdict == verdict and words in found.reasons[0]
    assert "r_hat" not in found.figures and "ess_bulk" not in found.figures


@pytest.mark.parametrize(
    ("family", "blamed", "cure"),
    [(FullRank, "amortisation", "SemiAmortized"), (MeanField, "approximation", "FullRank")],
)
def test_a_gap_is_blamed_on_the_encoder_or_on_its_family(family: Any, blamed: str, cure: str) -> None:
    """A row's posterior with strongly correlated dims, and an encoder that is trained for other rows or for these."""

    def model(x: Tensor) -> None:
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True) + 0.1 * z, 0.1).to_event(1), obs=x)

    x = torch.randn(30, 1) + 0.1 * torch.randn(30, 2)
    guide = Amortized(MLP(2, [16]), family(16, 2))
    method = svi(lr=1e-2, steps=1500, loss=importance(elbo, 4))
    posterior = fit(model, x, guide=guide, method=method, seed=0, progress=False)
    found = posterior.report(x + 3.0 if blamed == "amortisation" else x)
    other = {"amortisation": "approximation", "approximation": "amortisation"}[blamed]
    assert found.figures["gap"] > 0.5
    assert found.figures[f"{blamed}_gap"] > 2 * found.figures[f"{other}_gap"]
    assert cure in " ".join(found.reasons) and f"{found.figures['amortisation_gap']:.2f} nats" in " ".join(
        found.reasons
    )


@pytest.mark.parametrize("used", [0, 1, 2])
def test_a_latent_that_collapsed_as_a_whole_is_called_so(used: int) -> None:
    there = (torch.arange(2) < used).float()

    def model(x: Tensor) -> None:
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(there * z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Normal(there * x / 2, 0.5 ** (there / 2)).to_event(1))

    found = report(untrained(model, guide, torch.randn(50, 2)))
    assert ("The latent 'z' has collapsed" in " ".join(found.reasons)) == (used == 0)
    assert (found.verdict, found.figures["active_units"]) == ("good" if used else "usable", used)
    assert found.figures["kl"] > 0.15 * used or found.figures["kl"] == pytest.approx(0.0, abs=1e-6)
    assert found.figures["k_hat_median"] < 0.5, "as an approximation it is exact, used or not"


# -- after a fit -----------------------------------------------------------------------------------------------


@pytest.fixture
def warned() -> Iterator[list]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PosteriorWarning)
        yield caught


def test_a_poor_posterior_is_warned_of_once(warned: list) -> None:
    fit(funnel(True), None, method=nuts(draws=60, warmup=60), seed=0, progress=False)
    (warning,) = warned
    assert warning.category is PosteriorWarning and warning.filename == __file__
    assert "poor" in str(warning.message) and "R-hat" in str(warning.message) and "check=False" in str(warning.message)


def test_a_poor_guide_is_warned_of(warned: list) -> None:
    model, _, x = ppca.example()
    guide = biased_guide(model, 0.0, 0.05)
    fit(model, x, guide=guide, method=svi(steps=1), seed=0, progress=False)
    assert "k-hat" in str(warned[0].message) and len(warned) == 1


def test_good_posteriors_points_and_silence_are_not_warned_of(warned: list) -> None:
    y = torch.randn(9, 2)
    fit(gaussian, y, method=nuts(draws=500, warmup=300), seed=0, progress=False)
    fit(gaussian, y, guide=AutoDelta(gaussian), method=svi(steps=2), seed=0, progress=False)
    fit(gaussian, y, method="map", seed=0, progress=False)
    model, guide, x = ppca.example()
    fit(model, x, guide=guide, method=svi(steps=1), seed=0, progress=False, check=False)
    assert not warned


def test_nothing_is_worked_out_where_warnings_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("looked at")

    monkeypatch.setattr(after_fit, "check", never)
    model, guide, x = ppca.example()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PosteriorWarning)
        fit(model, x, guide=guide, method=svi(steps=1), seed=0, progress=False)
        warnings.simplefilter("always", PosteriorWarning)
        with pytest.raises(AssertionError, match="looked at"):
            fit(model, x, guide=guide, method=svi(steps=1), seed=0, progress=False)


def test_a_look_leaves_the_random_states_and_what_it_cannot_judge(warned: list) -> None:
    model, _, x = ppca.example()
    guide = biased_guide(model, 0.0, 0.05)
    after = []
    for look in (True, False):
        pyro.set_rng_seed(3)
        fit(model, x, guide=guide, method=svi(steps=1), progress=False, check=look)
        after.append((torch.rand(1), np.random.rand(), random.random()))
    assert after[0] == after[1]
    many = torch.randn(50_000, 2)
    fit(gaussian, many, method=svi(steps=1), seed=0, progress=False)
    assert len(warned) == 1, "many rows under one latent are left to the report"
