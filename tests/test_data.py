"""Data in every form, minibatches, and missing values."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset
from truth import exact_guide, ppca

from pyro_ae import elbo, fit, iwae, log_weights, nuts, observe, svi
from pyro_ae.data import as_rows
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.models.vae import VAE
from pyro_ae.nn import MLP

VALUES = np.arange(12.0).reshape(6, 2)


@pytest.mark.parametrize(
    "data",
    [
        torch.tensor(VALUES, dtype=torch.float32),
        VALUES,
        VALUES.tolist(),
        pd.DataFrame(VALUES, columns=["a", "b"]),
        xr.DataArray(VALUES, dims=("row", "column")),
    ],
    ids=lambda d: type(d).__name__,
)
def test_one_array_in_every_form(data):
    rows = as_rows(data)
    (x,), kwargs = rows.call()
    assert not kwargs
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.tensor(VALUES, dtype=torch.float32))
    assert rows.size == 6


def test_tuples_and_dicts_keep_settings_as_they_are():
    rows = as_rows((VALUES, 3, "name", None, len))
    assert rows.call().args[1:] == (3, "name", None, len)
    assert rows.size == 6
    rows = as_rows({"x": VALUES, "k": 3})
    assert rows.call().args == ()
    assert rows.call().kwargs["k"] == 3
    assert as_rows(None).call() == ((), {})
    data = xr.Dataset({"x": (("row", "c"), VALUES), "y": (("row",), VALUES[:, 0])})
    assert set(as_rows(data).call().kwargs) == {"x", "y"}


def test_dtypes():
    rows = as_rows({"count": np.arange(3, dtype=np.int32), "flag": np.array([True, False, True]), "x": np.zeros(3)})
    assert {n: v.dtype for n, v in rows.rows.items()} == {
        "count": torch.int64,
        "flag": torch.bool,
        "x": torch.float32,
    }
    assert as_rows(torch.zeros(3, dtype=torch.float64)).rows["0"].dtype == torch.float64


def test_labels_come_from_the_index():
    frame = pd.DataFrame(VALUES, index=list("abcdef"))
    assert as_rows(frame).labels == tuple("abcdef")
    assert as_rows(frame).take(torch.tensor([4, 1])).labels == ("e", "b")
    assert as_rows(pd.DataFrame(VALUES)).labels is None
    assert as_rows(xr.DataArray(VALUES, dims=("t", "c"), coords={"t": np.arange(6) * 10})).labels == tuple(
        range(0, 60, 10)
    )


def test_an_epoch_sees_each_row_once_and_the_last_batch_is_smaller():
    x = torch.arange(10.0)
    rows = as_rows((x, x * 2, "setting"))
    batches = list(rows.batches(4))
    assert [len(b.args[0]) for b in batches] == [4, 4, 2]
    assert all(torch.equal(b.args[1], b.args[0] * 2) and b.args[2] == "setting" for b in batches)
    seen = torch.cat([b.args[0] for b in batches])
    assert not torch.equal(seen, x)
    assert torch.equal(seen.sort().values, x)


def test_a_fraction_is_held_out():
    x = torch.arange(10.0)
    train, held = as_rows(x).split(0.3)
    assert (train.size, held.size) == (7, 3)
    assert torch.equal(torch.cat([train.rows["0"], held.rows["0"]]).sort().values, x)


def test_loaders_know_their_size():
    data = TensorDataset(torch.zeros(10, 2))
    assert as_rows(DataLoader(data, batch_size=4)).size == 10
    assert as_rows(DataLoader(data, sampler=SubsetRandomSampler([1, 2, 3]))).size == 3

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([torch.zeros(2)])

    with pytest.raises(ValueError, match="no length"):
        as_rows(DataLoader(Stream())).check_batch_size(None)


# -- missing values ----------------------------------------------------------------------------------------


def test_missing_values_are_marginalised_exactly():
    """With the exact posterior given what is observed, the bound is log p of the observed elements."""
    model, x = ppca(rows=8)
    missing = torch.rand_like(x) < 0.4
    missing[:, 0] = missing[0] = False
    x = x.masked_fill(missing, float("nan"))
    marginal = model.marginal()

    evidence, posteriors = [], []
    for row in x:
        o = ~row.isnan()
        w, r = model.weight[o], row[o] - model.mean[o]
        covariance = marginal.covariance_matrix[o][:, o]
        evidence.append(dist.MultivariateNormal(torch.zeros(int(o.sum())), covariance).log_prob(r))
        precision = torch.eye(2) + w.T @ w / 0.49
        posteriors.append((torch.linalg.solve(precision, w.T @ r / 0.49), torch.linalg.inv(precision)))
    loc, covariance = (torch.stack(t) for t in zip(*posteriors, strict=True))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, covariance))

    log_w, _ = log_weights(model, guide, x, particles=3)
    torch.testing.assert_close(log_w, torch.stack(evidence).expand(3, 8), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: dist.Bernoulli(logits=p).to_event(2),
        lambda p: dist.Poisson(p.exp()).to_event(1),
        lambda p: dist.Gamma(p.exp(), 1.0),
        lambda p: dist.Beta(p.exp(), 1.0).to_event(2),
    ],
)
def test_observe_masks_element_by_element_whatever_the_support(make):
    q = make(torch.randn(4, 3, 2))
    x = q.sample()
    holes = x.clone()
    holes[1, 2, 0] = holes[3, 0, 1] = float("nan")

    def model(x):
        observe("x", q, x)

    site = pyro.poutine.trace(model).get_trace(holes).nodes["x"]
    log_prob = site["fn"].log_prob(site["value"])
    base = q.base_dist if q.event_shape else q
    expected = base.log_prob(x).masked_fill(holes.isnan(), 0.0)
    if q.event_shape:
        expected = expected.sum(tuple(range(-len(q.event_shape), 0)))
    torch.testing.assert_close(log_prob, expected)
    assert torch.isfinite(site["value"]).all()


def test_joint_distributions_lose_whole_events_only():
    mvn = dist.MultivariateNormal(torch.zeros(2), torch.eye(2)).expand([3])
    x = torch.randn(3, 2)
    whole = x.clone()
    whole[1] = float("nan")
    site = pyro.poutine.trace(lambda: observe("x", mvn, whole)).get_trace().nodes["x"]
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), mvn.log_prob(x) * torch.tensor([1.0, 0, 1]))
    whole[2, 0] = float("nan")
    with pytest.raises(ValueError, match="'x'.*MultivariateNormal.*to_event"):
        pyro.poutine.trace(lambda: observe("x", mvn, whole)).get_trace()


def test_gradients_pass_missing_values_by():
    loc = torch.zeros(3, requires_grad=True)
    x = torch.tensor([1.0, float("nan"), 2.0])
    site = pyro.poutine.trace(lambda: observe("x", dist.Normal(loc, 1.0).to_event(1), x)).get_trace().nodes["x"]
    site["fn"].log_prob(site["value"]).backward()
    torch.testing.assert_close(loc.grad, torch.tensor([1.0, 0.0, 2.0]))


def test_the_encoder_gets_zeros_and_the_mask():
    seen = []

    class Encoder(nn.Module):
        def forward(self, x, observed=None):
            seen.append((x, observed))
            return x

    guide = Amortized(Encoder(), MeanField(3, 2))
    x = torch.tensor([[1.0, float("nan"), 2.0]])
    guide(x)
    assert torch.equal(seen[0][0], torch.tensor([[1.0, 0.0, 2.0]]))
    assert torch.equal(seen[0][1], torch.tensor([[True, False, True]]))
    guide(torch.ones(1, 3))
    assert seen[1][1] is None


def test_a_network_that_cannot_see_the_mask_is_refused():
    model, x = ppca(rows=4)
    x[1, 2] = float("nan")
    with pytest.raises(ValueError, match="missing=True"):
        log_weights(model, Amortized(MLP(5, [8]), MeanField(8, 2)), x)


def test_a_vae_learns_from_data_with_holes():
    """Imputing from a VAE trained with 30% holes beats the column means on the hidden elements."""
    torch.manual_seed(0)
    _, full = ppca(rows=400)
    x = full.masked_fill(torch.rand_like(full) < 0.3, float("nan"))
    model = VAE(MLP(2, [16], 5), 2, lambda h: dist.Normal(h, 0.7).to_event(1))
    guide = Amortized(MLP(5, [32], missing=True), MeanField(32, 2))
    posterior = fit(model, x, guide=guide, method=svi(lr=5e-3, epochs=60), batch_size=50, seed=0, progress=False)
    hidden = x.isnan()
    imputed = posterior.reconstruct(draws=20)
    means = torch.nanmean(x, 0).expand_as(full)
    assert (imputed - full)[hidden].square().mean() < 0.7 * (means - full)[hidden].square().mean()


def test_missing_values_for_chains_too():
    y = torch.tensor([1.0, float("nan"), 3.0])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            observe("y", dist.Normal(mu, 1.0), y)

    posterior = fit(model, y, method=nuts(draws=200, warmup=100, chains=2), seed=0, progress=False)
    assert abs(posterior.sample()["mu"].mean() - 2.0) < 0.3


def test_bounds_hold_with_holes():
    model, x = ppca(rows=6)
    x[0, 0] = x[3, 2] = float("nan")

    def fill(x):
        return exact_guide(model)(x.nan_to_num())

    log_w, _ = log_weights(model, fill, x, particles=500)
    assert (elbo(log_w) <= iwae(log_w) + 1e-4).all()
    assert torch.isfinite(log_w).all()
