"""Bounds on log p(x): each a function of log-weights ``[K, *batch]``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[[Tensor], Tensor])


def linear(bound: F) -> F:
    """Mark a bound as linear in the log-weights.

    Only such a bound stays one when the rows share a latent and are subsampled: the N/B scale may then
    stand inside the log-weights. A bound without the mark is refused there.

    Arguments:
        bound: function of log-weights ``[K, *batch]``.

    Example:
        >>> linear(lambda log_w: log_w.mean(0)).linear
        True
    """
    bound.linear = True  # type: ignore[attr-defined]
    return bound


def is_linear(bound: Callable[[Tensor], Tensor]) -> bool:
    return getattr(bound, "linear", False)


def is_upper(bound: Callable[[Tensor], Tensor]) -> bool:
    """Whether a bound lies above log p(x), so that it is to be minimised."""
    return getattr(bound, "upper", False)


@linear
def elbo(log_weights: Tensor) -> Tensor:
    r"""The evidence lower bound, averaged over particles.

    .. math:: \frac{1}{K} \sum_k \log w_k

    References:
        Auto-Encoding Variational Bayes (Kingma and Welling, 2014) https://arxiv.org/abs/1312.6114

    Arguments:
        log_weights: ``[K, *batch]``, in nats.

    Example:
        >>> elbo(torch.tensor([[1.0], [3.0]]))
        tensor([2.])
    """
    return log_weights.mean(0)


def iwae(log_weights: Tensor) -> Tensor:
    r"""The importance-weighted bound: the log of the particles' mean weight.

    .. math:: \log \frac{1}{K} \sum_k w_k

    Tighter than the ELBO for K > 1, and equal to log p(x) in the limit of many particles.

    References:
        Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016) https://arxiv.org/abs/1509.00519

    Arguments:
        log_weights: ``[K, *batch]``, in nats.

    Example:
        >>> iwae(torch.tensor([[0.0], [0.0]]))
        tensor([0.])
    """
    return torch.logsumexp(log_weights, 0) - math.log(log_weights.shape[0])


@dataclass(frozen=True)
class miwae:
    r"""The mean of several importance-weighted bounds, each with particles of its own.

    .. math:: \frac{1}{M} \sum_m \log \frac{1}{K} \sum_k w_{mk}

    Between the ELBO (K = 1) and IWAE (M = 1): M lowers the variance of its gradient, K tightens it.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018) https://arxiv.org/abs/1802.04537

    Arguments:
        outer: M, the bounds that are averaged.
        inner: K, the particles in each; log-weights have M * K of them.

    Raises:
        ValueError: for fewer than one, and, when called, for another number of log-weights than M * K.

    Example:
        >>> miwae(2, 3)(torch.zeros(6, 4))
        tensor([0., 0., 0., 0.])
    """

    outer: int
    inner: int

    def __post_init__(self) -> None:
        if self.outer < 1 or self.inner < 1:
            raise ValueError(f"miwae needs at least one bound of at least one particle, got {self.outer}, {self.inner}")

    @property
    def particles(self) -> int:
        return self.outer * self.inner

    @property
    def linear(self) -> bool:
        return self.inner == 1

    def __call__(self, log_weights: Tensor) -> Tensor:
        if log_weights.shape[0] != self.particles:
            raise ValueError(f"{self} needs {self.particles} particles, and there are {log_weights.shape[0]}")
        parts = log_weights.unflatten(0, (self.outer, self.inner))
        return parts.logsumexp(1).mean(0) - math.log(self.inner)


@dataclass(frozen=True)
class ciwae:
    r"""A mixture of the ELBO and the importance-weighted bound.

    .. math:: \beta \, \text{ELBO} + (1 - \beta) \, \text{IWAE}_K

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018) https://arxiv.org/abs/1802.04537

    Arguments:
        beta: weight of the ELBO, in [0, 1].

    Raises:
        ValueError: for a weight outside [0, 1].

    Example:
        >>> ciwae(0.5)(torch.tensor([[0.0], [0.0]]))
        tensor([0.])
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {self.beta!r}")

    @property
    def linear(self) -> bool:
        return self.beta == 1

    def __call__(self, log_weights: Tensor) -> Tensor:
        return self.beta * elbo(log_weights) + (1 - self.beta) * iwae(log_weights)


@dataclass(frozen=True)
class renyi:
    r"""The variational Renyi bound.

    .. math:: \frac{1}{1 - \alpha} \log \frac{1}{K} \sum_k w_k^{1 - \alpha}

    Falls in alpha: the largest weight at minus infinity (VR-max), IWAE at 0, the ELBO at 1, the smallest weight at
    infinity. For alpha in [0, 1] it is a lower bound for any number of particles. Below 0 it is an upper bound in the
    limit of many particles only.

    References:
        Renyi Divergence Variational Inference (Li and Turner, 2016) https://arxiv.org/abs/1602.02311

    Arguments:
        alpha: order of the divergence, any number or an infinity.

    Raises:
        ValueError: for an order that is not a number.

    Example:
        >>> renyi(float("-inf"))(torch.tensor([[1.0], [3.0]]))
        tensor([3.])
    """

    alpha: float

    def __post_init__(self) -> None:
        if math.isnan(self.alpha):
            raise ValueError("alpha must be a number or an infinity, got nan")

    @property
    def linear(self) -> bool:
        return self.alpha == 1

    def __call__(self, log_weights: Tensor) -> Tensor:
        if math.isinf(self.alpha):
            return log_weights.amin(0) if self.alpha > 0 else log_weights.amax(0)
        power = 1 - self.alpha
        if abs(power) < 1e-3:
            # the limit and its slope: the formula itself would divide rounding errors by almost nothing
            return log_weights.mean(0) + 0.5 * power * log_weights.var(0, correction=0)
        return iwae(power * log_weights) / power


@dataclass(frozen=True)
class cubo:
    r"""The chi upper bound.

    .. math:: \frac{1}{n} \log \frac{1}{K} \sum_k w_k^n

    An upper bound on log p(x) in the limit of many particles; with few, Jensen's inequality pulls its estimate down,
    for K = 1 to the ELBO. ``importance`` minimises it over the guide, and learns the model by IWAE on the same
    particles, as a model that lowers its own evidence would be no model of the data.

    References:
        Variational Inference via Chi Upper Bound Minimization (Dieng et al., 2017) https://arxiv.org/abs/1611.00328

    Arguments:
        order: n of the chi divergence, greater than 1.

    Raises:
        ValueError: for an order of 1 or less, which is no upper bound.

    Example:
        >>> cubo(2)(torch.tensor([[0.0], [0.0]]))
        tensor([0.])
    """

    order: float = 2.0
    upper = True

    def __post_init__(self) -> None:
        if not self.order > 1:
            raise ValueError(f"the order must be greater than 1 for an upper bound, got {self.order!r}")

    def __call__(self, log_weights: Tensor) -> Tensor:
        return iwae(self.order * log_weights) / self.order


@dataclass(frozen=True)
class jackknife:
    r"""The importance-weighted bound with its bias in 1/K removed up to an order.

    .. math::
        \sum_{j=0}^m (-1)^j \frac{(K - j)^m}{(m - j)! \, j!} \, \overline{\text{IWAE}}_{K - j}

    The mean runs over all ways to leave j particles out. Its bias is of order 1/K to the power m + 1, of either sign:
    an estimate of the evidence rather than a bound. Memory grows as K to the power m + 1.

    References:
        Debiasing Evidence Approximations: On Importance-weighted Autoencoders and Jackknife Variational Inference
        (Nowozin, 2018) https://openreview.net/forum?id=HyZoi-WRb

    Arguments:
        order: m, from 0 (IWAE) on; there must be more particles than that.

    Raises:
        ValueError: for a negative order and, when called, for too few particles.

    Example:
        >>> jackknife(1)(torch.zeros(4, 2))
        tensor([0., 0.])
    """

    order: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.order, int) or self.order < 0:
            raise ValueError(f"the order must be a whole number of at least 0, got {self.order!r}")

    def __call__(self, log_weights: Tensor) -> Tensor:
        particles, order = log_weights.shape[0], self.order
        if particles <= order:
            raise ValueError(f"{self} needs more than {order} particles, and there are {particles}")
        total = torch.zeros_like(log_weights[0])
        for left_out in range(order + 1):
            factor = (-1) ** left_out * (particles - left_out) ** order
            factor /= math.factorial(order - left_out) * math.factorial(left_out)
            total = total + factor * self._mean_bound(log_weights, left_out)
        return total

    @staticmethod
    def _mean_bound(log_weights: Tensor, left_out: int) -> Tensor:
        """IWAE of all particles but ``left_out``, averaged over which ones these are."""
        if left_out == 0:
            return iwae(log_weights)
        indices = torch.arange(log_weights.shape[0], device=log_weights.device)
        gone = torch.combinations(indices, left_out)
        mask = torch.zeros(len(gone), len(indices), dtype=torch.bool, device=log_weights.device).scatter_(1, gone, True)
        mask = mask.reshape(*mask.shape, *(1,) * (log_weights.dim() - 1))
        rest = log_weights.masked_fill(mask, -torch.inf)
        return rest.logsumexp(1).mean(0) - math.log(len(indices) - left_out)


@dataclass(frozen=True)
class tvo:
    r"""The thermodynamic variational objective: a left Riemann sum along the path from guide to posterior.

    .. math::
        \sum_{j} (\beta_{j+1} - \beta_j) \sum_k \bar w_k^{(\beta_j)} \log w_k,
        \qquad \bar w_k^{(\beta)} \propto w_k^\beta

    Lies between the ELBO and the IWAE of the same particles, so it is a lower bound for any number of them. With the
    one point 0 it is the ELBO; with more it nears the IWAE.

    References:
        The Thermodynamic Variational Objective (Masrani, Le and Wood, 2019) https://arxiv.org/abs/1907.00031

    Arguments:
        schedule: the points, from 0, rising and below 1; or their number, with those after 0 at equal ratios from
            0.025 on.

    Raises:
        ValueError: for points that do not begin at 0 or do not rise to below 1.

    Example:
        >>> tvo([0.0, 0.5])(torch.zeros(3, 2))
        tensor([0., 0.])
    """

    schedule: Sequence[float] | int = 5

    def __post_init__(self) -> None:
        points = self.points
        if not points or points[0] != 0 or not all(a < b for a, b in pairwise((*points, 1.0))):
            raise ValueError(f"the schedule must begin at 0 and rise to below 1, got {self.schedule!r}")

    @property
    def points(self) -> tuple[float, ...]:
        if isinstance(self.schedule, int):
            number = self.schedule
            return tuple([0.0, *(0.025 ** (1 - j / (number - 1)) for j in range(number - 1))][:number])
        return tuple(self.schedule)

    @property
    def linear(self) -> bool:
        return len(self.points) == 1

    def __call__(self, log_weights: Tensor) -> Tensor:
        beta = log_weights.new_tensor([*self.points, 1.0])
        shape = (-1, *(1,) * log_weights.dim())
        weights = torch.softmax(beta[:-1].reshape(shape) * log_weights, 1)
        return ((beta[1:] - beta[:-1]).reshape(shape[:-1]) * (weights * log_weights).sum(1)).sum(0)
