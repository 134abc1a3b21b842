"""A guide of the latents that all rows share: one distribution over the unconstrained space of any model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import AffineTransform

from pyro_ae.types import Head, Model
from pyro_ae.unconstrained import Unconstrained

from .mean_field import MeanField


class Shared(Unconstrained):
    r"""Any head, such as ``FullRank``, ``Mixture`` or ``Flow``, over all of a model's latents outside the rows' plate.

    .. math:: u = m + s \, \epsilon, \quad \epsilon \sim \text{head}, \qquad z_i = T_i(u_i)

    Each T maps to the support of its latent. The center m begins at the median of the prior, or where ``start`` says.
    Latents of the rows and enumerated ones are left to other guides: put both into ``Together``. Its parameters are
    made when it is first called, or when a saved state is loaded.

    References:
        Automatic Differentiation Variational Inference (Kucukelbir, Tran, Ranganath, Gelman and Blei, 2017)
        https://arxiv.org/abs/1603.00788

    Arguments:
        model: whose latents it samples.
        head: makes a head without features, from their number 0 and that of the unconstrained latents: a class, or a
            partial of one, such as ``partial(LowRank, rank=5)``.
        plate: name of the plate of the rows; None for a guide of their latents, too.
        start: initial value of a site, one of ``pyro.infer.autoguide``'s ``init_to_...`` functions.
        scale: initial s, in unconstrained space.

    Raises:
        ValueError: for a scale that is not positive; when first called, for a model without such latents.
    """

    def __init__(
        self,
        model: Model,
        head: Callable[[int, int], Head] = MeanField,
        *,
        plate: str | None = "data",
        start: Callable[..., Any] = init_to_median,
        scale: float = 0.1,
    ) -> None:
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale!r}")
        super().__init__(model, plate=plate, start=start)
        self.make, self.scale = head, scale

    def build(self, size: int) -> None:
        self.center = nn.Parameter(torch.zeros(size))
        self.log_scale = nn.Parameter(torch.full((size,), math.log(self.scale)))
        self.head = self.make(0, size)

    def get_posterior(self, *args: Any, **kwargs: Any) -> Distribution:
        free = self.head(self.center.new_zeros(0))
        shift = AffineTransform(self.center, self.log_scale.exp(), event_dim=1, cache_size=1)
        return dist.TransformedDistribution(free, [shift])


def example() -> tuple[Any, Shared, Tensor]:
    """A model with a real and a positive latent, a guide for it, and 16 rows."""
    from pyro_ae.plates import batch_plate

    from .full_rank import FullRank

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.Exponential(1.0))
        with batch_plate(x):
            pyro.sample("x", dist.Normal(mean, scale.unsqueeze(-1)).to_event(1), obs=x)

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return model, Shared(model, FullRank), torch.randn(16, 3)
