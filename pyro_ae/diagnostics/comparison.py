"""How two posteriors of the same rows differ, such as a guide's and the draws of long chains."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..data import LoadedRows, Rows, as_rows
from ..divergences import wasserstein_1d
from ..runtime import seeded
from ..sites import quote
from ..types import Draws
from .rows import chosen_rows
from .two_sample import FEWEST, c2st, checked, effective_draws, interval_coverage, sliced_w1, thinned

if TYPE_CHECKING:
    from ..posterior import Posterior

CLEAR = 4.0
"""Standard errors beyond which a difference is no chance, also where it is the largest of many."""

Side: TypeAlias = "Posterior | Draws"


@dataclass(frozen=True)
class Difference:
    """How the draws of one site differ. What is said in sds is in standard deviations of the reference.

    Attributes:
        c2st: accuracy of a classifier, of each row ``[n]`` or a scalar; NaN where fewer than 50 draws are independent.
        sliced_wasserstein: mean Wasserstein-1 distance along random directions, in sds, as ``c2st``.
        mean: the mean less the reference's, in sds, ``[n, *event]``, or ``[*shape]`` of a site that is not the rows'.
        log_sd_ratio: log of the standard deviation over the reference's; negative where it is too narrow.
        wasserstein: Wasserstein-1 distance of each number, in sds, shaped as ``mean``.
        coverage: share of the reference's draws within the central intervals, ``[levels, *mean.shape]``.
        effective: how many independent draws the smaller side is worth, as ``c2st``.
    """

    c2st: Tensor
    sliced_wasserstein: Tensor
    mean: Tensor
    log_sd_ratio: Tensor
    wasserstein: Tensor
    coverage: Tensor
    effective: Tensor


@dataclass(frozen=True)
class Comparison:
    """How a posterior differs from a reference, site by site.

    Attributes:
        sites: name to :class:`Difference`.
        rows: which rows were compared ``[n]``, or None where no site is the rows'.
        levels: of the central intervals.
        names: what the two sides are called.
        left_out: sites that only one side has draws of.
    """

    sites: dict[str, Difference]
    rows: Tensor | None
    levels: tuple[float, ...]
    names: tuple[str, str]
    left_out: tuple[str, ...] = ()

    @property
    def sentences(self) -> tuple[str, ...]:
        """What is different, in words, the worst first."""
        found = [sentence for name in self.sites for sentence in self._of(name)]
        return tuple(text for _, text in sorted(found, key=lambda sentence: -sentence[0]))

    def _of(self, name: str) -> list[tuple[float, str]]:
        d, (one, other) = self.sites[name], self.names
        found: list[tuple[float, str]] = []
        n = d.effective.reshape(d.effective.shape + (1,) * (d.mean.dim() - d.effective.dim())).expand_as(d.mean)
        numbers, rows = d.mean.numel(), d.c2st.numel()
        for word, sign in (("narrow", -1.0), ("wide", 1.0)):
            off = sign * d.log_sd_ratio
            bad = off > (CLEAR / n.sqrt()).clamp(min=math.log(1.2))
            if bad.any():
                worst, median = (float((sign * v).exp() - 1) for v in (off[bad].max(), off[bad].median()))
                at, count = self._at(name, off), f"{int(bad.sum())} of {numbers} numbers"
                text = f"{name}: {one} is too {word} in {count}, by {abs(median):.0%} in the median of them"
                found.append((float(off.max()) / math.log(2), f"{text} and {abs(worst):.0%} at worst{at}."))
        off = d.mean.abs()
        bad = off > (CLEAR * (2 / n).sqrt()).clamp(min=0.25)
        if bad.any():
            text = f"{name}: the mean of {one} is off in {int(bad.sum())} of {numbers} numbers, by "
            text += f"{float(off.max()):.2f} standard deviations of {other} at worst{self._at(name, off)}."
            found.append((float(off.max()), text))
        shapes_only = not found
        bad = d.c2st > 0.5 + (CLEAR * 0.5 / (2 * d.effective).sqrt()).clamp(min=0.1)
        if bad.any():
            best = float(d.c2st[bad].max())
            text = f"{name}: a classifier tells {one} from {other}, right for {best:.0%} of the draws at worst"
            text += f"{self._at(name, d.c2st.nan_to_num(0.0))} where 50% is chance"
            text += f", and well above it in {int(bad.sum())} of {rows} rows" if rows > 1 else ""
            text += "; means and spreads agree, so it is the shape that differs" if shapes_only else ""
            found.append(((best - 0.5) / 0.25, f"{text}."))
        stuck = int((d.effective < FEWEST).sum())
        if stuck:
            text = (
                f"{name}: of {stuck} of {rows} rows there are fewer than {FEWEST} independent draws"
                if rows > 1
                else (f"{name}: there are fewer than {FEWEST} independent draws")
            )
            found.append((math.inf, f"{text}, too few to go by: run the chains for longer."))
        if not found:
            text = f"{name}: no clear difference; means differ by at most {float(d.mean.abs().max()):.2f} standard "
            text += f"deviations, and standard deviations by {float(d.log_sd_ratio.abs().max().exp() - 1):.0%}."
            found.append((0.0, text))
        return found

    def _at(self, name: str, off: Tensor) -> str:
        """Where a tensor is largest, in words."""
        if off.dim() == 0:
            return ""
        at = [int(i) for i in np.unravel_index(int(off.argmax()), tuple(off.shape))]
        local = self.rows is not None and self.sites[name].c2st.dim() == 1
        inside = at[1:] if local else at
        parts = [f"row {int(self.rows[at[0]])}"] if local and self.rows is not None else []
        parts += [f"dim {', '.join(map(str, inside))}"] if inside else []
        return f" ({', '.join(parts)})"

    def __str__(self) -> str:
        heads = ["site", "c2st", "sliced W1", "W1", "|mean|", "sd ratio", *(f"in {level:.0%}" for level in self.levels)]
        lines = [heads]
        for name, d in self.sites.items():
            pairs = [_median_worst(v) for v in (d.c2st, d.sliced_wasserstein, d.wasserstein, d.mean.abs())]
            spread = d.log_sd_ratio.exp()
            covered = [f"{float(share.mean()):.0%}" for share in d.coverage]
            lines.append([name, *pairs, f"{float(spread.min()):.2f} to {float(spread.max()):.2f}", *covered])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        where = "" if self.rows is None else f" on {len(self.rows)} rows"
        title = f"How {self.names[0]} differs from {self.names[1]}{where}: median (worst); W1 and means in sds"
        said = [t for s in self.sentences for t in textwrap.wrap(s, 100, initial_indent="- ", subsequent_indent="  ")]
        said += [f"- {quote(self.left_out)}: not compared, as only one side has draws."] if self.left_out else []
        return "\n".join([title, *table, *said])


def _median_worst(values: Tensor) -> str:
    values = values[~values.isnan()]
    if not values.numel():
        return "-"
    worst = f"{float(values.max()):.2f}"
    return worst if values.numel() == 1 else f"{float(values.median()):.2f} ({worst})"


class _Sample(NamedTuple):
    """Draws of one site."""

    values: Tensor
    """``[chains, draws, n, d]``; n is 1 for a site that is not the rows'."""
    shape: torch.Size
    """Of the site, its rows first."""
    chains: bool
    """Whether draws may depend on those before them."""


def compare(
    a: Side,
    b: Side,
    data: Any = None,
    *,
    draws: int = 1000,
    rows: int | Sequence[int] | Tensor | None = 10,
    levels: Sequence[float] = (0.5, 0.9),
    local: Iterable[str] | None = None,
    classify: bool = True,
    names: tuple[str, str] = ("the guide", "the reference"),
    seed: int = 0,
) -> Comparison:
    """How a posterior ``a`` differs from a reference ``b`` on the same rows, from draws of both.

    ``compare(posterior, reference(posterior))`` sets a guide against long chains on some rows. Every number of every
    site is compared by its mean, spread, intervals and Wasserstein-1 distance; and all numbers of a site together, row
    by row where the rows have latents of their own, by a classifier and along random lines. A difference is only spoken
    of where it is large and no chance. Chains' draws are thinned to their effective number for the classifier.

    References:
        Revisiting Classifier Two-Sample Tests (Lopez-Paz and Oquab, 2017) https://arxiv.org/abs/1610.06545
        Benchmarking Simulation-Based Inference (Lueckmann, Boelts, Greenberg, Goncalves and Macke, 2021)
        https://arxiv.org/abs/2101.04653

    Arguments:
        a: a posterior, or draws: site to ``[draws, *shape]``.
        b: the reference, likewise.
        data: rows of both; those of the chains where one side is chains with latents of rows, else those of the fit.
        draws: of a guide; of chains, all that they hold are used.
        rows: how many of the rows, spread evenly, or which; None for all.
        levels: of the central intervals.
        local: sites whose first dim is the rows'; by default what the posteriors say, and none for draws alone.
        classify: whether to train classifiers, which takes about a second for each row and site.
        names: what to call the two sides.
        seed: of draws, directions and classifiers; the global random states stay as they were.

    Raises:
        ValueError: for sides that share no site, or draws that are too few, not finite, all the same, or not of the
            same rows.

    Example:
        >>> found = compare({"z": torch.randn(500, 2)}, {"z": 3 + torch.randn(500, 2)}, names=("a", "b"))
        >>> found.sites["z"].mean.shape, bool(found.sites["z"].c2st > 0.9)
        (torch.Size([2]), True)
    """
    if draws < FEWEST:
        raise ValueError(f"draws must be at least {FEWEST}, got {draws}")
    posteriors: list[Any] = [side for side in (b, a) if not isinstance(side, Mapping)]
    found = {n for p in posteriors for n in p.local} if local is None else set(local)
    held, index, total = _rows(posteriors, data, rows, bool(found)), None, None
    if found:
        total = held.size if held is not None else _size((a, b), found)
        index = None if total is None else chosen_rows(total, rows)
    with seeded(seed), torch.no_grad():
        one, other = (_samples(side, held, index, total, found, draws, posteriors) for side in (a, b))
        shared = [n for n in one if n in other]
        if not shared:
            raise ValueError(
                f"the two sides share no site: one has {quote(one) or 'none'}, one {quote(other) or 'none'}"
            )
        sites = {n: _difference(n, one[n], other[n], levels, n in found, classify, seed) for n in shared}
    left = tuple(n for n in (*one, *other) if n not in shared)
    return Comparison(sites, index, tuple(levels), names, left)


def _rows(posteriors: list[Any], data: Any, rows: Any, local: bool) -> Rows | None:
    """The rows that both sides are about."""
    chains = [p.data for p in posteriors if p.draws is not None and p.local]
    held = as_rows(data) if data is not None else next((d for d in (*chains, *(p.data for p in posteriors)) if d), None)
    if isinstance(held, LoadedRows):
        raise ValueError("a DataLoader brings other rows to each side: pass data=... as tensors")
    if held is None and any(p.draws is None for p in posteriors):
        raise ValueError("the posterior was loaded without data: pass data=...")
    return held


def _size(sides: tuple[Side, Side], local: set[str]) -> int:
    mappings = [s for s in sides if isinstance(s, Mapping)]
    sizes = [v.shape[1] for s in mappings for n, v in s.items() if n in local and v.dim() > 1]
    if not sizes:
        raise ValueError(f"neither side has draws [draws, rows, *event] of a site {quote(sorted(local))}")
    return min(sizes)


def _samples(
    side: Any, held: Rows | None, index: Tensor | None, total: int | None, local: set[str], draws: int, known: list[Any]
) -> dict[str, _Sample]:
    """The draws of one side, of the rows that were chosen."""
    guided = not isinstance(side, Mapping) and side.draws is None
    taken = guided and held is not None and index is not None
    if guided:
        drawn = side.sample(draws, held) if held is None or index is None else rows_drawn(side, draws, held, index)
        values = {n: v.unsqueeze(0) for n, v in drawn.items()}
    else:
        values = side.draws if not isinstance(side, Mapping) else {n: v.unsqueeze(0) for n, v in side.items()}
    out = {}
    for name, value in values.items():
        lead = value.shape[:2]
        if name in local:
            axis = 2 + next((row_dim(p, name) for p in known if name in p.program.layout.model), 0)
            value = value.movedim(axis, 2) if value.dim() > axis else value.unsqueeze(2)
            if not taken and total not in (None, value.shape[2]):
                raise ValueError(
                    f"site '{name}' has draws of {value.shape[2]} rows, where the other side or the data has {total}: "
                    "give both sides the same rows, by data=..."
                )
            value = value if taken or index is None else value[:, :, index]
        flat = value.reshape(*lead, value.shape[2] if name in local else 1, -1)
        out[name] = _Sample(flat.detach().cpu().double(), value.shape[2:], not guided)
    return out


def rows_drawn(posterior: Posterior, draws: int | None, held: Rows, index: Tensor) -> dict[str, Tensor]:
    """Draws of a guide on some rows alone where that can be, else on all rows, of which some are taken."""
    local = posterior.local

    def dim(name: str) -> int:
        return 1 + row_dim(posterior, name)

    if set(posterior.program.layout.names("latent")) <= set(local):  # others need all rows
        with suppress(ValueError, RuntimeError):  # as a guide with parameters for each row has them for all
            values = posterior.sample(draws, held.take(index))
            if all(v.shape[dim(n)] == len(index) for n, v in values.items()):
                return values
    values = posterior.sample(draws, held)
    return {n: v.index_select(dim(n), index) if n in local else v for n, v in values.items()}


def row_dim(posterior: Any, name: str) -> int:
    """Which dim of a site's value is the rows'."""
    site = posterior.program.layout.model[name]
    return len(site.batch) + next(dim for plate, dim, _ in site.plates if plate == posterior.program.plate)


def _difference(
    name: str, a: _Sample, b: _Sample, levels: Sequence[float], local: bool, classify: bool, seed: int
) -> Difference:
    if a.shape != b.shape:
        raise ValueError(
            f"site '{name}' has draws of shape {tuple(a.shape)} on one side, {tuple(b.shape)} on the other"
        )
    x, y = a.values.flatten(0, 1), b.values.flatten(0, 1)
    try:
        x, y = checked(x, y)
    except ValueError as error:
        error.add_note(f"These were the draws of site '{name}'.")
        raise
    still = [(v == v[:1]).all(0) for v in (x, y)]
    fixed = still[0] & still[1] & (x[0] == y[0])  # by the support, as in a Cholesky factor
    if fixed.all() or ((still[0] | still[1]) & ~fixed).any():
        raise ValueError(
            f"site '{name}' has numbers that are the same in all draws of a side: a point, without a spread to compare"
        )
    center, scale = y.mean(0), y.std(0).where(~fixed, 1.0)
    ratio = (x.std(0) / scale).where(~fixed, 1.0).log()
    u, v = (x - center) / scale, (y - center) / scale
    counts = [effective_draws(s.values) if s.chains else torch.full(x.shape[1:2], float(len(x))) for s in (a, b)]
    effective = torch.minimum(*(c.double() for c in counts))
    accuracy = torch.full_like(effective, torch.nan)
    for i in (effective >= FEWEST).nonzero().squeeze(-1).tolist() if classify else []:
        n = int(effective[i])
        accuracy[i] = c2st(thinned(u[:, i], n), thinned(v[:, i], n), seed)
    batch = a.shape[:1] if local else torch.Size()
    distance = wasserstein_1d(u.flatten(1), v.flatten(1), 1.0)
    dtype = torch.get_default_dtype()
    return Difference(
        c2st=accuracy.reshape(batch).to(dtype),
        sliced_wasserstein=sliced_w1(u, v).reshape(batch).to(dtype),
        mean=u.mean(0).reshape(a.shape).to(dtype),
        log_sd_ratio=ratio.reshape(a.shape).to(dtype),
        wasserstein=distance.reshape(a.shape).to(dtype),
        coverage=interval_coverage(x, y, levels).reshape(-1, *a.shape),
        effective=effective.reshape(batch).to(dtype),
    )
