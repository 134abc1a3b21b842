"""The unscented head: a Gaussian whose draws of a row are its sigma points."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, LowRankMultivariateNormal, MultivariateNormal, Normal, constraints

from pyro_ae.heads import Jointly
from pyro_ae.sites import elements_of


class Unscented(nn.Module):
    r"""The distribution of a Gaussian head, with sigma points in place of random draws.

    .. math:: m, \qquad m \pm \sqrt{n + \kappa} \, L_i, \quad i = 1, \ldots, n, \qquad L L^\top = \Sigma

    Particles of a row are points drawn at random without replacement, again from all once each was drawn. They are a
    quadrature, not draws from q: each by itself has q's mean and covariance (for the default kappa) and nothing else
    of it, and all 2 n + 1 together average every quadratic function exactly, so that the ELBO's KL divergence to a
    Gaussian prior is exact. ``log_prob`` is the Gaussian's; importance weights of such points are no estimate of the
    evidence, and a bound that is nonlinear in them, such as ``iwae``, is no bound.

    References:
        Unscented Autoencoder (Janjos, Rosenbaum, Dolgov and Zoellner, 2023) https://arxiv.org/abs/2306.05256
        A New Extension of the Kalman Filter to Nonlinear Systems (Julier and Uhlmann, 1997)
        https://doi.org/10.1117/12.280797

    Arguments:
        head: features ``[*, h]`` to Normal or MultivariateNormal vectors, such as ``MeanField``.
        kappa: how far points are from the mean. The weights of the unscented transform, kappa / (n + kappa) for the
            mean and half of 1 / (n + kappa) for the others, are all equal for 1/2: there the plain average of particles
            is right. For 0 the mean has no weight and is left out, and the average is right as well. For another kappa
            the average has 2 (n + kappa) / (2 n + 1) times the covariance; the authors' code has 1e-3.

    Raises:
        ValueError: for a negative kappa; when called, for a head whose distribution is not Gaussian.
    """

    def __init__(self, head: nn.Module, *, kappa: float = 0.5) -> None:
        super().__init__()
        if not kappa >= 0:
            raise ValueError(f"kappa must be at least 0, got {kappa!r}")
        self.head, self.kappa = head, kappa

    def forward(self, features: Tensor) -> Distribution:
        return _SigmaPoints(self.head(features), self.kappa)


class _SigmaPoints(Jointly):
    """A Gaussian ``q`` over vectors, drawn by its sigma points."""

    support = constraints.real_vector

    def __init__(self, q: Distribution, kappa: float) -> None:
        base = elements_of(q)
        if not isinstance(base, Normal | MultivariateNormal | LowRankMultivariateNormal) or len(q.event_shape) != 1:
            raise ValueError(
                f"sigma points are of Normal or MultivariateNormal vectors, and the head gave {q} with event shape "
                f"{tuple(q.event_shape)}: use a head such as MeanField(features, d) over real vectors"
            )
        self.q, self.base, self.kappa = q, base, kappa
        super().__init__(q.batch_shape, q.event_shape)

    def draw(self, copies: int, rows: torch.Size) -> Tensor:
        loc, (n,) = self.base.loc, self.event_shape
        arms = math.sqrt(n + self.kappa) * torch.eye(n, dtype=loc.dtype, device=loc.device)
        nodes = torch.cat([arms[:0] if self.kappa == 0 else arms[:1] * 0, arms, -arms])
        rounds = -(-copies // len(nodes))
        order = torch.rand(rounds, len(nodes), *rows, device=loc.device).argsort(1).flatten(0, 1)[:copies]
        noise = nodes[order]
        if isinstance(self.base, Normal):
            return loc + self.base.scale * noise
        return loc + (self.base.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)  # points along L's columns

    def log_prob(self, value: Tensor) -> Tensor:
        return self.q.log_prob(value)

    @property
    def mean(self) -> Tensor:
        return self.q.mean.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        return self.q.variance.expand(self.batch_shape + self.event_shape)


def example() -> tuple[nn.Module, nn.Module, Tensor]:
    """A model, an amortised guide with this head, and 16 rows: the draws are not for importance weights."""
    from pyro_ae.nn import MLP

    from ..models.ppca import example as ppca
    from .amortized import Amortized
    from .mean_field import MeanField

    model, _, x = ppca()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return model, Amortized(MLP(5, [16]), Unscented(MeanField(16, 2))), x
