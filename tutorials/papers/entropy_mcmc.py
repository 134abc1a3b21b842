"""Chains that are coupled to a smoothed posterior find flatter basins, where a network predicts better.

References:
    Entropy-MCMC: Sampling from Flat Basins with Ease (Li and Zhang, 2024) https://arxiv.org/abs/2310.05401

All methods have one chain, the same network and prior and as many gradients. Learning rate, four cycles of it,
temperature, weight decay (here the variance of a normal prior) and the coupling, relative to the step, are those of the
paper's code; MAP is fitted by Adam. Entropy-MCMC moves as cSGLD does, and keeps draws of both of its variables.
Images of another kind are told by the entropy of what is predicted. Sharpness is that of the training images' average
NLL, without the prior: the largest eigenvalue of its Hessian by Lanczos and its trace by Hutchinson, at two draws.

- full: Fashion-MNIST against MNIST, two convolutions and two layers, 200 epochs; the paper's own are CIFAR and ResNets,
  whose batch norms have no likelihood of single rows.
- medium: the same with a quarter of the channels and 10 epochs.
- small: digits of 8 x 8 pixels, binarised at a half so that not all is easy; 200 images of the classes 0 to 7 to train
  on, 1041 to test on, and those of 8 and 9 as the other kind.

Small, seed 0; over seeds 0 to 4 each claim held but for those in ``NOT_AT_SMALL``::

    method        accuracy     nll     ece   auroc  eigenvalue  trace
    MAP              0.921   0.271   0.034   0.852        0.43    2.8
    SGLD             0.914   0.289   0.037   0.844        0.29    1.8
    SGHMC            0.910   0.324   0.042   0.846        0.45    2.5
    cSGLD            0.908   0.302   0.043   0.850        0.59    3.2
    Entropy-MCMC     0.913   0.274   0.019   0.859        1.24    8.2
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_ae import batch_plate, datasets, fit
from pyro_ae.bayesian import Bayesian, bayesian
from pyro_ae.diagnostics.calibration import calibration_error
from pyro_ae.engines.ensemble import map_
from pyro_ae.engines.sghmc import entropy_sghmc, sghmc
from pyro_ae.engines.sgld import sgld
from pyro_ae.engines.stepping import Stepping
from pyro_ae.nn import MLP
from pyro_ae.priors import normal
from pyro_ae.runtime import find_device, seeded

if TYPE_CHECKING:
    from pandas import DataFrame


def perceptron(pixels: int, classes: int) -> nn.Module:
    """The network of the small scale."""
    return MLP(pixels, (50, 50), classes)


def convolutions(pixels: int, classes: int, *, width: int) -> nn.Module:
    """Two convolutions and two layers, for square images of a multiple of 4 pixels."""
    side = round(pixels**0.5)
    return nn.Sequential(
        *(nn.Unflatten(1, (1, side, side)), nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(2 * width * (side // 4) ** 2, 4 * width), nn.ReLU(), nn.Linear(4 * width, classes)),
    )


@dataclass(frozen=True)
class Scale:
    """What differs between the scales; without images of another kind, two classes are held out in their place."""

    images: str
    others: str | None
    rows: int | None
    binary: bool
    network: Callable[[int, int], nn.Module]
    batch_size: int
    warmup: int
    draws: int
    thinning: int
    flatness: float
    adam_lr: float
    lr: float = 0.5
    cycles: int = 4
    temperature: float = 1e-4
    decay: float = 5e-4
    friction: float = 0.1
    hessians: int = 2


_FASHION = ("fashion_mnist", "mnist", None, False)

SCALES = {
    "small": Scale("digits", None, 200, True, perceptron, 50, 1200, 20, 10, 0.1, 3e-3),
    "medium": Scale(*_FASHION, partial(convolutions, width=8), 128, 7 * 400, 8, 150, 4e-4, 1e-3),
    "full": Scale(*_FASHION, partial(convolutions, width=32), 128, 192 * 391, 8, 391, 4e-4, 1e-3),
}

BASELINES = ["MAP", "SGLD", "SGHMC", "cSGLD"]


def _beats(column: str, sign: int, others: list[str] = BASELINES) -> Callable[[DataFrame], bool]:
    """Whether Entropy-MCMC has the larger (1) or smaller (-1) value."""

    def check(table: DataFrame) -> bool:
        values = sign * table.set_index("method")[column]
        return bool((values["Entropy-MCMC"] > values[others]).all())

    return check


def _is_cheap(table: DataFrame) -> bool:
    seconds = table.set_index("method")["seconds"]
    return bool(seconds["Entropy-MCMC"] < 2 * seconds["SGLD"])


CLAIMS: dict[str, Callable[[DataFrame], bool]] = {
    "Entropy-MCMC has a lower NLL than all other samplers": _beats("nll", -1, BASELINES[1:]),
    "Entropy-MCMC has a lower NLL than MAP": _beats("nll", -1, ["MAP"]),
    "Entropy-MCMC is calibrated better than all others": _beats("ece", -1),
    "Entropy-MCMC detects other images better than all other samplers": _beats("auroc", 1, BASELINES[1:]),
    "Entropy-MCMC detects other images better than MAP": _beats("auroc", 1, ["MAP"]),
    "Entropy-MCMC is more accurate than all others": _beats("accuracy", 1),
    "Entropy-MCMC finds flatter basins than all others, by the largest eigenvalue": _beats("eigenvalue", -1),
    "Entropy-MCMC finds flatter basins than all others, by the trace": _beats("trace", -1),
    "Entropy-MCMC takes less than twice the time of SGLD": _is_cheap,
}

_SHARP = (
    "for 0 of 5 seeds: only one of the coupled variables has a gradient, so that they go half as far in as many steps, "
    "and the likelihood flattens as rows are fitted; with twice the learning rate the eigenvalue was 0.46, cSGLD's 0.32"
)

NOT_AT_SMALL = {
    "Entropy-MCMC has a lower NLL than MAP": "0.258 to 0.299 against 0.271 to 0.292; it held for 2 of 5 seeds",
    "Entropy-MCMC detects other images better than MAP": "AUROC 0.828 to 0.869 against 0.830 to 0.852; it held for 4 "
    "of 5 seeds",
    "Entropy-MCMC is more accurate than all others": "0.903 to 0.913, MAP 0.911 to 0.921; it held for 0 of 5 seeds: "
    "of 1041 images, the methods differ in ten",
    "Entropy-MCMC finds flatter basins than all others, by the largest eigenvalue": "1.18 to 1.33 against 0.29 to "
    f"0.66, {_SHARP}",
    "Entropy-MCMC finds flatter basins than all others, by the trace": f"7.1 to 8.8 against 1.7 to 3.5, {_SHARP}",
}

PAPER: list[dict[str, Any]] = []


class Images(NamedTuple):
    """Images to train on, to test on, and of another kind; all flat."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    others: Tensor


def images(name: str, others: str | None = None, rows: int | None = None, binary: bool = False) -> Images:
    """A data set, and images that are of none of its classes.

    Arguments:
        name: of a data set of images and classes.
        others: name of the data set whose test images are of another kind; the two last classes of ``name`` where
            there is none, which are then left out of all else.
        rows: to train on, the rest being tested on as well; all training rows by default.
        binary: whether pixels are cut at a half, which leaves less to tell classes by.
    """
    data = datasets.load(name)
    assert data.test is not None
    x, y = (torch.cat([data.train[key], data.test[key]]) for key in "xy")
    count = len(data.train["x"])
    if others is not None:
        other = datasets.load(others).test
        assert other is not None
        kind = other["x"]
    else:
        known = y < y.max() - 1
        count = int(known[:count].sum())
        x, y, kind = x[known], y[known], x[~known]
    if binary:
        x, kind = ((t > 0.5).float() for t in (x, kind))
    x, kind, at = x.flatten(1), kind.flatten(1), rows or count
    return Images(x[:at], y[:at], x[at:], y[at:], kind)


def score(probabilities: Tensor, others: Tensor, y: Tensor) -> dict[str, float]:
    """What is right, likely, calibrated, and told from images of another kind by the entropy of what is predicted.

    Arguments:
        probabilities: of the classes of known images, ``[N, C]``.
        others: of images of another kind, ``[M, C]``.
        y: the true classes ``[N]``.
    """
    from sklearn.metrics import roc_auc_score

    entropy = -torch.special.xlogy(p := torch.cat([probabilities, others]), p).sum(-1)
    return {
        "accuracy": (probabilities.argmax(-1) == y).float().mean().item(),
        "nll": nn.functional.nll_loss(probabilities.clamp(min=1e-30).log(), y).item(),
        "ece": calibration_error(probabilities, y),
        "auroc": float(roc_auc_score([0] * len(probabilities) + [1] * len(others), entropy)),
    }


@torch.no_grad()
def in_parts(predict: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What is predicted of rows, so many at a time that all draws of them find room.

    Arguments:
        predict: rows ``[n, ...]`` to values ``[n, ...]``.
        x: ``[N, ...]``.
    """
    return torch.cat([predict(part.to(find_device("auto"))).cpu() for part in x.split(1250)])


def curvature(net: Bayesian, weights: Mapping[str, Tensor], x: Tensor, y: Tensor, probes: int = 30) -> dict[str, float]:
    """How sharp the likelihood is at some weights, by products with its Hessian alone: Lanczos and Hutchinson.

    Arguments:
        net: a network of classes.
        weights: a draw of its weights.
        x, y: rows; the likelihood is their average.
        probes: random signs that the trace is estimated from.
    """
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    shapes = {name: value.shape for name, value in weights.items()}
    flat = torch.cat([v.flatten() for v in weights.values()]).double().requires_grad_()
    parts = flat.split([s.numel() for s in shapes.values()])
    values = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
    loss = nn.functional.cross_entropy(poutine.condition(net, values)(x.double()), y)
    (gradient,) = torch.autograd.grad(loss, flat, create_graph=True)
    product = partial(torch.autograd.grad, gradient, flat, retain_graph=True)
    signs = torch.randint(2, (probes, len(flat))).double() * 2 - 1
    (along,) = product(signs, is_grads_batched=True)
    operator = LinearOperator(
        (len(flat), len(flat)), lambda v: product(torch.from_numpy(v.ravel()))[0].numpy(), dtype=np.float64
    )
    largest = eigsh(operator, 1, which="LA", v0=signs[0].numpy(), tol=1e-3, return_eigenvectors=False)
    return {"eigenvalue": float(largest[0]), "trace": (signs * along).sum(-1).mean().item()}


def run(scale: str = "small", seed: int = 0, progress: bool = False) -> DataFrame:
    """What each method predicts of held-out images, how sharp the likelihood is at its draws, and the fit's seconds.

    Arguments:
        scale: one of ``SCALES``.
        seed: of the initial weights, the batches and all noise; the same in every row.
        progress: whether to show a bar for each fit, and each row once it is known.
    """
    from pandas import DataFrame

    settings = SCALES[scale]
    data = images(settings.images, settings.others, settings.rows, settings.binary)
    rows: list[dict[str, Any]] = []
    for name, method in _methods(settings).items():
        with seeded(seed):
            rows.append({"method": name, **_measure(settings, method, data, progress)})
        if progress:
            print(rows[-1], file=sys.stderr)
    return DataFrame(rows)


def _methods(s: Scale) -> dict[str, Stepping]:
    """All of one chain and with as many gradients; friction of 1 makes Hamiltonian dynamics those of Langevin."""
    names = ("warmup", "draws", "thinning", "temperature")
    shared: dict[str, Any] = {"chains": 1, **{name: getattr(s, name) for name in names}}
    entropy: dict[str, Any] = {"adaptive": False, "friction": 1.0, "flatness": s.flatness}
    return {
        "MAP": map_(lr=s.adam_lr, steps=s.warmup + s.draws * s.thinning),
        "SGLD": sgld(lr=s.lr, **shared),
        "SGHMC": sghmc(lr=s.lr * s.friction, friction=s.friction, adaptive=False, **shared),
        "cSGLD": sgld(lr=s.lr, cycles=s.cycles, **shared),
        "Entropy-MCMC": entropy_sghmc(lr=s.lr, cycles=s.cycles, **entropy, **shared),
    }


def _measure(s: Scale, method: Stepping, data: Images, progress: bool) -> dict[str, float]:
    prior = normal(0.0, (s.decay * len(data.x)) ** -0.5)
    net = bayesian(s.network(data.x.shape[1], int(data.y.max()) + 1), prior, event_dims=1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = net(x)
        pyro.deterministic("probabilities", logits.softmax(-1), event_dim=1)
        with batch_plate(x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    start = time.perf_counter()
    posterior = fit(model, (data.x, data.y), method=method, batch_size=s.batch_size, progress=progress)
    seconds = time.perf_counter() - start
    weights = posterior.sample()
    count = len(next(iter(weights.values())))

    def predict(x: Tensor) -> Tensor:
        return posterior.predict((x, None), count, sites=["probabilities"])["probabilities"].mean(0)

    found = score(in_parts(predict, data.test_x), in_parts(predict, data.others), data.test_y)
    at = torch.linspace(0, count - 1, min(s.hessians, count)).long().tolist()
    sharp = [curvature(net, {n: v[i] for n, v in weights.items()}, data.x[:2000], data.y[:2000]) for i in at]
    return found | {n: sum(each[n] for each in sharp) / len(sharp) for n in sharp[0]} | {"seconds": seconds}
