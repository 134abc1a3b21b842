"""Images: as they are, rebuilt, made anew, and how sure a model is of their pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...draws import means
from ...program import validation
from ...sites import Recorder
from ..rows import evenly
from .style import GREY, WIDTH, array, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ...posterior import Posterior

SHADES = "gray_r"


def images(
    *bands: Any,
    names: Sequence[str] = (),
    title: str = "",
    columns: int = 10,
    limits: tuple[float, float] | None = None,
    cmap: str = SHADES,
    axes: Axes | None = None,
) -> Axes:
    """Images in a grid; of several bands, such as originals and reconstructions, one above the other.

    Arguments:
        bands: images ``[N, height, width]`` each, or ``[N, channels, height, width]`` of one channel or three, all of
            one shape.
        names: one for each band, written beside it.
        title: of the figure.
        columns: images in a line; bands longer than that go on below.
        limits: the values that are white and black; 0 and 1, or the least and the largest where some lie outside.
        cmap: Matplotlib's name of the colours of one channel.
        axes: to draw into; by default new ones of the size that the images need.

    Raises:
        ValueError: for bands of different shapes, or not of images.

    Example:
        >>> axes = images(torch.rand(10, 8, 8), torch.rand(10, 8, 8), names=["image", "rebuilt"])
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['image', 'rebuilt']
    """
    arrays = [_channels_last(array(band)) for band in bands]
    shapes = {a.shape for a in arrays}
    if len(shapes) != 1 or arrays[0].ndim not in (3, 4) or not len(arrays[0]):
        found = ", ".join(str(list(array(band).shape)) for band in bands) or "none"
        raise ValueError(
            "bands must be images [N, height, width] or [N, channels, height, width] of 1 or 3 channels, all of one "
            f"shape; got {found}"
        )
    if names and len(names) != len(arrays):
        raise ValueError(f"one name for each of the {len(arrays)} bands, got {len(names)}")
    columns = min(columns, len(arrays[0]))
    canvas, corners, centres = _canvas(arrays, columns)
    lines, dots = canvas.shape[:2]
    labels = (list(names) or [""] * len(arrays)) * (len(centres) // len(arrays))
    axes = _fitting(lines / dots, labels, title) if axes is None else axes
    low, high = limits or _limits(arrays)
    if canvas.ndim == 3:
        canvas = np.nan_to_num(((canvas - low) / (high - low)).clip(0, 1), nan=1.0)
    # nearest: what is shown are the pixels, not a blur of them
    axes.imshow(canvas, cmap=cmap, vmin=low, vmax=high, interpolation="nearest", aspect="equal")
    axes.set_title(title, fontsize=13, loc="left")
    axes.set_xticks([])
    axes.set_yticks(centres if names else [], labels if names else [], fontsize=12)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _frames(axes, corners, *arrays[0].shape[1:3])
    return axes


def _channels_last(images: np.ndarray) -> np.ndarray:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        return images if images.ndim == 3 else np.empty(())
    return images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)


def _limits(arrays: list[np.ndarray]) -> tuple[float, float]:
    low, high = (float(f([f(a) for a in arrays])) for f in (np.nanmin, np.nanmax))
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def _canvas(arrays: list[np.ndarray], columns: int) -> tuple[np.ndarray, list[tuple[int, int]], list[float]]:
    """All images on one, the corner of each, and the middle of each line of images."""
    n, height, width = arrays[0].shape[:3]
    blocks = math.ceil(n / columns)
    gap = max(1, width // 8)  # between images; twice that between a block of bands and the next
    space = 2 * gap if len(arrays) > 1 else gap
    block = len(arrays) * (height + gap) - gap + space
    size = (blocks * block - space, columns * (width + gap) - gap)
    canvas = np.full((*size, *arrays[0].shape[3:]), np.nan)
    corners, centres = [], []
    for b in range(blocks):
        for k, images in enumerate(arrays):
            top = b * block + k * (height + gap)
            centres.append(top + (height - 1) / 2)
            for c, image in enumerate(images[b * columns : (b + 1) * columns]):
                left = c * (width + gap)
                canvas[top : top + height, left : left + width] = image
                corners.append((left, top))
    return canvas, corners, centres


def _fitting(ratio: float, labels: list[str], title: str) -> Axes:
    """New axes of the size that images of this height to width need."""
    height, top = (WIDTH - _margin(labels) - 0.05) * ratio, 0.4 if title else 0.05
    made = figure(height + top + 0.05)
    made.set_layout_engine("none")
    return _place(made, height + 0.05, height, labels)


def _margin(labels: list[str]) -> float:
    return 0.05 + 0.11 * max(map(len, labels))


def _place(made: Figure, top: float, height: float, labels: list[str]) -> Axes:
    """Axes in inches from below, by hand, for the layout engine leaves no room for tick labels beside an image."""
    left, total = _margin(labels), made.get_figheight()
    return made.add_axes((left / WIDTH, (top - height) / total, (WIDTH - left - 0.05) / WIDTH, height / total))


def _frames(axes: Axes, corners: list[tuple[int, int]], height: int, width: int) -> None:
    """A thin frame about each image, so that light images have an edge."""
    from matplotlib.patches import Rectangle

    for left, top in corners:
        frame = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=GREY, linewidth=0.6)
        frame.set_clip_on(False)
        axes.add_patch(frame)


# -- of a posterior --------------------------------------------------------------------------------------------


def reconstructions(posterior: Posterior, data: Any = None, n: int = 20, *, axes: Axes | None = None) -> Axes:
    """Images, and under each the mean of the likelihood, averaged over draws of its code or of the weights.

    Arguments:
        posterior: of a model that observes images.
        data: rows; those of the fit by default.
        n: how many, spread evenly.
        axes: to draw into; new ones by default.

    Raises:
        ValueError: for a model without codes, or one that does not observe images at one site.
    """
    index = _spread(posterior, data, n)
    seen = _of_rows(posterior, data, index, lambda rows: _observed(posterior, rows))
    rebuilt = _of_rows(posterior, data, index, posterior.reconstruct)
    return images(seen, rebuilt, names=["image", "rebuilt"], title="Reconstructions", axes=axes)


def samples(posterior: Posterior, n: int = 40, *, axes: Axes | None = None, **options: Any) -> Axes:
    """New images: the likelihood's mean at codes from the prior, or from another density.

    Arguments:
        posterior: of a model that observes images.
        n: how many.
        axes: to draw into; new ones by default.
        options: of :meth:`~pyro_ae.posterior.Posterior.generate`, such as ``density=``. For several densities one above
            the other, give what it generates from each to :func:`images`.

    Raises:
        ValueError: as ``generate`` does, and for a model that does not observe images at one site.
    """
    made = _images_only(posterior.generate(n, **({"mean": True} | options)))
    return images(made, title="Samples", axes=axes)


def traversal(
    posterior: Posterior,
    data: Any = None,
    row: int = 0,
    *,
    dims: Sequence[int] | None = None,
    span: float = 3.0,
    steps: int = 9,
    axes: Axes | None = None,
) -> Axes:
    """What each dim of a row's code stands for: the image as that dim goes from ``-span`` to ``span``.

    Arguments:
        posterior: of a model that observes images and has one latent ``[latent]`` for each row.
        data: rows; those of the fit by default.
        row: whose code is held fixed in all other dims, at its posterior mean.
        dims: of the code; the first ten by default.
        span: in the latent's own units; the prior of most models has a standard deviation of 1.
        steps: images for each dim.
        axes: to draw into; new ones by default.

    Raises:
        ValueError: for another kind of model, or a row or dims that are not there.
    """
    rows = _rows_of(posterior, data)
    size = rows.need_size()
    if not -size <= row < size:
        raise ValueError(f"there is no row {row}: the data has {size}")
    index = torch.tensor([row % size])
    if len(posterior.local) != 1:
        raise ValueError(
            f"a traversal needs one latent [latent] for each row, and the rows have {posterior.local or 'none'}; codes "
            "that are a function of latent weights differ in meaning from draw to draw"
        )
    code = _of_rows(posterior, data, index, posterior.encode)
    if code.dim() != 2:
        raise ValueError(f"a traversal needs a latent [latent] for each row, and theirs has shape {[*code.shape[1:]]}")
    latent = code.shape[1]
    chosen = list(range(min(latent, 10))) if dims is None else list(dims)
    if not chosen or not all(0 <= d < latent for d in chosen):
        raise ValueError(f"dims must be some of 0 to {latent - 1}, got {chosen}")
    codes = code.repeat(len(chosen) * steps, 1, 1)
    for k, d in enumerate(chosen):
        codes[k * steps : (k + 1) * steps, 0, d] = torch.linspace(-span, span, steps)
    (site,) = posterior.local
    tied = [n for n in posterior.program.layout.names("latent") if n != site]
    drawn = posterior.sample(1) if tied else {}
    shared = {n: drawn[n].expand(len(codes), *drawn[n].shape[1:]) for n in tied}
    with torch.no_grad():
        pictures = _images_only(means(posterior.program, {site: codes, **shared}, rows.take(index).call()))
    bands = pictures.flatten(0, 1).unflatten(0, (len(chosen), steps))
    return images(
        *bands,
        names=[f"dim {d}" for d in chosen],
        title=f"Each dim from {-span:g} to {span:g}",
        columns=steps,
        axes=axes,
    )


def uncertainty(posterior: Posterior, data: Any = None, n: int = 10, draws: int = 100) -> Any:
    """Images, what the posterior predicts of them, and how sure it is of each pixel.

    The standard deviation is that of the likelihood's mean between draws: of the code, and of the weights where they
    have a posterior. Noise of the pixels themselves is no part of it.

    Arguments:
        posterior: of a model that observes images.
        data: rows; those of the fit by default.
        n: how many, spread evenly.
        draws: of the posterior.

    Returns:
        The axes of the images and of the maps of standard deviations, an array of two.

    Raises:
        ValueError: for a model that does not observe images at one site.
    """
    index = _spread(posterior, data, n)
    seen = _of_rows(posterior, data, index, lambda rows: _observed(posterior, rows))
    most = posterior._at_most(draws)

    def read(rows: Any) -> Tensor:
        found: Any = _images_only(posterior.uncertainty(rows, most))
        return torch.stack([found.mean, found.epistemic.sqrt()], 1)

    mean, spread = _of_rows(posterior, data, index, read).unbind(1)
    names = ["image", "mean", "sd"]
    tall = [_canvas([_channels_last(array(seen))] * k, min(len(seen), 10))[0].shape for k in (2, 1)]
    heights = [(WIDTH - _margin(names) - 0.05) * lines / dots for lines, dots, *_ in tall]
    total = sum(heights) + 1.25  # title, the space between, and the scale
    made = figure(total)
    made.set_layout_engine("none")
    tops = [total - 0.4, total - 0.55 - heights[0]]
    axes = np.array([_place(made, top, height, names) for top, height in zip(tops, heights, strict=True)])
    images(seen, mean, names=names[:2], title="Prediction and its uncertainty", axes=axes[0])
    images(spread, names=names[2:], limits=(0.0, float(spread.max()) or 1.0), cmap="viridis", axes=axes[1])
    scale = made.add_axes((0.3, 0.5 / total, 0.5, 0.1 / total))
    bar = made.colorbar(axes[1].get_images()[0], cax=scale, orientation="horizontal")
    bar.set_label("standard deviation between draws", fontsize=11)
    scale.tick_params(labelsize=11)
    return axes


def _rows_of(posterior: Posterior, data: Any) -> Any:
    rows = posterior._rows(data)
    if not hasattr(rows, "take"):
        raise ValueError("a figure needs rows that can be picked, which a DataLoader does not give: pass data=...")
    return rows


def _spread(posterior: Posterior, data: Any, n: int) -> Tensor:
    """The numbers of some rows, spread evenly."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    size = _rows_of(posterior, data).need_size()
    return evenly(size, n)


def _of_rows(posterior: Posterior, data: Any, index: Tensor, read: Callable[[Any], Any]) -> Any:
    """What is read of some rows; where chains drew the latents of all rows of the fit, of these and then some."""
    if data is None and posterior.draws is not None and posterior.local:
        values = read(None)
        return values[index] if isinstance(values, Tensor) else values
    return read(_rows_of(posterior, data).take(index))


def _observed(posterior: Posterior, data: Any) -> Tensor:
    """The values of the observed site."""
    batch = posterior._rows(data).call()
    names = posterior.program.layout.names("observed")
    with torch.no_grad(), posterior.program.active(), validation(False), Recorder() as run:
        posterior.program.model.fn(*batch.args, **batch.kwargs)
    return _images_only({n: run.sites[n]["value"].cpu() for n in names})


def _images_only(values: Any) -> Tensor:
    if isinstance(values, dict):
        if len(values) != 1:
            raise ValueError(f"images are of one observed site, and the model has {', '.join(map(repr, values))}")
        (values,) = values.values()
    return values
