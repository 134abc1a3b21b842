"""How far a guide's draws, weighted, can stand for the posterior's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import BLUE, INK, ORANGE, array, one

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOOD = 0.7


def pareto_k(values: Any, *, title: str = "", axes: Axes | None = None) -> Axes:
    r"""A histogram of Pareto k-hat with the line at 0.7, above which importance sampling is not to be relied on.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024) https://arxiv.org/abs/1507.02646

    Arguments:
        values: ``[N]``, one for each row; those that are not finite are counted in the title alone.
        title: of the figure; by default how many rows are above the line.
        axes: to draw into; new ones by default.

    Raises:
        ValueError: where there is none.

    Example:
        >>> pareto_k([0.1, 0.2, 0.9]).get_title(loc="left")
        'k-hat is at most 0.7 for 2 of 3 rows'
    """
    from matplotlib.ticker import MaxNLocator

    k = _k(values)
    finite = k[np.isfinite(k)]
    axes = one(axes, 3.0, title=title or _title(k), x="Pareto k-hat of a row (no unit)", y="rows")
    low, high = (min(finite.min(), 0.0), max(finite.max(), 1.0)) if len(finite) else (0.0, 1.0)
    # edges at multiples of a part of 0.7, so that no bar straddles the line
    width = next((w for w in (0.05, 0.1, 0.35) if (high - low) / w <= 40), GOOD)
    edges = np.arange(math.floor(low / width), math.ceil(high / width) + 1) * width
    below = (edges[:-1] + edges[1:]) / 2 < GOOD
    counts, _ = np.histogram(finite, edges)
    colors = np.where(below, BLUE, ORANGE).tolist()
    axes.bar(edges[:-1], counts, width, align="edge", color=colors, edgecolor="white", linewidth=0.5)
    axes.axvline(GOOD, color=INK, linestyle="--", linewidth=1.2)
    axes.annotate("0.7", (GOOD, 1.0), (4, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                  fontsize=11, va="top")  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return axes


def pareto_k_by_row(values: Any, rows: Any = None, *, title: str = "", axes: Axes | None = None) -> Axes:
    """Pareto k-hat of each row at its number, so that the rows that a guide fails on can be looked up.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024) https://arxiv.org/abs/1507.02646

    Arguments:
        values: ``[N]``; those that are not finite are drawn at the upper edge (infinity, NaN) or the lower one.
        rows: numbers ``[N]`` of the rows in the data; 0 to N - 1 by default.
        title: of the figure; by default how many rows are above the line at 0.7.
        axes: to draw into; new ones by default.

    Raises:
        ValueError: where there is none, or where rows and values do not match.

    Example:
        >>> pareto_k_by_row([0.1, 0.2, 0.9]).get_xlabel()
        'row'
    """
    k = _k(values)
    where = np.arange(len(k)) if rows is None else array(rows)
    if where.shape != k.shape:
        raise ValueError(f"rows must be one for each of the {len(k)} values of k-hat, got shape {where.shape}")
    finite = k[np.isfinite(k)]
    low, high = (min(finite.min(), 0.0), max(finite.max(), 1.0)) if len(finite) else (0.0, 1.0)
    shown = np.where(np.isfinite(k), k, np.where(k == -np.inf, low, high))
    axes = one(axes, 3.0, title=title or _title(k), x="row", y="Pareto k-hat (no unit)")
    good = k <= GOOD
    for some, color, marker in ((good, BLUE, "o"), (~good, ORANGE, "^")):
        axes.scatter(where[some], shown[some], s=16, color=color, marker=marker, alpha=0.8, linewidths=0)
    axes.axhline(GOOD, color=INK, linestyle="--", linewidth=1.2)
    worst = int(np.argmax(np.where(np.isnan(k), np.inf, k)))
    if not good[worst]:
        left = where[worst] > (where.min() + where.max()) / 2
        axes.annotate(f"row {where[worst]}", (where[worst], shown[worst]), (-6 if left else 6, 0), va="center",
                      textcoords="offset points", fontsize=11, ha="right" if left else "left")  # fmt: skip
    return axes


def _k(values: Any) -> np.ndarray:
    k = array(values).astype(float).ravel()
    if not len(k):
        raise ValueError("there is no k-hat to show")
    return k


def _title(k: np.ndarray) -> str:
    return f"k-hat is at most 0.7 for {int((k <= GOOD).sum())} of {len(k)} rows"
