"""NUTS on the models of posteriordb, against its reference draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

from pyro_ae import fit, nuts


def flat(name: str, constraint: Any, *shape: int) -> Tensor:
    """A parameter as Stan declares one: improper, uniform on its support."""
    return pyro.sample(name, dist.ImproperUniform(constraint, (), shape))


def ordered(name: str, constraint: Any, prior: Any) -> Tensor:
    """Ordered values, with independent priors before the order."""
    value = flat(name, constraint, *prior.batch_shape)
    pyro.factor(f"{name}_prior", prior.log_prob(value).sum())
    return value


def ar(y: Tensor, K: int, T: int) -> None:
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(K), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = y.unfold(0, K, 1)[:-1].flip(1)
    with pyro.plate("times", T - K):
        pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y[K:])


def schools_centered(J: int, y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", J):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def schools_noncentered(J: int, y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", J):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def gp_poisson(N: int, x: Tensor, y: Tensor, k: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    points = pyro.plate("points", N)
    with points:
        f_tilde = pyro.sample("f_tilde", dist.Normal(0.0, 1.0))
    alpha, rho = alpha.unsqueeze(-1), rho.unsqueeze(-1)
    covariance = alpha**2 * torch.exp(-0.5 * ((x[:, None] - x) / rho) ** 2) + 1e-10 * torch.eye(N)
    f = pyro.deterministic("f", (torch.linalg.cholesky(covariance) @ f_tilde.unsqueeze(-1)).squeeze(-1))
    with points:
        pyro.sample("k", dist.Poisson(f.exp()), obs=k)


def hmm(N: int, K: int, y: Tensor) -> None:
    theta = torch.stack([pyro.sample(f"theta{i + 1}", dist.Dirichlet(torch.ones(K))) for i in range(K)])
    mu = ordered("mu", constraints.positive_ordered_vector, dist.Normal(torch.tensor([3.0, 10.0]), 1.0))
    # Stan's chain begins at the first observation, Pyro's one transition before: so the first one stands alone
    first = dist.Normal(mu, 1.0).log_prob(y[0])
    pyro.factor("first", first.logsumexp(0))
    pyro.sample("y", dist.DiscreteHMM(first, theta.log(), dist.Normal(mu, 1.0), duration=N - 1), obs=y[1:])


def kidscore(N: int, kid_score: Tensor, mom_hs: Tensor, mom_iq: Tensor, **new: float) -> None:
    beta = flat("beta", constraints.real_vector, 4)
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta[0] + beta[1] * mom_hs + beta[2] * mom_iq + beta[3] * mom_hs * mom_iq
    with pyro.plate("kids", N):
        pyro.sample("kid_score", dist.Normal(mean, sigma), obs=kid_score)


def mixture(N: int, y: Tensor) -> None:
    mu = ordered("mu", constraints.ordered_vector, dist.Normal(torch.zeros(2), 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    with pyro.plate("points", N):
        component = pyro.sample("component", dist.Categorical(torch.stack([theta, 1 - theta])))
        pyro.sample("y", dist.Normal(mu[component], sigma[component]), obs=y)


def mesquite(N: int, weight: Tensor, group: Tensor, **sizes: Tensor) -> None:
    names = "diam1", "diam2", "canopy_height", "total_height", "density"
    x = torch.stack([torch.ones(N), *(sizes[n].log() for n in names), group], 1)
    beta = flat("beta", constraints.real_vector, 7)
    sigma = flat("sigma", constraints.positive)
    with pyro.plate("bushes", N):
        pyro.sample("log_weight", dist.Normal(x @ beta, sigma), obs=weight.log())


def linear(N: int, D: int, X: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(D), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("rows", N):
        pyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


MODELS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "arK-arK": (ar, {}),
    # as it stands: 549 divergences, an R-hat of 1.57; the reference draws, too, are those of the noncentred model
    "eight_schools-eight_schools_centered": (
        pyro.poutine.reparam(schools_centered, {"theta": LocScaleReparam(0.0)}),
        {},
    ),
    "eight_schools-eight_schools_noncentered": (schools_noncentered, {}),
    # the diagonal's 1e-10 is below single precision, in which the covariance has no Cholesky factor
    "gp_pois_regr-gp_pois_regr": (gp_poisson, {"float64": True}),
    "hmm_example-hmm_example": (hmm, {}),
    "kidiq-kidscore_interaction": (kidscore, {}),
    "low_dim_gauss_mix-low_dim_gauss_mix": (mixture, {}),
    "mesquite-logmesquite": (mesquite, {}),
    "sblrc-blr": (linear, {}),
}
SLOW = ("gp_pois_regr-gp_pois_regr", "hmm_example-hmm_example")  # long trajectories, and a long compilation


@pytest.fixture(scope="module")
def database(data_root: Path) -> Path:
    folder = data_root / "posteriordb"
    if not folder.is_dir():
        pytest.skip("needs posteriordb in the folder of data sets")
    return folder


def element(draws: Any, parameter: str) -> NDArray:
    """Chains of a parameter by Stan's name, such as ``beta[2]``, in double precision."""
    name, _, index = parameter.rstrip("]").partition("[")
    values = draws[name].values.astype(float)
    return values[..., int(index) - 1] if index else values


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MODELS])
def test_means_and_standard_deviations_are_those_of_the_reference(name: str, database: Path) -> None:
    """Each within four joint Monte Carlo standard errors."""
    model, options = MODELS[name]
    entry = json.loads((database / "index.json").read_text())[name]
    if options.get("float64"):
        torch.set_default_dtype(torch.float64)  # of the data, and where the chains start
    data = json.loads((database / "data" / f"{entry['data']}.json").read_text())
    with np.load(database / "draws" / f"{entry['reference']}.npz") as file:
        reference = dict(zip(file["parameters"].tolist(), file["draws"].astype(float).transpose(2, 0, 1), strict=True))
    method = nuts(draws=1000, warmup=1000, chains=4, **options)
    posterior = fit(model, data, method=method, seed=0, progress=False)
    draws = posterior.to_arviz(groups=["posterior"]).posterior
    for parameter, theirs in reference.items():
        ours = element(draws, parameter)
        assert arviz.rhat(ours) < 1.02, parameter
        for kind, of in (("mean", np.mean), ("sd", np.std)):
            error = np.hypot(arviz.mcse(ours, method=kind), arviz.mcse(theirs, method=kind))
            assert abs(of(ours) - of(theirs)) < 4 * error, (parameter, kind, of(ours), of(theirs), error)
