"""The full-rank head: a normal distribution with any covariance, on any support."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_ae.heads import Readout, free_size, onto, scale_of


class FullRank(nn.Module):
    r"""Features to a multivariate normal distribution, carried onto the support of the latent.

    .. math:: z = T(m(h) + L(h) \, \epsilon), \qquad \epsilon \sim N(0, I)

    T is the identity for real latents, L lower triangular; its diagonal is exp of a linear map of the features, kept
    within (e^-7, e^5). The parameters of a row grow with the square of its latent: ``LowRank`` has fewer.

    References:
        Doubly Stochastic Variational Bayes for non-Conjugate Inference (Titsias and Lazaro-Gredilla, 2014)
        https://proceedings.mlr.press/v32/titsias14.html

    Arguments:
        features: size h of the features ``[*, h]``.
        latent: size d of the latent, or its event shape, such as ``()`` for a scalar.
        support: a constraint of torch, such as ``constraints.positive`` or ``constraints.simplex``.

    Raises:
        ValueError: for a support that is not continuous; when called, for features of another width.
    """

    def __init__(
        self, features: int, latent: int | Sequence[int], *, support: constraints.Constraint = constraints.real
    ) -> None:
        super().__init__()
        self.latent, self.support = latent, support
        self.size = free_size(latent, support)
        self.linear = Readout(features, 2 * self.size + self.size * (self.size - 1) // 2)

    def forward(self, features: Tensor) -> Distribution:
        return self.distribution(self.linear(features))

    def distribution(self, parameters: Tensor) -> Distribution:
        """The distribution of parameters ``[*, p]``: locations, logarithms of the diagonal, what is below it."""
        m = self.size
        loc, log_diagonal, below = parameters.split([m, m, m * (m - 1) // 2], -1)
        tril = scale_of(log_diagonal).diag_embed()
        row, column = torch.tril_indices(m, m, -1, device=loc.device)
        tril[..., row, column] = below
        return onto(dist.MultivariateNormal(loc, scale_tril=tril), self.latent, self.support)


def example() -> tuple[FullRank, Tensor]:
    """A small instance and features for 16 rows."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return FullRank(8, 2), torch.randn(16, 8)
