"""Several guides as one, such as one for the shared latents and one for those of the rows."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ae.types import Guide


class Together(nn.Module):
    r"""Guides over different latents of one model, run one after the other, such as ``Shared`` and ``Amortized``.

    .. math:: q(w, z \mid x) = q(w) \, q(z \mid x)

    References:
        Stochastic Variational Inference (Hoffman et al., 2013) https://jmlr.org/papers/v14/hoffman13a.html

    Arguments:
        guides: callables with the model's arguments, each of which samples some of its latents.
    """

    def __init__(self, *guides: Guide) -> None:
        super().__init__()
        # modules are registered so that their parameters are found; functions are only called
        self.parts = nn.ModuleList(g for g in guides if isinstance(g, nn.Module))
        self.guides = [None if isinstance(g, nn.Module) else g for g in guides]

    def forward(self, *args: Any, **kwargs: Any) -> None:
        modules = iter(self.parts)
        for guide in self.guides:
            (next(modules) if guide is None else guide)(*args, **kwargs)


def example() -> tuple[Any, Together, Tensor]:
    """A model with a shared and a local latent, a guide for both, and 16 rows."""
    from pyro_ae.data import observe
    from pyro_ae.nn import MLP
    from pyro_ae.plates import batch_plate

    from .amortized import Amortized
    from .mean_field import MeanField
    from .shared import Shared

    def model(x: Tensor | None = None, *, size: int = 1) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with batch_plate(x, size):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            observe("x", dist.Normal(mean + z, 0.5).to_event(1), x)

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        guide = Together(Shared(model), Amortized(MLP(3, [8]), MeanField(8, 3)))
        x = torch.randn(16, 3)
    return model, guide, x
