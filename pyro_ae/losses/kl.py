"""Losses that change the ELBO's KL divergence: its weight, its aim, or its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Call
from ..density import Weights, weigh
from ..estimators import base_of, element_kl, kl, reconstruction, refuse_discrete
from ..plates import replicated, tempered
from ..schedules import Schedule, now
from ..types import Guide, Loss, Model, Sides
from .importance import check_particles, importance


@dataclass(frozen=True)
class annealed:
    r"""Another loss with the latent sites of both sides counted beta times.

    .. math:: E_q[\log p(x \mid z)] - \beta \, KL\big(q(z \mid x) \,\|\, p(z)\big)

    That is what it makes of the ELBO; beta may be a schedule, such as ``linear(0.0, 1.0, end=0.3)`` to warm up, or
    above 1 for the beta-VAE. The model itself is not changed, so evidence is measured with its own prior.

    References:
        beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework
        (Higgins et al., 2017) https://openreview.net/forum?id=Sy2fzU9gl

    Arguments:
        beta: a factor of at least 0, or a schedule of factors.
        loss: a loss of ours or of Pyro's; the ELBO of one particle by default.
        sites: names of the latent sites that it is for; all of them by default.

    Raises:
        ValueError: for a negative factor.

    Example:
        >>> from pyro_ae.models import ppca
        >>> annealed(4.0)(*ppca.example()).shape
        torch.Size([])
    """

    beta: Schedule
    loss: Loss = field(default_factory=importance)
    sites: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not callable(self.beta) and self.beta < 0:
            raise ValueError(f"beta must be at least 0, got {self.beta!r}")

    def __call__(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Tensor | Sides:
        loss = getattr(self.loss, "differentiable_loss", self.loss)
        beta = now(self.beta)
        model, guide = (tempered(fn, beta, sites=self.sites) for fn in (model, guide))
        return loss(model, guide, *args, **kwargs)


@dataclass(frozen=True)
class autogen:
    r"""Another loss for rows of which the latent is to generate several equal copies.

    .. math:: (1 + m) \, E_q[\log p(x \mid z)] - KL\big(q(z \mid x) \,\|\, p(z)\big)

    A bound on :math:`\log \int p(z) \, p(x \mid z)^{1 + m} dz`, with latents that say more of the row the larger m is.

    References:
        Improving latent variable descriptiveness with AutoGen (Mansbridge, Fierimonte, Feige and Barber, 2018)
        https://arxiv.org/abs/1806.04480

    Arguments:
        copies: m, of at least 0, or a schedule of it.
        loss: a loss of ours or of Pyro's; the ELBO of one particle by default.

    Raises:
        ValueError: for negative copies.

    Example:
        >>> from pyro_ae.models import ppca
        >>> autogen(1.0)(*ppca.example()).shape
        torch.Size([])
    """

    copies: Schedule = 1.0
    loss: Loss = field(default_factory=importance)

    def __post_init__(self) -> None:
        if not callable(self.copies) and self.copies < 0:
            raise ValueError(f"copies must be at least 0, got {self.copies!r}")

    def __call__(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Tensor | Sides:
        loss = getattr(self.loss, "differentiable_loss", self.loss)
        return loss(replicated(model, 1 + now(self.copies)), guide, *args, **kwargs)


def _draw(model: Model, guide: Guide, args: tuple, kwargs: dict, particles: int, what: str) -> Weights:
    weights = weigh(model, guide, Call(args, kwargs), particles)
    refuse_discrete(weights, what)
    return weights


@dataclass(frozen=True)
class capacity:
    r"""The ELBO with the KL divergence drawn to an aim, which may grow in the course of the fit.

    .. math:: E_q[\log p(x \mid z)] - \gamma \, \Big| \tfrac{1}{B} \sum_b KL_b - C \Big|

    The mean of the KL over the rows of a batch is what the aim is for, so that some rows may need more than others.

    References:
        Understanding disentangling in beta-VAE (Burgess et al., 2018) https://arxiv.org/abs/1804.03599

    Arguments:
        aim: C in nats per row, such as ``linear(0.0, 25.0, end=0.8)``.
        gamma: how strongly.
        particles: draws from the guide.

    Raises:
        ValueError: for a negative aim or gamma.

    Example:
        >>> from pyro_ae.models import ppca
        >>> capacity(5.0, gamma=100.0)(*ppca.example()).shape
        torch.Size([])
    """

    aim: Schedule
    gamma: float = 1000.0
    particles: int = 1

    def __post_init__(self) -> None:
        check_particles(self.particles)
        if self.gamma < 0 or (not callable(self.aim) and self.aim < 0):
            raise ValueError(f"aim and gamma must be at least 0, got {self.aim!r} and {self.gamma!r}")

    def __call__(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Tensor:
        weights = _draw(model, guide, args, kwargs, self.particles, "capacity")
        likelihood, divergence = weights.gather(reconstruction).mean(0), weights.gather(kl).mean(0)
        rows = divergence.numel()
        penalty = self.gamma * rows * (divergence.mean() - now(self.aim)).abs()
        return weights.scale * (penalty - likelihood.sum())


@dataclass(frozen=True)
class free_bits:
    r"""The ELBO with a KL divergence that costs nothing below a threshold, for each element of the latent.

    .. math:: E_q[\log p(x \mid z)] - \sum_d \max\Big(\lambda, \tfrac{1}{B} \sum_b KL_{bd}\Big)

    References:
        Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016)
        https://arxiv.org/abs/1606.04934

    Arguments:
        nats: the threshold lambda of each element.
        particles: draws from the guide.

    Raises:
        ValueError: for a negative threshold; when called, for a latent whose elements are tied together.

    Example:
        >>> from pyro_ae.models import ppca
        >>> free_bits(0.1)(*ppca.example()).shape
        torch.Size([])
    """

    nats: Schedule
    particles: int = 1

    def __post_init__(self) -> None:
        check_particles(self.particles)
        if not callable(self.nats) and self.nats < 0:
            raise ValueError(f"nats must be at least 0, got {self.nats!r}")

    def __call__(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Tensor:
        weights = _draw(model, guide, args, kwargs, self.particles, "free_bits")
        likelihood = weights.gather(reconstruction).mean(0)
        penalty: Tensor | float = 0.0
        for site in weights.passes[0].latents:
            each = weights.gather(partial(element_kl, name=site["name"]))
            penalty = penalty + each.flatten(0, -2).mean(0).clamp(min=now(self.nats)).sum()
        return weights.scale * (likelihood.numel() * penalty - likelihood.sum())


class soft_free_bits(nn.Module):
    r"""The ELBO with a weight of the KL divergence that is turned down while the KL is below a threshold.

    .. math:: E_q[\log p(x \mid z)] - \gamma \, KL\big(q(z \mid x) \,\|\, p(z)\big)

    After each step gamma falls by a tenth where the KL of the batch was more than 5% below the threshold, and grows by
    a tenth, up to 1, where it was more than 5% above. So this is the ELBO while the KL is large enough. It keeps gamma
    between the steps: use a new one for each fit.

    References:
        Variational Lossy Autoencoder (Chen et al., 2017) https://arxiv.org/abs/1611.02731

    Arguments:
        nats: the threshold, of the sum over all elements of the latent.
        rate: by how much gamma changes.
        tolerance: how far from the threshold the KL may be.
        particles: draws from the guide.

    Raises:
        ValueError: for values that are not positive.

    Example:
        >>> from pyro_ae.models import ppca
        >>> loss = soft_free_bits(50.0)
        >>> loss(*ppca.example()).shape, round(loss.gamma.item(), 3)
        (torch.Size([]), 0.909)
    """

    gamma: Tensor

    def __init__(self, nats: float, *, rate: float = 0.1, tolerance: float = 0.05, particles: int = 1) -> None:
        super().__init__()
        check_particles(particles)
        if not (nats > 0 and rate > 0 and tolerance > 0):
            raise ValueError(f"nats, rate and tolerance must be positive, got {nats!r}, {rate!r} and {tolerance!r}")
        self.nats, self.rate, self.tolerance, self.particles = nats, rate, tolerance, particles
        self.register_buffer("gamma", torch.tensor(1.0))

    def forward(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Tensor:
        weights = _draw(model, guide, args, kwargs, self.particles, "soft_free_bits")
        likelihood, divergence = weights.gather(reconstruction).mean(0), weights.gather(kl).mean(0)
        loss = weights.scale * (self.gamma.clone() * divergence - likelihood).sum()
        if torch.is_grad_enabled():  # an evaluation changes nothing
            with torch.no_grad():
                off = divergence.mean() / self.nats - 1
                factor = torch.where(off > self.tolerance, 1 + self.rate, 1.0)
                factor = torch.where(off < -self.tolerance, 1 / (1 + self.rate), factor)
                self.gamma.mul_(factor).clamp_(max=1.0)
        return loss

    def __repr__(self) -> str:
        return f"soft_free_bits({self.nats}, rate={self.rate}, tolerance={self.tolerance})"


@dataclass(frozen=True)
class total_correlation:
    r"""The ELBO with weights of its own for the three parts of the KL divergence.

    .. math::
        E_q[\log p(x \mid z)] - \alpha \, I(x; z) - \beta \, KL\big(q(z) \,\|\, \textstyle\prod_d q(z_d)\big)
        - \gamma \sum_d KL\big(q(z_d) \,\|\, p(z_d)\big)

    The aggregate posterior q(z) is estimated from the rows of the batch (minibatch-weighted sampling). With all three
    weights 1 this is the ELBO of one draw.

    References:
        Isolating Sources of Disentanglement in Variational Autoencoders (Chen et al., 2018)
        https://arxiv.org/abs/1802.04942

    Arguments:
        beta: weight of the total correlation, or a schedule of it.
        alpha: weight of the mutual information.
        gamma: weight of the elements' own divergences.
        site: the latent; the only one by default.

    Raises:
        ValueError: for negative weights; when called, for a latent whose elements are tied together, or several.

    Example:
        >>> from pyro_ae.models import ppca
        >>> total_correlation(beta=6.0)(*ppca.example()).shape
        torch.Size([])
    """

    beta: Schedule = 6.0
    alpha: float = 1.0
    gamma: float = 1.0
    site: str | None = None

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.gamma < 0 or (not callable(self.beta) and self.beta < 0):
            raise ValueError(f"weights must be at least 0, got {self.alpha!r}, {self.beta!r} and {self.gamma!r}")

    def __call__(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Tensor:
        weights = _draw(model, guide, args, kwargs, 1, "total_correlation")
        (run,) = weights.passes
        q, p = only_latent(run.latents, self.site, "total_correlation"), {s["name"]: s for s in run.modelled}
        likelihood = reconstruction(run).squeeze(0)
        if likelihood.dim() != 1:
            raise ValueError(
                f"total_correlation needs the rows in one plate, with one latent each; '{q['name']}' has plates of "
                f"sizes {tuple(likelihood.shape)}"
            )
        rows, total = len(likelihood), len(likelihood) * weights.scale
        base = base_of(q)
        z = q["value"]
        pairs = base.log_prob(z.unsqueeze(1)).flatten(2)  # [row of z, row of q, element]
        log_qz = pairs.sum(-1).logsumexp(1) - math.log(rows * total)
        log_marginals = (pairs.logsumexp(1) - math.log(rows * total)).sum(-1)
        information = q["fn"].log_prob(z) - log_qz
        elements = log_marginals - p[q["name"]]["fn"].log_prob(z)
        penalty = self.alpha * information + now(self.beta) * (log_qz - log_marginals) + self.gamma * elements
        return weights.scale * (penalty - likelihood).sum()


def only_latent(latents: list[dict], name: str | None, what: str) -> dict:
    """The named site of the guide, or its only one."""
    found = [s for s in latents if name in (None, s["name"])]
    if len(found) != 1:
        names = ", ".join(repr(s["name"]) for s in latents) or "none"
        raise ValueError(f"{what} is for one latent, and the guide's are {names}: name it with site=")
    return found[0]
