"""Minus a bound on log p(x), from log-weights of a number of particles."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from ..bounds import elbo, is_linear, is_upper, iwae, miwae
from ..data import Call
from ..density import Weights, refuse_shared, weigh
from ..estimators import pathwise
from ..types import Bound, Guide, Model, Sides

Estimator: TypeAlias = Callable[[Bound, Weights], Tensor]
"""A bound and log-weights to the bound's value, with a gradient of the estimator's own, ``[*batch]``."""


def name_of(thing: Any) -> str:
    return getattr(thing, "__name__", None) or repr(thing)


def check_particles(particles: Any) -> None:
    if not isinstance(particles, int) or particles < 1:
        raise ValueError(f"particles must be a whole number of at least 1, got {particles!r}")


def estimate(
    model: Model, guide: Guide, batch: Call, bound: Bound, particles: int, estimator: Estimator = pathwise
) -> tuple[Tensor, Weights]:
    """A bound with the gradient of an estimator, ``[*batch]``, and the log-weights that it came from."""
    handler = getattr(estimator, "handler", nullcontext)
    with handler():
        weights = weigh(model, guide, batch, particles)
        if not is_linear(bound):
            refuse_shared(weights, name_of(bound))
        return estimator(bound, weights), weights


@dataclass(frozen=True)
class importance:
    r"""Minus a bound on log p(x), from log-weights of a number of particles.

    .. math:: -\frac{N}{B} \sum_{b=1}^{B} \mathcal{L}(\log w_{1b}, \ldots, \log w_{Kb})

    The N/B of a minibatch stands outside the bound, so the losses of the minibatches average to the loss of the
    whole data for every bound. Where latents tie the rows together only a linear bound can be subsampled. An upper
    bound such as ``cubo`` is minimised by the guide, and the model maximises IWAE of the same particles.

    References:
        Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016) https://arxiv.org/abs/1509.00519

    Arguments:
        bound: a function of log-weights ``[K, *batch]``, such as ``elbo``, ``iwae`` or ``renyi(0.5)``.
        particles: K, the draws from the guide for each row; by default what the bound asks for, or 1.
        estimator: of the gradient, from ``pyro_ae.estimators`` or ``pyro_ae.relaxations``.

    Raises:
        ValueError: for fewer than one particle; when called, for a nonlinear bound whose rows share a latent and
            are subsampled, and for a site of the guide that the estimator has no gradient for.

    Example:
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> importance(elbo, particles=8)(model, guide, x).shape
        torch.Size([])
    """

    bound: Bound = elbo
    particles: int | None = None
    estimator: Estimator = pathwise

    def __post_init__(self) -> None:
        if not callable(self.bound):
            raise ValueError(f"bound must be a function of log-weights such as elbo or iwae, got {self.bound!r}")
        if self.particles is not None:
            check_particles(self.particles)
            wanted = getattr(self.bound, "particles", self.particles)
            if wanted != self.particles:
                raise ValueError(f"{self.bound!r} needs particles={wanted}, got {self.particles}")

    @property
    def count(self) -> int:
        """K."""
        return self.particles if self.particles is not None else int(getattr(self.bound, "particles", 1))

    def __call__(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Tensor | Sides:
        value, weights = estimate(model, guide, Call(args, kwargs), self.bound, self.count, self.estimator)
        if is_upper(self.bound):
            return Sides(model=-weights.scale * iwae(weights.log_weights).sum(), guide=weights.scale * value.sum())
        return -weights.scale * value.sum()

    def __repr__(self) -> str:
        by = "" if self.estimator is pathwise else f", estimator={name_of(self.estimator)}"
        return f"importance({name_of(self.bound)}, particles={self.count}{by})"


@dataclass(frozen=True)
class piwae:
    r"""The partially importance-weighted autoencoder: a bound for each side, from the same particles.

    .. math:: \theta: \; \text{IWAE}_{MK}, \qquad \phi: \; \text{MIWAE}_{M,K}

    The model gets the tighter bound. The guide gets the one whose gradient has a larger ratio of signal to noise.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018) https://arxiv.org/abs/1802.04537

    Arguments:
        outer: M, bounds that are averaged for the guide.
        inner: K, particles in each.
        estimator: of the guide's gradient.

    Raises:
        ValueError: for fewer than one; when called, as for ``importance``.

    Example:
        >>> from pyro_ae.models import ppca
        >>> sides = piwae(2, 4)(*ppca.example())
        >>> bool(sides.model < sides.guide)  # the tighter bound is the smaller loss
        True
    """

    outer: int
    inner: int
    estimator: Estimator = pathwise

    def __post_init__(self) -> None:
        miwae(self.outer, self.inner)

    def __call__(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Sides:
        bound = miwae(self.outer, self.inner)
        value, weights = estimate(model, guide, Call(args, kwargs), bound, bound.particles, self.estimator)
        refuse_shared(weights, repr(self))
        scale = weights.scale
        return Sides(model=-scale * iwae(weights.log_weights).sum(), guide=-scale * value.sum())

    def __repr__(self) -> str:
        return f"piwae({self.outer}, {self.inner})"
