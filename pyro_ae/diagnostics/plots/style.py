"""What all figures share: size, colours and labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#222222", "#BBBBBB"
# Okabe and Ito's and Tol's colours, dark enough to be read on white; who cannot tell two apart reads the labels.
CLASSES = [BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", INK, "#882255", "#999933", "#888888"]
STYLES = ["-", "--", ":", "-."]
WIDTH = 5.0
"""Inches: small enough for 12 point text to be read on a phone, where the figure is shrunk."""


def figure(height: float) -> Figure:
    """A new figure of pyplot, which a notebook shows by itself."""
    from matplotlib import pyplot

    return pyplot.figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")


def grid(lines: int, columns: int, height: float) -> Any:
    """New axes ``[lines, columns]`` in one figure, an array of NumPy."""
    return figure(height).subplots(lines, columns, squeeze=False)


def dress(axes: Axes, *, title: str = "", x: str = "", y: str = "") -> Axes:
    """Give axes their title and labels."""
    axes.set_title(title, fontsize=13, loc="left")
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def one(axes: Axes | None, height: float, **labels: str) -> Axes:
    """The axes that were given, or new ones, with their labels."""
    return dress(figure(height).add_subplot() if axes is None else axes, **labels)


def legend(axes: Axes, **options: Any) -> None:
    """A legend without a frame, at the best place by default."""
    axes.legend(fontsize=11, frameon=False, **options)


def array(values: Any) -> np.ndarray:
    """A tensor or anything like it, as NumPy's array."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
