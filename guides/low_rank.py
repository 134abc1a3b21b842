"""The low-rank head: a normal distribution whose covariance is a diagonal and a few directions."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_ae.heads import Readout, free_size, onto, scale_of


class LowRank(nn.Module):
    r"""Features to a normal distribution with a low-rank covariance, carried onto the support of the latent.

    .. math:: z = T(m(h) + F(h) \, \eta + s(h) \, \epsilon), \qquad \eta, \epsilon \sim N(0, I)

    T is the identity for real latents, F has ``rank`` columns, and s is kept within (e^-7, e^5).

    References:
        Gaussian Variational Approximation with a Factor Covariance Structure (Ong, Nott and Smith, 2018)
        https://arxiv.org/abs/1701.03208

    Arguments:
        features: size h of the features ``[*, h]``.
        latent: size d of the latent, or its event shape, such as ``()`` for a scalar.
        rank: the number of directions, columns of F.
        support: a constraint of torch, such as ``constraints.positive`` or ``constraints.simplex``.

    Raises:
        ValueError: for a rank below 1, or a support that is not continuous; when called, for features of another width.
    """

    def __init__(
        self,
        features: int,
        latent: int | Sequence[int],
        *,
        rank: int = 2,
        support: constraints.Constraint = constraints.real,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}: MeanField has none")
        self.latent, self.rank, self.support = latent, rank, support
        self.size = free_size(latent, support)
        self.linear = Readout(features, (2 + rank) * self.size)

    def forward(self, features: Tensor) -> Distribution:
        return self.distribution(self.linear(features))

    def distribution(self, parameters: Tensor) -> Distribution:
        """The distribution of parameters ``[*, (2 + rank) m]``: locations, logarithms of scales, and F by rows."""
        loc, log_scale, factor = parameters.split([self.size, self.size, self.rank * self.size], -1)
        variance = scale_of(log_scale).square()
        free = dist.LowRankMultivariateNormal(loc, factor.unflatten(-1, (self.size, self.rank)), variance)
        return onto(free, self.latent, self.support)


def example() -> tuple[LowRank, Tensor]:
    """A small instance and features for 16 rows."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return LowRank(8, 2), torch.randn(16, 8)
