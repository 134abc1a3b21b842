"""The bottom-up guide: the first latent is read off the row, and each next one off the latent below it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
from torch import Tensor, nn

from pyro_ae.plates import batch_plate

from .amortized import Amortized


class BottomUp(Amortized):
    r"""A chain of encoders and heads, for a model with several layers of latents such as ``DeepVAE``.

    .. math:: q(z_1, \ldots, z_L \mid x) = q(z_1 \mid x) \prod_{l=2}^{L} q(z_l \mid z_{l-1})

    The sites are ``"z1"`` to ``"zL"``. Missing values are for the first encoder alone, as in ``Amortized``.

    References:
        Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016) https://arxiv.org/abs/1509.00519

    Arguments:
        first: an encoder from rows ``[B, ...]`` to features ``[B, h]``, and a head such as ``MeanField``.
        above: from the bottom up, encoders from the latent below ``[*, d]`` to features ``[*, h]``, and their heads.
        plate: name of the plate of the rows.
        inputs: which of the model's arguments the first encoder sees, as a function of all of them; the first by
            default.

    Raises:
        ValueError: when called, for rows that are not floating point, or not given.
    """

    def __init__(
        self,
        first: tuple[nn.Module, nn.Module],
        *above: tuple[nn.Module, nn.Module],
        plate: str = "data",
        inputs: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__(*first, site="z1", plate=plate, inputs=inputs)
        self.above = nn.ModuleList(nn.Sequential(encoder, head) for encoder, head in above)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = self.rows(args, kwargs)
        features = self.features(x)
        with batch_plate(x, name=self.plate):
            z = pyro.sample("z1", self.head(features))
            for layer, above in enumerate(self.above, 2):
                z = pyro.sample(f"z{layer}", above(z))
        return z


def example() -> tuple[nn.Module, BottomUp, Tensor]:
    """A model of two layers, its guide and 16 rows."""
    from ..models.deep_vae import example as deep_vae

    model, guide, x = deep_vae()
    return model, guide, x  # type: ignore[return-value]
