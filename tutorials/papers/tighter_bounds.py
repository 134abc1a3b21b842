"""A tighter bound drowns the gradient of the guide in noise; other ways to spend the particles do not.

References:
    Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018) https://arxiv.org/abs/1802.04537

Part "snr" is on data of the paper's linear Gaussian model, near the optimum: the ratio of signal to noise (a gradient's
mean over its standard deviation, both over replicates), for the guide's parameters and for the model's, of M bounds of
K particles. Shown is its root mean square over parameters, less what the noise adds to it; rates are slopes of logs,
for the model from K = 16 on, where the bias of few particles no longer shows in its signal. DReG (Tucker et al., 2019,
https://arxiv.org/abs/1810.04152) is IWAE with another gradient of the guide.

Part "training" spends 64 particles on IWAE, MIWAE, PIWAE, CIWAE and the VAE. The metrics are the paper's, on test
images: the negative log-likelihood by importance sampling, the IWAE bound of 64 particles, and KL(q(z|x) || p(z|x)).

- full: D = 20, N = 1024 rows, offsets 0.01; dynamically binarised MNIST, batches of 20, Adam with epsilon 1e-4 for 3280
  epochs in 8 stages of falling learning rate; 5000 samples on 10,000 test images.
- medium: the same for the first 3 stages, 13 epochs; 1000 samples on 1000 test images. A few hours without a GPU.
- small: D = 3, N = 16, offsets 0.1; digits of 8 x 8 pixels, few and small layers, and a cosine in place of the stages.

Small, seed 0; over seeds 0 to 4 each claim held::

    M or K           1     4    16    64   256    method            nll    bound   kl
    IWAE, guide   0.60  0.29  0.15  0.07  0.03    VAE             24.51    24.51 0.18
    IWAE, model   0.38  0.26  0.52  1.11  2.26    IWAE            24.64    24.70 3.56
    ELBO, guide   0.60  1.18  2.35                MIWAE           24.36    24.37 0.88
    ELBO, model   0.38  0.73  1.47                PIWAE           24.45    24.47 1.24
    DReG, guide   2.35  2.56  4.17                CIWAE, 0.05     24.42    24.47 1.26
                                                  CIWAE, 0.5      24.39    24.40 0.38
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from pyro_ae import datasets, elbo, fit, importance, iwae, log_weights, svi
from pyro_ae.bounds import ciwae, miwae
from pyro_ae.estimators import dreg
from pyro_ae.losses import piwae
from pyro_ae.nn import MLP
from pyro_ae.runtime import find_device, seeded
from pyro_ae.types import Loss

from ..guides.amortized import Amortized
from ..guides.mean_field import MeanField
from ..models.vae import VAE
from .importance_weighted_autoencoder import annealed

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Scale:
    """What differs between the scales: first of the gradients' ratios, then of the training."""

    dims: int
    rows: int
    offset: float
    particles: tuple[int, ...]
    fewer: tuple[int, ...]
    replicates: int
    data: str
    hidden: tuple[int, ...]
    latent: int
    epochs: int
    batch_size: int
    lr: float
    schedule: str | Callable[[float], float]
    test: int
    samples: int


_POWERS = (1, 4, 16, 64, 256)
_MNIST = ("mnist", (200, 200), 50)

SCALES = {
    "small": Scale(3, 16, 0.1, _POWERS, _POWERS[:3], 2000, "digits", (64,), 8, 4, 32, 1e-2, "cosine", 250, 300),
    "medium": Scale(20, 1024, 0.01, _POWERS, _POWERS[:4], 200, *_MNIST, 13, 20, 1e-3, annealed(3), 1000, 1000),
    "full": Scale(
        *(20, 1024, 0.01, (*_POWERS, 1024), _POWERS[:4], 1000, *_MNIST),
        *(3280, 20, 1e-3, annealed(8), 10_000, 5000),
    ),
}

METHODS: dict[tuple[str, int, int], Loss] = {
    ("VAE", 64, 1): importance(elbo, 64),
    ("IWAE", 1, 64): importance(iwae, 64),
    ("MIWAE", 8, 8): importance(miwae(8, 8)),
    ("PIWAE", 8, 8): piwae(8, 8),
    ("CIWAE, beta 0.05", 1, 64): importance(ciwae(0.05), 64),
    ("CIWAE, beta 0.5", 1, 64): importance(ciwae(0.5), 64),
}


def _rate(table: DataFrame, method: str, side: str, fewest: int = 1) -> float:
    """The power of the number of particles that a ratio grows with, from so many particles on."""
    rows = table[(table["part"] == "snr") & (table["method"] == method)]
    rows = rows.assign(particles=rows["M"] * rows["K"])
    rows = rows[rows["particles"] >= fewest]
    x, y = (torch.tensor(rows[column].tolist(), dtype=torch.double).log() for column in ("particles", f"{side} snr"))
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def _beats(table: DataFrame, method: str, *metrics: str) -> list[bool]:
    """For each metric whether a method (even the worst of its settings) has a lower, better, value than the IWAE."""
    rows = table[table["part"] == "training"]
    iwae, these = rows[rows["method"] == "IWAE"], rows[rows["method"].str.startswith(method)]
    return [these[metric].max() < iwae[metric].min() for metric in metrics]


METRICS = ("nll", "bound", "kl")

CLAIMS: dict[str, Callable[[DataFrame], bool]] = {
    "The guide's ratio falls with K as K^-1/2": lambda table: abs(_rate(table, "IWAE", "guide") + 0.5) < 0.15,
    "The guide's ratio rises with M as M^1/2": lambda table: abs(_rate(table, "ELBO", "guide") - 0.5) < 0.15,
    "The model's ratio rises with K as K^1/2": lambda table: abs(_rate(table, "IWAE", "model", 16) - 0.5) < 0.15,
    "The model's ratio rises with M as M^1/2": lambda table: abs(_rate(table, "ELBO", "model") - 0.5) < 0.15,
    "With DReG the guide's ratio does not fall with K": lambda table: _rate(table, "DReG", "guide") > 0,
    "MIWAE, PIWAE and CIWAE each beat IWAE on some metric": lambda table: all(
        any(_beats(table, method, *METRICS)) for method in ("MIWAE", "PIWAE", "CIWAE")
    ),
    "MIWAE, PIWAE and CIWAE have guides nearer to the posterior than IWAE": lambda table: all(
        all(_beats(table, method, "kl")) for method in ("MIWAE", "PIWAE", "CIWAE")
    ),
    "PIWAE beats IWAE on the likelihood and on the guide at once": lambda table: all(
        _beats(table, "PIWAE", "nll", "kl")
    ),
}

NOT_AT_SMALL: dict[str, str] = {}

_README = "printed as the paper's in github.com/clementchadebec/benchmark_VAE"

PAPER = [
    {"part": "training", "method": "MIWAE", "M": 8, "K": 8, "nll": 84.97, "source": _README},
    {"part": "training", "method": "PIWAE", "M": 8, "K": 8, "nll": 84.46, "source": _README},
    {"part": "training", "method": "CIWAE, beta 0.05", "M": 1, "K": 64, "nll": 84.57, "source": _README},
]


def run(scale: str = "small", seed: int = 0, progress: bool = False) -> DataFrame:
    """Ratios of signal to noise by M and K, and the test metrics of each method, in nats.

    Arguments:
        scale: one of ``SCALES``.
        seed: of the data, the initial weights, the batches and all noise; the same in every row.
        progress: whether to show a bar for each fit, and each row once it is known.
    """
    from pandas import DataFrame

    settings = SCALES[scale]
    powers = settings.particles
    ratios: list[tuple[str, int, int, Loss]] = [
        *(("IWAE", 1, k, importance(iwae, k)) for k in powers),
        *(("ELBO", m, 1, importance(elbo, m)) for m in settings.fewer),
        *(("DReG", 1, k, importance(iwae, k, dreg)) for k in settings.fewer),
    ]
    tasks = [("snr", method, m, k, loss, _ratios) for method, m, k, loss in ratios]
    tasks += [("training", *labels, loss, _train) for labels, loss in METHODS.items()]
    rows = []
    for part, method, m, k, loss, measure in tasks:
        with seeded(seed):
            rows.append({"part": part, "method": method, "M": m, "K": k} | measure(settings, loss, m * k, progress))
        if progress:
            print(rows[-1], file=sys.stderr)
    return DataFrame(rows)


# ---------------------------------------------------------------------------------- signal and noise


class LinearGaussian(nn.Module):
    """z ~ N(mean, I) and x | z ~ N(z, I), in replicates, each with a mean of its own, ``[R, 1, d]``."""

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.mean = nn.Parameter(mean)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("replicates", x.shape[0], dim=-2), pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class LinearGuide(nn.Module):
    """q(z | x) = N(A x + b, 2/3 I), in replicates, each with an A ``[R, d, d]`` and b ``[R, 1, d]`` of its own."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("replicates", x.shape[0], dim=-2), pyro.plate("data", x.shape[1], dim=-1):
            loc = x @ self.weight.mT + self.bias
            pyro.sample("z", dist.Normal(loc, math.sqrt(2 / 3)).to_event(1))


def _ratios(settings: Scale, loss: Loss, particles: int, progress: bool) -> dict[str, float]:
    """The ratios for guide and model; replicates with the same parameters but noise of their own run at once."""
    rows, d, offset = settings.rows, settings.dims, settings.offset
    x = torch.randn(d) + math.sqrt(2.0) * torch.randn(rows, d)
    mean = x.mean(0) + offset * torch.randn(d)
    weight = torch.eye(d) / 2 + offset * torch.randn(d, d)
    bias = x.mean(0) / 2 + offset * torch.randn(d)
    x, mean, weight, bias = (t.to(find_device("auto")) for t in (x, mean, weight, bias))
    at_once = max(1, 2**22 // (rows * particles * d))  # as many as fit into memory
    gradients: list[tuple[Tensor, Tensor]] = []
    for start in range(0, settings.replicates, at_once):
        r = min(at_once, settings.replicates - start)
        model, guide = LinearGaussian(mean.repeat(r, 1, 1)), LinearGuide(weight.repeat(r, 1, 1), bias.repeat(r, 1, 1))
        parameters = [guide.weight, guide.bias, model.mean]
        a, b, mu = torch.autograd.grad(loss(model, guide, x.expand(r, rows, d)), parameters)  # type: ignore[arg-type]
        gradients.append((torch.cat([a, b], 1).flatten(1), mu.flatten(1)))
    of_guide, of_model = (torch.cat(parts) for parts in zip(*gradients, strict=True))
    return {"guide snr": _ratio(of_guide), "model snr": _ratio(of_model)}


def _ratio(gradients: Tensor) -> float:
    """Of ``[R, parameters]``; a mean of R draws has itself a variance of 1/R, which is not signal."""
    squares = gradients.mean(0).square() / gradients.var(0) - 1 / len(gradients)
    return squares.mean().clamp(min=0.0).sqrt().item()


# ------------------------------------------------------------------------------------------ training


class Binarised(Dataset[Tensor]):
    """Images whose pixels are drawn anew, on with their intensity as probability, whenever they are read."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Sequence[int]) -> Tensor:
        return torch.bernoulli(self.x[index])


def _train(settings: Scale, loss: Loss, particles: int, progress: bool) -> dict[str, float]:
    data = datasets.load(settings.data)
    assert data.test is not None
    train = Binarised(data.train["x"].flatten(1))
    test = Binarised(data.test["x"].flatten(1))[range(settings.test)]
    batches = BatchSampler(RandomSampler(train), settings.batch_size, drop_last=False)
    pixels, sizes, latent = test.shape[1], settings.hidden, settings.latent
    mlp = partial(MLP, activation=nn.Tanh)
    posterior = fit(
        VAE(mlp(latent, sizes, pixels), latent),
        DataLoader(train, sampler=batches, batch_size=None),
        guide=Amortized(mlp(pixels, sizes), MeanField(sizes[-1], latent)),
        method=svi(
            loss=loss,
            lr=settings.lr,
            optimizer=partial(torch.optim.Adam, eps=1e-4, fused=True),
            schedule=settings.schedule,
            epochs=settings.epochs,
        ),
        progress=progress,
    )
    assert posterior.guide is not None
    log_p = posterior.log_evidence(test, settings.samples).mean().item()
    with torch.no_grad():
        test = test.to(find_device("auto"))
        parts = [log_weights(posterior.model, posterior.guide, rows, particles=64)[0] for rows in test.split(500)]
    weights = torch.cat(parts, 1)
    return {"nll": -log_p, "bound": -iwae(weights).mean().item(), "kl": log_p - elbo(weights).mean().item()}
