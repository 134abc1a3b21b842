"""The point head: no spread, for encoders that are deterministic."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution


class Point(nn.Module):
    r"""Features to a point, which makes the guide deterministic.

    .. math:: z = m(h)

    It is for losses that have no KL divergence of the rows, such as ``wasserstein``. A point has no density, so the
    ELBO and its kin are no bounds with it.

    References:
        Wasserstein Auto-Encoders (Tolstikhin et al., 2018) https://arxiv.org/abs/1711.01558

    Arguments:
        features: size h of the features ``[*, h]``.
        latent: size d of the latent; the event shape is ``[d]``.
    """

    def __init__(self, features: int, latent: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, latent)

    def forward(self, features: Tensor) -> Distribution:
        return dist.Delta(self.linear(features), event_dim=1)


def example() -> tuple[Point, Tensor]:
    """A small instance and features for 16 rows."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Point(8, 2), torch.randn(16, 8)
