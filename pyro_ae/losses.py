"""Losses: what svi minimises, as functions of (model, guide, batch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .bounds import elbo, is_linear
from .data import Call
from .density import refuse_shared, weigh
from .types import Bound, Guide, Model


@dataclass(frozen=True)
class importance:
    r"""Minus a bound on log p(x), from log-weights of a number of particles.

    .. math:: -\frac{N}{B} \sum_{b=1}^{B} \mathcal{L}(\log w_{1b}, \ldots, \log w_{Kb})

    The N/B of a minibatch stands outside the bound, so the losses of the minibatches average to the loss of the
    whole data for every bound. Where latents tie the rows together only a linear bound can be subsampled.

    References:
        Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016) https://arxiv.org/abs/1509.00519

    Arguments:
        bound: a function of log-weights ``[K, *batch]``, such as ``elbo`` or ``iwae``.
        particles: K, the draws from the guide for each row.

    Raises:
        ValueError: for fewer than one particle; when called, for a nonlinear bound whose rows share a latent and
            are subsampled, and for a guide with a site that has no reparameterised sampler.

    Example:
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> importance(elbo, particles=8)(model, guide, x).shape
        torch.Size([])
    """

    bound: Bound = elbo
    particles: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.particles, int) or self.particles < 1:
            raise ValueError(f"particles must be a whole number of at least 1, got {self.particles!r}")
        if not callable(self.bound):
            raise ValueError(f"bound must be a function of log-weights such as elbo or iwae, got {self.bound!r}")

    def __call__(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Tensor:
        weights = weigh(model, guide, Call(args, kwargs), self.particles, reparameterised=True)
        if not is_linear(self.bound):
            refuse_shared(weights, f"{self}")
        return -weights.scale * self.bound(weights.log_weights).sum()

    def __repr__(self) -> str:
        return f"importance({getattr(self.bound, '__name__', self.bound)}, particles={self.particles})"
