"""The radial head: a normal distribution that layers contract or expand around one point each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn.functional import softplus

from pyro_ae.flows import Pushforward
from pyro_ae.heads import Readout, free_size, onto, scale_of


class Radial(nn.Module):
    r"""Features to a radial flow of independent normals, carried onto the support of the latent.

    .. math:: f(z) = z + \frac{\beta(h)}{\alpha(h) + \|z - c(h)\|} \, (z - c(h)), \qquad \beta > -\alpha

    The map of each layer is inverted in closed form, so the density is known at any value.

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
            raise ValueError(f"a radial flow needs at least one layer, got {layers}")
        self.latent, self.layers, self.support = latent, layers, support
        self.size = free_size(latent, support)
        self.linear = Readout(features, 2 * self.size + layers * (self.size + 2))

    def forward(self, features: Tensor) -> Distribution:
        return self.distribution(self.linear(features))

    def distribution(self, parameters: Tensor) -> Distribution:
        """The distribution of parameters ``[*, p]``: locations, logarithms of scales; of each layer c, alpha, beta."""
        m = self.size
        loc, log_scale, rest = parameters.split([m, m, self.layers * (m + 2)], -1)
        each = (layer.split([m, 1, 1], -1) for layer in rest.chunk(self.layers, -1))
        base = dist.Normal(loc, scale_of(log_scale)).to_event(1)
        return onto(Pushforward(base, [_Radial.of(*parts) for parts in each]), self.latent, self.support)


@dataclass(frozen=True)
class _Radial:
    centre: Tensor
    alpha: Tensor
    beta: Tensor

    @classmethod
    def of(cls, centre: Tensor, alpha: Tensor, beta: Tensor) -> _Radial:
        """With alpha positive and beta above -0.999 alpha; the identity for a beta of zero."""
        width = softplus(alpha)
        return cls(centre, width, 0.999 * width * (softplus(beta + math.log(math.e - 1)) - 1))

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        away = z - self.centre
        r = torch.linalg.vector_norm(away, dim=-1, keepdim=True)
        stretch = 1 + self.beta / (self.alpha + r)
        # across the radius every direction is stretched alike, along it by the derivative of r times stretch
        log_along = torch.log1p(self.alpha * self.beta / (self.alpha + r).square())
        return self.centre + stretch * away, ((away.shape[-1] - 1) * stretch.log() + log_along).squeeze(-1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        away = x - self.centre
        rho = torch.linalg.vector_norm(away, dim=-1, keepdim=True)
        # r^2 - half r - alpha rho = 0, whose positive root is written without a difference of equal numbers
        half = rho - self.alpha - self.beta
        root = (half.square() + 4 * self.alpha * rho).sqrt()
        r = torch.where(half > 0, (root + half) / 2, 2 * self.alpha * rho / (root + half.abs()))
        z = self.centre + away / (1 + self.beta / (self.alpha + r))
        return z, self(z)[1]


def example() -> tuple[Radial, Tensor]:
    """A small instance and features for 16 rows."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Radial(8, 2, layers=3), torch.randn(16, 8)
