"""A loss that takes the codes of all rows for one normal, and holds its moments to the prior's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributions import Normal

from ..data import Call
from ..density import weigh
from ..estimators import base_of, reconstruction
from ..schedules import Schedule, now
from ..types import Guide, Model
from .importance import check_particles
from .kl import only_latent


@dataclass(frozen=True)
class aggregate_moments:
    r"""Reconstruction, the KL divergence of a batch's mixture of posteriors from the prior, and one of their spreads.

    .. math::
        E_q[\log p(x \mid z)] - \beta_1 \, KL\big(N(m, v) \,\|\, N(0, 1)\big)
        - \frac{\beta_2}{B} \sum_b KL\big(N(0, s_b^2) \,\|\, N(0, 1)\big), \qquad
        m = \frac{1}{B} \sum_b m_b, \quad v = \frac{1}{B} \sum_b (m_b - m)^2

    For each element of the latent, in units of the prior, the posteriors of the rows are N(m_b, s_b^2); ``within`` adds
    their mean variance to v, so that m and v are the moments of their mixture. The first divergence lets the spread of
    a single row vanish; the second holds against that, and leaves its mean free. Both count once for each row. Other
    than ``aggregate`` this sees two moments alone, and needs no draws of the prior. It is no bound on log p(x).

    References:
        How to train your VAE (Rivera, 2024) https://arxiv.org/abs/2309.13160

    Arguments:
        beta: weight beta_1 of the mixture's divergence, or a schedule of it.
        spread: weight beta_2 of the spreads', or a schedule of it; 0.2 in the author's code.
        within: whether the spreads are a part of v; they are not in the author's code, where they come on top.
        site: the latent; the only one by default.
        particles: codes of each row.

    Raises:
        ValueError: for negative weights; when called, for several latents, a posterior or prior that is not of
            independent normals, or a batch of one row without ``within``.

    Example:
        >>> from pyro_ae.models import vae
        >>> aggregate_moments(spread=0.2)(*vae.example()).shape
        torch.Size([])
    """

    beta: Schedule = 1.0
    spread: Schedule = 0.2
    within: bool = False
    site: str | None = None
    particles: int = 1

    def __post_init__(self) -> None:
        check_particles(self.particles)
        for name, value in (("beta", self.beta), ("spread", self.spread)):
            if not callable(value) and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}")

    def __call__(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Tensor:
        weights = weigh(model, guide, Call(args, kwargs), self.particles)
        run = weights.passes[0]
        site = only_latent(run.latents, self.site, "aggregate_moments")
        p, q = _normal(next(s for s in run.modelled if s["name"] == site["name"])), _normal(site)
        dims = site["fn"].event_dim
        loc, var = ((q.mean - p.mean) / p.stddev, (q.stddev / p.stddev).square())
        loc, var = (t.reshape(t.shape[: t.dim() - dims].numel(), -1) for t in (loc, var))  # [rows, elements]
        if len(loc) == 1 and not self.within:
            raise ValueError("the mean of a batch of one row has no variance: use larger batches, or within=True")
        v = loc.var(0, correction=0) + (var.mean(0) if self.within else 0.0)
        mixture = 0.5 * (loc.mean(0).square() + v - 1 - v.log()).sum()
        spreads = 0.5 * (var - 1 - var.log()).sum(1).mean()
        likelihood = weights.gather(reconstruction).mean(0)
        penalty = now(self.beta) * mixture + now(self.spread) * spreads
        return weights.scale * (likelihood.numel() * penalty - likelihood.sum())


def _normal(site: dict) -> Normal:
    """The distribution of a site's elements."""
    fn = base_of(site)
    if not isinstance(fn, Normal):
        raise ValueError(
            f"aggregate_moments needs independent normals, and the elements of '{site['name']}' are "
            f"{type(fn).__name__}: use a head such as MeanField, and a prior such as Normal(...).to_event(1)"
        )
    return fn
