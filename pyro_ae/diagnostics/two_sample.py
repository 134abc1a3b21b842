"""How two samples differ: functions of draws ``[draws, *shape]`` of the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..divergences import wasserstein_1d

FEWEST = 50
"""Draws, of either side, below which nothing is compared."""
FOLDS = 5
PROJECTIONS = 50
ENTRIES = 50
"""Numbers of a row, at most, whose effective sample size is worked out."""


def c2st(a: Tensor, b: Tensor, seed: int = 0) -> Tensor:
    """The accuracy of a classifier that tells two samples apart: the classifier two-sample test.

    It is 0.5 where the distributions are the same, but for chance, and 1 where they do not overlap. The classifier
    is a small network, regularised and trained for few epochs, on standardised draws, and judged on draws that it was
    not trained on (five folds). It sees curved boundaries, which a linear or quadratic classifier cannot, and with a
    thousand draws in one to sixteen dimensions it came nearer to the best accuracy that there is than forests and
    boosted trees did. Draws must be independent: thin those of a chain. Of unequal samples, the larger one is thinned.

    References:
        Revisiting Classifier Two-Sample Tests (Lopez-Paz and Oquab, 2017) https://arxiv.org/abs/1610.06545

    Arguments:
        a: draws ``[S, *batch, d]``.
        b: draws ``[T, *batch, d]``.
        seed: of the folds and the network.

    Returns:
        ``[*batch]``, in [0, 1].

    Raises:
        ValueError: for shapes that do not match, fewer than 50 draws, or draws that are not finite.

    Example:
        >>> float(c2st(torch.randn(100, 1), 9 + torch.randn(100, 1)))
        1.0
    """
    if min(a.dim(), b.dim()) < 2:
        raise ValueError(f"c2st takes draws [S, *batch, d], got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = checked(a, b)
    size, batch = min(len(a), len(b)), a.shape[1:-1]
    both = torch.cat([thinned(a, size), thinned(b, size)]).reshape(2 * size, -1, a.shape[-1])
    label = np.repeat([0, 1], size)
    accuracies = [_accuracy(both[:, i].numpy(), label, seed) for i in range(both.shape[1])]
    return torch.tensor(accuracies, dtype=torch.get_default_dtype()).reshape(batch)


def _accuracy(draws: np.ndarray, label: np.ndarray, seed: int) -> float:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network = MLPClassifier((32, 32), learning_rate_init=0.01, alpha=1.0, max_iter=30, random_state=seed)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # few epochs are meant
        return float(cross_val_score(make_pipeline(StandardScaler(), network), draws, label, cv=folds).mean())


def interval_coverage(a: Tensor, b: Tensor, levels: Sequence[float] = (0.5, 0.9)) -> Tensor:
    r"""The share of ``b``'s draws within the central intervals of ``a``, number by number.

    .. math:: P_b\big( Q_a(\tfrac{1 - \alpha}{2}) \le z \le Q_a(\tfrac{1 + \alpha}{2}) \big)

    Below the level where a is too narrow or misplaced, above it where a is too wide.

    References:
        Validated Variational Inference via Practical Posterior Error Bounds (Huggins, Kasprzak, Campbell and
        Broderick, 2020) https://arxiv.org/abs/1910.04102, which says what errors of intervals follow from others

    Arguments:
        a: draws ``[S, *shape]``.
        b: draws ``[T, *shape]``, those of the reference.
        levels: alpha, in (0, 1).

    Returns:
        ``[levels, *shape]``.

    Raises:
        ValueError: for shapes that do not match, under 50 draws, draws that are not finite, or levels out of range.

    Example:
        >>> draws = torch.linspace(0, 1, 101).unsqueeze(-1)
        >>> interval_coverage(draws, draws, levels=(0.5,))
        tensor([[0.5050]])
    """
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels must lie between 0 and 1, got {tuple(levels)}")
    a, b = checked(a, b)
    a, found = a.sort(0).values, []
    for level in levels:
        low, high = (_quantile(a, 0.5 + sign * level / 2) for sign in (-1, 1))
        found.append(((b >= low) & (b <= high)).double().mean(0))
    return torch.stack(found).to(torch.get_default_dtype())


def _quantile(ordered: Tensor, probability: float) -> Tensor:
    """Of sorted draws; torch.quantile takes no more than 2^24 numbers."""
    at = probability * (len(ordered) - 1)
    below = min(int(at), len(ordered) - 2)
    return torch.lerp(ordered[below], ordered[below + 1], at - below)


def checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU in double precision, where they can be compared."""
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    if a.dim() < 1 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"the draws [draws, *shape] must agree in all but their number, got shapes {shapes}")
    if min(len(a), len(b)) < FEWEST:
        raise ValueError(f"a comparison needs at least {FEWEST} draws of either side, got shapes {shapes}")
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("some draws are NaN or infinite: look at the supports and the data, and leave them out")
    return a, b


def thinned(draws: Tensor, size: int) -> Tensor:
    """So many of the draws, spread evenly, or all where there are not so many."""
    return draws if size >= len(draws) else draws[torch.linspace(0, len(draws) - 1, size).round().long()]


def sliced_w1(a: Tensor, b: Tensor) -> Tensor:
    """The Wasserstein-1 distance of ``[S, n, d]`` and ``[T, n, d]`` averaged over random directions, ``[n]``."""
    dims = a.shape[-1]
    count = 1 if dims == 1 else PROJECTIONS
    directions = normalize(torch.randn(dims, count, dtype=a.dtype), dim=0)
    size = max(1, 2**24 // (count * max(len(a), len(b))))  # rows that fit into memory
    parts = zip(a.split(size, 1), b.split(size, 1), strict=True)
    found = [wasserstein_1d((x @ directions).flatten(1), (y @ directions).flatten(1), 1.0) for x, y in parts]
    return torch.cat(found).reshape(-1, count).mean(-1)


def effective_draws(draws: Tensor) -> Tensor:
    """How many independent draws the worst number of each row of ``[chains, draws, n, d]`` is worth, ``[n]``."""
    import arviz

    chains, length, rows, dims = draws.shape
    some = draws[..., torch.linspace(0, dims - 1, min(dims, ENTRIES)).round().long()]
    flat = some.reshape(chains, length, -1)
    sizes = torch.full(flat.shape[2:], torch.inf, dtype=torch.double)
    for i in (~(flat == flat[:1, :1]).all(0).all(0)).nonzero().squeeze(-1).tolist():
        size = float(arviz.ess(flat[..., i].numpy(), method="bulk"))
        sizes[i] = size if size > 0 else 1.0  # NaN where chains stand still
    return sizes.reshape(rows, -1).amin(-1).clamp(max=float(chains * length))
