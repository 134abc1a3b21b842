"""With the information of codes not punished and their mixture matched, codes are used and keep to the prior.

References:
    InfoVAE: Balancing Learning and Inference in Variational Autoencoders (Zhao, Song and Ermon, 2019)
    https://arxiv.org/abs/1706.02262

A VAE trained on the ELBO and one trained on the InfoVAE's loss, with the same networks, optimiser and epochs, where the
ELBO has trouble: a decoder so flexible that it needs no code (each pixel is drawn given those before it; alpha is 1, so
that only the codes' mixture is held to the prior), and so few rows that they are learnt by heart (a perceptron; alpha
is 0.9). The divergence is the squared MMD with the Gaussian kernel of the authors' code, whose squared lengthscale is
half the square of the number of latents. With the flexible decoder, codes begin with a standard deviation of 0.01, for
both losses: in the authors' code they have none. It matters: begun near 1 the InfoVAE's codes said nothing in 6 of 6
runs (with a small PixelCNN), begun at 0.05 the first claim failed for one of seeds 0 to 4.

Reported are, on up to 1000 training rows, the mutual information of row and code in nats (at most the log of the number
of rows) and the Frobenius distance of the covariance of all codes from the prior's; and of test rows the negative
log-likelihood in nats, by importance sampling, and the gain, by how much likelier a row is given its code. Half of the
draws of importance sampling are the prior's: the guide's alone made the InfoVAE's 1 to 4 nats worse.

- full: MNIST, binarised at a half, with 20 latents as in the authors' code, though with perceptrons where that has
  convolutions, and lambda 1000; a PixelCNN of 8 layers, and 500 rows where they are few. Alpha, the PixelCNN and the
  number of few rows are our choice.
- medium: the same for fewer epochs.
- small: digits averaged to 4 x 4 pixels and binarised at 0.35, with 2 latents, lambda 30 and a masked perceptron (MADE)
  in place of the PixelCNN; where rows are few, 100 digits of 8 x 8 pixels, 8 latents and lambda 300.

Small, seed 0; over seeds 0 to 4 each claim held but for the two in ``NOT_AT_SMALL``::

    decoder     rows  method   information  gain  covariance    nll
    MADE        1297  ELBO            0.38  0.36        0.13   4.37
    MADE        1297  InfoVAE         3.85  2.40        0.23   4.58
    perceptron   100  ELBO            1.04  0.58        1.31  23.53
    perceptron   100  InfoVAE         0.66  0.53        0.38  24.82
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution
from torch.nn.functional import avg_pool2d, linear

from pyro_ae import Posterior, batch_plate, datasets, fit, importance, svi
from pyro_ae.divergences import mmd, rbf
from pyro_ae.estimators import analytic_kl
from pyro_ae.losses import info_vae
from pyro_ae.nn import MLP, PixelCNN
from pyro_ae.runtime import seeded
from pyro_ae.types import Loss

from ..guides.amortized import Amortized
from ..guides.mean_field import MeanField
from ..models.vae import VAE

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Setting:
    """One comparison; ``spread`` is the initial standard deviation of codes, ``width`` and ``layers`` a decoder's."""

    decoder: str
    data: str
    pool: int
    threshold: float
    rows: int | None
    latent: int
    hidden: tuple[int, ...]
    width: int
    layers: int
    spread: float
    alpha: float
    weight: float
    epochs: int
    batch_size: int
    lr: float
    test: int
    particles: int


_made = Setting(
    *("MADE", "digits", 2, 0.35, None, 2, (64,), 256, 1, 0.01, 1.0, 30.0),
    *(20, 128, 1e-2, 250, 500),
)
_few = Setting(
    *("perceptron", "digits", 1, 0.5, 100, 8, (128, 128), 128, 2, 1.0, 0.9, 300.0),
    *(220, 100, 3e-3, 250, 500),
)
_pixelcnn = Setting(
    *("PixelCNN", "mnist", 1, 0.5, None, 20, (1024, 1024), 32, 8, 0.01, 1.0, 1000.0),
    *(100, 100, 1e-3, 1000, 1000),
)
_few_mnist = Setting(
    *("perceptron", "mnist", 1, 0.5, 500, 20, (1024, 1024), 1024, 2, 1.0, 0.9, 1000.0),
    *(2000, 100, 1e-3, 1000, 1000),
)

SCALES = {
    "small": (_made, _few),
    "medium": (replace(_pixelcnn, epochs=5), replace(_few_mnist, epochs=200)),
    "full": (_pixelcnn, _few_mnist),
}


def _pairs(table: DataFrame, column: str, flexible: bool) -> tuple[float, float]:
    """With the ELBO and with the InfoVAE's loss."""
    rows = table[(table["decoder"] != "perceptron") == flexible].set_index("method")[column]
    return rows["ELBO"], rows["InfoVAE"]


def _information(table: DataFrame) -> bool:
    elbo, info = _pairs(table, "information", True)
    return elbo < 0.5 and info > 1


def _gain(table: DataFrame) -> bool:
    elbo, info = _pairs(table, "gain", True)
    return elbo < 0.5 and info > 1


def _covariance(table: DataFrame) -> bool:
    elbo, info = _pairs(table, "covariance", False)
    return info < elbo / 2 and _pairs(table, "information", False)[1] > 0.25  # codes that say nothing match too


def _likelihood(flexible: bool) -> Callable[[DataFrame], bool]:
    def check(table: DataFrame) -> bool:
        elbo, info = _pairs(table, "nll", flexible)
        return info < elbo + 0.5

    return check


CLAIMS: dict[str, Callable[[DataFrame], bool]] = {
    "With a flexible decoder the ELBO's codes say less than half a nat of a row, the InfoVAE's over one": _information,
    "That decoder uses the InfoVAE's codes, by over a nat for test rows, the ELBO's by less than half": _gain,
    "On few rows the covariance of the InfoVAE's codes, that say something, is at most half as far off": _covariance,
    "With a flexible decoder the InfoVAE models test rows as well, to within half a nat": _likelihood(True),
    "On few rows the InfoVAE models test rows as well, to within half a nat": _likelihood(False),
}

NOT_AT_SMALL = {
    "On few rows the covariance of the InfoVAE's codes, that say something, is at most half as far off": "it was 0.45 "
    "and the ELBO's 0.83, a little more than half, for one of seeds 0 to 4; it held for the others",
    "On few rows the InfoVAE models test rows as well, to within half a nat": "it was 0.9 to 1.9 nats worse in 5 of 5 "
    "seeds, with lambda 300 and alpha 0.9",
}

PAPER: list[dict[str, Any]] = []


class Pixels(nn.Module):
    """Pixels ``[*, B, side^2]`` and codes to the logits of each pixel given those before it, by a PixelCNN."""

    def __init__(self, latent: int, pixels: int, channels: int, layers: int) -> None:
        super().__init__()
        side = math.isqrt(pixels)
        self.code = nn.Sequential(nn.Linear(latent, channels * pixels), nn.Unflatten(-1, (channels, side, side)))
        self.pixels = PixelCNN((side, side), channels, (7, *(3,) * (layers - 1)))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.pixels(x.unflatten(-1, self.pixels.input_shape), self.code(z)).flatten(-2)


class MADE(nn.Module):
    """A perceptron of one hidden layer with the inputs and outputs of :class:`Pixels`.

    References:
        MADE: Masked Autoencoder for Distribution Estimation (Germain et al., 2015) https://arxiv.org/abs/1502.03509
    """

    before: Tensor
    after: Tensor

    def __init__(self, latent: int, pixels: int, width: int) -> None:
        super().__init__()
        seen, pixel = torch.arange(width)[:, None] % pixels, torch.arange(pixels)  # a unit sees so many pixels
        self.register_buffer("before", (pixel < seen).float())
        self.register_buffer("after", (seen <= pixel).float().T)
        self.code = nn.Linear(latent, width)
        self.first, self.last = nn.Linear(pixels, width), nn.Linear(width, pixels)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h = linear(x, self.first.weight * self.before, self.first.bias) + self.code(z)
        return linear(h.relu(), self.last.weight * self.after, self.last.bias)


class PixelVAE(nn.Module):
    """Binary images, each pixel drawn given the code and the pixels before it."""

    def __init__(self, logits: nn.Module, latent: int) -> None:
        super().__init__()
        self.logits, self.latent = logits, latent

    def forward(self, x: Tensor) -> Tensor:
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            return pyro.sample("x", dist.Bernoulli(logits=self.logits(x, z)).to_event(1), obs=x)


class Hedged(nn.Module):
    """Half of the draws from a head, half from the prior: the weight of a draw is at most twice its likelihood."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Distribution:
        q = self.head(features)
        loc = torch.stack([q.mean, torch.zeros_like(q.mean)], -2)
        scale = torch.stack([q.stddev, torch.ones_like(q.mean)], -2)
        return dist.MixtureSameFamily(Categorical(loc.new_ones(loc.shape[:-1])), dist.Normal(loc, scale).to_event(1))


def run(scale: str = "small", seed: int = 0, progress: bool = False) -> DataFrame:
    """What codes say of rows, how near the prior they are, and how well test rows are modelled.

    Arguments:
        scale: one of ``SCALES``.
        seed: of the initial weights, the batches and all noise; the same in every row.
        progress: whether to show a bar for each fit, and each row once it is known.
    """
    from pandas import DataFrame

    rows: list[dict[str, Any]] = []
    for setting in SCALES[scale]:
        data = datasets.load(setting.data)
        assert data.test is not None
        x, test = (
            (avg_pool2d(part["x"].unsqueeze(1), setting.pool).flatten(1) > setting.threshold).float()
            for part in (data.train, data.test)
        )
        with seeded(seed):
            x = x[torch.randperm(len(x))[: setting.rows]]
        kernel = rbf(scales=(setting.latent / 2**0.5,))
        losses: dict[str, Loss] = {
            "ELBO": importance(estimator=analytic_kl),
            "InfoVAE": info_vae(mmd(kernel, unbiased=False), alpha=setting.alpha, weight=setting.weight),
        }
        for method, loss in losses.items():
            with seeded(seed):
                found = _measure(setting, _fit(setting, loss, x, progress), x[:1000], test[: setting.test])
            rows.append({"decoder": setting.decoder, "rows": len(x), "method": method, **found})
            if progress:
                print(rows[-1], file=sys.stderr)
    return DataFrame(rows)


def _fit(setting: Setting, loss: Loss, x: Tensor, progress: bool) -> Posterior:
    pixels, latent, hidden, width = x.shape[1], setting.latent, setting.hidden, setting.width
    model = {
        "MADE": lambda: PixelVAE(MADE(latent, pixels, width), latent),
        "PixelCNN": lambda: PixelVAE(Pixels(latent, pixels, width, setting.layers), latent),
        "perceptron": lambda: VAE(MLP(latent, (width,) * setting.layers, pixels), latent),
    }[setting.decoder]()
    head = MeanField(hidden[-1], latent)
    nn.init.constant_(head.linear.bias[latent:], math.log(setting.spread))
    method = svi(loss=loss, lr=setting.lr, schedule="cosine", epochs=setting.epochs)
    guide = Amortized(MLP(pixels, hidden), head)
    return fit(model, x, guide=guide, method=method, batch_size=setting.batch_size, progress=progress)


def _measure(setting: Setting, posterior: Posterior, x: Tensor, test: Tensor) -> dict[str, float]:
    """Of the rows' codes the mutual information and the covariance's distance; of test rows how likely they are."""
    guide = posterior.guide
    assert isinstance(guide, Amortized)
    device = next(guide.parameters()).device
    with torch.no_grad():
        q = guide.head(guide.encoder(x.to(device)))
        z = q.sample((10,))
        mixture = torch.stack([q.log_prob(draw.unsqueeze(1)).logsumexp(1) - math.log(len(x)) for draw in z])
        information = (q.log_prob(z) - mixture).mean().item()
        covariance = z.flatten(0, 1).T.cov()
    reconstruction = posterior.log_likelihood(test, draws=10)["x"].mean().item()
    assert isinstance(guide.head, nn.Module)
    guide.head = Hedged(guide.head)
    nll = -posterior.log_evidence(test, setting.particles).mean().item()
    return {
        "information": information,
        "gain": reconstruction + nll,
        "covariance": (covariance - torch.eye(len(covariance)).to(covariance)).norm().item(),
        "nll": nll,
    }
