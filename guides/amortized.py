"""The amortised guide: an encoder and a head, from a row to the distribution of its latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
from torch import Tensor, nn

from pyro_ae.data import fill_missing
from pyro_ae.plates import batch_plate
from pyro_ae.types import Head


class Amortized(nn.Module):
    r"""A guide that reads the latent's distribution off each row.

    .. math:: z_n \sim \text{head}(\text{encoder}(x_n))

    Where values are missing the encoder is given zeros and, as a second input, the mask of what is observed.

    References:
        Auto-Encoding Variational Bayes (Kingma and Welling, 2014) https://arxiv.org/abs/1312.6114

    Arguments:
        encoder: a network from rows ``[B, ...]`` to features ``[B, h]``.
        head: features ``[*, h]`` to a distribution with batch ``[*]``, such as ``MeanField``.
        site: name of the latent site.
        plate: name of the plate of the rows.
        inputs: which of the model's arguments the encoder sees, as a function of all of them; the first by default.

    Raises:
        ValueError: when called, for rows that are not floating point, or not given.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: Head,
        *,
        site: str = "z",
        plate: str = "data",
        inputs: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.site = site
        self.plate = plate
        self.inputs = inputs

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = self._rows(args, kwargs)
        filled, observed = fill_missing(x)
        features = self.encoder(filled) if observed is None else self.encoder(filled, observed)
        with batch_plate(x, name=self.plate):
            return pyro.sample(self.site, self.head(features))

    def _rows(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        x = next(tensors, None) if self.inputs is None else self.inputs(*args, **kwargs)
        if not isinstance(x, Tensor):
            raise ValueError(
                f"the guide of site '{self.site}' needs the rows to read its distribution off, and got none"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"the encoder of site '{self.site}' needs floating point rows and got {x.dtype} of shape "
                f"{tuple(x.shape)}: scale images as x.float() / 255, or pass inputs=lambda x: x.float() for counts"
            )
        return x


def example() -> tuple[nn.Module, Amortized, Tensor]:
    """A model, its guide and 16 rows."""
    from ..models.ppca import example as ppca

    model, guide, x = ppca()
    return model, guide, x  # type: ignore[return-value]
