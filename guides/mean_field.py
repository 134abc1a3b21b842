"""The mean-field head: independent normal latents, on any support."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_ae.heads import Readout, free_size, onto, scale_of


class MeanField(nn.Module):
    r"""Features to independent normal distributions, carried onto the support of the latent.

    .. math:: z = T(m(h) + s(h) \, \epsilon), \qquad \epsilon \sim N(0, I)

    T is the identity for real latents. The scale is exp of a linear map of the features, kept within (e^-7, e^5).

    References:
        Auto-Encoding Variational Bayes (Kingma and Welling, 2014) https://arxiv.org/abs/1312.6114

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
        self.linear = Readout(features, 2 * free_size(latent, support))

    def forward(self, features: Tensor) -> Distribution:
        return self.distribution(self.linear(features))

    def distribution(self, parameters: Tensor) -> Distribution:
        """The distribution that parameters ``[*, 2 m]`` stand for: m locations and m logarithms of scales."""
        loc, log_scale = parameters.chunk(2, -1)
        return onto(dist.Normal(loc, scale_of(log_scale)).to_event(1), self.latent, self.support)


def example() -> tuple[MeanField, Tensor]:
    """A small instance and features for 16 rows."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return MeanField(8, 2), torch.randn(16, 8)
