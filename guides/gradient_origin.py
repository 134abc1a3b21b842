"""The gradient-origin guide: no encoder, as the code of a row is its likelihood's gradient at the origin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ae.heads import event_of
from pyro_ae.plates import batch_plate, isolated
from pyro_ae.sites import Recorder, is_latent, pointwise_log_prob, quote
from pyro_ae.types import Head, Model


class GradientOrigin(nn.Module):
    r"""A guide that finds the latent of a row by one step from the origin, up its log-likelihood.

    .. math:: h_n = \eta \, \nabla_z \log p(x_n \mid z) \big|_{z = 0}, \qquad z_n = h_n \text{ or }
        z_n \sim \text{head}(h_n)

    The model learns through the step too, by second derivatives. Without a head the latent is a point, for losses that
    have no KL divergence, such as ``wasserstein(weight=0.0)``; with ``MeanField(d, d)`` the guide is variational and
    makes its model a VAE. There the authors' code starts the step above the head, from features of zero, with noise and
    with the KL divergence; here it starts from the latent. A row's code depends on that row alone, unless the model
    itself ties rows together, as batch norm does.

    References:
        Gradient Origin Networks (Bond-Taylor and Willcocks, 2021) https://arxiv.org/abs/2007.02798

    Arguments:
        model: the model that the guide is for, with one latent and without shared ones. The guide does not own it: its
            parameters are learnt as the model's.
        latent: size d of the latent, or its event shape.
        head: features ``[*, n]``, the gradient with its n elements in a row, to a distribution with batch ``[*]``.
        site: name of the latent site.
        plate: name of the plate of the rows.
        step: eta. The gradient is of a row's log-likelihood, in nats; the paper's is of a mean over pixels, so for a
            step like its own divide by the number of pixels, and by twice a normal likelihood's precision.

    Raises:
        ValueError: for a step that is not positive; when called, without rows, or for a model with other latents.
    """

    def __init__(
        self,
        model: Model,
        latent: int | Sequence[int],
        head: Head | None = None,
        *,
        site: str = "z",
        plate: str = "data",
        step: float = 1.0,
    ) -> None:
        super().__init__()
        if not step > 0:
            raise ValueError(f"step must be positive, got {step!r}")
        self._model = (model,)  # as an attribute its parameters would be the guide's, too
        self.latent, self.head, self.site, self.plate, self.step = event_of(latent), head, site, plate, step

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if x is None:
            raise ValueError(f"the guide of site '{self.site}' needs rows, whose likelihood it climbs, and got none")
        point = self.step * self._gradient(x, args, kwargs)
        with batch_plate(x, name=self.plate):
            if self.head is None:
                return pyro.sample(self.site, dist.Delta(point, event_dim=len(self.latent)))
            return pyro.sample(self.site, self.head(point.reshape(len(x), -1)))

    def _gradient(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Of each row's log-likelihood by its latent, ``[B, *latent]``; no handler outside sees this run."""
        learning = torch.is_grad_enabled()
        dtype = x.dtype if x.is_floating_point() else None
        with torch.enable_grad():
            origin = torch.zeros(x.shape[:1] + self.latent, dtype=dtype, device=x.device, requires_grad=True)
            with isolated(), Recorder({self.site: origin}) as p:
                self._model[0](*args, **kwargs)
            latents = [n for n, s in p.sites.items() if is_latent(s)]
            if latents != [self.site]:
                raise ValueError(
                    f"the guide of site '{self.site}' is for a model with that latent alone, and this one has "
                    f"{quote(latents) or 'none'}: name the site, and observe or sum out the others"
                )
            # a sum over rows, not a mean: else a code would shrink with the size of its batch
            likelihood = torch.stack([pointwise_log_prob(s).sum() for s in p.scored if s["is_observed"]]).sum()
            return torch.autograd.grad(likelihood, origin, create_graph=learning)[0]


def example() -> tuple[nn.Module, GradientOrigin, Tensor]:
    """A model, its guide with a mean-field head, and 16 rows."""
    from ..models.ppca import example as ppca
    from .mean_field import MeanField

    model, _, x = ppca()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return model, GradientOrigin(model, 2, MeanField(2, 2)), x
