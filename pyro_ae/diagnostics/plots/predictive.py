"""Statistics of the data against those of data that the model makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .style import BLUE, ORANGE, array, legend, one

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def predictive(replicated: Any, observed: float, *, name: str = "statistic", axes: Axes | None = None) -> Axes:
    """A statistic of replicated data, and that of the data.

    Arguments:
        replicated: ``[draws]``.
        observed: of the data.
        name: of the statistic.
        axes: to draw into; new ones by default.

    Raises:
        ValueError: for values that are not ``[draws]``, two at least, or not finite.

    Example:
        >>> predictive([1.0, 2.0, 3.0], 2.5, name="mean").get_xlabel()
        'mean'
    """
    values = array(replicated).astype(float)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite([*values, observed]).all():
        raise ValueError(f"a check needs a finite statistic of each of two draws or more, got shape {values.shape}")
    above = float((values >= observed).mean())
    axes = one(axes, 3.0, title=f"{above:.0%} of replicates are at or above the data", x=name, y="replicates")
    axes.hist(values, 40, color=BLUE, alpha=0.7, label="replicated")
    axes.axvline(observed, color=ORANGE, linewidth=2, linestyle="--", label="data")
    legend(axes)
    return axes
