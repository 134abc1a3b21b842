"""Any model and any data in ArviZ: plates, missing values, labels and names, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_ae import Posterior, batch_plate, fit, observe, svi
from pyro_ae.data import as_rows
from pyro_ae.models import ppca
from pyro_ae.program import Program

SAMPLES = ("chain", "draw")


def posterior_of(model: Callable, guide: Callable, data: Any) -> Posterior:
    """A guide as it is, not trained."""
    rows = as_rows(data)
    program = Program(model, guide, total=rows.size)
    program.build(rows.call())
    return Posterior(program, data=rows, method="by hand")


def groups_of(inference: Any) -> set[str]:
    return (
        {g.strip("/") for g in inference.groups if g != "/"}
        if not callable(inference.groups)
        else set(inference.groups())
    )


def dims(inference: Any, group: str) -> dict[str, tuple]:
    return {name: v.dims for name, v in inference[group].data_vars.items()}


# ------------------------------------------------------------------------------------------ kinds of models


def test_several_observed_sites() -> None:
    def model(count: Tensor, size: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with batch_plate(count):
            pyro.sample("count", dist.Poisson(rate), obs=count)
            pyro.sample("size", dist.Normal(rate.unsqueeze(-1), torch.ones(2)).to_event(1), obs=size)

    data = {"count": torch.tensor([1, 0, 4]), "size": torch.randn(3, 2)}
    inference = posterior_of(model, AutoNormal(model), data).to_arviz(10)
    assert dims(inference, "log_likelihood") == {"count": (*SAMPLES, "data"), "size": (*SAMPLES, "data")}
    assert dims(inference, "observed_data") == {"count": ("data",), "size": ("data", "size_dim_0")}
    assert inference["observed_data"]["count"].dtype.kind == "i"
    counts = inference["posterior_predictive"]["count"].values
    assert (counts == counts.round()).all() and (counts >= 0).all()
    assert "constant_data" not in groups_of(inference)


def test_two_plates_with_latents_in_one_each() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        groups, data = pyro.plate("groups", 3, dim=-2), pyro.plate("data", 4, dim=-1)
        with groups:
            a = pyro.sample("a", dist.Normal(mu, 1.0))
        with data:
            b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with groups, data:
            cell = pyro.deterministic("cell", a + b.sum(-1))
            pyro.sample("y", dist.Normal(cell, 1.0), obs=y)

    y = torch.randn(3, 4)
    inference = posterior_of(model, AutoNormal(model), y).to_arviz(6)
    assert dims(inference, "posterior") == {
        **{"mu": SAMPLES, "a": (*SAMPLES, "groups")},
        **{"b": (*SAMPLES, "data", "b_dim_0"), "cell": (*SAMPLES, "groups", "data")},
    }
    assert dims(inference, "log_likelihood") == {"y": (*SAMPLES, "groups", "data")}
    assert dims(inference, "observed_data") == {"y": ("groups", "data")}
    assert dims(inference, "sample_stats")["log_weight"] == SAMPLES
    latents = inference["posterior"]
    np.testing.assert_allclose(latents["cell"], latents["a"] + latents["b"].sum("b_dim_0"), rtol=1e-4, atol=1e-5)


def test_rows_of_two_plates_are_weighed_one_by_one() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("groups", 3, dim=-2), pyro.plate("data", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.randn(3, 4)

    def guide(y: Tensor) -> None:
        with pyro.plate("groups", 3, dim=-2), pyro.plate("data", 4, dim=-1):
            pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))

    stats = posterior_of(model, guide, y).to_arviz(5, groups=["sample_stats"])["sample_stats"]
    assert stats["log_weight"].dims == (*SAMPLES, "groups", "data")
    evidence = dist.Normal(0.0, 2**0.5).log_prob(y)
    np.testing.assert_allclose(stats["log_weight"][0], evidence.expand(5, 3, 4), atol=1e-5)


def test_no_plate_and_no_data() -> None:
    y = torch.tensor([1.0, 2.0])

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        pyro.sample("y", dist.Normal(w.sum(-1), 1.0).to_event(1), obs=y)

    inference = posterior_of(model, AutoNormal(model), None).to_arviz(4)
    assert dims(inference, "posterior") == {"w": (*SAMPLES, "w_dim_0", "w_dim_1")}
    assert dims(inference, "log_likelihood") == {"y": SAMPLES}
    assert dims(inference, "observed_data") == {"y": ("y_dim_0",)}


@pytest.mark.filterwarnings("ignore:the model or guide does not broadcast")
def test_batches_without_a_plate() -> None:
    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    y = torch.randn(3)
    inference = posterior_of(model, lambda y: pyro.sample("w", dist.Normal(y / 2, 0.5**0.5)), y).to_arviz(4)
    assert dims(inference, "log_likelihood") == {"y": (*SAMPLES, "y_dim_0")}
    np.testing.assert_allclose(
        inference["sample_stats"]["log_weight"], np.full((1, 4), dist.Normal(0.0, 2**0.5).log_prob(y).sum()), rtol=1e-5
    )


def test_discrete_latents_and_names_that_clash() -> None:
    """A latent named after a dim, an entry named after the plate, a slash in a name."""

    def model(data: Tensor, y: Tensor) -> None:
        pyro.sample("draw", dist.Categorical(torch.ones(3)))
        pyro.sample("net/w", dist.Normal(0.0, 1.0))
        with batch_plate(y):
            pyro.sample("y", dist.Normal(data, 1.0), obs=y)

    def guide(data: Tensor, y: Tensor) -> None:
        pyro.sample("draw", dist.Categorical(torch.ones(3)))
        pyro.sample("net/w", dist.Normal(0.0, 1.0))

    inference = posterior_of(model, guide, (torch.zeros(4), torch.randn(4))).to_arviz(5)
    assert dims(inference, "posterior") == {"draw_": SAMPLES, "net.w": SAMPLES}
    assert inference["posterior"]["draw_"].dtype.kind == "i"
    assert dims(inference, "constant_data") == {"data_": ("data",)}


# ------------------------------------------------------------------------------------------------- the data


def regression(x: Tensor, y: Tensor, width: float = 1.0, name: str = "", flag: bool = False) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), width), obs=y)


X, Y = torch.ones(4, 2), torch.arange(4.0)


@pytest.mark.parametrize(
    "data", [{"x": X, "y": Y, "width": 2.0, "name": "a", "flag": True}, (X, Y, 2.0, "a", True)], ids=["dict", "tuple"]
)
def test_constant_data_goes_by_the_names_of_the_model(data: Any) -> None:
    constants = posterior_of(regression, AutoNormal(regression), data).to_arviz(3)["constant_data"]
    assert {n: v.dims for n, v in constants.data_vars.items()} == {"x": ("data", "x_dim_0"), "width": (), "flag": ()}
    assert float(constants["width"]) == 2.0 and constants["flag"].dtype == bool


def test_an_entry_with_the_values_of_the_observed_one_stays() -> None:
    inference = posterior_of(regression, AutoNormal(regression), (Y.unsqueeze(1).clone(), Y)).to_arviz(3)
    assert set(inference["constant_data"].data_vars) == {"x"}


def test_missing_values_stay_missing_and_count_nothing() -> None:
    model, guide, x = ppca.example()
    x = x.clone()
    x[0, 0], x[3] = torch.nan, torch.nan

    def prior(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    inference = posterior_of(model, prior, x).to_arviz(4)
    np.testing.assert_array_equal(inference["observed_data"]["x"], x)
    likelihood = dist.Normal(torch.tensor(inference["posterior"]["z"].values) @ model.weight.T, 1.0)
    terms = torch.where(x.isnan(), 0.0, likelihood.log_prob(x.nan_to_num())).sum(-1)
    np.testing.assert_allclose(inference["log_likelihood"]["x"], terms.detach(), atol=1e-4)
    assert not np.isnan(inference["posterior_predictive"]["x"]).any()


def test_missing_values_of_a_transformed_entry() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with batch_plate(x):
            observe("y", dist.Normal(mu.unsqueeze(-1), torch.ones(2)).to_event(1), 2 * x)

    x = torch.tensor([[1.0, torch.nan], [2.0, 3.0], [torch.nan, torch.nan]])
    inference = posterior_of(model, AutoNormal(model), x).to_arviz(2)
    np.testing.assert_array_equal(inference["observed_data"]["y"], 2 * x)
    np.testing.assert_array_equal(inference["constant_data"]["x"], x)


LABELS = {
    "names": pd.Index(["a", "b", "c", "d"]),
    "years": pd.Index([2001, 2003, 2005, 2009]),
    "dates": pd.date_range("2024-01-01", periods=4),
    "pairs": pd.MultiIndex.from_product([["a", "b"], [1, 2]]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_rows_keep_their_labels(kind: str, tmp_path: Path) -> None:
    index = LABELS[kind]
    data = {"x": pd.DataFrame(X.numpy(), index=index), "y": pd.Series(Y.numpy(), index=index)}
    inference = posterior_of(regression, AutoNormal(regression), data).to_arviz(3)
    expected = [f"{a} {b}" for a, b in index] if kind == "pairs" else index.to_numpy()
    for group in ("log_likelihood", "observed_data", "constant_data"):
        np.testing.assert_array_equal(inference[group]["data"], expected)
    inference.to_netcdf(str(tmp_path / "it.nc"))
    with xarray.open_dataset(tmp_path / "it.nc", group="observed_data", engine="h5netcdf") as again:
        np.testing.assert_array_equal(again["data"], expected)


@pytest.mark.filterwarnings("ignore:the model or guide does not broadcast")
def test_rows_that_the_model_subsamples_itself() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    posterior = posterior_of(model, AutoNormal(model), torch.randn(6))
    inference = posterior.to_arviz(3)
    assert groups_of(inference) == {"posterior", "prior", "constant_data"}
    assert "plate 'data' takes a new subsample" in inference.attrs["left_out"]
    with pytest.raises(ValueError, match="no group 'log_likelihood'.*batch_size"):
        posterior.to_arviz(3, groups=["log_likelihood"])


def test_guide_of_other_rows() -> None:
    model, _, x = ppca.example()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 16):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    for rows in (x[:5], torch.cat([x, x])):
        with pytest.raises(ValueError, match=f"'data' has 16 rows in the guide and {len(rows)} in the model"):
            posterior_of(model, guide, x).to_arviz(3, data=rows)


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_enumerated_latents() -> None:
    @config_enumerate
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("y", dist.Normal(Vindex(loc)[..., c], 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor([-1.0, 1.0])), 0.1).to_event(1))

    method = svi(loss=TraceEnum_ELBO(max_plate_nesting=1), steps=2)
    posterior = fit(model, torch.randn(5), guide=guide, method=method, seed=0, progress=False)
    inference = posterior.to_arviz(3)
    assert set(inference["posterior"].data_vars) == {"loc"}
    assert inference["posterior_predictive"]["y"].shape == (1, 3, 5)
    assert not {"log_likelihood", "sample_stats"} & groups_of(inference)
    with pytest.raises(ValueError, match="'c' are enumerated"):
        posterior.to_arviz(3, groups=["sample_stats"])


def test_improper_prior() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with batch_plate(y):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(y.mean(), 1.0))

    posterior = posterior_of(model, guide, torch.randn(4))
    assert not {"prior", "prior_predictive"} & groups_of(posterior.to_arviz(3))
    with pytest.raises(ValueError, match="no group 'prior'"):
        posterior.to_arviz(3, groups=["prior"])
