"""The structured guide: the model's own prior, multiplied by potentials that are read off each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from pyro_ae.conjugate import AllDrawn, Multiplied
from pyro_ae.sites import Recorder, is_latent
from pyro_ae.types import Guide, Head, Model

from .amortized import Amortized


class Structured(Amortized):
    r"""A guide that keeps the structure of the model's prior, and lets the row speak by conjugate potentials.

    .. math:: q(z_l \mid z_{>l}, x) \propto p(z_l \mid z_{>l}) \, \psi_l(z_l; x)

    The model is run as far as its last latent of a row, and each latent with a potential is drawn from the product of
    its prior and that potential. So a prior that is learnt or depends on other latents is met by the guide at once, and
    a ladder of latents is drawn from the top, precision-weighted. What has no potential needs ``shared``. A potential
    that became flat has hardly a gradient back: where likelihoods are sharp, begin with narrow ones.

    References:
        Composing Graphical Models with Neural Networks for Structured Representations and Fast Inference
        (Johnson et al., 2016) https://arxiv.org/abs/1603.06277;
        Ladder Variational Autoencoders (Sonderby, Raiko, Maaloe, Sonderby and Winther, 2016)
        https://arxiv.org/abs/1602.02282

    Arguments:
        model: of the fit.
        encoder: a network from rows ``[B, ...]`` to features ``[B, h]``.
        potential: a head whose density is the potential, such as ``MeanField`` or ``FullRank`` for a normal prior; or
            a mapping of sites to such heads.
        site: name of the latent site, where ``potential`` is no mapping.
        inputs: which of the model's arguments the encoder sees; the first by default.
        shared: a guide of the latents that have no potential.

    Raises:
        ValueError: when called, for a prior and a potential of different families, and for latents without either.
    """

    def __init__(
        self,
        model: Model,
        encoder: nn.Module,
        potential: Head | Mapping[str, nn.Module],
        *,
        site: str = "z",
        inputs: Callable[..., Tensor] | None = None,
        shared: Guide | None = None,
    ) -> None:
        super().__init__(encoder, potential, site=site, inputs=inputs)
        self.shared = shared
        self._model = (model,)  # no part of this module, as its parameters are the model's

    def forward(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        features = self.features(self.rows(args, kwargs))
        with Recorder() as known:
            if self.shared is not None:
                self.shared(*args, **kwargs)
        values = {n: s["value"] for n, s in known.sites.items() if is_latent(s)}
        potentials = {site: head(features) for site, head in self.site_heads}
        try:
            with Multiplied(potentials, values):
                self._model[0](*args, **kwargs)
        except AllDrawn:
            return
        raise ValueError(f"the model has no latent site {', '.join(map(repr, potentials))} that the potentials are for")


def example() -> tuple[nn.Module, Structured, Tensor]:
    """A model of two layers, its guide and 16 rows."""
    from pyro_ae.nn import MLP

    from ..models.deep_vae import example as deep_vae
    from .mean_field import MeanField

    model, _, x = deep_vae()
    heads = {"z2": MeanField(8, 2), "z1": MeanField(8, 4)}
    return model, Structured(model, MLP(12, [8]), heads), x
