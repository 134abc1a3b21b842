"""Whether a posterior's draws and intervals are as often right as they claim."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .style import BLUE, CLASSES, GREY, INK, STYLES, array, legend, one

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Band = tuple[Any, Any]


def rank_ecdf(
    ranks: Any, draws: int, *, band: Band | None = None, label: str = "", title: str = "", axes: Axes | None = None
) -> Axes:
    """The distribution of ranks of simulation-based calibration, less that of a calibrated posterior.

    Above 0 at the left and below at the right, the posterior is too narrow; the other way round, too wide; on one side
    all along, it is shifted.

    References:
        Graphical Test for Discrete Uniformity and its Applications in Goodness of Fit Evaluation and Multiple Sample
        Comparison (Saeilynoja, Buerkner and Vehtari, 2022) https://arxiv.org/abs/2103.10522

    Arguments:
        ranks: ``[replications]`` of a number, or ``[replications, numbers]``, from 0 to ``draws``.
        draws: of the posterior in each replication.
        band: lower and upper limit of the distribution at ranks 0 to ``draws``, as ``ecdf_band`` gives.
        label: of the line.
        title: of the figure.
        axes: to draw into; new ones by default.

    Raises:
        ValueError: for ranks that are not from 0 to ``draws``.

    Example:
        >>> rank_ecdf(range(101), 100).get_xlabel()
        'rank (share of the draws below)'
    """
    values = array(ranks)
    if values.ndim not in (1, 2) or not len(values) or values.min() < 0 or values.max() > draws:
        raise ValueError(f"ranks must be [replications], or [replications, numbers], from 0 to {draws}")
    values = values.reshape(len(values), -1)
    at = np.arange(draws + 1)
    x, uniform = at / draws, (at + 1) / (draws + 1)
    axes = one(axes, 3.2, title=title or "Simulation-based calibration", x="rank (share of the draws below)",
               y="ECDF less uniform")  # fmt: skip
    if band is not None:
        low, high = (array(edge) - uniform for edge in band)
        axes.fill_between(x, low, high, color=GREY, alpha=0.5, linewidth=0, label="calibrated")
    axes.axhline(0.0, color=INK, linewidth=0.8)
    for k, column in enumerate(values.T):
        ecdf = np.searchsorted(np.sort(column), at, side="right") / len(column)
        name = label if k == 0 else ""
        axes.step(x, ecdf - uniform, where="post", color=CLASSES[k % len(CLASSES)], linewidth=1.3, label=name or None)
    if label or band is not None:
        legend(axes)
    return axes


def coverage(
    levels: Any, covered: Any, *, band: Band | None = None, label: str = "", title: str = "", axes: Axes | None = None
) -> Axes:
    """How often credible regions hold the truth, against how often they claim to.

    Below the diagonal the posterior is too sure of itself; above it, not sure enough.

    References:
        Sampling-Based Accuracy Testing of Posterior Estimators for General Inference (Lemos, Coogan, Hezaveh and
        Perreault-Levasseur, 2023) https://arxiv.org/abs/2302.03026

    Arguments:
        levels: ``[L]``, in [0, 1].
        covered: share of truths in the region of each level, ``[L]``; or of several numbers, ``[L, numbers]``.
        band: lower and upper limit of what a calibrated posterior gives, ``[L]`` each.
        label: of the line.
        title: of the figure.
        axes: to draw into; new ones by default.

    Raises:
        ValueError: for shapes that do not match.

    Example:
        >>> coverage([0.0, 0.5, 1.0], [0.0, 0.3, 1.0]).get_ylabel()
        'share of truths in it'
    """
    level, share = array(levels).astype(float), array(covered).astype(float)
    if level.ndim != 1 or share.shape[:1] != level.shape or share.ndim > 2:
        raise ValueError(f"covered must be [L] or [L, numbers] for the {len(level)} levels, got shape {share.shape}")
    axes = one(axes, 4.6, title=title or "Coverage", x="level of the credible region", y="share of truths in it")
    axes.set_aspect("equal")
    if band is not None:
        axes.fill_between(level, *map(array, band), color=GREY, alpha=0.5, linewidth=0, label="calibrated")
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8)
    for k, column in enumerate(share.reshape(len(level), -1).T):
        name = label if k == 0 else ""
        axes.plot(level, column, STYLES[k % 4], color=[BLUE, *CLASSES[1:]][k % 10], linewidth=1.8, label=name or None)
    if label or band is not None:
        legend(axes)
    return axes
