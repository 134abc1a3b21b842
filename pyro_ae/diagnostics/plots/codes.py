"""The latent space of an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .style import BLUE, CLASSES, GREY, INK, ORANGE, array, legend, one

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CLASSES = 20
"""Different labels above which whole numbers are taken for a scale."""


def latent_space(codes: Any, labels: Any = None, *, title: str = "Latent space", axes: Axes | None = None) -> Axes:
    """Codes of rows on their first two principal components, or on their two dims where there are only two.

    Arguments:
        codes: ``[N, latent]``, such as ``posterior.encode()`` gives.
        labels: ``[N]``, what the points are coloured by. Classes are drawn as their label where that is one
            character; numbers with a fraction, or of many values, by a scale of colours.
        title: of the figure.
        axes: to draw into; new ones by default.

    Raises:
        ValueError: for codes that are not ``[N, latent]`` with two rows at least, or labels that are not ``[N]``.

    Example:
        >>> latent_space(torch.randn(50, 8)).get_xlabel().startswith("1st principal component")
        True
    """
    z = torch.as_tensor(array(codes), dtype=torch.float64)
    if z.dim() != 2 or len(z) < 2:
        raise ValueError(f"codes must be [N, latent] with two rows at least, got {list(z.shape)}")
    values = None if labels is None else array(labels)
    if values is not None and values.shape != (len(z),):
        raise ValueError(f"labels must be one for each of the {len(z)} codes, got {list(values.shape)}")
    points, names = _flat(z)
    axes = one(axes, 4.8, title=title, x=names[0], y=names[1])
    axes.set_aspect("equal", adjustable="datalim")
    if values is None:
        axes.scatter(points[:, 0], points[:, 1], s=14, color=BLUE, alpha=0.7, linewidths=0)
    elif np.issubdtype(values.dtype, np.floating) or _is_scale(values):
        seen = axes.scatter(points[:, 0], points[:, 1], s=14, c=values, cmap="viridis", linewidths=0)
        bar = axes.figure.colorbar(seen, ax=axes, shrink=0.8)
        bar.ax.tick_params(labelsize=11)
    else:
        _classes(axes, points, values)
    return axes


def _is_scale(values: np.ndarray) -> bool:
    return np.issubdtype(values.dtype, np.number) and len(np.unique(values)) > MOST_CLASSES


def _flat(z: torch.Tensor) -> tuple[np.ndarray, list[str]]:
    """Codes on a plane, and the names of its axes."""
    if z.shape[1] == 1:
        return torch.cat([z, torch.zeros_like(z)], 1).numpy(), ["code", ""]
    if z.shape[1] == 2:
        return z.numpy(), ["1st dim of the code", "2nd dim of the code"]
    z = z - z.mean(0)
    _, s, v = torch.linalg.svd(z, full_matrices=False)
    share = (s**2 / (s**2).sum().clamp_min(1e-300)).tolist()
    names = [f"{n} principal component ({p:.0%} of variance)" for n, p in zip(["1st", "2nd"], share, strict=False)]
    return (z @ v[:2].T).numpy(), names


def _classes(axes: Axes, points: np.ndarray, classes: np.ndarray) -> None:
    known = np.unique(classes)
    for k, label in enumerate(known):
        some = points[classes == label]
        text = str(label)
        marker = f"${text}$" if len(text) == 1 and text.isalnum() else "o"
        size = 60 if marker != "o" else 18
        color = CLASSES[k % len(CLASSES)]
        axes.scatter(some[:, 0], some[:, 1], s=size, color=color, marker=marker, linewidths=0.3, label=text)
    if any(len(str(label)) > 1 for label in known):
        legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))


def kl(values: Any, kinds: Sequence[str] | None = None, *, title: str = "", axes: Axes | None = None) -> Axes:
    """The KL of the guide to the prior in each dim of a code, largest first: what each dim says about a row.

    Arguments:
        values: ``[latent]`` in nats, averaged over rows.
        kinds: ``"active"``, ``"mixed"`` or ``"passive"`` for each; dims that are not active are drawn pale.
        title: of the figure.
        axes: to draw into; new ones by default.

    Raises:
        ValueError: for values that are not one for each dim, or as many kinds.

    Example:
        >>> [text.get_text() for text in kl([0.1, 2.0]).get_xticklabels()]
        ['1', '0']
    """
    value = array(values).astype(float)
    if value.ndim != 1 or not len(value):
        raise ValueError(f"values must be one KL for each dim of the code, got shape {value.shape}")
    names = ["active"] * len(value) if kinds is None else list(kinds)
    if len(names) != len(value):
        raise ValueError(f"kinds must be one for each of the {len(value)} dims, got {len(names)}")
    order = np.argsort(-value, kind="stable")
    axes = one(
        axes, 3.0, title=title or "What each dim says about a row", x="dim of the code", y="KL to the prior (nats)"
    )
    colors = {"active": BLUE, "mixed": ORANGE, "passive": GREY}
    for kind, color in colors.items():
        at = [i for i, d in enumerate(order) if names[d] == kind]
        if at:
            axes.bar(at, value[order][at], color=color, label=kind, edgecolor=INK, linewidth=0.4)
    step = -(-len(value) // 24)  # as many labels as there is room for
    axes.set_xticks(range(0, len(value), step), [str(d) for d in order[::step]], fontsize=11)
    if kinds is not None:
        legend(axes)
    return axes
