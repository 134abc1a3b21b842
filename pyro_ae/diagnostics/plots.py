"""Figures of a fit: images, codes, history and k-hat. They leave pyplot and its global state alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#222222", "#BBBBBB"
# Okabe and Ito's and Tol's colours, dark enough to be read on white; who cannot tell two apart reads the labels.
CLASSES = [BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", INK, "#882255", "#999933", "#888888"]
WIDTH = 5.0
"""Inches: small enough for 12 point text to be read on a phone, where the figure is shrunk."""


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")


def _axes(figure: Figure, *where: Any, title: str, x: str, y: str) -> Axes:
    axes = figure.add_subplot(*where)
    axes.set_title(title, fontsize=13, loc="left")
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def images(
    *bands: Any, names: Sequence[str] = (), title: str = "", columns: int = 10, limits: tuple[float, float] = (0.0, 1.0)
) -> Figure:
    """Grey images in a grid; of several bands, such as originals and reconstructions, one above the other.

    Arguments:
        bands: images ``[N, height, width]`` each, all of one shape.
        names: one for each band, written beside it.
        title: of the figure.
        columns: images in a line; bands longer than that go on below.
        limits: the values that are white and black.

    Raises:
        ValueError: for bands of different shapes, or not ``[N, height, width]``.

    Example:
        >>> len(images(torch.rand(10, 8, 8), torch.rand(10, 8, 8), names=["image", "reconstruction"]).axes)
        1
    """
    arrays = [_array(band) for band in bands]
    shapes = {a.shape for a in arrays}
    if len(shapes) != 1 or arrays[0].ndim != 3 or not len(arrays[0]):
        found = ", ".join(str(list(a.shape)) for a in arrays) or "none"
        raise ValueError(f"bands must be images [N, height, width], all of one shape; got {found}")
    if names and len(names) != len(arrays):
        raise ValueError(f"one name for each of the {len(arrays)} bands, got {len(names)}")
    n, height, width = arrays[0].shape
    columns = min(columns, n)
    blocks = math.ceil(n / columns)
    gap = max(1, width // 8)  # between images; twice that between a block of bands and the next
    space = 2 * gap if len(arrays) > 1 else gap
    block = len(arrays) * (height + gap) - gap + space
    canvas = np.full((blocks * block - space, columns * (width + gap) - gap), np.nan)
    centres, labels = [], []
    for b in range(blocks):
        for k, array in enumerate(arrays):
            top = b * block + k * (height + gap)
            for c, image in enumerate(array[b * columns : (b + 1) * columns]):
                left = c * (width + gap)
                canvas[top : top + height, left : left + width] = image
            centres.append(top + (height - 1) / 2)
            labels.append(names[k] if names else "")
    lines, dots = canvas.shape
    # the axes are placed by hand, for the layout engine leaves no room for tick labels beside an image
    left = 0.05 + (0.11 * max(map(len, labels)) if names else 0.0)
    top = 0.4 if title else 0.05
    wide = WIDTH - left - 0.05
    high = wide * lines / dots
    figure = _figure(high + top + 0.05)
    figure.set_layout_engine("none")
    tall = figure.get_figheight()
    axes = figure.add_axes((left / WIDTH, 0.05 / tall, wide / WIDTH, high / tall))
    # nearest: what is shown are the pixels, not a blur of them
    axes.imshow(canvas, cmap="gray_r", vmin=limits[0], vmax=limits[1], interpolation="nearest", aspect="auto")
    axes.set_title(title, fontsize=13, loc="left")
    axes.set_xticks([])
    axes.set_yticks(centres if names else [], labels if names else [], fontsize=12)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _frames(axes, centres, n, columns, len(arrays), width, height, gap)
    return figure


def _frames(
    axes: Axes, centres: list[float], n: int, columns: int, bands: int, width: int, height: int, gap: int
) -> None:
    """A thin frame about each image, so that light images have an edge."""
    from matplotlib.patches import Rectangle

    for line, centre in enumerate(centres):
        for c in range(min(columns, n - line // bands * columns)):
            corner = (c * (width + gap) - 0.5, centre - height / 2)
            axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=GREY, linewidth=0.6, clip_on=False))


def latent_space(codes: Any, labels: Any = None, *, title: str = "Latent space") -> Figure:
    """Codes of rows on their first two principal components, or on their two dims where there are only two.

    Arguments:
        codes: ``[N, latent]``, such as ``posterior.encode()`` gives.
        labels: ``[N]``, the rows' classes; each point is drawn as its label where that is one character.
        title: of the figure.

    Raises:
        ValueError: for codes that are not ``[N, latent]`` with two rows at least, or labels that are not ``[N]``.

    Example:
        >>> latent_space(torch.randn(50, 8)).axes[0].get_xlabel().startswith("1st principal component")
        True
    """
    z = torch.as_tensor(_array(codes), dtype=torch.float64)
    if z.dim() != 2 or len(z) < 2:
        raise ValueError(f"codes must be [N, latent] with two rows at least, got {list(z.shape)}")
    classes = None if labels is None else _array(labels)
    if classes is not None and classes.shape != (len(z),):
        raise ValueError(f"labels must be one for each of the {len(z)} codes, got {list(classes.shape)}")
    if z.shape[1] == 1:
        z = torch.cat([z, torch.zeros_like(z)], 1)
        names = ["code", ""]
    elif z.shape[1] == 2:
        names = ["1st dim of the code", "2nd dim of the code"]
    else:
        z = z - z.mean(0)
        _, s, v = torch.linalg.svd(z, full_matrices=False)
        share = (s**2 / (s**2).sum().clamp_min(1e-300)).tolist()
        z = z @ v[:2].T
        names = [f"{n} principal component ({p:.0%} of variance)" for n, p in zip(["1st", "2nd"], share, strict=False)]
    figure = _figure(4.8)
    axes = _axes(figure, title=title, x=names[0], y=names[1])
    axes.set_aspect("equal", adjustable="datalim")
    points = z.numpy()
    if classes is None:
        axes.scatter(points[:, 0], points[:, 1], s=14, color=BLUE, alpha=0.7, linewidths=0)
        return figure
    known = np.unique(classes)
    for k, label in enumerate(known):
        some = points[classes == label]
        text = str(label)
        marker = f"${text}$" if len(text) == 1 and text.isalnum() else "o"
        size = 60 if marker != "o" else 18
        color = CLASSES[k % len(CLASSES)]
        axes.scatter(some[:, 0], some[:, 1], s=size, color=color, marker=marker, linewidths=0.3, label=text)
    if any(len(str(label)) > 1 for label in known):
        axes.legend(fontsize=11, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def history(values: Mapping[str, Sequence[float]], *, unit: str = "nats per row") -> Figure:
    """The loss over a fit, on held-out rows too where there are some, and below it the share of each site.

    Losses fall steeply at first. What lies above nine tenths of the drop is left out, so that the rest can be seen.

    Arguments:
        values: a posterior's ``history``.
        unit: of the losses.

    Raises:
        ValueError: for a history without a loss, such as that of a sampler.

    Example:
        >>> figure = history({"step": [10, 20], "epoch": [1, 2], "loss": [3.0, 2.0], "log p(x)": [-2.9, -1.9]})
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['loss (nats per row)', 'nats per row']
    """
    if not values.get("loss"):
        raise ValueError(f"no loss in this history; it has {', '.join(map(repr, values)) or 'nothing'}")
    epochs = values.get("epoch", [])
    by_epoch = len(set(epochs)) == len(values["loss"])
    x = epochs if by_epoch else values["step"]
    name = "epoch" if by_epoch else "optimiser step"
    terms = [n for n in values if n.startswith("log ")]
    figure = _figure(5.6 if terms else 3.0)
    grid = figure.add_gridspec(2 if terms else 1, 1)
    top = _axes(figure, grid[0], title="Loss (lower is better)", x="" if terms else name, y=f"loss ({unit})")
    top.plot(x, values["loss"], color=BLUE, linewidth=1.5, label="training")
    if "validation" in values:
        held = list(values["validation"])
        top.plot(x, held, color=ORANGE, linewidth=1.5, linestyle="--", label="held out")
        best = int(np.argmin(held))
        top.plot([x[best]], [held[best]], "o", color=ORANGE, label=f"best: {held[best]:.2f} at {name} {x[best]:g}")
    _zoom(top, [values[n] for n in ("loss", "validation") if n in values])
    top.legend(fontsize=11, frameon=False)
    if terms:
        below = _axes(figure, grid[1], title="Share of each site, one draw", x=name, y=unit)
        for k, term in enumerate(terms):
            style = ["-", "--", ":", "-."][k % 4]
            below.plot(x, values[term], style, color=[GREEN, PURPLE, ORANGE, INK][k % 4], linewidth=1.5, label=term)
        _zoom(below, [values[n] for n in terms])
        below.legend(fontsize=11, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    return figure


def _zoom(axes: Axes, lines: list[Sequence[float]]) -> None:
    """Leave the first evaluations out of the frame where they would flatten all others."""
    late = np.concatenate([np.asarray(line[len(line) // 10 :], dtype=float) for line in lines])
    late = late[np.isfinite(late)]
    if len(late) and np.ptp(late) > 0:
        pad = 0.06 * np.ptp(late)
        axes.set_ylim(late.min() - pad, late.max() + pad)


def pareto_k(values: Any, *, title: str = "") -> Figure:
    r"""A histogram of Pareto k-hat with the line at 0.7, above which importance sampling is not to be relied on.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024) https://arxiv.org/abs/1507.02646

    Arguments:
        values: ``[N]``, one for each row; those that are not finite are counted in the title alone.
        title: of the figure; by default how many rows are above the line.

    Raises:
        ValueError: where there is none.

    Example:
        >>> pareto_k([0.1, 0.2, 0.9]).axes[0].get_title(loc="left")
        'k-hat is at most 0.7 for 2 of 3 rows'
    """
    from matplotlib.ticker import MaxNLocator

    k = _array(values).astype(float).ravel()
    if not len(k):
        raise ValueError("there is no k-hat to show")
    good = int((k <= 0.7).sum())
    finite = k[np.isfinite(k)]
    figure = _figure(3.0)
    axes = _axes(
        figure,
        title=title or f"k-hat is at most 0.7 for {good} of {len(k)} rows",
        x="Pareto k-hat of a row (no unit)",
        y="rows",
    )
    low, high = (min(finite.min(), 0.0), max(finite.max(), 1.0)) if len(finite) else (0.0, 1.0)
    # edges at multiples of a part of 0.7, so that no bar straddles the line
    width = next((w for w in (0.05, 0.1, 0.35) if (high - low) / w <= 40), 0.7)
    edges = np.arange(math.floor(low / width), math.ceil(high / width) + 1) * width
    below = (edges[:-1] + edges[1:]) / 2 < 0.7
    counts, _ = np.histogram(finite, edges)
    colors = np.where(below, BLUE, ORANGE).tolist()
    axes.bar(edges[:-1], counts, width, align="edge", color=colors, edgecolor="white", linewidth=0.5)
    axes.axvline(0.7, color=INK, linestyle="--", linewidth=1.2)
    axes.annotate("0.7", (0.7, 1.0), (4, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                  fontsize=11, va="top")  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure
