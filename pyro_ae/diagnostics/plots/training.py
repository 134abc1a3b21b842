"""How a fit went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import BLUE, GREEN, INK, ORANGE, PURPLE, STYLES, dress, grid, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def history(values: Mapping[str, Sequence[float]], *, unit: str = "nats per row") -> Any:
    """The loss over a fit, on held-out rows too where there are some, and below it the share of each site.

    Losses fall steeply at first. What lies above nine tenths of the drop is left out, so that the rest can be seen.

    Arguments:
        values: a posterior's ``history``.
        unit: of the losses.

    Returns:
        The axes, an array of one or two.

    Raises:
        ValueError: for a history without a loss, such as that of a sampler.

    Example:
        >>> axes = history({"step": [10, 20], "epoch": [1, 2], "loss": [3.0, 2.0], "log p(x)": [-2.9, -1.9]})
        >>> [part.get_ylabel() for part in axes]
        ['loss (nats per row)', 'nats per row']
    """
    if not values.get("loss"):
        raise ValueError(f"no loss in this history; it has {', '.join(map(repr, values)) or 'nothing'}")
    epochs = values.get("epoch", [])
    by_epoch = len(set(epochs)) == len(values["loss"])
    x = epochs if by_epoch else values.get("step", range(1, len(values["loss"]) + 1))
    name = "epoch" if by_epoch else "optimiser step" if "step" in values else "evaluation"
    terms = [n for n in values if n.startswith("log ")]
    axes = grid(2 if terms else 1, 1, 5.6 if terms else 3.0)[:, 0]
    top = dress(axes[0], title="Loss (lower is better)", x="" if terms else name, y=f"loss ({unit})")
    top.plot(x, values["loss"], color=BLUE, linewidth=1.5, label="training")
    if "validation" in values:
        held = list(values["validation"])
        top.plot(x, held, color=ORANGE, linewidth=1.5, linestyle="--", label="held out")
        best = int(np.argmin(held))
        top.plot([x[best]], [held[best]], "o", color=ORANGE, label=f"best: {held[best]:.2f} at {name} {x[best]:g}")
    _zoom(top, [values[n] for n in ("loss", "validation") if n in values])
    legend(top)
    if terms:
        below = dress(axes[1], title="Share of each site, one draw", x=name, y=unit)
        for k, term in enumerate(terms):
            color = [GREEN, PURPLE, ORANGE, INK][k % 4]
            below.plot(x, values[term], STYLES[k % 4], color=color, linewidth=1.5, label=term)
        _zoom(below, [values[n] for n in terms])
        legend(below, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    return axes


def _zoom(axes: Axes, lines: list[Sequence[float]]) -> None:
    """Leave the first evaluations out of the frame where they would flatten all others."""
    late = np.concatenate([np.asarray(line[len(line) // 10 :], dtype=float) for line in lines])
    late = late[np.isfinite(late)]
    if len(late) and np.ptp(late) > 0:
        pad = 0.06 * np.ptp(late)
        axes.set_ylim(late.min() - pad, late.max() + pad)
