"""The power spherical head: codes on the unit sphere, around a direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import normalize, softplus

from pyro_ae import spheres
from pyro_ae.heads import Readout


class PowerSpherical(nn.Module):
    r"""Features to a power spherical distribution of unit vectors.

    .. math:: q(z \mid x) \propto (1 + \mu(h)^\top z)^{\kappa(h)}, \qquad \kappa > 1

    Its KL divergence from ``pyro_ae.spheres.UniformOnSphere``, the model's prior, is in closed form.

    References:
        The Power Spherical distribution (De Cao and Aziz, 2020) https://arxiv.org/abs/2006.04437
        Hyperspherical Variational Auto-Encoders (Davidson et al., 2018) https://arxiv.org/abs/1804.00891

    Arguments:
        features: size h of the features ``[*, h]``.
        latent: size d of the latent, at least 2; the sphere has d - 1 dimensions.

    Raises:
        ValueError: for another latent; when called, for features of another width.
    """

    def __init__(self, features: int, latent: int) -> None:
        super().__init__()
        if not isinstance(latent, int) or latent < 2:
            raise ValueError(
                f"latent must be a size of at least 2, got {latent!r}: in one dimension there are two points"
            )
        self.linear = Readout(features, latent + 1)

    def forward(self, features: Tensor) -> Distribution:
        return self.distribution(self.linear(features))

    def distribution(self, parameters: Tensor) -> Distribution:
        """The distribution of parameters ``[*, d + 1]``: a direction of any length, and the concentration's."""
        return spheres.PowerSpherical(normalize(parameters[..., :-1], dim=-1), softplus(parameters[..., -1]) + 1)


def example() -> tuple[PowerSpherical, Tensor]:
    """A small instance and features for 16 rows."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return PowerSpherical(8, 3), torch.randn(16, 8)
