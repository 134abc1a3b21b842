"""The amortised guide: an encoder and heads, from a row to the distribution of its latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
from torch import Tensor, nn

from pyro_ae.data import fill_missing
from pyro_ae.heads import beside
from pyro_ae.plates import batch_plate
from pyro_ae.types import Head


class Amortized(nn.Module):
    r"""A guide that reads the distribution of the latents off each row.

    .. math:: z_n \sim \text{head}(\text{encoder}(x_n))

    With several latents, each has a head of its own on the same features; ``chained``, a head sees the latents
    before it as well, so that the order of the heads is that of the sites, such as top-down. Where values are missing
    the encoder is given zeros and, as a second input, the mask of what is observed.

    References:
        Auto-Encoding Variational Bayes (Kingma and Welling, 2014) https://arxiv.org/abs/1312.6114

    Arguments:
        encoder: a network from rows ``[B, ...]`` to features ``[B, h]``.
        head: features ``[*, h]`` to a distribution with batch ``[*]``, such as ``MeanField``; or, for several latents,
            a mapping of site names to such heads.
        site: name of the latent site, where ``head`` is no mapping.
        plate: name of the plate of the rows.
        inputs: which of the model's arguments the encoder sees, as a function of all of them; the first by default.
        chained: whether a head takes the features with the latents before it beside them, ``[*, h + d_1 + ...]``.

    Raises:
        ValueError: for no head; when called, for rows that are not floating point, or not given.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: Head | Mapping[str, nn.Module],
        *,
        site: str = "z",
        plate: str = "data",
        inputs: Callable[..., Tensor] | None = None,
        chained: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(head, Mapping) and not head:
            raise ValueError("the guide needs a head for each latent site, and got none")
        self.encoder = encoder
        self.head = nn.ModuleDict(head) if isinstance(head, Mapping) else head
        self.site = site
        self.plate = plate
        self.inputs = inputs
        self.chained = chained

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = self.rows(args, kwargs)
        features = self.features(x)
        with batch_plate(x, name=self.plate):
            for site, head in self.site_heads:
                q = head(features)
                z = pyro.sample(site, q)
                if self.chained:
                    features = beside(features, z, len(q.event_shape))
        return z

    def features(self, x: Tensor) -> Tensor:
        """What the encoder makes of rows ``[B, ...]``, of which some values may be missing: ``[B, h]``."""
        filled, observed = fill_missing(x)
        return self.encoder(filled) if observed is None else self.encoder(filled, observed)

    def rows(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The rows that the encoder sees, of the model's arguments."""
        tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        x = next(tensors, None) if self.inputs is None else self.inputs(*args, **kwargs)
        if not isinstance(x, Tensor):
            raise ValueError(f"the guide of {self._sites} needs the rows to read its distribution off, and got none")
        if not x.is_floating_point():
            raise ValueError(
                f"the encoder of {self._sites} needs floating point rows and got {x.dtype} of shape {tuple(x.shape)}: "
                "scale images as x.float() / 255, or pass inputs=lambda x: x.float() for counts"
            )
        return x

    @property
    def site_heads(self) -> list[tuple[str, Head]]:
        """The latent sites and their heads, in order."""
        return list(self.head.items()) if isinstance(self.head, nn.ModuleDict) else [(self.site, self.head)]

    @property
    def _sites(self) -> str:
        names = [site for site, _ in self.site_heads]
        return f"site{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"


def example() -> tuple[nn.Module, Amortized, Tensor]:
    """A model, its guide and 16 rows."""
    from ..models.ppca import example as ppca

    model, guide, x = ppca()
    return model, guide, x  # type: ignore[return-value]
