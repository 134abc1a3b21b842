"""Log p(x) of each row between two bounds that do not rest on the guide: annealed importance sampling, both ways."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bounds import iwae
from ..data import LoadedRows, Rows, as_rows, missing_values
from ..particles import part_sizes
from ..program import Program, validation
from ..runtime import seeded
from .annealing import Kernels, Path, Start, adapted, anneal
from .annealing import temperatures as schedule
from .groups import look
from .importance import effective_sample_size
from .rows import evenly
from .simulated import as_given, prior_run, repeated, with_observed

if TYPE_CHECKING:
    from ..posterior import Posterior

SMALL = 2**17
"""Elements, over all chains, below which fewer chains take as long."""


@dataclass(frozen=True)
class Annealed:
    """What annealed importance sampling found of each row.

    Attributes:
        log_evidence: estimates of log p(x) in nats ``[N]``, which are too low on average.
        error: their standard errors ``[N]``, as far as the weights show them.
        log_weights: of the chains ``[K, N]``; their exponentials average to p(x) without a bias.
        ess: the effective sample size of the weights ``[N]``, between 1 and K.
        acceptance: of the proposals, ``[N]``; about 0.65 where the step sizes are right.
        index: the places of the rows in the data ``[N]``.
    """

    log_evidence: Tensor
    error: Tensor
    log_weights: Tensor
    ess: Tensor
    acceptance: Tensor
    index: Tensor

    def __str__(self) -> str:
        chains, rows = self.log_weights.shape
        return (
            f"log p(x) is {float(self.log_evidence.mean()):.3f} nats a row, a lower bound, over {rows} rows with "
            f"{chains} chains each; the weights are worth {float(self.ess.median()):.1f} chains in the median row, "
            f"and {float(self.acceptance.mean()):.0%} of the proposals were accepted"
        )


@dataclass(frozen=True)
class Sandwich:
    """Log p(x) of simulated rows between a lower and an upper bound.

    Attributes:
        x: the rows, as the data of the fit are held.
        lower: stochastic lower bounds ``[N]`` in nats, by chains from the start to the posterior.
        upper: stochastic upper bounds ``[N]``, by chains from the exact latents to the start.
        importance: what importance sampling with the guide says ``[N]``; None where the guide has no density.
        acceptance: of the proposals, ``[N]``.
        latents: the exact latents that made the rows, site to ``[N, *event]``.
    """

    x: Any
    lower: Tensor
    upper: Tensor
    importance: Tensor | None
    acceptance: Tensor
    latents: dict[str, Tensor]

    @property
    def gap(self) -> float:
        """The mean distance between the bounds. They hold on average, so that by chance it may be below 0."""
        return float((self.upper - self.lower).mean())

    def __str__(self) -> str:
        lower, upper = float(self.lower.mean()), float(self.upper.mean())
        text = f"log p(x) is between {lower:.3f} and {upper:.3f} nats a row on {len(self.lower)} simulated rows"
        if self.importance is None:
            return text
        value = float(self.importance.mean())
        return f"{text}; importance sampling with the guide says {value:.3f}, {upper - value:.3f} below the upper bound"


def annealed_importance_sampling(
    posterior: Posterior,
    data: Any = None,
    *,
    chains: int = 16,
    temperatures: int = 200,
    leapfrog: int = 5,
    start: Start = "guide",
    rows: int | None = None,
    seed: int = 0,
) -> Annealed:
    r"""Log p(x) of each row by chains that move from the guide, or the prior, to the posterior.

    .. math::
        \log w = \sum_{t=1}^{T} (\beta_t - \beta_{t-1}) \log \frac{p(x, z_{t-1})}{\pi(z_{t-1})}, \qquad
        z_t \sim \text{HMC that leaves } \pi^{1 - \beta_t} \, p(x, \cdot)^{\beta_t} \text{ as it is}

    For models whose latents all belong to rows, with parameters as they were learnt. It corrects a guide that is off
    where plain importance sampling (``posterior.log_evidence``) needs too many particles. Step sizes are found for
    each row in a first pass and stay fixed in a second, so that the weights average to p(x), and the estimate is a
    lower bound on average; :func:`bidirectional` shows how low. The guide is the better start where it is close to the
    posterior; where it is too narrow or leaves out a mode, the prior is, at the price of more temperatures.

    References:
        Annealed Importance Sampling (Neal, 2001) https://arxiv.org/abs/physics/9803008
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu, Burda, Salakhutdinov and Grosse, 2017)
        https://arxiv.org/abs/1611.04273

    Arguments:
        posterior: of a model with latents for each row and no others.
        data: rows; those of the fit by default.
        chains: for each row.
        temperatures: T; with one, this is importance sampling from the start.
        leapfrog: steps of a proposal.
        start: ``"guide"`` or ``"prior"``.
        rows: how many, spread evenly; all by default.
        seed: of the chains; the global random states stay as they were.

    Raises:
        ValueError: for values out of range; for a model whose rows share a latent, or that observes nothing; for a
            start without a density; where log-weights are not finite.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), seed=0, progress=False)
        >>> found = annealed_importance_sampling(posterior, temperatures=100, start="prior")
        >>> bool((found.log_evidence - model.marginal().log_prob(x)).mean().abs() < 0.1)
        True
    """
    _check(chains, temperatures, leapfrog, start, rows)
    held = _held(posterior, data)
    size = held.size if held.size is not None else None
    index = None
    if rows is not None and size is not None and rows < size:
        index = evenly(size, rows)
        held = held.take(index)
    with seeded(seed), _running(posterior.program, held.has_missing):
        path, kernels = _prepared(posterior.program, held, chains, temperatures, leapfrog, start)
        parts = [anneal(path, kernels, path.draw(k)) for k in part_sizes(chains, path.layout)]
    log_w = _finite(torch.cat([w for w, _ in parts]))
    ess = effective_sample_size(log_w)
    # the relative variance of a mean of K weights is their squared coefficient of variation, K / ess - 1, over K - 1
    error = ((1 / ess - 1 / chains).clamp(min=0.0) * chains / max(chains - 1, 1)).sqrt()
    return Annealed(
        _real(iwae(log_w)),
        error if chains > 1 else torch.full_like(error, math.nan),
        _real(log_w),
        ess,
        _real(torch.stack([a for _, a in parts]).mean(0)),
        torch.arange(path.rows) if index is None else index,
    )


def bidirectional(
    posterior: Posterior,
    data: Any = None,
    *,
    rows: int = 50,
    chains: int = 16,
    temperatures: int = 200,
    leapfrog: int = 5,
    start: Start = "guide",
    particles: int = 1000,
    seed: int = 0,
) -> Sandwich:
    r"""Log p(x) of rows that the model makes, between bounds by annealed importance sampling in both directions.

    .. math:: E[\log \hat p(x)] \le \log p(x) \le E\Big[-\log \frac{1}{K} \sum_k \frac{1}{w_k}\Big]

    Rows are simulated from the model with their latents, which are then exact draws of the posterior, so that chains
    that begin there and go back to the start give an upper bound. A small gap shows that the temperatures suffice,
    for real rows as far as they are like the simulated ones; what importance sampling with the guide says of the
    same rows shows how far it is off.

    References:
        Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (Grosse, Ghahramani and Adams, 2015)
        https://arxiv.org/abs/1511.02543
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu, Burda, Salakhutdinov and Grosse, 2017)
        https://arxiv.org/abs/1611.04273

    Arguments:
        posterior: of a model with latents for each row and no others.
        data: rows whose covariates the simulated ones have; those of the fit by default.
        rows: how many to simulate.
        chains: for each row and direction.
        temperatures: as for :func:`annealed_importance_sampling`, as are ``leapfrog`` and ``start``.
        leapfrog: steps of a proposal.
        start: ``"guide"`` or ``"prior"``.
        particles: of importance sampling with the guide.
        seed: of rows and chains; the global random states stay as they were.

    Raises:
        ValueError: as :func:`annealed_importance_sampling` does; for a prior that cannot be drawn from, and a model
            that observes what is no entry of the data.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), seed=0, progress=False)
        >>> bidirectional(posterior, rows=20, temperatures=100, start="prior").gap < 0.2
        True
    """
    _check(chains, temperatures, leapfrog, start, rows)
    if particles < 1:
        raise ValueError(f"particles must be at least 1, got {particles}")
    held, program = _held(posterior, data), posterior.program
    with seeded(seed):
        with _running(program, held.has_missing):
            template = repeated(held, rows)
            view = look(program, template.call())
            sites = prior_run(posterior, view, template).sites
            latents = {n: sites[n]["value"] for n in program.layout.names("latent")}
            made = with_observed(view, template, {n: sites[n]["value"] for n in view.observed})
        with _running(program, made.has_missing):
            path, kernels = _prepared(program, made, chains, temperatures, leapfrog, start)
            sizes = part_sizes(chains, path.layout)
            exact = path.pack({n: latents[n].unsqueeze(0) for n in path.names})
            there = [anneal(path, kernels, path.draw(k)) for k in sizes]
            back = [anneal(path, kernels, exact.expand(k, -1, -1), reverse=True) for k in sizes]
        x = as_given(made.to("cpu"))
        try:
            importance = None if program.guide is None else posterior.log_evidence(x, particles)
        except ValueError:  # a point, or a latent that is not drawn
            importance = None
    log_w, inverse = _finite(torch.cat([w for w, _ in there])), _finite(-torch.cat([w for w, _ in back]))
    acceptance = torch.stack([a for _, a in there + back]).mean(0)
    found = {n: z.cpu() for n, z in latents.items()}
    return Sandwich(x, _real(iwae(log_w)), _real(-iwae(inverse)), importance, _real(acceptance), found)


def _check(chains: int, temperatures: int, leapfrog: int, start: str, rows: int | None) -> None:
    for name, value in (("chains", chains), ("temperatures", temperatures), ("leapfrog", leapfrog), ("rows", rows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if start not in ("guide", "prior"):
        raise ValueError(f"start must be 'guide' or 'prior', got {start!r}")


def _held(posterior: Posterior, data: Any) -> Rows:
    """The rows, or the first batch of a loader's."""
    held = posterior._rows(data)
    if isinstance(held, LoadedRows):
        call = held.first()
        made = as_rows(call.kwargs or call.args)
        assert isinstance(made, Rows)
        held = made.to(posterior.program.device)
    return held


@contextmanager
def _running(program: Program, missing: bool) -> Iterator[None]:
    with torch.no_grad(), program.active(), validation(False), missing_values(missing):
        yield


def _prepared(
    program: Program, rows: Rows, chains: int, temperatures: int, leapfrog: int, start: Start
) -> tuple[Path, Kernels]:
    """The path of the rows, and kernels that are fixed from then on."""
    path = Path(program, rows.call(), start, captured=temperatures * leapfrog > 200)
    most = part_sizes(chains, path.layout)[0]
    few = most if chains * path.largest < SMALL else min(max(4, chains // 4), most)
    return path, adapted(path, schedule(temperatures), few, leapfrog)


def _finite(log_w: Tensor) -> Tensor:
    """The log-weights, where each row has some of its chains to go by."""
    bad = (log_w.isnan() | (log_w == math.inf)).any(0) | (log_w == -math.inf).all(0)
    if bad.any():
        raise ValueError(
            f"the log-weights of {int(bad.sum())} of {len(bad)} rows are not finite, row "
            f"{int(bad.nonzero()[0])} first: look at the supports of the likelihood and the guide, and at the data"
        )
    return log_w


def _real(values: Tensor) -> Tensor:
    return values.to("cpu", torch.get_default_dtype())
