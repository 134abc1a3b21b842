"""Priors over the weights of a network: functions of a site's name and its tensor."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

Prior: TypeAlias = Callable[[str, Tensor], Distribution]
"""Site name and initial value ``[*shape]`` to a distribution over such tensors; it may sample sites of its own."""


@dataclass(frozen=True)
class normal:
    """The same normal prior for all weights.

    Arguments:
        loc: mean.
        scale: standard deviation.

    Example:
        >>> normal(0.0, 2.0)("w", torch.zeros(3, 2)).event_shape
        torch.Size([3, 2])
    """

    loc: float = 0.0
    scale: float = 1.0

    def __call__(self, name: str, tensor: Tensor) -> Distribution:
        return _gaussian(self.loc, self.scale, tensor)


@dataclass(frozen=True)
class fan_in:
    r"""A normal prior that keeps activations of about one size, however wide the layers are.

    .. math:: w \sim N(0, \text{scale}^2 / \text{fan-in})

    Biases, and other tensors of one dim, have the standard deviation ``scale``.

    References:
        Bayesian Learning for Neural Networks (Neal, 1996) https://doi.org/10.1007/978-1-4612-0745-0

    Arguments:
        scale: standard deviation of what a unit gets where its inputs have unit size.

    Example:
        >>> fan_in()("w", torch.zeros(3, 4)).stddev[0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    scale: float = 1.0

    def __call__(self, name: str, tensor: Tensor) -> Distribution:
        scale = self.scale / math.sqrt(fan_in_of(tensor)) if tensor.dim() > 1 else self.scale
        return normal(0.0, scale)(name, tensor)


@dataclass(frozen=True)
class hierarchical:
    r"""A normal prior whose standard deviation is latent, one for each tensor.

    .. math:: w_i \sim N(0, \sigma^2), \quad \sigma \sim \text{scale}

    Arguments:
        scale: prior of the standard deviation, site ``"w.0.weight.scale"``; half-Cauchy with scale 1 by default.

    Example:
        >>> pyro.poutine.trace(hierarchical()).get_trace("w", torch.zeros(3, 4)).stochastic_nodes
        ['w.scale']
    """

    scale: Distribution | None = None

    def __call__(self, name: str, tensor: Tensor) -> Distribution:
        prior = _half_cauchy(1.0, tensor) if self.scale is None else _like(self.scale, tensor)
        scale = pyro.sample(f"{name}.scale", dist.Independent(prior, 0))
        spread = _spread(scale, tensor).expand(*scale.shape, *tensor.shape)
        return dist.Normal(torch.zeros_like(spread), spread).to_event(tensor.dim())


@dataclass(frozen=True)
class horseshoe:
    r"""The regularised horseshoe: most weights are shrunk to zero, and those that are not have a slab's size at most.

    .. math::
        w_i \sim N(0, \tau^2 \tilde\lambda_i^2), \quad
        \tilde\lambda_i^2 = \frac{c^2 \lambda_i^2}{c^2 + \tau^2 \lambda_i^2}, \quad
        \lambda_i \sim C^+(0, 1), \quad \tau \sim C^+(0, \tau_0), \quad
        c^2 \sim \text{Inv-Gamma}(\nu / 2, \nu s^2 / 2)

    Each tensor has the sites ``"w.0.weight.global"``, ``.local`` (one for each weight) and ``.slab`` of its own.

    References:
        Sparsity information and regularization in the horseshoe and other shrinkage priors
        (Piironen and Vehtari, 2017) https://arxiv.org/abs/1707.01694

    Arguments:
        global_scale: the median of tau; with p of D weights thought to be relevant, about p / (D - p) / sqrt(rows).
        slab: s, the size of weights that are not shrunk.
        degrees: nu, the degrees of freedom of the slab, a Student t.

    Example:
        >>> pyro.poutine.trace(horseshoe(0.1)).get_trace("w", torch.zeros(4)).stochastic_nodes
        ['w.global', 'w.local', 'w.slab']
    """

    global_scale: float = 1.0
    slab: float = 2.0
    degrees: float = 4.0

    def __call__(self, name: str, tensor: Tensor) -> Distribution:
        half = tensor.new_full((), 0.5 * self.degrees)
        tau = pyro.sample(f"{name}.global", _half_cauchy(self.global_scale, tensor))
        local = pyro.sample(f"{name}.local", _half_cauchy(1.0, tensor).expand(tensor.shape).to_event(tensor.dim()))
        slab = pyro.sample(f"{name}.slab", dist.InverseGamma(half, half * self.slab**2))
        width, c2 = _spread(tau, tensor) * local, _spread(slab, tensor)
        scale = width * (c2 / (c2 + width.square())).sqrt()
        return dist.Normal(torch.zeros_like(scale), scale).to_event(tensor.dim())


class learnable(nn.Module):
    r"""A normal prior whose mean and variance are parameters, fitted with the rest: type-II maximum likelihood.

    .. math:: w_i \sim N(\mu, \exp \rho)

    References:
        Model Selection for Bayesian Autoencoders (Tran et al., 2021) https://arxiv.org/abs/2106.06245

    Arguments:
        loc: where the means start, ``"zero"`` or ``"module"``, the network's own values (their average, where a tensor
            has one mean).
        log_variance: where the log-variances start.
        per: ``"tensor"`` for one mean and variance a tensor, ``"weight"`` for one a weight.

    Example:
        >>> from pyro_ae.bayesian import bayesian
        >>> net = bayesian(nn.Linear(3, 1), learnable())
        >>> sum(p.numel() for p in net.parameters())  # mean and log-variance, of weight and of bias
        4
    """

    def __init__(self, loc: str = "zero", log_variance: float = 0.0, per: str = "tensor") -> None:
        super().__init__()
        if loc not in ("zero", "module") or per not in ("tensor", "weight"):
            raise ValueError(f'learnable takes loc="zero" or "module", per="tensor" or "weight"; got {loc!r}, {per!r}')
        self.start = (loc, log_variance, per)
        self.loc, self.log_variance = nn.ParameterDict(), nn.ParameterDict()

    def extra_repr(self) -> str:
        return "loc={!r}, log_variance={!r}, per={!r}".format(*self.start)

    def forward(self, name: str, tensor: Tensor) -> Distribution:
        key = as_key(name)
        if key not in self.loc:
            where, log_variance, per = self.start
            loc = tensor.detach().clone() if where == "module" else torch.zeros_like(tensor)
            self.loc[key] = nn.Parameter(loc if per == "weight" else loc.mean())
            self.log_variance[key] = nn.Parameter(torch.full_like(self.loc[key], log_variance))
        return _gaussian(self.loc[key], (0.5 * self.log_variance[key]).exp(), tensor)


class _Alike(dist.Independent):
    """Normal elements of one mean and scale: their squares are summed before anything else is done, in half the time.

    An instance that ``expand`` makes does not know them, and is as any other.
    """

    both: tuple[Any, Any] | None = None

    def log_prob(self, value: Tensor) -> Tensor:
        if self.both is None:
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        loc, scale = self.both
        dims = tuple(range(-len(self.event_shape), 0))
        centred = value if isinstance(loc, float) and loc == 0.0 else value - loc
        log_scale = scale.log() if isinstance(scale, Tensor) else math.log(scale)
        constant = self.event_shape.numel() * (log_scale + 0.5 * math.log(2.0 * math.pi))
        return -0.5 * centred.square().sum(dims) / scale**2 - constant


def _gaussian(loc: float | Tensor, scale: float | Tensor, tensor: Tensor) -> Distribution:
    """Normal with a mean and scale for all elements of a tensor, or for each."""
    pair = [v if isinstance(v, Tensor) else tensor.new_full((), v) for v in (loc, scale)]
    base = dist.Normal(*pair).expand(tensor.shape)
    if not tensor.dim():
        return base
    alike = _Alike(base, tensor.dim())
    if all(v.dim() == 0 for v in pair):
        alike.both = (loc, scale)
    return alike


@dataclass(frozen=True)
class everywhere:
    """The same distribution for all weights."""

    distribution: Distribution

    def __call__(self, name: str, tensor: Tensor) -> Distribution:
        return _like(self.distribution, tensor).expand(tensor.shape)

    def __repr__(self) -> str:
        return repr(self.distribution)


def _spread(value: Tensor, tensor: Tensor) -> Tensor:
    """A latent scalar, with particles or without, against the dims of a tensor."""
    return value[(..., *(None,) * tensor.dim())]


def _half_cauchy(scale: float, tensor: Tensor) -> Any:
    return dist.HalfCauchy(tensor.new_full((), scale))


def fan_in_of(weight: Tensor) -> int:
    return max(1, weight.shape[1:].numel())


def as_key(name: str) -> str:
    """A name that a module may have for a tensor."""
    return name.replace(".", "-")


def _like(thing: Any, tensor: Tensor) -> Any:
    """A distribution with its parameters of the dtype and on the device of a tensor."""
    if isinstance(thing, Tensor):
        return thing.to(tensor) if thing.is_floating_point() else thing.to(tensor.device)
    if isinstance(thing, (list, tuple)):
        return type(thing)(_like(t, tensor) for t in thing)
    if isinstance(thing, (Distribution, Transform)):
        moved = copy.copy(thing)
        vars(moved).update({k: _like(v, tensor) for k, v in vars(thing).items() if isinstance(v, _MOVED)})
        return moved
    return thing


_MOVED = (Tensor, Distribution, Transform, list)
