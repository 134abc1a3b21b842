"""Losses that match the aggregate posterior, the mixture of all rows' codes, to the prior."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Call, call_with
from ..density import Pass, weigh
from ..divergences import imq, mmd
from ..estimators import kl, reconstruction, refuse_discrete
from ..schedules import Schedule, now
from ..sites import Recorder
from ..types import Guide, Model, Sides
from .kl import only_latent


class aggregate(nn.Module):
    r"""Reconstruction, a share of the KL divergence, and a divergence of the aggregate posterior from the prior.

    .. math::
        E_q[\log p(x \mid z)] - \beta \, KL\big(q(z \mid x) \,\|\, p(z)\big) - \lambda \, D\big(q(z), p(z)\big)

    D compares the codes of a batch with as many draws from the prior, so it is for any prior that can be sampled. It
    counts once for each row, so lambda means the same for every size of batch and data. With beta 0 the guide may be
    deterministic.

    References:
        Wasserstein Auto-Encoders (Tolstikhin et al., 2018) https://arxiv.org/abs/1711.01558

    Arguments:
        divergence: two samples ``[n, d]``, codes first, to a scalar, such as ``mmd()`` or ``sliced_wasserstein()``. An
            ``adversarial`` one is trained along the way; its parameters are called ``loss.*``.
        weight: lambda, in nats per row, or a schedule of it.
        beta: weight of the KL divergence, or a schedule of it.
        site: the latent; the only one by default.
        particles: codes of each row.

    Raises:
        ValueError: for negative weights; when called, for several latents.

    Example:
        >>> from pyro_ae.models import ppca
        >>> aggregate(mmd(), weight=10.0)(*ppca.example()).shape
        torch.Size([])
    """

    def __init__(
        self,
        divergence: Callable[[Tensor, Tensor], Tensor],
        *,
        weight: Schedule = 10.0,
        beta: Schedule = 0.0,
        site: str | None = None,
        particles: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("beta", beta)):
            if not callable(value) and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        self.divergence, self.weight, self.beta, self.site, self.particles = divergence, weight, beta, site, particles

    def forward(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Tensor | Sides:
        batch = Call(args, kwargs)
        weights = weigh(model, guide, batch, self.particles)
        refuse_discrete(weights, "aggregate")
        name = only_latent(weights.passes[0].latents, self.site, "aggregate")["name"]
        likelihood, beta = weights.gather(reconstruction).mean(0), now(self.beta)
        loss = -likelihood.sum()
        if callable(self.beta) or beta != 0:  # a deterministic guide has no KL divergence
            loss = loss + beta * weights.gather(kl).mean(0).sum()
        codes = torch.cat([_rows(run.values[name], run, name) for run in weights.passes])
        prior = torch.cat([_rows(_prior(model, batch, run, name), run, name) for run in weights.passes])
        factor = weights.scale * now(self.weight) * likelihood.numel()
        try:
            loss = weights.scale * loss + factor * self.divergence(codes, prior)
        except ValueError as error:
            error.add_note(
                f"This was a batch of {likelihood.numel()} rows; the last of an epoch is smaller where batch_size does "
                "not divide the rows: choose another, or a biased divergence such as mmd(unbiased=False)."
            )
            raise
        critic = getattr(self.divergence, "critic_loss", None)
        return loss if critic is None else Sides(loss, loss, critic(codes, prior))

    def __repr__(self) -> str:
        return f"aggregate({self.divergence!r}, weight={self.weight!r}, beta={self.beta!r})"


def _rows(value: Tensor, run: Pass, name: str) -> Tensor:
    dims = next(s for s in run.latents if s["name"] == name)["fn"].event_dim
    return value.reshape(value.shape[: value.dim() - dims].numel(), -1)


class _Reached(Exception):
    """The run has come as far as it was needed."""


class _Until(Recorder):
    """Ends the run after a site, so that the decoder does not run for nothing."""

    def __init__(self, last: str) -> None:
        super().__init__()
        self.last = last

    def _pyro_post_sample(self, msg: Any) -> None:
        super()._pyro_post_sample(msg)
        if msg["name"] == self.last:
            raise _Reached


def _prior(model: Model, batch: Call, run: Pass, name: str) -> Tensor:
    """Draws of a latent from the model's prior, as many as the guide's."""
    args, kwargs = call_with(batch)
    recorder = _Until(name)
    with suppress(_Reached), run.particle_plate(), recorder:
        model(*args, **kwargs)
    return recorder.sites[name]["value"]


def info_vae(
    divergence: Callable[[Tensor, Tensor], Tensor] | None = None, *, alpha: float = 0.0, weight: float = 1000.0
) -> aggregate:
    r"""The InfoVAE's loss, with a preference for how much the code says of the row.

    .. math::
        E_q[\log p(x \mid z)] - (1 - \alpha) \, KL\big(q(z \mid x) \,\|\, p(z)\big)
        - (\alpha + \lambda - 1) \, D\big(q(z), p(z)\big)

    With alpha 1 it is the MMD-VAE, with alpha 0 and lambda 1 the ELBO.

    References:
        InfoVAE: Balancing Learning and Inference in Variational Autoencoders (Zhao, Song and Ermon, 2019)
        https://arxiv.org/abs/1706.02262

    Arguments:
        divergence: of the aggregate posterior from the prior; the squared MMD by default.
        alpha: weight of the mutual information of row and code, at most 1.
        weight: lambda, of at least 1 - alpha.

    Raises:
        ValueError: for weights out of range.

    Example:
        >>> info_vae(alpha=1.0, weight=10.0).beta
        0.0
    """
    if alpha > 1 or alpha + weight < 1:
        raise ValueError(f"alpha must be at most 1 and weight at least 1 - alpha, got {alpha!r} and {weight!r}")
    return aggregate(divergence or mmd(), weight=alpha + weight - 1, beta=1 - alpha)


def wasserstein(divergence: Callable[[Tensor, Tensor], Tensor] | None = None, *, weight: Schedule = 10.0) -> aggregate:
    r"""The Wasserstein autoencoder's loss: reconstruct, and match the codes of all rows to the prior.

    .. math:: E_q[\log p(x \mid z)] - \lambda \, D\big(q(z), p(z)\big)

    With ``mmd(imq())`` it is WAE-MMD, with ``adversarial(critic)`` WAE-GAN, with ``sliced_wasserstein()`` SWAE. The
    cost of transport is minus the likelihood's log-density: squared errors for a Normal.

    References:
        Wasserstein Auto-Encoders (Tolstikhin et al., 2018) https://arxiv.org/abs/1711.01558

    Arguments:
        divergence: of the aggregate posterior from the prior; the squared MMD with an IMQ kernel by default.
        weight: lambda, in nats per row, or a schedule of it.

    Example:
        >>> wasserstein(weight=10.0).beta
        0.0
    """
    return aggregate(divergence or mmd(imq()), weight=weight)
