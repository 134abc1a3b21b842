"""What collapses in linear conditional and hierarchical VAEs is known in closed form, and tells of networks too.

References:
    Beyond Vanilla Variational Autoencoders: Detecting Posterior Collapse in Conditional and Hierarchical Variational
    Autoencoders (Dang et al., 2024) https://arxiv.org/abs/2306.05023

Images are in units of their pixels' standard deviation; likelihoods are normal, with fixed noise. "conditional" makes
the lower half of an image from the upper one, or from another image's ("no correlation"); "hierarchical" has two levels
of latents, of which the upper is looked at, and a scale of z1 given x that is 0.7, or learnt. Detected as collapsed are
latents with a KL divergence below 0.1 nats for 95% of the images. What is predicted is the optimum of the linear model,
by ``pyro_ae.diagnostics.collapse``, where it is derived: the singular values of the data, once the condition is taken
out, below sqrt(beta) times the noise; and for the upper level what depends on both weights and the scale of z1.

- full: MNIST, 16 latents, two hidden layers of 512, 50,000 steps of 128. The paper's own sizes are not known to us.
- medium: 20,000 images of MNIST, 16 latents, a hidden layer of 256, 10,000 steps.
- small: digits of 8 x 8 pixels, 6 latents, a hidden layer of 48, 320 steps.

Small, seed 0; for seed 1 too each claim held, but for those in ``NOT_AT_SMALL``::

                                     linear                     MLP
    part          case             found  theory  nats  theory  found   nats
    conditional   base                 0       1  2.01    1.89      2   1.15
                  no correlation       0       0  3.35    3.24      2   2.32
                  larger beta          4       5  0.17    0.22      6   0.02
                  more noise           4       5  0.25    0.28      5   0.08
    hierarchical  base                 0       0  3.77    5.36      1   3.46
                  larger beta          0       2  0.74    1.31      2   0.99
                  learnt scale         6       6  0.00    0.00      6   0.01
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ae import batch_plate, datasets, fit, observe, svi
from pyro_ae.diagnostics.collapse import hierarchical_collapse, linear_collapse, residual_variances
from pyro_ae.diagnostics.units import collapsed
from pyro_ae.losses import annealed
from pyro_ae.nn import MLP
from pyro_ae.runtime import seeded

from ..guides.amortized import Amortized
from ..guides.bottom_up import BottomUp
from ..models.deep_vae import DeepVAE

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Scale:
    """What differs between the scales; learning rates are for linear models and for networks."""

    data: str
    rows: int
    latent: int
    hidden: tuple[int, ...]
    steps: int
    batch_size: int
    lr: tuple[float, float]


SCALES = {
    "small": Scale("digits", 1297, 6, (48,), 320, 128, (5e-2, 1e-2)),
    "medium": Scale("mnist", 20_000, 16, (256,), 10_000, 128, (5e-3, 1e-3)),
    "full": Scale("mnist", 60_000, 16, (512, 512), 50_000, 128, (5e-3, 1e-3)),
}


class Spread(nn.Module):
    """A linear map of features to locations of normals, whose scales are the same for all rows.

    Arguments:
        features: size h of the features ``[*, h]``.
        latent: size of the latent.
        scale: of all elements, which is not learnt; None where they are.
    """

    def __init__(self, features: int, latent: int, scale: float | None = None) -> None:
        super().__init__()
        self.map = nn.Linear(features, latent)
        log_scale = torch.full((latent,), math.log(scale or 0.5))
        self.log_scale = nn.Parameter(log_scale, requires_grad=scale is None)

    def forward(self, features: Tensor) -> Distribution:
        return dist.Normal(self.map(features), self.log_scale.exp()).to_event(1)


class ConditionalVAE(nn.Module):
    """Rows given others: a standard normal code, and a network that sees it beside the condition.

    Arguments:
        decoder: from ``[*, latent + condition]`` to the mean ``[*, d]``.
        latent: size of the code.
        noise: standard deviation of a row given both.
    """

    def __init__(self, decoder: nn.Module, latent: int, noise: float) -> None:
        super().__init__()
        self.decoder, self.latent, self.noise = decoder, latent, noise

    def forward(self, y: Tensor, condition: Tensor) -> None:
        with batch_plate(y):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))
            given = condition.expand(*z.shape[:-1], condition.shape[-1])
            mean = self.decoder(torch.cat([z, given], -1))
            observe("y", dist.Normal(mean, self.noise).to_event(1), y)


CONDITIONAL = {
    "base": (True, 1.0, 0.8),
    "no correlation": (False, 1.0, 0.8),
    "larger beta": (True, 3.0, 0.8),
    "more noise": (True, 1.0, 1.3),
}
"""Whether the condition belongs to the row, the KL divergence's weight beta, and the decoder's noise."""

HIERARCHICAL = {
    "base": (0.7, 1.0),
    "larger beta": (0.7, 2.0),
    "learnt scale": (None, 2.0),
}
"""The encoder's scale of z1, and the weight beta2 of z2's KL divergence."""

NOISE, PRIOR_NOISE = 0.5, 1.0
"""Of the decoder, and of z1 given z2, in the hierarchical models."""

THRESHOLDS = (0.1, 0.05)
"""The detector's epsilon in nats, and delta."""


def _of(table: DataFrame, part: str, networks: str, column: str) -> dict[str, float]:
    """Case to value."""
    rows = table[(table["part"] == part) & (table["networks"] == networks)]
    return dict(zip(rows["case"], rows[column], strict=True))


def _ordered(table: DataFrame, part: str, networks: str) -> bool:
    """Whether the divergences of the cases are in the order that the theory has them in."""
    found, theory = (_of(table, part, networks, column) for column in ("kl", "predicted kl"))
    return sorted(found, key=lambda case: found[case]) == sorted(theory, key=lambda case: theory[case])


def _agree(table: DataFrame, part: str) -> bool:
    """Whether no linear model of a part has more than one collapsed latent more or less than predicted."""
    found, theory = (_of(table, part, "linear", column) for column in ("collapsed", "predicted"))
    return all(abs(found[case] - theory[case]) <= 1 for case in theory)


BOTH = ("linear", "MLP")

CLAIMS: dict[str, Callable[[DataFrame], bool]] = {
    "In linear conditional models as many latents collapse as the theory says, give or take one": lambda table: _agree(
        table, "conditional"
    ),
    "In linear hierarchical models as many latents collapse as the theory says, give or take one": lambda table: _agree(
        table, "hierarchical"
    ),
    "The theory of linear models has the cases in the order of the divergences, of networks too": lambda table: all(
        _ordered(table, part, networks) for part in ("conditional", "hierarchical") for networks in BOTH
    ),
    "Latents say less of the row where the condition says more": lambda table: all(
        kl["base"] < 0.8 * kl["no correlation"] for kl in (_of(table, "conditional", n, "kl") for n in BOTH)
    ),
    "A larger beta, and more noise in the decoder, make more latents collapse": lambda table: all(
        many[case] > many["base"]
        for many in (_of(table, "conditional", n, "collapsed") for n in BOTH)
        for case in ("larger beta", "more noise")
    ),
    "A larger weight of the upper level's divergence makes more of it collapse": lambda table: all(
        many["larger beta"] > many["base"] for many in (_of(table, "hierarchical", n, "collapsed") for n in BOTH)
    ),
    "With a learnt scale of the lower level all of the upper one collapses, and not with a fixed one": lambda table: (
        all(
            many["learnt scale"] > many["larger beta"] and said["learnt scale"] < 0.1
            for many, said in ((_of(table, "hierarchical", n, c) for c in ("collapsed", "kl")) for n in BOTH)
        )
    ),
}

NOT_AT_SMALL = {
    "In linear hierarchical models as many latents collapse as the theory says, give or take one": "it held for 1 "
    "of 2 seeds: 320 steps are too few for the upper level to settle, so that with the larger weight none of 6 was "
    "below the threshold yet where 2 should be, and they said 0.7 nats in place of 1.3",
    "A larger weight of the upper level's divergence makes more of it collapse": "the same, for 1 of 2 seeds; the "
    "divergence of the linear model fell from 3.8 to 0.7 nats, but was shared out among all 6 latents",
}

PAPER: list[dict[str, Any]] = []  # no number of the paper's is known to us


def run(scale: str = "small", seed: int = 0, progress: bool = False) -> DataFrame:
    """How many latents the detector finds collapsed, and how many the theory says, with their KL divergences in nats.

    Arguments:
        scale: one of ``SCALES``.
        seed: of the initial weights, the batches and all noise; the same in every row.
        progress: whether to show a bar for each fit, and each row once it is known.
    """
    from pandas import DataFrame

    settings = SCALES[scale]
    images = datasets.load(settings.data).train["x"][: settings.rows]
    images = images.float() / images.float().std()
    half = images.shape[1] // 2
    condition, y = images[:, :half].flatten(1), images[:, half:].flatten(1)
    rows: list[dict[str, Any]] = []
    for networks, hidden in (("linear", ()), ("MLP", settings.hidden)):
        for case, (related, beta, noise) in CONDITIONAL.items():
            with seeded(seed):
                given = condition if related else condition[torch.randperm(len(condition))]
                kl = _conditional(settings, hidden, y, given, beta, noise, progress)
            theory = linear_collapse(residual_variances(y, given), noise, beta=beta, latent=settings.latent).kl
            rows.append({"part": "conditional", "networks": networks, "case": case, **_summary(kl, theory)})
        for case, (spread, beta) in HIERARCHICAL.items():
            with seeded(seed):
                kl = _hierarchical(settings, hidden, images.flatten(1), spread, beta, progress)
            theory = hierarchical_collapse(
                residual_variances(images),
                NOISE,
                prior_noise=PRIOR_NOISE,
                scale=spread,
                beta2=beta,
                latent=settings.latent,
            ).kl2
            rows.append({"part": "hierarchical", "networks": networks, "case": case, **_summary(kl, theory)})
        if progress:
            print(*rows[-7:], sep="\n", file=sys.stderr)
    return DataFrame(rows)


def _summary(kl: Tensor, theory: Tensor) -> dict[str, float]:
    """What the detector makes of the divergences of all rows ``[N, latent]``, and what was to be expected."""
    return {
        "collapsed": int(collapsed(kl, *THRESHOLDS).sum()),
        "predicted": int((theory == 0).sum()),
        "kl": kl.sum(1).mean().item(),
        "predicted kl": theory.sum().item(),
    }


def _network(inputs: int, hidden: tuple[int, ...]) -> tuple[nn.Module, int]:
    """Features of an input, and how many; the input itself for linear models."""
    return (MLP(inputs, hidden, activation=nn.Tanh), hidden[-1]) if hidden else (nn.Identity(), inputs)


def _fitted(
    settings: Scale, linear: bool, model: nn.Module, guide: nn.Module, data: Any, loss: annealed, progress: bool
) -> None:
    method = svi(loss=loss, lr=settings.lr[0 if linear else 1], schedule="cosine", steps=settings.steps)
    fit(
        model,
        data,
        guide=guide,
        method=method,
        batch_size=settings.batch_size,
        device="cpu",
        progress=progress,
        check=False,
    )


def _conditional(
    settings: Scale, hidden: tuple[int, ...], y: Tensor, given: Tensor, beta: float, noise: float, progress: bool
) -> Tensor:
    """The divergences of z after a fit of a conditional VAE, ``[N, latent]``."""
    both = y.shape[1] + given.shape[1]
    features, size = _network(settings.latent + given.shape[1], hidden)
    model = ConditionalVAE(nn.Sequential(features, nn.Linear(size, y.shape[1])), settings.latent, noise)
    encoder, size = _network(both, hidden)
    guide = Amortized(encoder, Spread(size, settings.latent), inputs=lambda y, x: torch.cat([y, x], -1))
    _fitted(settings, not hidden, model, guide, (y, given), annealed(beta), progress)
    with torch.no_grad():
        return _kl(guide.head(guide.features(torch.cat([y, given], -1))))


def _hierarchical(
    settings: Scale, hidden: tuple[int, ...], x: Tensor, scale: float | None, beta: float, progress: bool
) -> Tensor:
    """The divergences of z2 after a fit of a VAE with two levels of latents, ``[N, latent]``."""
    latent, pixels = settings.latent, x.shape[1]
    (up, above), (down, below), (first, size), (second, top) = (
        _network(inputs, hidden) for inputs in (latent, latent, pixels, latent)
    )
    model = DeepVAE(
        nn.Sequential(down, nn.Linear(below, pixels)),
        nn.Sequential(up, Spread(above, latent, PRIOR_NOISE)),
        latent=latent,
        likelihood=lambda mean: dist.Normal(mean, NOISE).to_event(1),
    )
    guide = BottomUp((first, Spread(size, latent, scale)), (second, Spread(top, latent)))
    _fitted(settings, not hidden, model, guide, x, annealed(beta, sites=("z2",)), progress)
    with torch.no_grad():
        return _kl(guide.above[0](guide.head(guide.features(x)).sample()))


def _kl(q: Distribution) -> Tensor:
    """Of independent normals from the standard normal, for each element."""
    variance = q.variance
    return 0.5 * (q.mean.square() + variance - 1 - variance.log())
