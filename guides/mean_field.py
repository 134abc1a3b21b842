"""The mean-field head: independent normal latents, on any support."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to, constraints


class MeanField(nn.Module):
    r"""Features to independent normal distributions, carried onto the support of the latent.

    .. math:: z = T(m(h) + s(h) \, \epsilon), \qquad \epsilon \sim N(0, I)

    T is the identity for real latents. The scale is exp of a linear map of the features, kept within (e^-7, e^5).

    References:
        Auto-Encoding Variational Bayes (Kingma and Welling, 2014) https://arxiv.org/abs/1312.6114

    Arguments:
        features: size h of the features ``[*, h]``.
        latent: size d of the latent; the event shape is ``[d]``.
        support: a constraint of torch that acts element by element, such as ``constraints.positive``.

    Raises:
        ValueError: for a support whose transform mixes elements, such as the simplex.
    """

    def __init__(self, features: int, latent: int, *, support: constraints.Constraint = constraints.real) -> None:
        super().__init__()
        self.transform = biject_to(support)
        if self.transform.domain.event_dim or self.transform.codomain.event_dim:
            raise ValueError(f"the support must act element by element, and {support} does not")
        self.linear = nn.Linear(features, 2 * latent)

    def forward(self, features: Tensor) -> Distribution:
        loc, log_scale = self.linear(features).chunk(2, -1)
        # far outside this range a scale over- or underflows; inside it nothing changes but by less than 1e-3
        log_scale = torch.clamp(log_scale, -7.0, 5.0)
        base = dist.Normal(loc, log_scale.exp())
        if self.transform.bijective and self.transform == biject_to(constraints.real):
            return base.to_event(1)
        return dist.TransformedDistribution(base, [self.transform]).to_event(1)


def example() -> tuple[MeanField, Tensor]:
    """A small instance and features for 16 rows."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return MeanField(8, 2), torch.randn(16, 8)
