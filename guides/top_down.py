"""The top-down guide: features go up from the row, and the latents are drawn from the top down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_ae.heads import beside
from pyro_ae.plates import batch_plate

from .amortized import Amortized


class TopDown(Amortized):
    r"""Encoders one upon the other, and heads that also see the latent above, for a model such as ``DeepVAE``.

    .. math::
        h_1 = e_1(x), \quad h_l = e_l(h_{l-1}), \qquad
        q(z_1, \ldots, z_L \mid x) = q(z_L \mid h_L) \prod_{l<L} q(z_l \mid h_l, z_{l+1})

    Each latent is drawn given the row and the latent that generated it, as the posterior has it, so that upper layers
    are used more than with ``BottomUp``. The sites are ``"z1"`` to ``"zL"``.

    References:
        Ladder Variational Autoencoders (Sonderby, Raiko, Maaloe, Sonderby and Winther, 2016)
        https://arxiv.org/abs/1602.02282

    Arguments:
        first: an encoder from rows ``[B, ...]`` to features ``[B, h_1]``, and a head of features ``[*, h_1 + d_2]``.
        above: from the bottom up, encoders from the features below to features ``[*, h_l]``, and heads of features
            ``[*, h_l + d_{l+1}]``; that of the top layer of ``[*, h_L]``.
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
        self.encoders = nn.ModuleList(encoder for encoder, _ in above)
        self.heads = nn.ModuleList(head for _, head in above)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = self.rows(args, kwargs)
        features = [self.features(x)]
        for encoder in self.encoders:
            features.append(encoder(features[-1]))
        heads = [self.head, *self.heads]
        with batch_plate(x, name=self.plate):
            h = features[-1]
            for layer in range(len(heads), 0, -1):
                q = heads[layer - 1](h)
                z = pyro.sample(f"z{layer}", q)
                if layer > 1:
                    h = beside(features[layer - 2], z, len(q.event_shape))
        return z


def example() -> tuple[nn.Module, TopDown, Tensor]:
    """A model of two layers, its guide and 16 rows."""
    from pyro_ae.nn import MLP

    from ..models.deep_vae import example as deep_vae
    from .mean_field import MeanField

    model, _, x = deep_vae()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        guide = TopDown((MLP(12, [8]), MeanField(10, 4)), (MLP(8, [8]), MeanField(8, 2)))
    return model, guide, x
