"""A posterior in ArviZ: every group with its dims, its labels and, against closed forms, its numbers."""

import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyro_ae.diagnostics.conversion
from pyro_ae import Posterior, batch_plate, fit, nuts, svi
from pyro_ae.data import as_rows
from pyro_ae.diagnostics.conversion import GROUPS, to_arviz
from pyro_ae.guides import together
from pyro_ae.models import ppca, vae
from pyro_ae.program import Program


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


def dataset(inference: Any, group: str) -> xarray.Dataset:
    found = inference[group]
    return found if isinstance(found, xarray.Dataset) else found.to_dataset()


def dims(inference: Any, group: str) -> dict[str, tuple]:
    return {name: v.dims for name, v in inference[group].data_vars.items()}


# ------------------------------------------------------------------------------- the zoo, and eight schools

SAMPLES = ("chain", "draw")


def test_dims_of_a_local_latent() -> None:
    model, guide, x = ppca.example()
    inference = posterior_of(model, guide, x).to_arviz(7)
    assert groups_of(inference) == set(GROUPS) - {"constant_data"}
    assert dims(inference, "posterior") == dims(inference, "prior") == {"z": (*SAMPLES, "data", "z_dim_0")}
    assert dims(inference, "posterior_predictive") == {"x": (*SAMPLES, "data", "x_dim_0")}
    assert dims(inference, "prior_predictive") == {"x": (*SAMPLES, "data", "x_dim_0")}
    assert dims(inference, "log_likelihood") == {"x": (*SAMPLES, "data")}
    stats = {"lp": SAMPLES, "log_q": SAMPLES, "log_weight": (*SAMPLES, "data")}
    assert dims(inference, "sample_stats") == stats
    assert dims(inference, "observed_data") == {"x": ("data", "x_dim_0")}
    assert dict(inference["posterior"].sizes) == {"chain": 1, "draw": 7, "data": 16, "z_dim_0": 2}
    np.testing.assert_array_equal(inference["observed_data"]["x"], x)
    np.testing.assert_array_equal(inference["posterior"]["data"], range(16))


def test_dims_of_shared_and_local_latents() -> None:
    inference = posterior_of(*together.example()).to_arviz(5)
    assert dims(inference, "posterior") == {"mean": (*SAMPLES, "mean_dim_0"), "z": (*SAMPLES, "data", "z_dim_0")}
    # a shared latent ties the rows together: one weight for all
    assert dims(inference, "sample_stats")["log_weight"] == SAMPLES


def test_binary_rows() -> None:
    inference = posterior_of(*vae.example()).to_arviz(20)
    for group in ("posterior_predictive", "prior_predictive", "observed_data"):
        assert set(np.unique(inference[group]["x"])) == {0.0, 1.0}


SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
EFFECTS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])


def schools(J: int, sigma: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("schools", J):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


DATA = {"J": 8, "sigma": SIGMA, "y": EFFECTS}


def by_guide() -> Posterior:
    return posterior_of(schools, AutoNormal(schools), DATA)


def by_chains() -> Posterior:
    """Chains whose draws are made up."""
    rows = as_rows(DATA)
    program = Program(schools, None, total=rows.size)
    program.build(rows.call())
    draws = {"mu": torch.randn(2, 50), "tau": torch.rand(2, 50), "eta": torch.randn(2, 50, 8)}
    stats = {"lp": torch.randn(2, 50), "diverging": torch.rand(2, 50) < 0.1, "tree_depth": torch.randint(1, 5, (2, 50))}
    return Posterior(program, data=rows, method="nuts(draws=50)", draws=draws, stats=stats)


@pytest.mark.parametrize("method", ["svi", "nuts"])
def test_eight_schools(method: str) -> None:
    engine = svi(lr=0.05, steps=100) if method == "svi" else nuts(draws=60, warmup=60, chains=2, max_tree_depth=3)
    posterior = fit(schools, DATA, method=engine, seed=0, progress=False)
    inference = posterior.to_arviz()
    assert groups_of(inference) == set(GROUPS)
    chains, draws = (1, 1000) if method == "svi" else (2, 60)
    latents = inference["posterior"]
    assert latents.sizes["chain"] == chains and latents.sizes["draw"] == draws
    assert dims(inference, "posterior") == {
        **{"mu": SAMPLES, "tau": SAMPLES},
        **{"eta": (*SAMPLES, "schools"), "theta": (*SAMPLES, "schools")},
    }
    np.testing.assert_allclose(latents["theta"], latents["mu"] + latents["tau"] * latents["eta"], rtol=1e-5, atol=1e-5)
    expected = dist.Normal(torch.tensor(latents["theta"].values), SIGMA).log_prob(EFFECTS)
    np.testing.assert_allclose(inference["log_likelihood"]["y"], expected, rtol=1e-5)
    constants = inference["constant_data"]
    assert int(constants["J"]) == 8 and constants["J"].dtype.kind == "i"
    assert constants["sigma"].dims == ("schools",)
    np.testing.assert_array_equal(constants["sigma"], SIGMA)

    # and ArviZ can work with it
    summary = arviz.summary(inference, var_names=["mu", "theta"])
    assert len(summary) == 9
    assert (summary["ess_bulk"].astype(float) > 5).all()
    if method == "nuts":
        assert posterior.draws is not None
        assert torch.equal(torch.tensor(latents["mu"].values), posterior.draws["mu"])
        stats = inference["sample_stats"]
        assert stats["diverging"].dtype == bool and stats["tree_depth"].dtype.kind == "i"
        assert {"energy", "lp", "acceptance_rate", "step_size", "n_steps"} <= set(stats.data_vars)
        assert (summary["r_hat"].astype(float) < 1.5).all()
        bfmi = arviz.bfmi(inference)
        assert float(np.min(bfmi if isinstance(bfmi, np.ndarray) else bfmi["energy"])) > 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of k-hat over 0.7, which a short run may have
        loo = arviz.loo(inference)
    assert -34 < getattr(loo, "elpd_loo", getattr(loo, "elpd", 0.0)) < -29
    arviz.plot_trace(inference, var_names=["mu", "tau"])
    arviz.plot_ppc(inference, num_pp_samples=20)


# ---------------------------------------------------------------------------------------------- the numbers


def exact_guide(model: ppca.PPCA, scale: float = 1.0) -> Callable:
    def guide(x: Tensor) -> None:
        with batch_plate(x):
            exact = model.posterior(x)
            pyro.sample("z", dist.MultivariateNormal(exact.mean, scale**2 * exact.covariance_matrix))

    return guide


def test_weights_of_the_exact_posterior_are_the_evidence() -> None:
    model, _, x = ppca.example()
    stats = posterior_of(model, exact_guide(model), x).to_arviz(30, groups=["sample_stats"])["sample_stats"]
    evidence = model.marginal().log_prob(x).detach()
    np.testing.assert_allclose(stats["log_weight"][0], evidence.expand(30, 16), atol=1e-4)
    np.testing.assert_allclose(stats["lp"] - stats["log_q"], np.full((1, 30), evidence.sum()), atol=1e-3)


def test_densities_with_a_shared_latent() -> None:
    model, guide, x = together.example()
    inference = posterior_of(model, guide, x).to_arviz(9)
    mean, z = (torch.tensor(inference["posterior"][n].values) for n in ("mean", "z"))
    log_x = dist.Normal(mean.unsqueeze(2) + z, 0.5).log_prob(x).sum(-1)
    np.testing.assert_allclose(inference["log_likelihood"]["x"], log_x, rtol=1e-4, atol=1e-4)
    unit = dist.Normal(0.0, 1.0)
    lp = log_x.sum(-1) + unit.log_prob(mean).sum(-1) + unit.log_prob(z).sum((-1, -2))
    stats = inference["sample_stats"]
    np.testing.assert_allclose(stats["lp"], lp, rtol=1e-4)
    np.testing.assert_allclose(stats["log_weight"], stats["lp"] - stats["log_q"], rtol=1e-4)


def test_prior_and_its_predictive() -> None:
    model, guide, x = ppca.example()
    inference = posterior_of(model, guide, x).to_arviz(500, groups=["prior", "prior_predictive"])
    z = inference["prior"]["z"].values.reshape(-1, 2)
    np.testing.assert_allclose(np.cov(z.T), np.eye(2), atol=0.1)
    generated = inference["prior_predictive"]["x"].values.reshape(-1, 5)
    np.testing.assert_allclose(np.cov(generated.T), model.marginal().covariance_matrix.detach(), atol=0.35)
    assert not np.isin(x.numpy(), generated).any()  # none is the data


def test_posterior_predictive_follows_its_draw() -> None:
    model, _, x = ppca.example()
    with torch.no_grad():
        model.log_noise.fill_(-6.0)
    inference = posterior_of(model, exact_guide(model), x).to_arviz(3)
    fitted = torch.tensor(inference["posterior"]["z"].values) @ model.weight.T + model.mean
    np.testing.assert_allclose(inference["posterior_predictive"]["x"], fitted.detach(), atol=0.02)


def test_minibatched_fit_gives_all_rows_unscaled() -> None:
    model, guide, x = ppca.example()
    posterior = fit(model, x, guide=guide, method=svi(epochs=2), batch_size=4, seed=0, progress=False)
    inference = posterior.to_arviz(6)
    z = torch.tensor(inference["posterior"]["z"].values)
    assert z.shape == (1, 6, 16, 2)
    expected = dist.Normal(z @ model.weight.T + model.mean, model.log_noise.exp()).log_prob(x).sum(-1)
    np.testing.assert_allclose(inference["log_likelihood"]["x"], expected.detach(), rtol=1e-4)
    some = posterior.to_arviz(6, data=x[:5])
    assert some["posterior"].sizes["data"] == some["observed_data"].sizes["data"] == 5
    weight = some["sample_stats"]["log_weight"].sum("data")
    np.testing.assert_allclose(weight, some["sample_stats"]["lp"] - some["sample_stats"]["log_q"], rtol=1e-4)


@pytest.mark.filterwarnings("ignore:the model or guide does not broadcast")
def test_draws_that_do_not_broadcast_are_run_one_by_one() -> None:
    """mu + tau * eta is [K] + [K, 1, 8] here: it fits for some K, and then says something else."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        eta = pyro.sample("eta", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        theta = pyro.deterministic("theta", mu + eta)
        with pyro.plate("schools", 8):
            pyro.sample("y", dist.Normal(theta, SIGMA), obs=y)

    posterior = posterior_of(model, AutoNormal(model), EFFECTS)
    for draws in (8, 3):
        inference = posterior.to_arviz(draws)
        latents = inference["posterior"]
        np.testing.assert_allclose(latents["theta"].values, latents["mu"].values[..., None] + latents["eta"].values)
        log_y = dist.Normal(torch.tensor(latents["theta"].values), SIGMA).log_prob(EFFECTS)
        np.testing.assert_allclose(inference["log_likelihood"]["y"], log_y, rtol=1e-5)
        unit = dist.Normal(0.0, 1.0)
        prior = dist.Normal(0.0, 5.0).log_prob(torch.tensor(latents["mu"].values))
        prior = prior + unit.log_prob(torch.tensor(latents["eta"].values)).sum(-1)
        np.testing.assert_allclose(inference["sample_stats"]["lp"], log_y.sum(-1) + prior, rtol=1e-4)
        assert inference["prior_predictive"]["y"].shape == (1, draws, 8)


# ---------------------------------------------------------------------------------- what holds the groups


def test_netcdf_and_attributes(tmp_path: Path) -> None:
    inference = by_chains().to_arviz()
    path = str(tmp_path / "it.nc")
    inference.to_netcdf(path)
    again = arviz.from_netcdf(path)
    assert groups_of(again) == set(GROUPS)
    for group in GROUPS:
        xarray.testing.assert_equal(dataset(inference, group), dataset(again, group))
        assert again[group].attrs["inference_library"] == "pyro_ae"
        assert again[group].attrs["inference_library_version"] == pyro_ae.__version__
        assert again[group].attrs["inference_method"].startswith("nuts(draws=50")
        assert again[group].attrs["created_at"].startswith("20")


def test_datatree_where_arviz_has_no_inferencedata(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Later(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"ArviZ 1.x warns of {name}")

    monkeypatch.setitem(sys.modules, "arviz", Later("arviz"))
    tree = by_chains().to_arviz()
    assert isinstance(tree, xarray.DataTree)
    assert set(tree.children) == set(GROUPS)
    assert tree["posterior"]["theta"].dims == tree.posterior["theta"].dims == (*SAMPLES, "schools")
    assert tree.attrs["inference_library"] == tree["posterior"].attrs["inference_library"] == "pyro_ae"
    tree.to_netcdf(tmp_path / "it.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "it.nc", engine="h5netcdf") as again:
        xarray.testing.assert_equal(again["sample_stats"].to_dataset(), tree["sample_stats"].to_dataset())


def test_fewer_draws_of_chains_are_spread_evenly() -> None:
    posterior = by_chains()
    inference = posterior.to_arviz(4, groups=["posterior", "sample_stats"])
    assert posterior.draws is not None
    for name, all_draws in (("mu", posterior.draws["mu"]), ("lp", posterior.stats["lp"])):
        found = inference["posterior" if name == "mu" else "sample_stats"][name]
        np.testing.assert_array_equal(found, all_draws[:, [0, 16, 33, 49]])


# ------------------------------------------------------------------------------------------ what is refused


def test_only_the_groups_that_were_asked_for() -> None:
    assert groups_of(by_guide().to_arviz(3, groups=["posterior", "prior"])) == {"posterior", "prior"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": ["posterior", "priors"]}, "unknown group 'priors'; known are posterior, posterior_predictive"),
        ({"draws": 0}, "at least 1"),
        ({"draws": 51}, "each chain holds 50 draws, fewer than 51"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_arviz(by_chains(), **arguments)


def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = posterior_of(*ppca.example())
    with pytest.raises(ValueError, match=r"2\.\d+ GiB, more than 2 GiB.*_predictive'.*draws=.*data=x\[:100\].*groups="):
        posterior.to_arviz(5_000_000, groups=["posterior_predictive", "log_likelihood", "prior"])
    inference = posterior.to_arviz(50)
    held = sum(v.nbytes for g in set(GROUPS[:6]) for v in inference[g].data_vars.values())
    monkeypatch.setattr(pyro_ae.diagnostics.conversion, "LIMIT", held)
    posterior.to_arviz(50)
    with pytest.raises(ValueError, match="GiB"):
        posterior.to_arviz(51)
