"""Trained together with particles of its stochastic part, a partly Bayesian network is surer where it may be.

References:
    On Feynman-Kac training of partial Bayesian neural networks (Zhao, Mair, Schon and Sjolund, 2024)
    https://arxiv.org/abs/2310.19608

In each network one layer is stochastic, with the prior N(0, I), and the rest is trained along: by SMC over that layer
(Feynman-Kac), to the maximum a posteriori, by SWAG, with 20 epochs for its moments, and by mean-field VI. All take
minibatches and Adam with a learning rate of 0.01, but that SWAG's stochastic layer descends with momentum. Each is
fitted with several numbers of epochs, and that with the lowest NLL of validation rows is kept; the paper keeps the best
of all steps.

- full: two moons with 100 points (100-20-5 stochastic-1 units), UCI tables (50-20-5 stochastic-1, noise of a tenth of
  the variance of y, as the paper's is not known here) and MNIST (the first of two convolutions stochastic), with 1000
  particles; 10 repeats of all but MNIST. Of MNIST's batches of 100 they take tens of GB of GPU memory.
- medium: moons, Boston and 2000 images of MNIST, with 300 particles.
- small: one set of moons, 1000 test points, up to 40 epochs.

Small, seed 0; and the mean over seeds 0 to 4::

    method         nll   accuracy    ece    nll, mean
    MAP          0.243      0.918  0.039        0.308
    SWAG         0.278      0.908  0.044        0.325
    VI           0.252      0.903  0.009        0.324
    Feynman-Kac  0.231      0.919  0.029        0.286
"""

from __future__ import annotations

import math
import operator
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ae import Posterior, batch_plate, datasets, fit, map_, svi, swag
from pyro_ae.bayesian import bayesian
from pyro_ae.diagnostics.calibration import calibration_error
from pyro_ae.engines.feynman_kac import feynman_kac
from pyro_ae.runtime import seeded
from pyro_ae.types import Engine

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Scale:
    """What differs between the scales; of images there may be fewer."""

    data: tuple[str, ...]
    repeats: int
    epochs: tuple[int, ...]
    particles: int
    draws: int
    images: int = 50_000
    image_epochs: tuple[int, ...] = (1, 3, 10)


SCALES = {
    "small": Scale(("moons",), 1, (10, 20, 40), 1000, 100),
    "medium": Scale(("moons", "uci/boston", "mnist"), 3, (10, 20, 50, 100), 300, 100, images=2000, image_epochs=(1, 2)),
    "full": Scale(("moons", "uci/boston", "uci/yacht", "uci/protein", "mnist"), 10, (10, 20, 50, 100), 1000, 1000),
}

BATCH = {"moons": 20, "uci/boston": 50, "uci/yacht": 20, "uci/protein": 100, "mnist": 100}
METHOD, BASELINES = "Feynman-Kac", ("MAP", "SWAG", "VI")


def _better(
    table: DataFrame, column: str, others: tuple[str, ...], better: Callable[[float, float], bool] = operator.lt
) -> bool:
    """Whether the method is better than others, on all data that have the column."""
    cells = table[table[column].notna()].pivot(index="data", columns="method", values=column)
    return all(better(row[METHOD], row[other]) for _, row in cells.iterrows() for other in others)


CLAIMS: dict[str, Callable[[DataFrame], bool]] = {
    "Feynman-Kac training has a lower NLL than MAP": lambda table: _better(table, "nll", ("MAP",)),
    "Feynman-Kac training has a lower NLL than VI": lambda table: _better(table, "nll", ("VI",)),
    "Feynman-Kac training has a lower NLL than SWAG": lambda table: _better(table, "nll", ("SWAG",)),
    "Feynman-Kac training has the lowest calibration error": lambda table: _better(table, "ece", BASELINES),
    "Feynman-Kac training is as accurate as each of the others, or at most a percent below": lambda table: _better(
        table, "accuracy", BASELINES, lambda a, b: a > b - 0.01
    ),
}

NOT_AT_SMALL = {
    "Feynman-Kac training has a lower NLL than SWAG": "one set of 100 points: SWAG's NLL is from 0.009 lower to 0.114 "
    "higher; it held for 3 of 5 seeds",
    "Feynman-Kac training has the lowest calibration error": "of one set of 100 points all are within 0.07, VI, which "
    "is less accurate, now and then by less; it held for 2 of 5 seeds",
}

PAPER: list[dict[str, Any]] = []


class Part(NamedTuple):
    """Rows to train on, to choose by and to test on, and the unit of y."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    test_x: Tensor
    test_y: Tensor
    unit: float = 1.0


def run(scale: str = "small", seed: int = 0, progress: bool = False) -> DataFrame:
    """What each method predicts of held-out rows, averaged over repeats, and the seconds that a fit takes.

    Arguments:
        scale: one of ``SCALES``.
        seed: of the data that are generated, the initial weights, the batches and all noise; the same in every row.
        progress: whether to show a bar for each fit, and each row once it is known.
    """
    from pandas import DataFrame

    settings = SCALES[scale]
    rows: list[dict[str, Any]] = []
    for data in settings.data:
        parts = [_load(settings, data, n, seed) for n in range(1 if data == "mnist" else settings.repeats)]
        for method in (*BASELINES, METHOD):
            with seeded(seed):
                found = [_measure(settings, data, method, part, progress) for part in parts]
            rows.append({"data": data, "method": method, **DataFrame(found).mean()})
            if progress:
                print(rows[-1], file=sys.stderr)
    columns = ["data", "method", "nll", "accuracy", "ece", "rmse", "epochs", "seconds"]
    return DataFrame(rows, columns=[c for c in columns if any(c in row for row in rows)])


def _load(settings: Scale, name: str, repeat: int, seed: int) -> Part:
    if name == "moons":
        from sklearn.datasets import make_moons

        x, y = make_moons(1200, noise=0.3, random_state=100 * seed + repeat)
        x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
        return Part(x[:100], y[:100], x[100:200], y[100:200], x[200:], y[200:])
    split = None if name == "mnist" else repeat % (5 if name == "uci/protein" else 20)
    data = datasets.load(name, split=split)
    assert data.test is not None
    (x, y), (test_x, test_y) = ((part["x"], part["y"]) for part in (data.train, data.test))
    if name == "mnist":
        held = data.validation
        assert held is not None
        n = settings.images
        return Part(x[:n, None], y[:n], held["x"][:n, None], held["y"][:n], test_x[:, None], test_y)
    mean, spread, unit = x.mean(0), x.std(0).clamp(min=1e-6), y.std()
    y, test_y = ((values - y.mean()) / unit for values in (y, test_y))
    (x, held_x), (y, held_y) = (t.split([len(t) - len(t) // 10, len(t) // 10]) for t in ((x - mean) / spread, y))
    return Part(x, y, held_x, held_y, (test_x - mean) / spread, test_y, unit.item())


def _model(name: str, inputs: int) -> Callable[..., None]:
    """The paper's networks: stochastic is the layer before the last, and the first convolution of images'."""
    if name == "mnist":
        convolutions = [nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)]
        layers: list[nn.Module] = [part for c in convolutions for part in (c, nn.ReLU(), nn.AvgPool2d(2))]
        layers += [nn.Flatten(), nn.Linear(3136, 256), nn.ReLU(), nn.Linear(256, 10)]
        trained = ["3", "7", "9"]
    else:
        sizes = [inputs, 100 if name == "moons" else 50, 20, 5]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.GELU())]
        layers.append(nn.Linear(5, 1))
        trained = ["0", "2", "6"]
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    network = bayesian(nn.Sequential(*layers), deterministic=trained, start="module")

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = pyro.deterministic("f", network(x))
        with batch_plate(x):
            pyro.sample("y", _likelihood(name, f), obs=y)

    return model


def _likelihood(name: str, f: Tensor) -> Any:
    if name == "mnist":
        return dist.Categorical(logits=f)
    return dist.Bernoulli(logits=f.squeeze(-1)) if name == "moons" else dist.Normal(f.squeeze(-1), 0.1**0.5)


def _engine(settings: Scale, method: str, epochs: int, batches: int) -> Engine:
    """All of as many steps, at one learning rate; SWAG takes its moments after them."""
    steps = epochs * batches
    engines: dict[str, Engine] = {
        "MAP": map_(steps=steps, lr=1e-2, parameter_lr=1e-2),
        "SWAG": swag(
            warmup=steps, snapshots=20, thinning=batches, rank=20, lr=1e-2, parameter_lr=1e-2, draws=settings.draws
        ),
        "VI": svi(epochs=epochs, lr=1e-2),
        METHOD: feynman_kac(particles=settings.particles, walk=1e-2, lr=1e-2, steps=steps),
    }
    return engines[method]


def _measure(settings: Scale, name: str, method: str, part: Part, progress: bool) -> dict[str, float]:
    """Metrics of the fit whose number of epochs is best for the rows held out for that."""
    start = time.perf_counter()
    fits = []
    for epochs in settings.image_epochs if name == "mnist" else settings.epochs:
        engine = _engine(settings, method, epochs, -(-len(part.x) // BATCH[name]))
        model = _model(name, part.x.shape[1])
        posterior = fit(model, (part.x, part.y), method=engine, batch_size=BATCH[name], progress=progress)
        fits.append((_score(settings, name, posterior, part.held_x, part.held_y)["nll"], epochs, posterior))
    _, epochs, best = min(fits, key=operator.itemgetter(0))
    found = _score(settings, name, best, part.test_x, part.test_y, part.unit)
    return found | {"epochs": epochs, "seconds": time.perf_counter() - start}


@torch.no_grad()
def _score(
    settings: Scale, name: str, posterior: Posterior, test_x: Tensor, test_y: Tensor, unit: float = 1.0
) -> dict[str, float]:
    """Metrics of the mixture over draws, in the units of y."""
    draws = min(settings.draws, 100 if name == "mnist" else 1000)
    if posterior.draws is not None:
        chains, each = next(iter(posterior.draws.values())).shape[:2]
        draws = min(draws, chains * each)
    f, log_p = [], []
    for x, y in zip(test_x.split(100), test_y.split(100), strict=True):
        f.append(posterior.predict((x, None), draws, sites=["f"])["f"].cpu())
        log_p.append(posterior.log_likelihood((x, y), draws)["y"].cpu().logsumexp(0) - math.log(draws))
    values, nll = torch.cat(f, 1), -torch.cat(log_p).mean().item()
    if name.startswith("uci/"):
        rmse = (values.mean(0).squeeze(-1) - test_y).square().mean().sqrt().item()
        return {"nll": nll + math.log(unit), "rmse": unit * rmse}
    binary = torch.cat([torch.zeros_like(values), values], -1) if name == "moons" else values
    probabilities = binary.softmax(-1).mean(0)
    accuracy = (probabilities.argmax(-1) == test_y).float().mean().item()
    return {"nll": nll, "accuracy": accuracy, "ece": calibration_error(probabilities, test_y)}
