"""Draws of chains, or of a guide as one chain.

ArviZ's two generations draw with different functions and return different things; these return axes with both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..entries import pick
from .style import BLUE, CLASSES, GREY, INK, ORANGE, STYLES, array, dress, figure, grid, legend, one

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ...posterior import Posterior

BINS = 20


def _numbers(posterior: Posterior, names: Sequence[str] | None, most: int) -> dict[str, np.ndarray]:
    """Name to draws ``[chains, draws]``."""
    sites = posterior.draws or {n: v.unsqueeze(0) for n, v in posterior.sample().items()}
    return dict(pick(sites, names, most))


def _diverging(posterior: Posterior) -> np.ndarray | None:
    found = posterior.stats.get("diverging")
    return None if found is None else array(found).astype(bool)


def trace(posterior: Posterior, names: Sequence[str] | None = None, *, most: int = 4) -> Any:
    """Draws in the order in which they were made, and beside them how often each value came, chain by chain.

    Chains that agree lie over one another; one that drifts or stands still shows. Short strokes at the lower edge are
    draws that diverged.

    Arguments:
        posterior: of any engine.
        names: of sites, or of single numbers such as ``"theta[3]"``.
        most: numbers to draw, where they are not named one by one.

    Returns:
        The axes, ``[numbers, 2]``.

    Raises:
        ValueError: for a name that is not there.
    """
    numbers = _numbers(posterior, names, most)
    diverging = _diverging(posterior)
    made = figure(1.6 * len(numbers) + 0.5)
    axes = made.subplots(len(numbers), 2, squeeze=False, width_ratios=[2, 3], sharey="row")
    for i, (line, (name, draws)) in enumerate(zip(axes, numbers.items(), strict=True), 1):
        last = i == len(axes)
        dress(line[0], y=name, x="draws" if last else "")
        dress(line[1], x="draw" if last else "")
        edges = np.histogram_bin_edges(draws[np.isfinite(draws)], 30)
        for c, chain in enumerate(draws):
            color = CLASSES[c % len(CLASSES)]
            line[0].hist(chain, edges, orientation="horizontal", histtype="step", color=color, linewidth=1.2)
            line[1].plot(chain, color=color, linewidth=0.5, alpha=0.8)
            if diverging is not None and diverging[c].any():
                at = np.flatnonzero(diverging[c])
                line[1].plot(at, np.full(len(at), edges[0]), "|", color=INK, markersize=6)
        line[0].invert_xaxis()
    axes[0, 0].set_title("Trace", fontsize=13, loc="left")
    return axes


def rank(posterior: Posterior, names: Sequence[str] | None = None, *, most: int = 4) -> Any:
    """How each chain's draws rank among all: where chains agree, every rank is as frequent in each.

    References:
        Rank-Normalization, Folding, and Localization: An Improved R-hat for Assessing Convergence of MCMC
        (Vehtari, Gelman, Simpson, Carpenter and Buerkner, 2021) https://arxiv.org/abs/1903.08008

    Arguments:
        posterior: of any engine.
        names: of sites, or of single numbers such as ``"theta[3]"``.
        most: numbers to draw, where they are not named one by one.

    Returns:
        The axes, one for each number.

    Raises:
        ValueError: for a name that is not there.
    """
    from scipy.stats import rankdata

    numbers = _numbers(posterior, names, most)
    axes = grid(len(numbers), 1, 1.5 * len(numbers) + 0.9)[:, 0]
    for part, (name, draws) in zip(axes, numbers.items(), strict=True):
        ranks = rankdata(draws).reshape(draws.shape)
        edges = np.linspace(0.5, draws.size + 0.5, BINS + 1)
        for c, chain in enumerate(ranks):
            counts, _ = np.histogram(chain, edges)
            part.stairs(counts, edges, color=CLASSES[c % len(CLASSES)], linestyle=STYLES[c % 4], label=f"{c}")
        part.axhline(draws.shape[1] / BINS, color=GREY, linewidth=1, zorder=0)
        part.set_ylim(bottom=0)
        dress(part, y=name, x="rank among all draws" if part is axes[-1] else "")
    axes[0].set_title("Ranks by chain", fontsize=13, loc="left")
    legend(axes[0], title="chain", ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return axes


def pair(posterior: Posterior, names: Sequence[str] | None = None, *, most: int = 3) -> Any:
    """Draws of each number against each other's; those that diverged stand out.

    Arguments:
        posterior: of any engine.
        names: of sites, or of single numbers such as ``"theta[3]"``.
        most: numbers to draw, where they are not named one by one.

    Returns:
        The axes, ``[numbers - 1, numbers - 1]``; those above the diagonal are empty.

    Raises:
        ValueError: for a name that is not there, or where there are fewer than two numbers.
    """
    numbers = _numbers(posterior, names, most)
    if len(numbers) < 2:
        raise ValueError(f"a pair is of two numbers, and there is only {', '.join(numbers) or 'none'}")
    k = len(numbers) - 1
    diverging = _diverging(posterior)
    axes = figure(max(3.2, 4.8 * k / max(k, 2))).subplots(k, k, squeeze=False, sharex="col", sharey="row")
    labels, draws = list(numbers), list(numbers.values())
    for i in range(k):
        for j in range(k):
            part = axes[i, j]
            if j > i:
                part.set_axis_off()
                continue
            dress(part, x=labels[j] if i == k - 1 else "", y=labels[i + 1] if j == 0 else "")
            part.scatter(draws[j], draws[i + 1], s=5, color=BLUE, alpha=0.25, linewidths=0)
            if diverging is not None and diverging.any():
                some = draws[j][diverging], draws[i + 1][diverging]
                part.scatter(*some, s=14, color=ORANGE, marker="^", linewidths=0, label="diverged")
    axes[0, 0].set_title("Pairs of draws", fontsize=13, loc="left")
    if axes[0, 0].get_legend_handles_labels()[0]:
        legend(axes[0, 0])
    return axes


def energy(posterior: Posterior, *, axes: Axes | None = None) -> Axes:
    """The energy's distribution, and that of its changes from draw to draw: where these are narrower, tails are missed.

    References:
        A Conceptual Introduction to Hamiltonian Monte Carlo (Betancourt, 2018) https://arxiv.org/abs/1701.02434

    Arguments:
        posterior: of nuts or hmc.
        axes: to draw into; new ones by default.

    Raises:
        ValueError: for a posterior whose sampler records no energy.
    """
    if "energy" not in posterior.stats:
        raise ValueError(f"{posterior.method.split('(')[0]} records no energy: this is a figure of nuts and hmc")
    values = array(posterior.stats["energy"]).astype(float)
    levels = values - values.mean(1, keepdims=True)
    changes = np.diff(values, axis=1)
    edges = np.histogram_bin_edges(np.concatenate([levels.ravel(), changes.ravel()]), 40).tolist()
    axes = one(axes, 3.0, title="Energy", x="energy (nats)", y="density")
    axes.hist(levels.ravel(), edges, density=True, color=BLUE, alpha=0.35, label="about its mean")
    axes.hist(changes.ravel(), edges, density=True, histtype="step", color=ORANGE, linewidth=1.8, label="changes")
    legend(axes)
    return axes
