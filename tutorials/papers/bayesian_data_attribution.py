"""What a training row does to a prediction is mostly drowned by the noise of training.

References:
    A Bayesian Approach To Analysing Training Data Attribution In Deep Learning (Nguyen, Seo and Oh, 2023)
    https://arxiv.org/abs/2305.19765

A network is a draw of a posterior: of an ensemble from several starts ("members", which also differ in their batches),
at the ends of the last 5 epochs ("snapshots"). An effect is by how much the loss on a test row rises when a training
row is left out. It is found by training again without the row (LOO), all networks side by side with the start and the
batches of the one with all rows; or estimated from networks with all rows: by a step up the row's loss (ATS), influence
functions (IF, whose curvature is Gauss and Newton's), or gradients' dot product (GD) or cosine (GC). "Covariance" is
what rows would do if the networks were draws of an exact posterior, see ``pyro_ae.diagnostics.attribution``.

Over pairs of a training and a test row: "noisy" is the share whose effect is smaller than its standard deviation over
single networks, "clear" that whose effect is more than twice as large; p-values are of a t-test over members, each
averaged over its snapshots. Correlations are with LOO, of means and ("of p") p-values; "with others" is the average
rank correlation with the other three estimates. ATS is nearly GD, as its step is short.

- full: 150 images of three MNIST classes, 900 to test on, networks of two and of three convolutions, 10 members.
  Only the 150 is known to be the paper's. As it printed no bounds that are known here, those of the claims are ours,
  set after runs at small scale, where learning rate, width and epochs were chosen so that all members learn the task.
- medium: the same with perceptrons of one and of two hidden layers.
- small: digits 3, 5 and 8 of 8 x 8 pixels, 150 to train on and 90 to test on, 8 members, and perceptrons of one and of
  two hidden layers of 16 units. It is depth that adds noise: with one layer of 64 units, fewer pairs were noisy (0.36).

Small, seed 0; over seeds 0 to 4 each claim held but for those in ``NOT_AT_SMALL``::

    network  differ by          method      noisy  clear  p < 0.05  pearson  spearman   of p  with others
    shallow  start and batches  LOO         0.49   0.13   0.71
                                ATS         0.30   0.18   0.90      0.76     0.16       0.08  0.65
                                IF          0.48   0.12   0.72      0.85     0.40       0.06  0.12
                                GD          0.27   0.18   0.91      0.76     0.16       0.07  0.65
                                GC          0.09   0.82   0.93      0.08     0.22       0.07  0.62
                                covariance                          0.72     0.25
    shallow  batches            LOO         0.39   0.30   0.82
    deep     start and batches  LOO         0.98   0.00   0.20
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn.functional import cross_entropy, normalize

from pyro_ae import datasets
from pyro_ae.diagnostics.attribution import case_influence, t_test
from pyro_ae.nn import MLP
from pyro_ae.runtime import find_device, seeded

if TYPE_CHECKING:
    from pandas import DataFrame

Weights = dict[str, Tensor]


def perceptron(pixels: int, classes: int, *, hidden: Sequence[int]) -> nn.Module:
    """Those of the smaller scales."""
    return MLP(pixels, hidden, classes)


def convolutions(pixels: int, classes: int, *, width: int, layers: int) -> nn.Module:
    """Those of the full scale: convolutions, each halving the image, and a layer."""
    side = round(pixels**0.5)
    parts: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
    for before, after in pairwise([1, *[width] * layers]):
        parts += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(width * (side // 2**layers) ** 2, classes))


@dataclass(frozen=True)
class Scale:
    """What differs between the scales; ``chunk`` members are worked on at once."""

    data: str
    classes: tuple[int, ...]
    test: int
    shallow: Callable[[int, int], nn.Module]
    deep: Callable[[int, int], nn.Module]
    lr: float
    members: int
    chunk: int
    rows: int = 150
    epochs: int = 20
    snapshots: int = 5
    batch_size: int = 50
    decay: float = 5e-4
    momentum: float = 0.9


_MNIST = ("mnist", (0, 1, 2), 900)

SCALES = {
    "small": Scale(
        *("digits", (3, 5, 8), 90, partial(perceptron, hidden=(16,)), partial(perceptron, hidden=(16, 16))),
        *(0.05, 8, 8),
    ),
    "medium": Scale(*_MNIST, partial(perceptron, hidden=(32,)), partial(perceptron, hidden=(32, 32)), 0.05, 10, 2),
    "full": Scale(
        *_MNIST, partial(convolutions, width=16, layers=2), partial(convolutions, width=16, layers=3), 0.05, 10, 1
    ),
}

SETTINGS = (("shallow", "start and batches"), ("shallow", "batches"), ("deep", "start and batches"))
"""The network, and what differs between the members."""

ESTIMATES = ("ATS", "IF", "GD", "GC")


def _of(table: DataFrame, column: str, setting: int = 0, method: str = "LOO") -> float:
    network, noise = SETTINGS[setting]
    rows = table[(table["network"] == network) & (table["noise"] == noise) & (table["method"] == method)]
    return float(rows[column].iloc[0])


CLAIMS: dict[str, Callable[[DataFrame], bool]] = {
    "In the deeper network, most pairs have an effect below its spread": lambda table: _of(table, "noisy", 2) > 0.5,
    "So they have in the shallow one": lambda table: _of(table, "noisy") > 0.5,
    "In the deeper network, fewer than half of the pairs have a p-value below 0.05": lambda table: (
        _of(table, "p < 0.05", 2) < 0.5
    ),
    "So it is in the shallow one": lambda table: _of(table, "p < 0.05") < 0.5,
    "Pairs with an effect above twice its spread are rare, a sixth or fewer": lambda table: (
        max(_of(table, "clear"), _of(table, "clear", 2)) <= 1 / 6
    ),
    "But in the shallow network there are such pairs, more than one in a hundred": lambda table: (
        _of(table, "clear") > 0.01
    ),
    "Initial weights are a part of the noise: with the same ones, fewer pairs are noisy": lambda table: (
        _of(table, "noisy", 1) < _of(table, "noisy") and _of(table, "p < 0.05", 1) > _of(table, "p < 0.05")
    ),
    "So are batches: by them alone, a fifth of the pairs are noisy or more": lambda table: _of(table, "noisy", 1) > 0.2,
    "More pairs are noisy in the deeper network": lambda table: (
        _of(table, "noisy", 2) > _of(table, "noisy") and _of(table, "p < 0.05", 2) < _of(table, "p < 0.05")
    ),
    "No estimate ranks pairs as leaving rows out does: rank correlations are below 0.5": lambda table: all(
        _of(table, "spearman", method=method) < 0.5 for method in ESTIMATES
    ),
    "No estimate tells which pairs are reliable: p-values correlate by less than 0.3": lambda table: all(
        _of(table, "of p", method=method) < 0.3 for method in ESTIMATES
    ),
    "By ranks, ATS, GD and GC agree better with the other estimates than with leaving rows out": lambda table: all(
        _of(table, "with others", method=method) > _of(table, "spearman", method=method)
        for method in ("ATS", "GD", "GC")
    ),
    "So does IF": lambda table: _of(table, "with others", method="IF") > _of(table, "spearman", method="IF"),
}

NOT_AT_SMALL = {
    "So they have in the shallow one": "0.49 to 0.72 of the pairs; it held for 4 of 5 seeds",
    "So it is in the shallow one": "0.51 to 0.71 of the pairs, and so for 0 of 5 seeds: the mean over 8 members of 5 "
    "snapshots each can be told from zero for many pairs in which a single network says nothing",
    "So does IF": "for 0 of 5 seeds: rank correlations are 0.36 to 0.40 with leaving rows out and 0.11 to 0.12 with "
    "the other estimates, as in so small a network the curvature needs no approximation",
}

PAPER: list[dict[str, Any]] = []


class Runs(NamedTuple):
    """Networks that were trained with all rows, and what is otherwise without each."""

    weights: Weights
    """Of the networks with all rows, ``[members, snapshots, *shape]``."""
    left_out: Tensor
    """Losses on the test rows without each row, less those with all, ``[members, snapshots, rows, test]``."""


def trained(s: Scale, base: nn.Module, start: Weights, x: Tensor, y: Tensor, test: tuple[Tensor, Tensor]) -> Runs:
    """Train a network with all rows, and one without each of them, for each member; all of them side by side.

    The networks of one member have the same initial weights and batches, and a row is left out by a weight of 0.
    """
    rows = len(x)
    left = torch.arange(-1, rows, device=x.device).unsqueeze(1)  # -1 leaves none out
    weights = {k: v.unsqueeze(1).repeat(1, rows + 1, *(1,) * (v.dim() - 1)) for k, v in start.items()}
    speed = {k: torch.zeros_like(v) for k, v in weights.items()}

    def loss(weights: Weights, x: Tensor, y: Tensor, there: Tensor) -> Tensor:
        return (there * _losses(base, weights, x, y)).sum() / s.batch_size

    gradient = vmap(vmap(grad(loss), (0, None, None, 0)), chunk_size=s.chunk)
    measure = vmap(vmap(partial(_losses, base), (0, None, None)), (0, None, None), chunk_size=s.chunk)
    changes, kept = [], []
    for epoch in range(s.epochs):
        order = torch.stack([torch.randperm(rows) for _ in range(s.members)]).to(x.device)
        for at in order.split(s.batch_size, 1):
            found = gradient(weights, x[at], y[at], (at.unsqueeze(1) != left).to(x.dtype))
            for k, w in weights.items():
                speed[k].mul_(s.momentum).add_(found[k]).add_(w, alpha=s.decay)
                w.add_(speed[k], alpha=-s.lr)
        if epoch >= s.epochs - s.snapshots:
            losses = measure(weights, *test)
            changes.append(losses[:, 1:] - losses[:, :1])
            kept.append({k: w[:, 0].clone() for k, w in weights.items()})
    return Runs({k: torch.stack([w[k] for w in kept], 1) for k in weights}, torch.stack(changes, 1))


def _losses(base: nn.Module, weights: Weights, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(functional_call(base, weights, (x,)), y, reduction="none")


def estimates(
    s: Scale, base: nn.Module, weights: Weights, x: Tensor, y: Tensor, test: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """What attribution methods say of networks that were trained once, ``[members, snapshots, rows, test]``.

    The Hessian of the influence functions is that of Gauss and Newton, with the weight decay, and exact by Woodbury.
    """
    names, shapes = list(weights), [w.shape[2:] for w in weights.values()]
    step = s.lr / s.batch_size  # one row's part in a step of training

    def unflat(v: Tensor) -> Weights:
        parts = v.split([shape.numel() for shape in shapes])
        return {n: part.reshape(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}

    def one(v: Tensor) -> tuple[Tensor, ...]:
        def loss(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return _losses(base, unflat(v), x.unsqueeze(0), y.unsqueeze(0)).squeeze(0)

        def logits(v: Tensor, x: Tensor) -> Tensor:
            return functional_call(base, unflat(v), (x.unsqueeze(0),)).squeeze(0)

        of_rows, of_test = (vmap(grad(loss), (None, 0, 0))(v, *rows) for rows in ((x, y), test))
        p = vmap(logits, (None, 0))(v, x).softmax(-1)
        root = torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)  # of diag(p) - p p^T
        jacobian = vmap(jacrev(logits), (None, 0))(v, x)
        a = torch.einsum("ncp,ncd->ndp", jacobian, root).flatten(0, 1) / len(x) ** 0.5
        inner = s.decay * torch.eye(len(a), dtype=a.dtype, device=a.device) + a @ a.T
        dots = of_rows @ of_test.T
        curved = dots - (of_rows @ a.T) @ torch.linalg.solve(inner, a @ of_test.T)
        moved = vmap(lambda g: _losses(base, unflat(v + step * g), *test))(of_rows)
        return (
            moved - _losses(base, unflat(v), *test),
            curved / (len(x) * s.decay),
            step * dots,
            normalize(of_rows, dim=1) @ normalize(of_test, dim=1).T,
        )

    flat = torch.cat([w.flatten(0, 1).flatten(1) for w in weights.values()], 1)
    found = vmap(one, chunk_size=s.chunk)(flat)
    members = (s.members, s.snapshots)
    return {n: v.reshape(*members, *v.shape[1:]) for n, v in zip(ESTIMATES, found, strict=True)}


def covariance(base: nn.Module, weights: Weights, x: Tensor, y: Tensor, test: tuple[Tensor, Tensor]) -> Tensor:
    """The derivative in a row's weight, were the networks draws of a posterior, ``[rows, test]``."""
    draws = {k: w.flatten(0, 1) for k, w in weights.items()}
    on_rows, on_test = (vmap(partial(_losses, base), (0, None, None))(draws, *rows) for rows in ((x, y), test))
    return case_influence(on_test, -on_rows).change


def images(s: Scale) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images of some classes to train on and to test on, flat."""
    data = datasets.load(s.data)
    assert data.test is not None
    x, y = (torch.cat([data.train[key], data.test[key]]) for key in "xy")
    of = torch.stack([y == c for c in s.classes], 1)
    kept = of.any(1)
    x, y = x[kept].flatten(1), of[kept].long().argmax(1)
    end = s.rows + s.test
    return (x[: s.rows], y[: s.rows]), (x[s.rows : end], y[s.rows : end])


def _pearson(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


def _spearman(a: Tensor, b: Tensor) -> float:
    return _pearson(*(v.flatten().argsort().argsort() for v in (a, b)))


class Signal(NamedTuple):
    """How far the effects of the rows are from noise."""

    numbers: dict[str, float]
    mean: Tensor
    p_value: Tensor


def signal(draws: Tensor) -> Signal:
    """Means over all networks ``[members, snapshots, rows, test]``, against the spread of single ones.

    P-values are by members, of each the mean over its snapshots, as those are no independent draws.
    """
    each, p = t_test(draws.flatten(0, 1)), t_test(draws.mean(1)).p_value
    ratio = each.mean.abs() / each.sd
    numbers = {
        "noisy": float((ratio < 1).double().mean()),
        "clear": float((ratio > 2).double().mean()),
        "p < 0.05": float((p < 0.05).double().mean()),
        "median p": float(p.median()),
    }
    return Signal(numbers, each.mean, p)


def run(scale: str = "small", seed: int = 0, progress: bool = False) -> DataFrame:
    """How noisy the effects of leaving rows out and their estimates are, over pairs of a training and a test row.

    Arguments:
        scale: one of ``SCALES``.
        seed: of the initial weights and the batches.
        progress: whether to show each row once it is known.
    """
    from pandas import DataFrame

    s = SCALES[scale]
    rows: list[dict[str, Any]] = []
    with seeded(seed):
        device = find_device("auto")
        x, y, *held = (v.to(device) for part in images(s) for v in part)
        test = held[0], held[1]
        for network, noise in SETTINGS:
            make = s.shallow if network == "shallow" else s.deep
            nets = [make(x.shape[1], len(s.classes)).to(device) for _ in range(1 if noise == "batches" else s.members)]
            start = {k: v.detach().expand(s.members, *v.shape[1:]) for k, v in stack_module_state(nets)[0].items()}
            found = trained(s, nets[0], start, x, y, test)
            last = {k: w[:, -1] for k, w in found.weights.items()}
            logits = vmap(lambda w, base=nets[0]: functional_call(base, w, (test[0],)))(last)
            named = {"network": network, "noise": noise}
            accuracy = float((logits.argmax(-1) == test[1]).double().mean())
            loo = signal(found.left_out)
            rows.append({**named, "method": "LOO", "accuracy": accuracy, **loo.numbers})
            if len(rows) == 1:
                rows += [named | row for row in _estimated(s, nets[0], found.weights, x, y, test, loo)]
            if progress:
                print(rows[-1], file=sys.stderr)
    return DataFrame(rows)


def _estimated(
    s: Scale, base: nn.Module, weights: Weights, x: Tensor, y: Tensor, test: tuple[Tensor, Tensor], loo: Signal
) -> list[dict[str, Any]]:
    """A row of the table for each method that does not train again."""
    signals = {method: signal(v) for method, v in estimates(s, base, weights, x, y, test).items()}
    rows = []
    for method, (numbers, mean, p) in signals.items():
        others = [_spearman(mean, other.mean) for name, other in signals.items() if name != method]
        agreement = {"pearson": _pearson(mean, loo.mean), "spearman": _spearman(mean, loo.mean)}
        agreement |= {"of p": _pearson(p, loo.p_value), "with others": sum(others) / len(others)}
        rows.append({"method": method, **numbers, **agreement})
    mean = covariance(base, weights, x, y, test).to(loo.mean)
    rows.append({"method": "covariance", "pearson": _pearson(mean, loo.mean), "spearman": _spearman(mean, loo.mean)})
    return rows
