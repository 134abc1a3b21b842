"""Two or more posteriors side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..entries import pick
from .style import CLASSES, legend, one

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor


def intervals(
    posteriors: Mapping[str, Mapping[str, Tensor]],
    names: Sequence[str] | None = None,
    *,
    most: int = 12,
    level: float = 0.9,
    axes: Axes | None = None,
) -> Axes:
    """Medians and central intervals of the same numbers under several posteriors.

    Arguments:
        posteriors: what each is called, to its draws ``{site: [draws, *shape]}``, as ``sample`` gives them.
        names: of sites, or of single numbers such as ``"theta[3]"``; all that each has by default.
        most: numbers to draw, where they are not named one by one.
        level: of the thin lines; the thick ones hold half of the draws.
        axes: to draw into; new ones by default.

    Raises:
        ValueError: for no posterior, a level outside (0, 1), or a name that is not there.

    Example:
        >>> import torch
        >>> axes = intervals({"a": {"z": torch.randn(50, 2)}, "b": {"z": torch.randn(50, 2)}})
        >>> [text.get_text() for text in axes.get_yticklabels()]
        ['z[0]', 'z[1]']
    """
    if not posteriors or not 0 < level < 1:
        raise ValueError(f"needs one posterior or more and a level in (0, 1), got {len(posteriors)} and {level}")
    common = [n for n in next(iter(posteriors.values())) if all(n in sites for sites in posteriors.values())]
    numbers: dict[str, list[np.ndarray]] = {}
    for sites in posteriors.values():
        for label, draws in pick({n: sites[n].unsqueeze(0) for n in common}, names, most):
            numbers.setdefault(label, []).append(draws.ravel())
    shown = f"{level:.0%} and 50% intervals"
    axes = one(axes, 0.24 * len(numbers) * len(posteriors) + 1.4, title="", x=f"median, {shown}")
    tails = np.array([(1 - level) / 2, 0.25, 0.5, 0.75, (1 + level) / 2])
    for k, name in enumerate(posteriors):
        color, marker = CLASSES[k % len(CLASSES)], "osD^v"[k % 5]
        place = np.arange(len(numbers)) + 0.7 * ((k + 0.5) / len(posteriors) - 0.5)
        low, left, middle, right, high = np.array([np.quantile(draws[k], tails) for draws in numbers.values()]).T
        axes.hlines(place, low, high, color=color, linewidth=1)
        axes.hlines(place, left, right, color=color, linewidth=3)
        axes.plot(middle, place, marker, color=color, markersize=5, label=name)
    axes.set_yticks(range(len(numbers)), list(numbers), fontsize=11)
    axes.invert_yaxis()
    legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return axes
