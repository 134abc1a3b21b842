"""A posterior of the last layer alone, by a loss without sampling, makes a network know better what it does not know.

References:
    Variational Bayesian Last Layers (Harrison, Willes and Snoek, 2024) https://arxiv.org/abs/2404.11599

Compared are, with the same networks (perceptrons), optimiser and epochs: the maximum a posteriori of the last layer
(MAP); an ensemble, the mixture of all fits of MAP; mean-field VI of all weights, with fan-in priors; and VBLL: for
regression and, "discriminative", for softmax regression with a full covariance for each output, and "generative", with
a Gaussian of the features for each class, whose mean has a diagonal covariance. Rows but for the ensemble and VI are
averages over fits. Weights that have no prior decay. Of the paper's settings CIFAR-10 and residual networks are not
here, and the networks' sizes are not the paper's.

Reported are, on held-out rows: the mean NLL in nats, of y in its own units; the root mean squared error; for images the
accuracy, the expected calibration error in 15 bins, and the AUROC of 1 - max p(y | x) for images of another kind; and
the seconds that a fit takes.

- full: six of the UCI tables in the benchmark's 20 splits, two layers of 50 units; Fashion-MNIST, with MNIST as the
  other kind, two layers of 512 units, 100 epochs.
- medium: three tables in 5 splits; two layers of 200 units for 10 epochs.
- small: scikit-learn's diabetes, 100 rows held out; digits of 8 x 8 pixels, 0 to 7 to train on, 8 and 9 as the other
  kind.

Small, seed 0; over seeds 0 to 4 each claim held but for those in ``NOT_AT_SMALL``::

                      diabetes        digits
    method            nll   rmse      nll  accuracy    ece  auroc
    MAP              5.85   53.6    0.043     0.995  0.031  0.950
    ensemble         5.82   53.4    0.043     0.995  0.031  0.953
    VI               5.85   54.2    0.245     0.975  0.185  0.966
    VBLL             5.81   52.8    0.050     0.988  0.034  0.947
    VBLL, generative                0.040     0.998  0.032  0.960

Medium, seed 0. Of the tables, on 3 of the 5 splits, VBLL has an NLL of 2.44 (MAP 2.46, ensemble 2.39) on uci/boston
and of 3.11 (3.23, 3.13) on uci/concrete. Of the images, discriminative VBLL gains where generative VBLL loses; a fit
takes 2.2 times as long as MAP, and 1.4 times the generative one, whose covariances are diagonal::

    method             nll  accuracy    ece  auroc
    MAP              0.326     0.885  0.012  0.837
    ensemble         0.322     0.886  0.010  0.856
    VI               0.417     0.852  0.033  0.874
    VBLL             0.326     0.884  0.011  0.863
    VBLL, generative 0.310     0.889  0.015  0.803
"""

from __future__ import annotations

import math
import operator
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.autoguide.initialization import init_to_sample, init_to_value
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ae import Posterior, datasets, fit, importance, svi
from pyro_ae.bayesian import bayesian
from pyro_ae.diagnostics.calibration import calibration_error
from pyro_ae.last_layer import Covariance, LastLayer, LastLayerGuide, Likelihood, last_layer_bound, predictive
from pyro_ae.nn import MLP
from pyro_ae.priors import fan_in
from pyro_ae.runtime import find_device, seeded

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Training:
    """How all methods are trained on one kind of data; the weights of the network decay, those with priors do not."""

    hidden: tuple[int, ...]
    epochs: int
    batch_size: int
    lr: float
    decay: float = 0.01


@dataclass(frozen=True)
class Scale:
    """What differs between the scales; without images of another kind, two classes are held out in their place."""

    tables: tuple[str, ...]
    splits: int
    on_tables: Training
    images: str
    others: str | None
    on_images: Training
    fits: int
    draws: int


_FASHION = ("fashion_mnist", "mnist")
_UCI = ("uci/boston", "uci/concrete", "uci/energy", "uci/power", "uci/wine", "uci/yacht")

SCALES = {
    "small": Scale(
        *(("diabetes",), 1, Training((50, 50), 20, 64, 5e-3)),
        *("digits", None, Training((64, 64), 20, 128, 1e-2)),
        *(2, 20),
    ),
    "medium": Scale(
        *(("uci/boston", "uci/concrete", "uci/wine"), 5, Training((50, 50), 100, 32, 5e-3)),
        *(*_FASHION, Training((200, 200), 10, 128, 1e-3)),
        *(2, 20),
    ),
    "full": Scale(
        *(_UCI, 20, Training((50, 50), 100, 32, 1e-3)),
        *(*_FASHION, Training((512, 512), 100, 128, 1e-3)),
        *(5, 100),
    ),
}


class Method(NamedTuple):
    """A guide of the last layer: one that ``svi`` has the bound for, all weights by Monte Carlo, or points."""

    name: str
    likelihood: Likelihood
    covariance: Covariance | None = None
    all_weights: bool = False


def _methods(likelihood: Likelihood) -> list[Method]:
    return [Method("MAP", likelihood), Method("VI", likelihood, all_weights=True), Method("VBLL", likelihood, "dense")]


ON_TABLES = _methods("regression")
ON_IMAGES = [*_methods("discriminative"), Method("VBLL, generative", "generative", "diagonal")]


def _compare(
    table: DataFrame, column: str, method: str, holds: Callable[[float, float], bool], *, kind: str, other: str = "MAP"
) -> bool:
    """Whether a method's value and another's are as they should be, on all data that have a column of that kind."""
    cells = table[table[kind].notna()].pivot(index="data", columns="method", values=column)
    return all(holds(a, b) for a, b in zip(cells[method], cells[other], strict=True))


_on_tables, _on_images = partial(_compare, kind="rmse"), partial(_compare, kind="accuracy")
GENERATIVE = "VBLL, generative"
BOTH = ("VBLL", GENERATIVE)

CLAIMS: dict[str, Callable[[DataFrame], bool]] = {
    "Tables: VBLL has a lower NLL than MAP": lambda table: _on_tables(table, "nll", "VBLL", operator.lt),
    "Tables: VBLL's error is lower than MAP's, or at most 5% above": lambda table: _on_tables(
        table, "rmse", "VBLL", lambda a, b: a < 1.05 * b
    ),
    "Images: both VBLLs are more accurate than MAP, or at most a percent below": lambda table: all(
        _on_images(table, "accuracy", method, lambda a, b: a > b - 0.01) for method in BOTH
    ),
    "Images: generative VBLL has a lower NLL than MAP": lambda table: _on_images(table, "nll", GENERATIVE, operator.lt),
    "Images: discriminative VBLL has a lower NLL than MAP": lambda table: _on_images(table, "nll", "VBLL", operator.lt),
    "Images: generative VBLL is calibrated better": lambda table: _on_images(table, "ece", GENERATIVE, operator.lt),
    "Images: discriminative VBLL is calibrated better": lambda table: _on_images(table, "ece", "VBLL", operator.lt),
    "Images: generative VBLL detects other images better": lambda table: _on_images(
        table, "auroc", GENERATIVE, operator.gt
    ),
    "Images: discriminative VBLL detects other images better": lambda table: _on_images(
        table, "auroc", "VBLL", operator.gt
    ),
    "Images: both VBLLs have a lower NLL than VI of all weights": lambda table: all(
        _on_images(table, "nll", method, operator.lt, other="VI") for method in BOTH
    ),
    "Images: both VBLLs take less than one and a half times as long as MAP": lambda table: all(
        _on_images(table, "seconds", method, lambda a, b: a < 1.5 * b) for method in BOTH
    ),
}

_FEW = (
    "confidence is below accuracy for all methods, and all are off by {}, on 204 test images; it held for {} of 5 seeds"
)

NOT_AT_SMALL = {
    "Tables: VBLL has a lower NLL than MAP": "by at most 0.05 either way on 100 test rows; it held for 4 of 5 seeds",
    "Images: discriminative VBLL has a lower NLL than MAP": "0.048 to 0.056 against 0.043 to 0.053, for 0 of 5 seeds: "
    "variance of the logits takes confidence, and there is too little of it here",
    "Images: generative VBLL is calibrated better": _FEW.format("0.024 to 0.036", 3),
    "Images: discriminative VBLL is calibrated better": _FEW.format("0.024 to 0.041", 1),
    "Images: discriminative VBLL detects other images better": "0.944 to 0.958 against 0.945 to 0.965, on 46 images; "
    "it held for 1 of 5 seeds",
    "Images: both VBLLs take less than one and a half times as long as MAP": "1.9 times: with networks this small the "
    "time goes into Pyro's handlers, and VBLL has more sites",
}

PAPER: list[dict[str, Any]] = []


class Part(NamedTuple):
    """Rows to train on, to test on, and of another kind; and the unit of y."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    others: Tensor | None = None
    unit: float = 1.0


def run(scale: str = "small", seed: int = 0, progress: bool = False) -> DataFrame:
    """What each method predicts of held-out rows, averaged over fits and splits, and the seconds that a fit takes.

    Arguments:
        scale: one of ``SCALES``.
        seed: of the initial weights, the batches and all noise; the same in every row.
        progress: whether to show a bar for each fit, and each row once it is known.
    """
    from pandas import DataFrame

    settings = SCALES[scale]
    tasks = [(t, [table(t, n, seed) for n in range(settings.splits)]) for t in settings.tables]
    tasks += [(settings.images, [_images(settings)])]
    rows: list[dict[str, Any]] = []
    for data, parts in tasks:
        images = data == settings.images
        for method in ON_IMAGES if images else ON_TABLES:
            with seeded(seed):
                found = [_measure(settings, method, part, images, progress) for part in parts]
            for name in found[0]:
                mean = DataFrame([each[name] for each in found]).mean()
                rows.append({"data": data, "method": name, **mean})
                if progress:
                    print(rows[-1], file=sys.stderr)
    return DataFrame(rows)


def table(name: str, split: int, seed: int) -> Part:
    """A table, standardised by its training rows, with y ``[N, 1]``.

    Arguments:
        name: of a data set, or ``"diabetes"``, scikit-learn's.
        split: which of the standard splits.
        seed: of the split of what has no standard ones.
    """
    if name == "diabetes":
        from sklearn.datasets import load_diabetes

        raw = load_diabetes()
        order = torch.randperm(442, generator=torch.Generator().manual_seed(100 * seed + split))
        (x, test_x), (y, test_y) = (
            torch.tensor(part, dtype=torch.float32)[order].split([342, 100]) for part in (raw.data, raw.target)
        )
    else:
        data = datasets.load(name, split=split)
        assert data.test is not None
        (x, y), (test_x, test_y) = ((part["x"], part["y"]) for part in (data.train, data.test))
    mean, spread, unit = x.mean(0), x.std(0).clamp(min=1e-6), y.std()
    y, test_y = ((values.unsqueeze(-1) - y.mean()) / unit for values in (y, test_y))
    return Part((x - mean) / spread, y, (test_x - mean) / spread, test_y, unit=unit.item())


def _images(settings: Scale) -> Part:
    data = datasets.load(settings.images)
    assert data.test is not None
    (x, y), (test_x, test_y) = ((part["x"].flatten(1), part["y"]) for part in (data.train, data.test))
    if settings.others is not None:
        others = datasets.load(settings.others).test
        assert others is not None
        return Part(x, y, test_x, test_y, others["x"].flatten(1))
    known = int(y.max()) - 1
    return Part(x[y < known], y[y < known], test_x[test_y < known], test_y[test_y < known], test_x[test_y >= known])


def _measure(settings: Scale, method: Method, part: Part, images: bool, progress: bool) -> dict[str, dict[str, float]]:
    """Metrics of a method, averaged over its fits; and of all its fits together, where it is MAP."""
    start = time.perf_counter()
    training = settings.on_images if images else settings.on_tables
    posteriors = [_fit(training, method, part, progress) for _ in range(1 if method.all_weights else settings.fits)]
    seconds = (time.perf_counter() - start) / len(posteriors)
    score = partial(_score, part=part, draws=settings.draws if method.all_weights else 1)
    scores = [score([posterior]) for posterior in posteriors]
    found = {method.name: {n: sum(s[n] for s in scores) / len(scores) for n in scores[0]} | {"seconds": seconds}}
    if method.name == "MAP":
        found["ensemble"] = score(posteriors) | {"seconds": seconds * len(posteriors)}
    return found


def _fit(training: Training, method: Method, part: Part, progress: bool) -> Posterior:
    network: nn.Module = MLP(part.x.shape[1], training.hidden)
    if method.all_weights:
        network = bayesian(network, fan_in(2**0.5), name="network")
    outputs = part.y.shape[1] if method.likelihood == "regression" else int(part.y.max()) + 1
    noiseless = method.likelihood == "discriminative" and method.covariance is None
    model = LastLayer(network, training.hidden[-1], outputs, method.likelihood, noise=0.0 if noiseless else None)
    guide: nn.Module
    if method.covariance is not None:
        guide = LastLayerGuide(model, method.covariance)
    else:  # these start as LastLayerGuide does
        noise = {"noise": torch.full((outputs,), math.exp(-2.0))}
        start = partial(init_to_value, values=noise, fallback=init_to_sample)
        guide = (
            AutoNormal(model, init_loc_fn=start, init_scale=0.01)
            if method.all_weights
            else AutoDelta(model, init_loc_fn=start)
        )
    engine = svi(
        loss=importance() if method.covariance is None else last_layer_bound(),
        lr=training.lr,
        optimizer=partial(torch.optim.AdamW, weight_decay=0.0, fused=True),
        groups={} if method.all_weights else {"model.*": {"weight_decay": training.decay}},
        schedule="cosine",
        epochs=training.epochs,
    )
    data = (part.x, part.y)
    return fit(model, data, guide=guide, method=engine, batch_size=training.batch_size, progress=progress)


@torch.no_grad()
def _score(posteriors: Sequence[Posterior], part: Part, draws: int) -> dict[str, float]:
    """Metrics of the equal mixture of what posteriors predict, in the units of y."""

    def predict(x: Tensor) -> list[Distribution]:
        x = x.to(find_device("auto"))
        return [p for posterior in posteriors for p in _predictions(posterior, x, draws)]

    found, y = predict(part.test_x), part.test_y.to(find_device("auto"))
    log_p = torch.stack([p.log_prob(y) for p in found]).logsumexp(0) - math.log(len(found))
    nll = -log_p.mean().item()
    if part.others is None:
        error = torch.stack([p.mean for p in found]).mean(0) - y
        return {"nll": nll + math.log(part.unit), "rmse": part.unit * error.square().mean().sqrt().item()}
    from sklearn.metrics import roc_auc_score

    known, others = (torch.stack([p.probs for p in some]).mean(0) for some in (found, predict(part.others)))  # type: ignore[attr-defined]
    doubt = 1 - torch.cat([known, others]).amax(-1)
    return {
        "nll": nll,
        "accuracy": (known.argmax(-1) == y).float().mean().item(),
        "ece": calibration_error(known, y),
        "auroc": float(roc_auc_score([0] * len(known) + [1] * len(others), doubt.cpu())),
    }


def _predictions(posterior: Posterior, x: Tensor, draws: int) -> list[Distribution]:
    """Distributions of y: one with the weights integrated out, or one for each draw of them."""
    if isinstance(posterior.guide, LastLayerGuide):
        return [predictive(posterior.model, posterior.guide, x)]
    values = posterior.sample(draws)
    sites = [{name: v[i].to(x.device) for name, v in values.items()} for i in range(draws)]
    return [poutine.trace(poutine.condition(posterior.model, s)).get_trace(x).nodes["y"]["fn"] for s in sites]
