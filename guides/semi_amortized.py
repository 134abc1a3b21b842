"""The semi-amortised guide: an encoder's answer, refined for each row by a few steps of gradient ascent."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_ae.data import Call
from pyro_ae.density import weigh
from pyro_ae.plates import batch_plate, isolated
from pyro_ae.sites import Layout, inspect_sites
from pyro_ae.types import Model

from .amortized import Amortized


class SemiAmortized(nn.Module):
    r"""A guide whose distribution of each row climbs the ELBO from where the encoder put it.

    .. math::
        \lambda_0 = \text{encoder}(x), \qquad
        \lambda_{t+1} = \lambda_t + \eta \, \nabla_\lambda \mathcal{L}(x, \lambda_t)

    In training the gradient goes through the steps, to the encoder and to the model. Used on a guide that is trained,
    with many small steps, it shows how much of a gap is the encoder's: the amortisation gap. Where the family cannot
    be exact, the noise of the last steps is left in the answer: then take smaller steps, or more particles.

    References:
        Semi-Amortized Variational Autoencoders (Kim, Wiseman, Miller, Sontag and Rush, 2018)
        https://arxiv.org/abs/1802.02550

    Arguments:
        model: of the fit, whose latents are those of the guide.
        guide: an encoder and a head whose parameters can be moved, such as ``MeanField`` or ``FullRank``.
        steps: of gradient ascent.
        lr: size of a step, for one row's ELBO in nats.
        particles: draws for the gradient of a step.
        clip: largest norm of a row's gradient.

    Raises:
        ValueError: for values out of range, or a head without parameters of a row; when called, for a model with
            latents that the guide does not sample.
    """

    def __init__(
        self,
        model: Model,
        guide: Amortized,
        *,
        steps: int = 10,
        lr: float = 0.02,
        particles: int = 1,
        clip: float = 5.0,
    ) -> None:
        super().__init__()
        for name, value in {"steps": steps, "lr": lr, "particles": particles, "clip": clip}.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        head: Any = guide.head
        if not hasattr(head, "linear") or not hasattr(head, "distribution"):
            raise ValueError(
                f"{type(head).__name__} has no parameters of a row to refine: use a head that has, such as "
                "MeanField, FullRank, LowRank or Mixture"
            )
        self.guide = guide
        self.steps, self.lr, self.particles, self.clip = steps, lr, particles, clip
        self._model = (model,)  # no part of this module, as its parameters are the model's
        self._layout: Layout | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        guide = self.guide
        x = guide.rows(args, kwargs)
        head: Any = guide.head
        parameters = head.linear(guide.features(x))
        through = torch.is_grad_enabled()
        if not through:
            parameters = parameters.detach()
        with isolated(), torch.enable_grad():
            for _ in range(self.steps):
                gradient = self._gradient(parameters, x, Call(args, kwargs), through)
                norm = gradient.norm(dim=-1, keepdim=True)
                parameters = parameters + self.lr * gradient * (self.clip / norm.clamp(min=self.clip))
        with batch_plate(x, name=guide.plate):
            return pyro.sample(guide.site, head.distribution(parameters))

    def _gradient(self, parameters: Tensor, x: Tensor, batch: Call, through: bool) -> Tensor:
        """Of each row's ELBO by its parameters ``[B, p]``, by the draws alone: without noise where q is exact."""
        guide, head = self.guide, self.guide.head
        moved = parameters.clone().requires_grad_()  # the draws come from it, and their density from what it copies

        def local(*args: Any, **kwargs: Any) -> None:
            with batch_plate(x, name=guide.plate):
                pyro.sample(guide.site, head.distribution(moved))  # type: ignore

        self._layout = self._layout or inspect_sites(self._model[0], local, batch)
        weights = weigh(self._model[0], local, batch, self.particles, layout=self._layout)
        log_q = head.distribution(parameters).log_prob(weights.values(guide.site))  # type: ignore
        bound = (weights.gather(lambda run: run.log_p) - log_q).mean(0).sum()
        return torch.autograd.grad(bound, moved, create_graph=through)[0]


def example() -> tuple[Any, SemiAmortized, Tensor]:
    """A model, its guide and 16 rows."""
    from ..models.ppca import example as ppca

    model, guide, x = ppca()
    return model, SemiAmortized(model, guide, steps=2), x  # type: ignore[arg-type]
