"""Matching the mixture of codes to the prior while each row's spread is kept gives a VAE better reconstructions.

References:
    How to train your VAE (Rivera, 2024) https://arxiv.org/abs/2309.13160

The objective is that of the author's code (https://github.com/marianorivera/How2TrainUrVAE): absolute errors; the KL
divergence of the normal with the mean and variance of a batch's code means from N(0, I), with weight 1; the KL of
N(0, s_b^2) from N(0, I), s_b being a row's spread, with weight 0.2; and the cross-entropy of an adversary that sees
patches of reconstructions (a PatchGAN). The mixture of the abstract has the rows' posteriors for its components, and
its variance also has their spreads in it: that is our reading, and the row "within". The paper's own formulas were not
at hand.

Against these stand a VAE, with a normal and with a mixture of four for each row's posterior, and a beta-VAE with the
weight of 0.2, with the same networks, optimiser, epochs and likelihood, a Laplace of fixed scale.

Reported are, on test rows: the median spread of a row's code; the squared sliced Wasserstein distance of all codes to
the prior; the absolute error of reconstructions from one draw, summed over pixels; and, of means of the likelihood at
as many draws from the prior, the energy distance in the space of pixels, a stand-in for the FID, which it is not. The
texture is a hundred times the energy distance of patches of 3 x 3 pixels without their means, of reconstructions and
of samples; the sharpness is the variance of the samples' Laplacian, over that of test rows. The row "data" has training
rows for samples.

- full: Fashion-MNIST with the code's weights, residual blocks of 128 channels, learning rate and batches of 20. The
  code has faces of 256 x 256 pixels (CelebA-HQ) and 512 latents; here there are 32 latents, 50 epochs, and a critic of
  patches of 8 x 8 without batch norm and dropout, which sees about as large a part of the image as theirs.
- medium: the same for 5 epochs, with larger batches and steps. Of both only two steps of full have been run.
- small: digits of 8 x 8 pixels, perceptrons, and a likelihood of scale 0.1: a VAE that learns it comes to 0.09. The
  adversary's weight is to the errors as in the code.

Small, seed 0; over seeds 0 to 4 each claim held but for the one in ``NOT_AT_SMALL``. The term does what it is for, but
nothing here shows the need: without it samples were nearer to the data for 4 of 5 seeds, with a distance of 0.08 to
0.12 against 0.09 to 0.18. With the spreads a part of the mixture's variance reconstructions and samples were worse for
each seed::

    method                       spread  codes  error  texture  samples  sample texture  sharpness
    VAE                            0.54   0.04   7.04     0.15     0.27            0.50       0.70
    beta-VAE                       0.17   0.19   5.95     0.05     0.36            0.43       0.74
    VAE, mixture head              0.69   0.03   7.69     0.36     0.23            0.65       0.67
    moments                       0.005   0.08   5.17     0.04     0.08            0.28       0.73
    moments + spread               0.12   0.10   5.39     0.05     0.18            0.29       0.75
    moments + spread, within       0.16   0.12   5.93     0.08     0.24            0.57       0.66
    moments + spread + PatchGAN    0.12   0.10   5.16    -0.02     0.10            0.21       0.77
    data                                                           -0.00           -0.02       1.02
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import conv2d, unfold

from pyro_ae import Posterior, datasets, fit, importance, svi
from pyro_ae.divergences import adversarial, energy_distance, sliced_wasserstein
from pyro_ae.estimators import analytic_kl
from pyro_ae.losses import aggregate_moments, annealed
from pyro_ae.nn import MLP, Residual, ResidualDecoder
from pyro_ae.runtime import seeded
from pyro_ae.types import Guide, Loss, Model, Sides

from ..guides.amortized import Amortized
from ..guides.mean_field import MeanField
from ..guides.mixture import Mixture
from ..models.vae import VAE

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Scale:
    """What differs between the scales: ``noise`` is the likelihood's scale, ``realism`` the adversary's weight."""

    data: str
    networks: Callable[[int], tuple[nn.Module, nn.Module, int]]
    critic: Callable[[int], nn.Module]
    latent: int
    noise: float
    patch: int
    stride: int
    realism: float
    lr: float
    critic_lr: float
    schedule: str
    epochs: int
    batch_size: int


def perceptrons(latent: int) -> tuple[nn.Module, nn.Module, int]:
    """An encoder, a decoder to logits of pixels, and the encoder's number of features; for 8 x 8 pixels."""
    return MLP(64, [128, 128]), MLP(latent, [128, 128], 64), 128


def residual(latent: int) -> tuple[nn.Module, nn.Module, int]:
    """As :func:`perceptrons`, for 28 x 28 pixels: residual blocks of 128 channels, with activations first."""
    channels = (128, 128, 128)  # 28, 14, 7, 4
    encoder = nn.Sequential(nn.Unflatten(-1, (28, 28)), Residual((28, 28), channels, 256))
    return encoder, nn.Sequential(ResidualDecoder(latent, channels, (28, 28)), nn.Flatten(-2)), 256


def convolutions(side: int) -> nn.Module:
    """Patches ``[n, side^2]`` to logits ``[n, 1]``."""
    layers = [
        layer
        for before, after, stride in ((1, 128, 2), (128, 128, 2), (128, 64, 1))
        for layer in (nn.Conv2d(before, after, 3, stride, padding=1), nn.LeakyReLU(0.3))
    ]
    return nn.Sequential(nn.Unflatten(-1, (1, side, side)), *layers, nn.Flatten(), nn.Linear(4 * side**2, 1))


_small = Scale(
    data="digits",
    networks=perceptrons,
    critic=lambda side: MLP(side**2, [64, 64], 1),
    latent=8,
    noise=0.1,
    patch=4,
    stride=2,
    realism=6.4,
    lr=1e-2,
    critic_lr=5e-3,
    schedule="cosine",
    epochs=30,
    batch_size=128,
)
_full = Scale(
    data="fashion_mnist",
    networks=residual,
    critic=convolutions,
    latent=32,
    noise=0.0784,
    patch=8,
    stride=4,
    realism=100.0,
    lr=1e-4,
    critic_lr=1e-4,
    schedule="constant",
    epochs=50,
    batch_size=20,
)

SCALES = {
    "small": _small,
    "medium": replace(_full, lr=1e-3, schedule="cosine", epochs=5, batch_size=100),
    "full": _full,
}

METHOD, GAN = "moments + spread", "moments + spread + PatchGAN"


def _get(table: DataFrame, method: str, column: str) -> float:
    return float(table.set_index("method")[column][method])


def _collapse(table: DataFrame) -> bool:
    free = _get(table, "moments", "spread")
    return free < 0.03 and _get(table, METHOD, "spread") > 5 * free


CLAIMS: dict[str, Callable[[DataFrame], bool]] = {
    "Spreads of single rows collapse without their term, to a median below 0.03; with it they are five times as large "
    "at least": _collapse,
    "The mixture of codes is nearer to the prior than the beta-VAE's of the same weight": lambda table: (
        _get(table, METHOD, "codes") < _get(table, "beta-VAE", "codes")
    ),
    "It reconstructs better than the VAE": lambda table: _get(table, METHOD, "error") < _get(table, "VAE", "error"),
    "It reconstructs better than the beta-VAE": lambda table: (
        _get(table, METHOD, "error") < _get(table, "beta-VAE", "error")
    ),
    "Its samples are as near to the data as the VAE's, to within a tenth": lambda table: (
        _get(table, METHOD, "samples") < 1.1 * _get(table, "VAE", "samples")
    ),
    "The PatchGAN brings the texture of reconstructions nearer to the data's": lambda table: (
        _get(table, GAN, "texture") < _get(table, METHOD, "texture")
    ),
    "The PatchGAN brings the texture of samples nearer to the data's": lambda table: (
        _get(table, GAN, "sample texture") < _get(table, METHOD, "sample texture")
    ),
}

NOT_AT_SMALL = {
    "The PatchGAN brings the texture of reconstructions nearer to the data's": "it held for 4 of 5 seeds; of so few "
    "pixels the texture is reconstructed without it already, to within the noise of 0.06 for 4 of 5",
}

PAPER: list[dict[str, Any]] = []


@dataclass(frozen=True)
class laplace:
    """Logits of pixels to a Laplace around them: minus its log-density is the absolute error, in units of a scale."""

    scale: float

    def __call__(self, logits: Tensor) -> Distribution:
        return dist.Laplace(logits.sigmoid(), self.scale).to_event(1)


class textured(nn.Module):
    r"""Another loss, and a PatchGAN: an adversary that tells patches of reconstructions from patches of rows.

    References:
        Image-to-Image Translation with Conditional Adversarial Networks (Isola, Zhu, Zhou and Efros, 2017)
        https://arxiv.org/abs/1611.07004

    Arguments:
        loss: of model, guide and rows ``[B, pixels]``.
        critic: of patches ``[n, side^2]``, to logits ``[n, 1]`` that they are of rows.
        patches: from images ``[n, pixels]`` to their patches.
        weight: of the adversary's cross-entropy, in nats per row.
    """

    def __init__(self, loss: Loss, critic: nn.Module, patches: Callable[[Tensor], Tensor], weight: float) -> None:
        super().__init__()
        self.loss, self.adversary, self.patches, self.weight = loss, adversarial(critic), patches, weight

    def forward(self, model: Model, guide: Guide, x: Tensor) -> Sides:
        with _Observed() as seen:
            loss = self.loss(model, guide, x)
        assert isinstance(loss, Tensor)
        fake, real = self.patches(seen.site["fn"].mean), self.patches(x)
        loss = loss + seen.site["scale"] * len(x) * self.weight * self.adversary(fake, real)
        return Sides(loss, loss, self.adversary.critic_loss(fake, real))


class _Observed(Messenger):
    """Keeps the observed site that goes by."""

    site: Any

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            self.site = msg


def patches_of(images: Tensor, side: int, stride: int = 1) -> Tensor:
    """Square images ``[n, pixels]`` to square patches ``[m, side^2]``."""
    edge = math.isqrt(images.shape[-1])
    return unfold(images.reshape(-1, 1, edge, edge), side, stride=stride).mT.flatten(0, 1)


def run(scale: str = "small", seed: int = 0, progress: bool = False) -> DataFrame:
    """What becomes of the codes' spreads and mixture, how well rows are reconstructed, and how good samples are.

    Arguments:
        scale: one of ``SCALES``.
        seed: of the initial weights, the batches and all noise; the same in every row.
        progress: whether to show a bar for each fit, and each row once it is known.
    """
    from pandas import DataFrame

    settings = SCALES[scale]
    data = datasets.load(settings.data)
    assert data.test is not None
    x, test = (part["x"].flatten(1) for part in (data.train, data.test))
    elbo = importance(estimator=analytic_kl)
    patches = partial(patches_of, side=settings.patch, stride=settings.stride)
    losses: dict[str, Callable[[], Loss]] = {
        "VAE": lambda: elbo,
        "beta-VAE": lambda: annealed(0.2, elbo),
        "VAE, mixture head": lambda: elbo,
        "moments": lambda: aggregate_moments(spread=0.0),
        METHOD: lambda: aggregate_moments(spread=0.2),
        f"{METHOD}, within": lambda: aggregate_moments(spread=0.2, within=True),
        GAN: lambda: textured(
            aggregate_moments(spread=0.2), settings.critic(settings.patch), patches, settings.realism
        ),
    }
    rows: list[dict[str, Any]] = []
    for method, loss in losses.items():
        with seeded(seed):
            posterior = _fit(settings, loss(), x, method, progress)
            rows.append({"method": method, **_measure(posterior, test)})
        if progress:
            print(rows[-1], file=sys.stderr)
    with seeded(seed):
        some = x[torch.randperm(len(x))[: len(test)]]
        rows.append({"method": "data", **_samples(some, test)})
    return DataFrame(rows)


def _fit(settings: Scale, loss: Loss, x: Tensor, method: str, progress: bool) -> Posterior:
    encoder, decoder, features = settings.networks(settings.latent)
    engine = svi(
        loss=loss,
        lr=settings.lr,
        groups={"loss.*": {"lr": settings.critic_lr}} if isinstance(loss, nn.Module) else {},
        optimizer=partial(torch.optim.Adam, betas=(0.5, 0.999), fused=True),
        schedule=settings.schedule,
        epochs=settings.epochs,
    )
    head = (Mixture if method.endswith("head") else MeanField)(features, settings.latent)
    model, guide = VAE(decoder, settings.latent, laplace(settings.noise)), Amortized(encoder, head)
    return fit(model, x, guide=guide, method=engine, batch_size=settings.batch_size, progress=progress)


def _measure(posterior: Posterior, test: Tensor) -> dict[str, float]:
    z = posterior.sample(20, test)["z"]
    decoded = posterior.reconstruct(test, 1)
    return {
        "spread": z.std(0).median().item(),
        "codes": sliced_wasserstein(100)(z[0], torch.randn(5000, z.shape[-1])).item(),
        "error": (decoded - test).abs().sum(1).mean().item(),
        "texture": _texture(decoded, test),
        **_samples(posterior.generate(len(test), mean=True), test),
    }


def _samples(samples: Tensor, test: Tensor) -> dict[str, float]:
    return {
        "samples": energy_distance()(samples[:2000], test[:2000]).item(),
        "sample texture": _texture(samples, test),
        "sharpness": _sharpness(samples) / _sharpness(test),
    }


def _texture(images: Tensor, test: Tensor) -> float:
    """Between patches without their means, in units of a hundredth."""
    patches = (patches_of(t, 3) for t in (images, test))
    a, b = (t[torch.randperm(len(t))[:1500]] for t in (t - t.mean(1, keepdim=True) for t in patches))
    return 100 * energy_distance()(a, b).item()


def _sharpness(images: Tensor) -> float:
    side = math.isqrt(images.shape[1])
    laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return conv2d(images.reshape(-1, 1, side, side), laplacian[None, None]).var().item()
