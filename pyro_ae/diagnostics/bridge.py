"""The evidence of a whole data set, from the draws of chains: bridge sampling."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions import ImproperUniform
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..bounds import iwae
from ..data import LoadedRows, call_with, missing_values
from ..energy import Energy
from ..particles import at_work, part_sizes
from ..program import validation
from ..runtime import seeded
from ..sites import Recorder, elements_of, quote
from ..types import Draws

if TYPE_CHECKING:
    from ..posterior import Posterior

FEWEST = 100
"""Draws below which neither the proposal nor the error can be told."""

MOST = 10_000
"""Rounds of the bridge, which settles within tens of rounds where the proposal fits."""


@dataclass(frozen=True)
class Evidence:
    """The evidence of a data set.

    Attributes:
        log_evidence: log p(x) in nats.
        error: its standard error in nats, the root of the relative mean squared error of p(x).
    """

    log_evidence: float
    error: float

    def __str__(self) -> str:
        return f"log p(x) = {self.log_evidence:.3f} +- {self.error:.3f} nats"


def bridge_sampling(posterior: Posterior, data: Any = None, *, seed: int = 0) -> Evidence:
    r"""Log p(x) from the draws of chains, by the optimal bridge to a normal proposal.

    .. math::
        p(x) = \frac{E_g[h(v) \, p(x, v)]}{E_{p(v \mid x)}[h(v) \, g(v)]}, \qquad
        h(v) \propto \frac{1}{s_1 p(x, v) + s_2 p(x) g(v)}

    The normal g is fitted to the first half of each chain in unconstrained space, the second half is used in the
    estimate, and the right side is worked out until it is the p(x) that h has in it. Two models of the same data are
    compared by the difference of their log-evidences, the log of the Bayes factor. All chains must have converged, and
    to the same place: what no chain has found is not counted.

    References:
        Simulating Ratios of Normalizing Constants via a Simple Identity: A Theoretical Exploration
        (Meng and Wong, 1996) https://www3.stat.sinica.edu.tw/statistica/j6n4/j6n43/j6n43.htm
        A Tutorial on Bridge Sampling (Gronau et al., 2017) https://arxiv.org/abs/1703.05984
        Estimating Marginal Likelihoods for Mixture and Markov Switching Models Using Bridge Sampling Techniques
        (Fruehwirth-Schnatter, 2004) https://doi.org/10.1111/j.1368-423X.2004.00125.x

    Arguments:
        posterior: of chains, such as those of ``nuts``.
        data: the rows of the fit, where the posterior was loaded without them.
        seed: of the proposal's draws; the global random states stay as they were.

    Raises:
        ValueError: for the posterior of a guide; for too few draws, draws that are not finite or all the same, an
            improper prior, and estimates that do not settle.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ae import fit, nuts
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = fit(model, torch.zeros(1), method=nuts(draws=500, chains=2), seed=0, progress=False)
        >>> print(f"{bridge_sampling(posterior).log_evidence:.2f}")  # of N(0; 0, 2)
        -1.27
    """
    if posterior.draws is None:
        raise ValueError(
            "bridge_sampling takes the draws of chains, and this posterior is that of a guide: see its log_evidence, "
            "or annealed_importance_sampling for each row"
        )
    program, held = posterior.program, posterior._rows(data)
    if isinstance(held, LoadedRows):
        raise ValueError("bridge_sampling needs all data at once: pass tensors in place of a DataLoader, as data=...")
    with seeded(seed), torch.no_grad(), program.active(), validation(False), missing_values(held.has_missing):
        energy = Energy(program.model.fn, held.call())
        values = at_work(_checked(energy, posterior.draws), program.device)
        v = energy.unconstrain(values)
        shapes = {n: x.shape[2:] for n, x in v.items()}
        flat = torch.cat([x.reshape(*x.shape[:2], -1) for x in v.values()], 2)
        half = flat.shape[1] // 2
        fitted, used = flat[:, :half].flatten(0, 1).double(), flat[:, half:]
        proposal = _normal(fitted)
        points = torch.cat([used.flatten(0, 1).double(), proposal.sample((used.shape[0] * used.shape[1],))])
        log_ratio = -_energies(energy, points.to(flat), shapes).double() - proposal.log_prob(points)
    at_draws, at_proposal = log_ratio.cpu().chunk(2)
    return _bridge(at_draws.reshape(used.shape[:2]), at_proposal)


def _checked(energy: Energy, draws: Draws) -> dict[str, Tensor]:
    """The draws of the model's latents, where a bridge can be built from them."""
    missing = [n for n in energy.transforms if n not in draws]
    if missing:
        raise ValueError(f"the chains hold no draws of {quote(missing)}: fit the model as it is now")
    found = {n: draws[n] for n in energy.transforms}
    for name, value in found.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"site '{name}' has draws that are not finite: look at its prior and its support")
    chains, count = next(iter(found.values())).shape[:2]
    if chains * count < FEWEST or count < 8:
        raise ValueError(
            f"bridge_sampling needs {FEWEST} draws or more, and 8 of each chain, but there are {chains} x {count}: "
            "draw more"
        )
    args, kwargs = call_with(energy.batch)
    with Recorder({n: x[0, 0] for n, x in found.items()}) as seen:
        energy.model(*args, **kwargs)
    improper = [n for n in found if isinstance(elements_of(seen.sites[n]["fn"]), ImproperUniform)]
    if improper:
        raise ValueError(f"the prior of {quote(improper)} is improper, so there is no evidence: give it a proper one")
    return found


def _normal(v: Tensor) -> MultivariateNormal:
    """A normal with the moments of draws ``[n, d]``."""
    draws, size = v.shape
    if draws < 2 * size:
        raise ValueError(
            f"half of the draws are {draws}, too few for a normal of {size} dims: take {4 * size} or more in all"
        )
    if not torch.isfinite(v).all():
        raise ValueError("some draws lie on the edge of their support, which has no place in unconstrained space")
    if not (v.std(0) > 0).all():
        raise ValueError("the draws of a latent are all the same, so the chains never moved: lengthen the warmup")
    scale_tril, failed = torch.linalg.cholesky_ex(v.T.cov().reshape(size, size))
    if failed:
        raise ValueError("latents are exactly linear in each other, so their joint density is no density: drop one")
    return MultivariateNormal(v.mean(0), scale_tril=scale_tril)


def _energies(energy: Energy, points: Tensor, shapes: dict[str, torch.Size]) -> Tensor:
    """The energy at each of ``[n, d]``, many at once where the model can be."""
    sizes = [shape.numel() for shape in shapes.values()]

    def one(v: Tensor) -> Tensor:
        parts = v.split(sizes)
        return energy({n: part.reshape(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)})

    parts = points.split(part_sizes(len(points), energy.layout))
    try:
        return torch.cat([torch.vmap(one, randomness="different")(part) for part in parts])
    except (RuntimeError, ValueError, NotImplementedError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(
            f"the model cannot run all draws at once, so they take turns, which is slower: {why}", stacklevel=3
        )
        return torch.stack([one(v) for v in points])


def _bridge(at_draws: Tensor, at_proposal: Tensor) -> Evidence:
    """The optimal bridge from log-ratios of model to proposal, at draws ``[chains, n]`` and at the proposal's."""
    if not torch.isfinite(at_draws).all():
        raise ValueError("the model's density is not finite at some draws: is the data that of the fit?")
    at_proposal = at_proposal.nan_to_num(-math.inf, -math.inf)  # outside of where the model has a density
    worth = _effective(at_draws)
    ours = worth / (worth + len(at_proposal))
    log_1, log_2 = math.log(ours), torch.tensor(math.log1p(-ours), dtype=at_draws.dtype)
    log_p, step = at_draws.median(), torch.tensor(math.inf)
    for _ in range(MOST):
        a, b = at_proposal - log_p, at_draws - log_p
        top, bottom = a - torch.logaddexp(log_1 + a, log_2), -torch.logaddexp(log_1 + b, log_2)
        step = iwae(top) - iwae(bottom.flatten())
        log_p = log_p + step
        if not abs(step) > 1e-8:
            break
    top, bottom = top.exp(), bottom.exp()
    # both average to the integral of p g / (s1 p + s2 g), which is at most 1; above, no side knows of the other's place
    if not abs(step) <= 1e-8 or top.mean() > 1.2:
        raise ValueError(
            "the bridge does not settle, as the draws hardly overlap with a normal that is fitted to the first half "
            "of each chain, in unconstrained space: lengthen the warmup, reparameterise, or draw more"
        )
    squared = top.var() / top.mean() ** 2 / len(top) + bottom.var() / bottom.mean() ** 2 / _effective(bottom)
    return Evidence(float(log_p), float(squared.sqrt()))


def _effective(values: Tensor) -> float:
    """The effective sample size of the mean of a series ``[chains, n]``."""
    import arviz

    size = float(arviz.ess(values.numpy(), method="mean"))
    return size if 1 <= size <= values.numel() else float(values.numel())
