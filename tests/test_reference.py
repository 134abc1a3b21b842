"""Chains on some rows of a fitted model, where the posterior is known, and what they show of a guide."""

from typing import Any

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from test_report import scaled
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from truth import banana, gaussian_mean, gaussian_mean_posterior, ppca, untrained

from pyro_ae import Posterior, batch_plate, fit, svi
from pyro_ae.diagnostics.comparison import compare
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.reference import reference

SHORT = {"draws": 300, "warmup": 200, "chains": 2, "progress": False}
"""The same for all, so that what is compiled for one serves others."""


def agree(draws: Tensor, mean: Tensor, sd: Tensor) -> None:
    """Moments of ``[chains, draws, *shape]`` within five Monte Carlo errors."""
    flat = draws.double().reshape(*draws.shape[:2], -1)
    for i, (m, s) in enumerate(zip(mean.flatten().tolist(), sd.flatten().tolist(), strict=True)):
        chain = flat[..., i].numpy()
        assert abs(chain.mean() - m) < 5 * float(arviz.mcse(chain, method="mean"))
        assert abs(chain.std() - s) < 5 * float(arviz.mcse(chain, method="sd"))


def test_exact_posterior_of_some_rows():
    """A guide that is off, with the model's parameters as they are."""
    model, x = ppca(40)
    model.requires_grad_(True)
    posterior = untrained(model, scaled(model, 0.5, 0.3), x)
    before = posterior.program.parameters.state()
    state = torch.get_rng_state()
    found = reference(posterior, rows=[31, 2, 17], **SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    some = x[[31, 2, 17]]
    exact = model.posterior(some)
    agree(found.draws["z"], exact.mean.detach(), exact.stddev.detach())
    z = found.draws["z"].flatten(0, 1)
    covariance = torch.einsum("sni,snj->nij", z - z.mean(0), z - z.mean(0)) / len(z)
    torch.testing.assert_close(covariance, exact.covariance_matrix.detach(), atol=0.05, rtol=0.2)
    after = posterior.program.parameters.state()
    assert all(torch.equal(v, after[n]) for n, v in before.items())
    assert all(p.grad is None for p in model.parameters())
    # as draws of the guide on those rows
    assert (
        found.draws["z"].shape == (2, 300, 3, 2)
        and found.sample(50)["z"].shape == posterior.sample(50, some)["z"].shape
    )
    assert found.data.labels == (31, 2, 17) and torch.equal(found.data.entries["0"], some)
    assert found.report().figures["r_hat"] < 1.05
    said = compare(posterior, found, classify=False)
    assert (said.sites["z"].log_sd_ratio < -0.4).all() and (said.sites["z"].mean > 0.2).all()
    assert "the guide is too narrow in 6 of 6 numbers" in " ".join(said.sentences)
    assert "no clear difference" in compare(untrained(model, scaled(model, 1.0), x), found, classify=False).sentences[0]
    # the same again, and rows spread evenly
    again = reference(posterior, rows=3, **SHORT)
    assert again.data.labels == (0, 20, 39)
    agree(again.draws["z"], model.posterior(x[[0, 20, 39]]).mean.detach(), exact.stddev.detach())
    assert torch.equal(reference(posterior, rows=3, **SHORT).draws["z"], again.draws["z"])


def test_a_bent_posterior_is_told_from_a_mean_field_guide():
    x = torch.tensor([[2.0], [0.0], [1.0]])
    guide = Amortized(nn.Linear(1, 4), MeanField(4, 2))
    posterior = fit(banana, x, guide=guide, method=svi(steps=300, lr=0.02), seed=0, progress=False)
    said = compare(posterior, reference(posterior, rows=3, **SHORT), rows=[0])
    # both legs of the first row, of which the guide has one, or lies in between
    assert said.sites["z"].c2st.item() > 0.7 and any("classifier" in s for s in said.sentences)


def test_what_pyro_param_learnt_is_kept():
    """In a function's own parameters and in a network that only ``pyro.module`` knows."""
    network = nn.Linear(1, 1)

    def model(x: Tensor) -> None:
        pyro.module("network", network)
        mean = pyro.param("mean", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(mean, scale))
            pyro.sample("x", dist.Normal(network(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Normal(0.0 * x, 1.0))

    posterior = untrained(model, guide, torch.randn(5))
    with torch.no_grad():
        network.weight.fill_(0.0)
        parameters = posterior.program.parameters.named()
        parameters["mean"].fill_(7.0)
        parameters["scale"].fill_(torch.tensor(0.25).log())  # unconstrained
    assert float(posterior.params["scale"]) == pytest.approx(0.25)
    before = posterior.program.parameters.state()
    found = reference(posterior, rows=2, **SHORT)
    agree(found.draws["z"], torch.full((2,), 7.0), torch.full((2,), 0.25))  # x says nothing of z
    after = posterior.program.parameters.state()
    assert all(torch.equal(v, after[n]) for n, v in before.items())
    assert "mean" not in pyro.get_param_store()


def test_latents_that_rows_share_are_sampled_with_all_rows():
    y = torch.randn(30) + 2
    posterior = fit(gaussian_mean, y, method=svi(steps=50), seed=0, progress=False)
    found = reference(posterior, rows=3, **SHORT)
    agree(found.draws["mu"], *gaussian_mean_posterior(y))
    assert found.data.size == 30
    said = compare(posterior, found, classify=False)
    assert said.sites["mu"].mean.shape == () and said.rows is None
    other = y.flip(0) - 1  # in place of the rows of the fit
    agree(reference(posterior, other, **SHORT).draws["mu"], *gaussian_mean_posterior(other))


def guides(model: Any) -> dict[str, Any]:
    exact = scaled(model, 1.0)

    def each(x: Tensor) -> None:
        """Parameters for each row of the fit."""
        loc = pyro.param("loc", torch.arange(8.0).unsqueeze(-1).expand(8, 2).clone())
        with pyro.plate("data", 8):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    def point(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Delta(torch.zeros(len(x), 2)).to_event(1))

    return {"exact": exact, "each": each, "point": point}


def started(monkeypatch: pytest.MonkeyPatch, posterior: Posterior, **options: Any) -> Any:
    """Where the chains would begin, and on which rows."""
    seen = {}

    def note(model: Any, rows: Any, *, method: Any, **rest: Any) -> None:
        seen.update(init=method.init, rows=rows, **rest)

    monkeypatch.setattr("pyro_ae.reference.fit", note)
    reference(posterior, **options)
    return seen


def test_chains_begin_at_the_guides_draws_of_the_same_rows(monkeypatch):
    model, x = ppca(8)
    made = guides(model)
    seen = started(monkeypatch, untrained(model, made["exact"], x), rows=[5, 1])
    exact = model.posterior(x[[5, 1]])
    torch.testing.assert_close(seen["init"].sample()["z"].mean(0), exact.mean, atol=0.2, rtol=0)
    seen = started(monkeypatch, untrained(model, made["each"], x), rows=[5, 1])
    torch.testing.assert_close(
        seen["init"].sample()["z"].mean(0), torch.tensor([[5.0, 5.0], [1.0, 1.0]]), atol=0.3, rtol=0
    )
    assert started(monkeypatch, untrained(model, made["point"], x), rows=2)["init"] == "median"
    draws = torch.arange(8.0).reshape(8, 1) + 0.01 * torch.randn(2, 30, 8, 2)
    chains = untrained(model, None, x, draws={"z": draws})
    seen = started(monkeypatch, chains, rows=[6, 0])
    torch.testing.assert_close(
        seen["init"].sample()["z"].mean(0), torch.tensor([[6.0, 6.0], [0.0, 0.0]]), atol=0.1, rtol=0
    )
    assert torch.equal(seen["rows"].entries["0"], x[[6, 0]])


def test_labels_of_rows_stay(monkeypatch):
    pandas = pytest.importorskip("pandas")
    model, x = ppca(8)
    posterior = untrained(model, scaled(model, 1.0), x)
    frame = pandas.DataFrame(x.numpy(), index=list("abcdefgh"))
    assert started(monkeypatch, posterior, data=frame, rows=[5, 1])["rows"].labels == ("f", "b")


def test_refusals():
    model, x = ppca(8)
    posterior = untrained(model, scaled(model, 1.0), x)
    with pytest.raises(ValueError, match="DataLoader"):
        reference(posterior, DataLoader(TensorDataset(x), batch_size=4))
    with pytest.raises(ValueError, match="rows must be at least 1"):
        reference(posterior, rows=0)
    nothing = untrained(
        lambda x: pyro.sample("x", dist.Normal(0.0, 1.0).expand([8]).to_event(1), obs=x), lambda x: None, x[:, 0]
    )
    with pytest.raises(ValueError, match="no latent site"):
        reference(nothing)
