"""Probabilistic principal component analysis: the linear Gaussian model, with everything in closed form."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ae.data import observe
from pyro_ae.plates import batch_plate


class PPCA(nn.Module):
    r"""Probabilistic PCA.

    .. math:: z \sim N(0, I), \qquad x \mid z \sim N(W z + \mu, \sigma^2 I)

    Its evidence and its posterior are known, so it is the yardstick for bounds and guides.

    References:
        Probabilistic Principal Component Analysis (Tipping and Bishop, 1999)
        https://doi.org/10.1111/1467-9868.00196

    Arguments:
        features: size of x.
        latent: size of z.
        noise: initial standard deviation of x given z.
    """

    def __init__(self, features: int, latent: int, noise: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, latent) / math.sqrt(latent))
        self.mean = nn.Parameter(torch.zeros(features))
        self.log_noise = nn.Parameter(torch.tensor(math.log(noise)))

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        with batch_plate(x, size):
            latent = self.weight.new_zeros(self.weight.shape[1])
            z = pyro.sample("z", dist.Normal(latent, 1.0).to_event(1))
            return observe("x", dist.Normal(z @ self.weight.T + self.mean, self.log_noise.exp()).to_event(1), x)

    def marginal(self) -> dist.LowRankMultivariateNormal:
        """The exact distribution of a row, event ``[features]``; its ``log_prob`` is the evidence in nats."""
        return dist.LowRankMultivariateNormal(self.mean, self.weight, (2 * self.log_noise).exp().expand_as(self.mean))

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """The exact posterior of z given rows.

        Arguments:
            x: ``[*, features]``.
        """
        precision = torch.eye(self.weight.shape[1]) + self.weight.T @ self.weight * (-2 * self.log_noise).exp()
        covariance = torch.linalg.inv(precision)
        loc = (x - self.mean) @ self.weight @ covariance * (-2 * self.log_noise).exp()
        return dist.MultivariateNormal(loc, covariance)


def example() -> tuple[PPCA, nn.Module, Tensor]:
    """A small instance, a guide for it, and 16 rows."""
    from pyro_ae.nn import MLP

    from ..guides.amortized import Amortized
    from ..guides.mean_field import MeanField

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = PPCA(features=5, latent=2)
        guide = Amortized(MLP(5, [16]), MeanField(16, 2))
        x = model.marginal().sample((16,))
    return model, guide, x
