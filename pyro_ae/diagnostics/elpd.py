"""How well a model predicts rows that it was not fitted to, as estimated without a second fit."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..draws import log_likelihood
from ..runtime import seeded
from ..sites import quote
from .conversion import container
from .entries import columns
from .importance import FEWEST

if TYPE_CHECKING:
    from ..posterior import Posterior


@dataclass(frozen=True)
class Elpd:
    """The expected log predictive density of new data, as estimated from the data of the fit.

    Attributes:
        elpd: in nats, summed over what is observed.
        se: its standard error.
        p: the effective number of parameters.
        pointwise: each term of the sum, in the batch shape of the observed site; NaN where missing.
        trouble: the same shape: k-hat for leave-one-out, the variance of the log-likelihood for WAIC.
        bad: places ``[bad, dims]`` where ``trouble`` is over 0.7 or, for WAIC, 0.4: terms not to be relied on.
        notes: what to have in mind, in sentences.
    """

    elpd: float
    se: float
    p: float
    pointwise: Tensor
    trouble: Tensor
    bad: Tensor
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"elpd {self.elpd:.1f} (standard error {self.se:.1f}), effective number of parameters {self.p:.1f}"]
        return "\n".join(lines + [f"  - {note}" for note in self.notes])


def loo(posterior: Posterior, *, site: str | None = None, data: Any = None, draws: int = 1000, seed: int = 0) -> Elpd:
    r"""How well each row is predicted from the others, by Pareto smoothed importance sampling.

    .. math:: \sum_n \log p(x_n \mid x_{-n}), \qquad w_{ns} \propto 1 / p(x_n \mid \theta_s)

    It is ArviZ's ``loo``, with its warnings as findings. Draws of a guide are taken for draws of the posterior. Where
    rows have latents of their own, the likelihood is that given a row's own latent, which the data of the row itself
    has informed: leaving the row out means to move that latent back to its prior, and weights for that rarely have a
    finite variance. With nothing shared there is nothing to learn from the other rows, so that this is refused, for
    ``posterior.log_evidence`` is log p(x) of each row.

    References:
        Practical Bayesian Model Evaluation Using Leave-One-Out Cross-Validation and WAIC (Vehtari, Gelman and Gabry,
        2017) https://arxiv.org/abs/1507.04544

    Arguments:
        posterior: of any engine, with latents that rows share.
        site: the observed site, where there are several.
        data: the rows of the fit, where the posterior does not hold them.
        draws: of a guide; chains give all that they hold.
        seed: of a guide's draws; the global random states stay as they were.

    Raises:
        ValueError: for a posterior without draws of shared latents; where it is not clear which site; for log-densities
            that are NaN or infinite.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ae import fit, svi
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = fit(model, torch.zeros(20), method=svi(steps=500, lr=0.05), seed=0, progress=False)
        >>> loo(posterior).pointwise.shape
        torch.Size([20])
    """
    import arviz
    import xarray

    found = _densities(posterior, site, data, draws, seed)
    old = "psislw" in vars(arviz)  # 0.x
    given: dict[str, Any] = {"scale": "log"} if old else {}
    if found.chains == 1:  # of which ArviZ has no estimate of the draws' efficiency
        given["reff"] = 1.0
    shape = (found.chains, -1)
    values = {n: columns(v.reshape(*shape, *v.shape[1:])) for n, v in found.values.items()}
    # what is fixed by a support, as in a Cholesky factor, has no efficiency
    values = {n: v[..., (v != v[:1, :1]).any(0).any(0)] for n, v in values.items()}
    flat = found.density[:, found.there].reshape(*shape, int(found.there.sum())).numpy()
    datasets = {
        "posterior": xarray.Dataset({n: (["chain", "draw", f"{n}_dim_0"], v.numpy()) for n, v in values.items()}),
        "log_likelihood": xarray.Dataset({found.site: (["chain", "draw", "entry"], flat)}),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is in the notes
        result = arviz.loo(container(datasets, {}), pointwise=True, var_name=found.site, **given)
    elpd, p, pointwise = (
        (result.elpd_loo, result.p_loo, result.loo_i) if old else (result.elpd, result.p, result.elpd_i)
    )
    k = torch.as_tensor(result.pareto_k.values)
    return _elpd(found, float(elpd), float(result.se), float(p), torch.as_tensor(pointwise.values), k, 0.7, "k-hat")


def waic(posterior: Posterior, *, site: str | None = None, data: Any = None, draws: int = 1000, seed: int = 0) -> Elpd:
    r"""The widely applicable information criterion, as an expected log predictive density.

    .. math:: \sum_n \Big( \log \tfrac{1}{S} \sum_s p(x_n \mid \theta_s) - \text{Var}_s \log p(x_n \mid \theta_s) \Big)

    :func:`loo` estimates the same and knows better where it fails; prefer it.

    References:
        Practical Bayesian Model Evaluation Using Leave-One-Out Cross-Validation and WAIC (Vehtari, Gelman and Gabry,
        2017) https://arxiv.org/abs/1507.04544

    Arguments:
        posterior: of any engine, with latents that rows share.
        site: the observed site, where there are several.
        data: the rows of the fit, where the posterior does not hold them.
        draws: of a guide; chains give all that they hold.
        seed: of a guide's draws; the global random states stay as they were.

    Raises:
        ValueError: as for :func:`loo`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ae import fit, svi
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = fit(model, torch.zeros(20), method=svi(steps=500, lr=0.05), seed=0, progress=False)
        >>> waic(posterior).pointwise.shape
        torch.Size([20])
    """
    found = _densities(posterior, site, data, draws, seed)
    density = found.density[:, found.there]
    variance = density.var(0, correction=0)
    pointwise = density.logsumexp(0) - math.log(len(density)) - variance
    se = float((len(pointwise) * pointwise.var(correction=0)).sqrt())
    return _elpd(found, float(pointwise.sum()), se, float(variance.sum()), pointwise, variance, 0.4, "the variance")


@dataclass(frozen=True)
class _Densities:
    """Log-densities of an observed site ``[draws, *batch]``, where there are any ``[*batch]``, and at which draws."""

    site: str
    density: Tensor
    there: Tensor
    values: dict[str, Tensor]
    chains: int
    notes: list[str]


def _densities(posterior: Posterior, site: str | None, data: Any, draws: int, seed: int) -> _Densities:
    program, rows = posterior.program, posterior._rows(data)
    chains = 1 if posterior.draws is None else len(next(iter(posterior.draws.values())))
    latents = set(program.layout.names("latent")) & set(posterior.draws or program.layout.guide)
    own = [n for n in posterior.local if n in latents]
    if not latents:
        raise ValueError("the posterior has no draws of latents, so that leaving a row out changes nothing")
    if not latents - set(own):
        raise ValueError(
            f"all latents ({quote(own)}) belong to single rows and the parameters are fixed, so that leaving a row out "
            "changes nothing for the others: posterior.log_evidence(data) of a guide is log p(x) of each row"
        )
    with seeded(seed), torch.no_grad():
        values = posterior.sample(None if posterior.draws is not None else draws, data)
        densities = log_likelihood(program, values, rows.call())
    known = quote(densities) or "none"
    if site is None and len(densities) != 1 or site is not None and site not in densities:
        raise ValueError(f"say of which observed site: site must be one of {known}, got {site!r}")
    site = site or next(iter(densities))
    density = densities[site].double()
    if not density.isfinite().all():
        bad = int((~density.isfinite()).flatten(1).any(0).sum())
        raise ValueError(f"the log-density of site '{site}' is NaN or infinite at {bad} places: look at its support")
    if bool((density == density[:1]).all()):
        raise ValueError(f"the log-density of site '{site}' is the same at every draw: the guide gives a single point")
    there = (density != 0).any(0)  # what is missing has a log-density of 0 at every draw
    if len(density) < FEWEST or int(there.sum()) < 2:
        raise ValueError(
            f"needs {FEWEST} draws and 2 places of site '{site}' or more, got {len(density)} and {int(there.sum())}"
        )
    notes = []
    if posterior.draws is None:
        notes.append("The draws are a guide's, not the posterior's: this is as right as the guide, see report().")
    if own and any(p[0] == program.plate for p in program.layout.model[site].plates):
        notes.append(
            f"The density is given the latents that a row has for itself ({quote(own)}), which its own data informed: "
            "this is not how well a new row is predicted, unless every k-hat is low."
        )
    if there.dim() > 1:
        notes.append(f"What is left out is each of {' x '.join(map(str, there.shape))} values by itself, not rows.")
    return _Densities(site, density, there, values, chains, notes)


def _elpd(
    found: _Densities, elpd: float, se: float, p: float, pointwise: Tensor, trouble: Tensor, limit: float, what: str
) -> Elpd:
    everywhere = []
    for value in (pointwise, trouble):
        full = torch.full(found.there.shape, torch.nan, dtype=torch.double)
        full[found.there] = value.double()
        everywhere.append(full.to(torch.get_default_dtype()))
    bad, notes = (everywhere[1] > limit).nonzero(), list(found.notes)
    if len(bad):
        places = ", ".join(str(tuple(b) if len(b) > 1 else b[0]) for b in bad[:10].tolist())
        notes.insert(
            0,
            f"{what[0].upper()}{what[1:]} is above {limit} at {len(bad)} of {int(found.there.sum())} places ({places}"
            f"{', ...' if len(bad) > 10 else ''}), so that these are not to be relied on: refit without them, or "
            "use a likelihood with heavier tails.",
        )
    return Elpd(elpd, se, p, everywhere[0], everywhere[1], bad, tuple(notes))
