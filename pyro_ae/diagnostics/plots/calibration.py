"""Whether a posterior's draws and intervals are as often right as they claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..entries import pick
from .style import CLASSES, GREY, INK, STYLES, array, legend, one

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..ranks import Coverage, Ranks


def rank_ecdf(
    ranks: Ranks,
    names: Sequence[str] | None = None,
    *,
    most: int = 6,
    prob: float = 0.95,
    axes: Axes | None = None,
) -> Axes:
    """The distribution of ranks of simulation-based calibration, less that of a calibrated posterior.

    Above 0 at the left and below at the right, the posterior is too narrow; the other way round, too wide; on one side
    all along, it is shifted. A number of a calibrated posterior stays within the band all along with probability
    ``prob``.

    References:
        Graphical Test for Discrete Uniformity and its Applications in Goodness of Fit Evaluation and Multiple Sample
        Comparison (Sailynoja, Buerkner and Vehtari, 2022) https://arxiv.org/abs/2103.10522

    Arguments:
        ranks: of ``simulation_based_calibration``.
        names: of sites and quantities, or of single numbers such as ``"z[3]"``.
        most: numbers to draw, where they are not named one by one.
        prob: of the band, in (0, 1).
        axes: to draw into; new ones by default.

    Raises:
        ValueError: for a name that is not there.

    Example:
        >>> import torch
        >>> from pyro_ae.diagnostics.ranks import Ranks
        >>> rank_ecdf(Ranks({"z": torch.randint(0, 101, (50, 2))}, 100)).get_ylabel()
        'ECDF less uniform'
    """
    from ..ranks import ecdf_band

    points, low, high = map(array, ecdf_band(ranks.replications, ranks.draws, prob))
    title, x = f"Calibration, {ranks.replications} replications", "rank (share of the draws below)"
    axes = one(axes, 3.4, title=title, x=x, y="ECDF less uniform")
    axes.fill_between(points, low - points, high - points, color=GREY, alpha=0.5, linewidth=0, label="calibrated")
    axes.axhline(0.0, color=INK, linewidth=0.8)
    found = pick({name: ecdf.unsqueeze(0) for name, ecdf in ranks.ecdf().items()}, names, most)
    for k, (label, ecdf) in enumerate(found):
        color, style = CLASSES[k % len(CLASSES)], STYLES[k % 4]
        axes.step(points, ecdf[0] - points, where="post", label=label, color=color, linestyle=style, linewidth=1.3)
    legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return axes


def coverage(found: Coverage | Mapping[str, Coverage], *, prob: float = 0.95, axes: Axes | None = None) -> Axes:
    """How often credible regions hold the truth, against how often they claim to.

    Below the diagonal the posterior is too sure of itself; above it, not sure enough.

    References:
        Sampling-Based Accuracy Testing of Posterior Estimators for General Inference (Lemos, Coogan, Hezaveh and
        Perreault-Levasseur, 2023) https://arxiv.org/abs/2302.03026

    Arguments:
        found: of ``expected_coverage`` or ``central_coverage``; several by name, as ``simulated_coverage`` gives them.
        prob: of the band within which a calibrated posterior stays all along, in (0, 1).
        axes: to draw into; new ones by default.

    Raises:
        ValueError: where there is none.

    Example:
        >>> import torch
        >>> from pyro_ae.diagnostics.ranks import Coverage
        >>> coverage(Coverage(torch.tensor([0.5, 0.9]), torch.tensor([0.3, 0.8]), 100)).get_ylabel()
        'share of truths in it'
    """
    several = found if isinstance(found, Mapping) else {"": found}
    if not several:
        raise ValueError("there is no coverage to show")
    axes = one(axes, 4.6, title="Coverage", x="level of the credible region", y="share of truths in it")
    axes.set_aspect("equal")
    points, low, high = map(array, next(iter(several.values())).band(prob))
    axes.fill_between(points, low, high, color=GREY, alpha=0.5, linewidth=0, label="calibrated")
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8)
    for k, (name, one_site) in enumerate(several.items()):
        color, style = CLASSES[k % len(CLASSES)], STYLES[k % 4]
        for i, column in enumerate(array(one_site.coverage).reshape(len(one_site.levels), -1).T):
            label = name if name and not i else None
            axes.plot(array(one_site.levels), column, color=color, linestyle=style, linewidth=1.6, label=label)
    legend(axes, loc="upper left")
    return axes
