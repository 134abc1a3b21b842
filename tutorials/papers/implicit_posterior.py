"""A posterior that a network makes of noise correlates the layers of another, and knows better what it does not know.

References:
    Implicit Variational Inference for High-Dimensional Posteriors (Uppal, Stensbo-Smidt, Boomsma and Frellsen, 2023)
    https://arxiv.org/abs/2310.06643

All methods have the same network with standard normal priors, as many steps, and the same start. The implicit posterior
has noise of 1e-3 as in the paper's code, and all terms of the ELBO count once, which in that code they do not. "Layers
apart" are its own draws, of each layer in an order of its own. On images nll, ece and, by the entropy of what is
predicted, the AUROC for images of another kind are those of held-out rows; of a curve with a gap the nll is that of
new rows where there are data, and the standard deviations of f are averages there and in the gap. The paper's UCI
tables and residual networks are not here, and its networks and steps are not known to be those of full.

- full: MNIST against Fashion-MNIST, two layers of 400 units, weights made by products of matrices; NUTS on the curve.
- medium: the same with one layer of 100 units.
- small: digits of 8 x 8 pixels, binarised at a half so that not all is easy; 200 images of the classes 0 to 7 to train
  on, 1041 to test on, and those of 8 and 9 as the other kind; one layer of 20 units, 200 steps and 300 on the curve.

Small, seed 0; over seeds 0 to 4 each claim held but for those in ``NOT_AT_SMALL``. On the curve, 300 steps are few for
all but the implicit posterior: with 400, mean-field VI has an nll of 0.51 and the implicit posterior one of -0.74::

                              curve                    images
    method                      nll  within  between   accuracy    nll    ece  auroc
    ensemble                   1.74   0.090    0.172      0.915  0.281  0.071  0.874
    MAP                        0.65                       0.922  0.287  0.066  0.860
    mean-field VI              1.06   0.144    0.119      0.914  0.332  0.106  0.878
    implicit                  -0.72   0.033    0.092      0.912  0.302  0.053  0.875
    implicit, layers apart    -0.70   0.096    0.113      0.912  0.302  0.053  0.875
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_ae import batch_plate, elbo, fit, importance, nuts, svi
from pyro_ae.bayesian import Bayesian, bayesian
from pyro_ae.engines.ensemble import ensemble
from pyro_ae.nn import MLP
from pyro_ae.priors import normal
from pyro_ae.runtime import find_device, seeded
from pyro_ae.types import Draws

from ..guides.implicit import Implicit, Matrices
from .entropy_mcmc import images, in_parts, score

if TYPE_CHECKING:
    from pandas import DataFrame


def perceptron(latent: int, size: int) -> nn.Module:
    """A generator of few weights."""
    return MLP(latent, (64, 64), size, activation=nn.Tanh)


@dataclass(frozen=True)
class Training:
    """How all methods are trained on one kind of data, and what the implicit posterior is made of."""

    hidden: tuple[int, ...]
    batch_size: int | None
    steps: int
    lr: float
    particles: int = 1
    latent: int = 5
    generator: Callable[[int, int], nn.Module] = perceptron
    noise: float = 1e-3
    spread: float = 0.05
    members: int = 5
    draws: int = 100


@dataclass(frozen=True)
class Scale:
    """What differs between the scales; without images of another kind, two classes are held out in their place."""

    images: str
    others: str | None
    rows: int | None
    binary: bool
    on_images: Training
    on_curve: Training
    reference: bool


_MNIST = ("mnist", "fashion_mnist", None, False)
_LONG = Training((20,), None, 5000, 1e-2, particles=4)

SCALES = {
    "small": Scale(
        *("digits", None, 200, True, Training((20,), 50, 200, 1e-2)),
        *(Training((20,), None, 300, 1e-2, 2), False),
    ),
    "medium": Scale(*_MNIST, Training((100,), 128, 4000, 2e-3, 1, 10, Matrices), _LONG, True),
    "full": Scale(*_MNIST, Training((400, 400), 128, 40_000, 1e-3, 2, 15, partial(Matrices, width=64)), _LONG, True),
}


def _values(table: DataFrame, column: str, data: str = "images") -> dict[str, float]:
    return dict(table[table.data == data].set_index("method")[column])


def _beats(column: str, sign: int, other: str, data: str = "images") -> Callable[[DataFrame], bool]:
    """Whether the implicit posterior has the larger (1) or smaller (-1) value."""

    def check(table: DataFrame) -> bool:
        values = _values(table, column, data)
        return bool(sign * values["implicit"] > sign * values[other])

    return check


def _widens(table: DataFrame) -> bool:
    within, between = (_values(table, column, "curve") for column in ("within", "between"))
    return between["implicit"] / within["implicit"] > between["mean-field VI"] / within["mean-field VI"]


def _correlates(table: DataFrame) -> bool:
    within = _values(table, "within", "curve")
    return within["implicit, layers apart"] > 1.5 * within["implicit"]


CLAIMS: dict[str, Callable[[DataFrame], bool]] = {
    "The implicit posterior correlates the layers: with the draws of each in an order of its own, the curve is half as "
    "uncertain again where there are data": _correlates,
    "With its layers apart, the implicit posterior fits the curve worse": _beats(
        "nll", -1, "implicit, layers apart", "curve"
    ),
    "Where there are no data, uncertainty grows by a larger factor than that of mean-field VI": _widens,
    "The implicit posterior fits the curve better than mean-field VI": _beats("nll", -1, "mean-field VI", "curve"),
    "The implicit posterior is more accurate on images than mean-field VI": _beats("accuracy", 1, "mean-field VI"),
    "The implicit posterior has a lower NLL of images than mean-field VI": _beats("nll", -1, "mean-field VI"),
    "The implicit posterior is calibrated better on images than mean-field VI": _beats("ece", -1, "mean-field VI"),
    "The implicit posterior detects other images better than mean-field VI": _beats("auroc", 1, "mean-field VI"),
    "The implicit posterior has a lower NLL of images than the deep ensemble": _beats("nll", -1, "ensemble"),
    "The implicit posterior is calibrated better on images than the deep ensemble": _beats("ece", -1, "ensemble"),
    "The implicit posterior detects other images better than the deep ensemble": _beats("auroc", 1, "ensemble"),
}

_FEW = "in 200 steps its five directions leave the 1468 weights near one network"

NOT_AT_SMALL = {
    "With its layers apart, the implicit posterior fits the curve worse": "nll -0.75 to -0.66 against -0.83 to -0.70; "
    "it held for 4 of 5 seeds",
    "The implicit posterior is more accurate on images than mean-field VI": "0.912 to 0.923 against 0.914 to 0.920; it "
    "held for 2 of 5 seeds",
    "The implicit posterior detects other images better than mean-field VI": "AUROC 0.852 to 0.877 against 0.878 to "
    f"0.893; it held for 0 of 5 seeds: {_FEW}",
    "The implicit posterior has a lower NLL of images than the deep ensemble": "0.279 to 0.302 against 0.272 to 0.281; "
    f"it held for 0 of 5 seeds: {_FEW}",
    "The implicit posterior is calibrated better on images than the deep ensemble": "0.053 to 0.066 against 0.060 to "
    "0.071; it held for 3 of 5 seeds",
    "The implicit posterior detects other images better than the deep ensemble": "AUROC 0.852 to 0.877 against 0.874 "
    "to 0.877; it held for 2 of 5 seeds",
}

PAPER: list[dict[str, Any]] = []


class Fitted(NamedTuple):
    """A network, draws of its weights, and the seconds that these took."""

    name: str
    net: Bayesian
    draws: Draws
    seconds: float

    def __call__(self, x: Tensor) -> Tensor:
        """What the network gives at each draw of its weights, ``[draws, N, outputs]``."""
        at = [{n: v[i].to(x.device) for n, v in self.draws.items()} for i in range(_count(self.draws))]
        with torch.no_grad():
            return torch.stack([poutine.condition(self.net, values)(x) for values in at])


def _count(draws: Draws) -> int:
    return len(next(iter(draws.values())))


def apart(draws: Draws) -> Draws:
    """The same draws of each layer, in an order of its own, so that no layer knows of another.

    Arguments:
        draws: of weights, site to ``[draws, *shape]``.
    """
    layers = sorted({name.rpartition(".")[0] for name in draws})
    orders = {layer: torch.randperm(_count(draws)) for layer in layers}
    return {name: value[orders[name.rpartition(".")[0]]] for name, value in draws.items()}


def run(scale: str = "small", seed: int = 0, progress: bool = False) -> DataFrame:
    """What each method predicts of held-out images and of a curve, how uncertain it is there, and the fit's seconds.

    Arguments:
        scale: one of ``SCALES``.
        seed: of the initial weights, the batches and all noise.
        progress: whether to show a bar for each fit, and each row once it is known.
    """
    from pandas import DataFrame

    rows: list[dict[str, Any]] = []
    for measure in (_on_curve, _on_images):
        for row in measure(SCALES[scale], seed, progress):
            rows.append(row)
            if progress:
                print(row, file=sys.stderr)
    return DataFrame(rows)


def _on_images(s: Scale, seed: int, progress: bool) -> Iterator[dict[str, Any]]:
    data = images(s.images, s.others, s.rows, s.binary)
    classes = int(data.y.max()) + 1
    for fitted in _fits(s.on_images, _classes, data.x, data.y, classes, seed, progress):

        def predict(x: Tensor, fitted: Fitted = fitted) -> Tensor:
            return fitted(x).softmax(-1).mean(0)

        found = score(in_parts(predict, data.test_x), in_parts(predict, data.others), data.test_y)
        yield {"data": "images", "method": fitted.name, **found, "seconds": fitted.seconds}


def _on_curve(s: Scale, seed: int, progress: bool) -> Iterator[dict[str, Any]]:
    """Of f(x) = sin 2x + x / 2 there are 40 rows within (-2, -1) and (1, 2), and none between."""
    with seeded(seed):
        x = torch.rand(240, 1).add(1.0) * torch.tensor([-1.0, 1.0]).repeat(120).unsqueeze(-1)
        y = (2 * x).sin().add(x / 2).squeeze(-1) + NOISE * torch.randn(240)
    device, between = find_device("auto"), torch.linspace(-0.8, 0.8, 41).unsqueeze(-1)
    for fitted in _fits(s.on_curve, _numbers, x[:40], y[:40], 1, seed, progress, reference=s.reference):
        known, gap = (fitted(part.to(device)).squeeze(-1).cpu() for part in (x[40:], between))
        log_p = dist.Normal(known, NOISE).log_prob(y[40:]).logsumexp(0) - torch.tensor(len(known)).log()
        spread = {"within": known.std(0).mean().item(), "between": gap.std(0).mean().item()} if len(known) > 1 else {}
        nll = -log_p.mean().item()
        yield {"data": "curve", "method": fitted.name, "nll": nll, **spread, "seconds": fitted.seconds}


NOISE = 0.1
"""Of the curve's rows."""


def _classes(f: Tensor) -> Any:
    return dist.Categorical(logits=f)


def _numbers(f: Tensor) -> Any:
    return dist.Normal(f.squeeze(-1), NOISE)


def _start(site: dict[str, Any]) -> Tensor:
    """PyTorch's initialisation, where ensembles start as well."""
    return site["infer"]["start"]()


def _fits(
    t: Training,
    likelihood: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor,
    outputs: int,
    seed: int,
    progress: bool,
    reference: bool = False,
) -> Iterator[Fitted]:
    """Every method, on the same network and prior with as many steps."""
    vi = svi(loss=importance(elbo, t.particles), lr=t.lr, schedule="cosine", steps=t.steps)
    implicit = partial(Implicit, latent=t.latent, generator=t.generator, noise=t.noise, start=_start, scale=t.spread)
    methods: dict[str, tuple[Any, Any]] = {
        "ensemble": (ensemble(members=t.members, lr=t.lr, steps=t.steps), None),
        "mean-field VI": (vi, partial(AutoNormal, init_loc_fn=_start, init_scale=t.spread)),
        "implicit": (vi, implicit),
    }
    if reference:
        methods["NUTS"] = nuts(draws=1000, chains=4), None
    for name, (engine, make) in methods.items():
        with seeded(seed):
            net = bayesian(MLP(x.shape[1], t.hidden, outputs, activation=nn.Tanh), normal(), event_dims=1)
            model = partial(_model, net, likelihood)
            start = time.perf_counter()
            guide = None if make is None else make(model)
            batch_size = t.batch_size if name != "NUTS" else None
            posterior = fit(model, (x, y), guide=guide, method=engine, batch_size=batch_size, progress=progress)
            seconds = time.perf_counter() - start
            draws = posterior.sample(None if make is None else t.draws)
            yield Fitted(name, net, draws, seconds)
            if name == "ensemble":
                yield Fitted("MAP", net, {n: v[:1] for n, v in draws.items()}, seconds / t.members)
            if name == "implicit":
                yield Fitted("implicit, layers apart", net, apart(draws), seconds)


def _model(net: Bayesian, likelihood: Callable[[Tensor], Any], x: Tensor, y: Tensor | None = None) -> None:
    f = net(x)
    with batch_plate(x):
        pyro.sample("y", likelihood(f), obs=y)
