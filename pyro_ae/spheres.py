"""Distributions on the sphere: one around a direction, and the uniform one, with their KL divergence."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import register_kl
from torch.nn.functional import normalize


class PowerSpherical(dist.TorchDistribution):
    r"""The power spherical distribution of unit vectors around a direction.

    .. math:: p(z) \propto (1 + \mu^\top z)^\kappa

    It stands in for the von Mises-Fisher distribution, whose sampler rejects and has no exact reparameterisation. Its
    draws are a beta variable along the direction, a uniform one across it, and a reflection.

    References:
        The Power Spherical distribution (De Cao and Aziz, 2020) https://arxiv.org/abs/2006.04437

    Arguments:
        loc: the mean direction, unit vectors ``[*, d]`` with d of at least 2.
        concentration: positive, ``[*]``.

    Raises:
        ValueError: for vectors of one element; with validation, for a direction that is no unit vector.

    Example:
        >>> q = PowerSpherical(torch.tensor([0.0, 1.0, 0.0]), torch.tensor(50.0))
        >>> q.mean, q.entropy()
        (tensor([0.0000, 0.9615, 0.0000]), tensor(-0.4204))
    """

    arg_constraints: ClassVar[dict] = {"loc": constraints.sphere, "concentration": constraints.positive}
    support = constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor, validate_args: bool | None = None) -> None:
        if loc.dim() < 1 or loc.shape[-1] < 2:
            raise ValueError(f"a sphere needs at least two dimensions, got directions of shape {list(loc.shape)}")
        batch = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        self.loc, self.concentration = loc.expand(*batch, -1), concentration.expand(batch)
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PowerSpherical:
        shape = torch.Size(batch_shape)
        return PowerSpherical(self.loc.expand(*shape, -1), self.concentration.expand(shape), validate_args=False)

    @property
    def _across(self) -> float:
        """The beta variable's second parameter; the first one is this plus the concentration."""
        return (self.event_shape[0] - 1) / 2

    @property
    def mean(self) -> Tensor:
        return self.loc * (self.concentration / (self.concentration + 2 * self._across)).unsqueeze(-1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        along = self.concentration + self._across
        # both parts of the beta variable, as one minus the other has few digits where that is near one
        parts = dist.Dirichlet(torch.stack([along, torch.full_like(along, self._across)], -1), validate_args=False)
        a, b = parts.rsample(torch.Size(sample_shape)).clamp(min=torch.finfo(self.loc.dtype).tiny).unbind(-1)
        around = normalize(
            torch.randn(*shape[:-1], shape[-1] - 1, dtype=self.loc.dtype, device=self.loc.device), dim=-1
        )
        # of the two poles the one that is farther from the direction, so that their difference is not near zero
        pole = torch.where(self.loc[..., :1] > 0, -1.0, 1.0)
        z = torch.cat([pole * (a - b).unsqueeze(-1), 2 * (a.sqrt() * b.sqrt()).unsqueeze(-1) * around], -1)
        mirror = normalize(torch.cat([pole - self.loc[..., :1], -self.loc[..., 1:]], -1), dim=-1)
        return z - 2 * (mirror * z).sum(-1, keepdim=True) * mirror

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        cosine = (self.loc * value).sum(-1).clamp(min=torch.finfo(self.loc.dtype).eps - 1)
        return self.concentration * torch.log1p(cosine) - self._log_normalizer()

    def entropy(self) -> Tensor:
        along = self.concentration + self._across
        mean_log = math.log(2) + torch.digamma(along) - torch.digamma(along + self._across)
        return self._log_normalizer() - self.concentration * mean_log

    def _log_normalizer(self) -> Tensor:
        along, across = self.concentration + self._across, self._across
        power = (along + across) * math.log(2) + across * math.log(math.pi)
        return power + torch.lgamma(along) - torch.lgamma(along + across)


class UniformOnSphere(dist.TorchDistribution):
    r"""The uniform distribution of unit vectors, a prior for codes on the sphere.

    .. math:: p(z) = \frac{\Gamma(d / 2)}{2 \pi^{d / 2}}

    References:
        Hyperspherical Variational Auto-Encoders (Davidson et al., 2018) https://arxiv.org/abs/1804.00891

    Arguments:
        like: any tensor ``[*, d]`` with d of at least 2; its shape, type and device are taken.

    Raises:
        ValueError: for vectors of one element.

    Example:
        >>> UniformOnSphere(torch.zeros(3)).log_prob(torch.tensor([1.0, 0.0, 0.0]))
        tensor(-2.5310)
    """

    arg_constraints: ClassVar[dict] = {}
    support = constraints.sphere
    has_rsample = True

    def __init__(self, like: Tensor, validate_args: bool | None = None) -> None:
        if like.dim() < 1 or like.shape[-1] < 2:
            raise ValueError(f"a sphere needs at least two dimensions, got a tensor of shape {list(like.shape)}")
        self.like = like.detach()
        super().__init__(like.shape[:-1], like.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> UniformOnSphere:
        return UniformOnSphere(self.like.expand(*batch_shape, -1), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return normalize(torch.randn(shape, dtype=self.like.dtype, device=self.like.device), dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return self.like.new_full(shape, -self._log_area())

    def entropy(self) -> Tensor:
        return self.like.new_full(self.batch_shape, self._log_area())

    def _log_area(self) -> float:
        d = self.event_shape[0]
        return math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)


@register_kl(PowerSpherical, UniformOnSphere)
def _from_uniform(q: PowerSpherical, p: UniformOnSphere) -> Tensor:
    return p.entropy() - q.entropy()
