"""The planar head: a normal distribution that layers stretch along one direction each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn.functional import softplus

from pyro_ae.flows import Pushforward, tanh_root
from pyro_ae.heads import Readout, free_size, onto, scale_of


class Planar(nn.Module):
    r"""Features to a planar flow of independent normals, carried onto the support of the latent.

    .. math:: f(z) = z + u(h) \tanh\big(w(h)^\top z + b(h)\big), \qquad w^\top u > -1

    The map of each layer is inverted by bisection along its direction, so the density is known at any value.

    References:
        Variational Inference with Normalizing Flows (Rezende and Mohamed, 2015) https://arxiv.org/abs/1505.05770

    Arguments:
        features: size h of the features ``[*, h]``.
        latent: size d of the latent, or its event shape, such as ``()`` for a scalar.
        layers: how many.
        support: a constraint of torch, such as ``constraints.positive`` or ``constraints.simplex``.

    Raises:
        ValueError: for no layer, or a support that is not continuous; when called, for features of another width.
    """

    def __init__(
        self,
        features: int,
        latent: int | Sequence[int],
        *,
        layers: int = 8,
        support: constraints.Constraint = constraints.real,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"a planar flow needs at least one layer, got {layers}")
        self.latent, self.layers, self.support = latent, layers, support
        self.size = free_size(latent, support)
        self.linear = Readout(features, 2 * self.size + layers * (2 * self.size + 1))

    def forward(self, features: Tensor) -> Distribution:
        return self.distribution(self.linear(features))

    def distribution(self, parameters: Tensor) -> Distribution:
        """The distribution of parameters ``[*, p]``: locations, logarithms of scales; of each layer u, w and b."""
        m = self.size
        loc, log_scale, rest = parameters.split([m, m, self.layers * (2 * m + 1)], -1)
        each = (layer.split([m, m, 1], -1) for layer in rest.chunk(self.layers, -1))
        base = dist.Normal(loc, scale_of(log_scale)).to_event(1)
        return onto(Pushforward(base, [_Planar.of(*parts) for parts in each]), self.latent, self.support)


@dataclass(frozen=True)
class _Planar:
    u: Tensor
    w: Tensor
    b: Tensor

    @classmethod
    def of(cls, u: Tensor, w: Tensor, b: Tensor) -> _Planar:
        """With the part of u along w changed so that the product is above -0.999, and the same where it is zero."""
        along = (w * u).sum(-1, keepdim=True)
        allowed = 0.999 * (softplus(along + math.log(math.e - 1)) - 1)
        return cls(u + (allowed - along) * w / w.square().sum(-1, keepdim=True), w, b)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._at(z, (self.w * z).sum(-1, keepdim=True), 1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gain, target = ((self.w * v).sum(-1, keepdim=True) for v in (self.u, x))
        return self._at(x, tanh_root(target, gain, 1.0, self.b), -1)

    def _at(self, v: Tensor, along: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        height = torch.tanh(along + self.b)
        log_det = torch.log1p((self.w * self.u).sum(-1) * (1 - height.square()).squeeze(-1))
        return v + sign * self.u * height, log_det


def example() -> tuple[Planar, Tensor]:
    """A small instance and features for 16 rows."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Planar(8, 2, layers=3), torch.randn(16, 8)
