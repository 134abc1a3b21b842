"""Matching the codes of all rows to the prior, and not each row's, gives sharper reconstructions and better samples.

References:
    Wasserstein Auto-Encoders (Tolstikhin, Bousquet, Gelly and Schoelkopf, 2018) https://arxiv.org/abs/1711.01558

Two Wasserstein autoencoders, with the MMD of an IMQ kernel (WAE-MMD) and with an adversary (WAE-GAN), against a VAE and
an autoencoder whose codes are free (AE), with the same networks, optimiser and epochs. All but the VAE have encoders
that are deterministic. Their likelihood is a Normal with variance 1/2, whose minus log-density is the paper's cost, the
squared error summed over pixels, but for a constant: so lambda is the paper's too. With that variance the VAE would be
at its worst; it learns its own, by maximum likelihood.

Reported are, on test rows: the squared sliced Wasserstein distance of their codes to 10,000 draws from the prior, with
which nothing was trained; the squared error of reconstructions; the energy distance, in the space of pixels, of as many
samples; and the samples' sharpness as in the paper, the variance of their Laplacian over pixels. Samples are means
of the likelihood, as in the paper. The row "data" has draws from the prior for codes, and training rows for samples.

- full: MNIST with 8 latents, lambda 10 and, as in the authors' code, convolutions of 4 x 4, Adam with a beta1 of 0.5
  and a learning rate of 1e-3, 100 epochs of batches of 100. Theirs also sets the encoder up to match two moments of
  the prior before it starts; here it starts as it is.
- medium: the same for 5 epochs.
- small: digits of 8 x 8 pixels, perceptrons, and lambda 1, as there are a twelfth as many pixels.

Small, seed 0; over seeds 0 to 4 each claim held but for those in ``NOT_AT_SMALL``::

    method   codes  error  samples  sharpness
    AE       6.676   1.50    0.823       0.15
    VAE      0.030   1.69    0.167       0.42
    WAE-MMD  0.061   1.46    0.126       0.54
    WAE-GAN  0.748   1.76    0.158       0.48
    data     0.017          -0.002       1.08
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import conv2d

from pyro_ae import Posterior, datasets, fit, importance, svi
from pyro_ae.divergences import adversarial, energy_distance, imq, mmd, sliced_wasserstein
from pyro_ae.estimators import analytic_kl
from pyro_ae.losses import wasserstein
from pyro_ae.nn import MLP
from pyro_ae.plates import batched
from pyro_ae.runtime import seeded
from pyro_ae.types import Loss

from ..guides.amortized import Amortized
from ..guides.mean_field import MeanField
from ..guides.point import Point
from ..models.vae import VAE

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Scale:
    """What differs between the scales; the critic's width is of each of its hidden layers."""

    data: str
    networks: Callable[[int], tuple[nn.Module, nn.Module, int]]
    critic: tuple[int, ...]
    weight: float
    lr: float
    critic_lr: float
    schedule: str
    epochs: int


LATENT = 8


def perceptrons(latent: int) -> tuple[nn.Module, nn.Module, int]:
    """An encoder, a decoder to logits of pixels, and the encoder's number of features; for 8 x 8 pixels."""
    return MLP(64, [64, 64]), MLP(latent, [64, 64], 64), 64


def convolutions(latent: int) -> tuple[nn.Module, nn.Module, int]:
    """As :func:`perceptrons`, for 28 x 28 pixels: up to 1024 channels of 4 x 4, with batch norm."""

    def normed(layer: nn.Module, channels: int) -> tuple[nn.Module, ...]:
        return layer, nn.BatchNorm2d(channels), nn.ReLU()

    down = [
        layer
        for before, after in ((1, 128), (128, 256), (256, 512), (512, 1024))  # 28, 14, 7, 3, 1
        for layer in normed(nn.Conv2d(before, after, 4, stride=2, padding=1), after)
    ]
    up = [
        layer
        for before, after in ((1024, 512), (512, 256))  # 7, 14, 28
        for layer in normed(nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), after)
    ]
    encoder = nn.Sequential(nn.Unflatten(1, (1, 28, 28)), *down, nn.Flatten())
    start = (nn.Linear(latent, 1024 * 49), nn.ReLU(), nn.Unflatten(1, (1024, 7, 7)))
    decoder = nn.Sequential(*start, *up, nn.Conv2d(256, 1, 3, padding=1), nn.Flatten())
    return batched(encoder, 1), batched(decoder, 1), 1024


_paper = partial(
    Scale, "mnist", convolutions, (512, 512, 512, 512), weight=10.0, lr=1e-3, critic_lr=1e-3, schedule="constant"
)

SCALES = {
    "small": Scale("digits", perceptrons, (64, 64), 1.0, 5e-3, 1e-3, "cosine", 35),
    "medium": _paper(epochs=5),
    "full": _paper(epochs=100),
}


def _get(table: DataFrame, method: str, column: str) -> float:
    return float(table.set_index("method")[column][method])


def _less(table: DataFrame, column: str, *methods: str) -> bool:
    """Whether the methods are in rising order."""
    return all(_get(table, a, column) < _get(table, b, column) for a, b in pairwise(methods))


CLAIMS: dict[str, Callable[[DataFrame], bool]] = {
    "The codes of both WAEs match the prior: they are at less than a fifth of the AE's distance": lambda table: all(
        _get(table, method, "codes") < _get(table, "AE", "codes") / 5 for method in ("WAE-MMD", "WAE-GAN")
    ),
    "WAE-MMD reconstructs better than the VAE": lambda table: _less(table, "error", "WAE-MMD", "VAE"),
    "WAE-GAN reconstructs better than the VAE": lambda table: _less(table, "error", "WAE-GAN", "VAE"),
    "Samples of WAE-MMD are nearer to the data than the VAE's": lambda table: _less(table, "samples", "WAE-MMD", "VAE"),
    "Samples of WAE-GAN are nearer to the data than the VAE's": lambda table: _less(table, "samples", "WAE-GAN", "VAE"),
    "Samples of WAE-MMD are sharper than the VAE's, and no sharper than the data": lambda table: _less(
        table, "sharpness", "VAE", "WAE-MMD", "data"
    ),
    "Samples of WAE-GAN are sharper than the VAE's, and no sharper than the data": lambda table: _less(
        table, "sharpness", "VAE", "WAE-GAN", "data"
    ),
    "Samples of WAE-GAN are nearer to the data than those of WAE-MMD": lambda table: _less(
        table, "samples", "WAE-GAN", "WAE-MMD"
    ),
}

_FEW = "455 steps are too few for the adversary; it held for {} of 5 seeds"

NOT_AT_SMALL = {
    "WAE-GAN reconstructs better than the VAE": _FEW.format(1),
    "Samples of WAE-GAN are nearer to the data than the VAE's": _FEW.format(3),
    "Samples of WAE-GAN are sharper than the VAE's, and no sharper than the data": _FEW.format(3),
    "Samples of WAE-GAN are nearer to the data than those of WAE-MMD": _FEW.format(0),
}

PAPER: list[dict[str, Any]] = []


class gaussian(nn.Module):
    """Logits of pixels to a Normal around them, of one standard deviation that is fixed or learnt."""

    def __init__(self, scale: float, *, learnt: bool) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(scale).log(), requires_grad=learnt)

    def forward(self, logits: Tensor) -> Distribution:
        return dist.Normal(logits.sigmoid(), self.log_scale.exp()).to_event(1)


def run(scale: str = "small", seed: int = 0, progress: bool = False) -> DataFrame:
    """How well codes match the prior and rows are reconstructed, and how good and sharp samples are.

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
    losses: dict[str, Callable[[], Loss]] = {
        "AE": lambda: wasserstein(weight=0.0),
        "VAE": lambda: importance(estimator=analytic_kl),
        "WAE-MMD": lambda: wasserstein(mmd(imq()), weight=settings.weight),
        "WAE-GAN": lambda: wasserstein(adversarial(MLP(LATENT, settings.critic, 1)), weight=settings.weight),
    }
    rows: list[dict[str, Any]] = []
    for method, loss in losses.items():
        with seeded(seed):
            posterior = _fit(settings, loss(), x, method == "VAE", progress)
            found = {
                "codes": _distance(posterior.sample(1, test)["z"][0]),
                "error": (posterior.reconstruct(test) - test).square().sum(1).mean().item(),
                **_samples(posterior.generate(len(test), mean=True), test),
            }
        rows.append({"method": method, **found})
        if progress:
            print(rows[-1], file=sys.stderr)
    with seeded(seed):
        some = x[torch.randperm(len(x))[: len(test)]]
        rows.append({"method": "data", "codes": _distance(torch.randn(len(test), LATENT)), **_samples(some, test)})
    return DataFrame(rows)


def _fit(settings: Scale, loss: Loss, x: Tensor, is_vae: bool, progress: bool) -> Posterior:
    encoder, decoder, features = settings.networks(LATENT)
    likelihood = gaussian(0.3, learnt=True) if is_vae else gaussian(0.5**0.5, learnt=False)
    method = svi(
        loss=loss,
        lr=settings.lr,
        groups={"loss.*": {"lr": settings.critic_lr}}
        if isinstance(getattr(loss, "divergence", None), nn.Module)
        else {},
        optimizer=partial(torch.optim.Adam, betas=(0.5, 0.999), fused=True),
        schedule=settings.schedule,
        epochs=settings.epochs,
    )
    head = MeanField(features, LATENT) if is_vae else Point(features, LATENT)
    model, guide = VAE(decoder, LATENT, likelihood), Amortized(encoder, head)
    return fit(model, x, guide=guide, method=method, batch_size=100, progress=progress)


def _distance(codes: Tensor) -> float:
    return sliced_wasserstein(200)(codes, torch.randn(10_000, LATENT)).item()


def _samples(samples: Tensor, test: Tensor) -> dict[str, float]:
    side = round(samples.shape[1] ** 0.5)
    laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    edges = conv2d(samples.reshape(-1, 1, side, side), laplacian[None, None])
    return {
        "samples": energy_distance()(samples, test).item(),
        "sharpness": edges.flatten(1).var(1).mean().item(),
    }
