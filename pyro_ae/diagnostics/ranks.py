"""Whether ranks of the truth among draws are uniform, as they are where the draws come from the posterior."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .entries import label

FEWEST = 10
"""Replications and draws below which ranks say nothing."""

MOST = 100
"""Points, at most, at which the distribution of ranks is looked at."""


def ranks_of(truths: Tensor, draws: Tensor) -> Tensor:
    """How many of the draws are below the truth, ties broken at random.

    Arguments:
        truths: ``[*shape]``.
        draws: ``[S, *shape]``.

    Returns:
        Whole numbers ``[*shape]`` from 0 to S, all equally likely where truth and draws are independent draws of one
        distribution, discrete ones too.

    Raises:
        ValueError: for shapes that do not match, no draws, and NaN.

    Example:
        >>> ranks_of(torch.tensor([0.5, -9.0]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        tensor([1, 0])
    """
    if draws.dim() < 1 or draws.shape[1:] != truths.shape or not draws.numel():
        raise ValueError(
            f"ranks are of truths [*shape] among draws [S, *shape], got {tuple(truths.shape)} and {tuple(draws.shape)}"
        )
    for name, value in (("truths", truths), ("draws", draws)):
        if bad := int(value.isnan().sum()):
            raise ValueError(f"{bad} of {value.numel()} {name} are NaN, which has no rank: look at the sites' supports")
    equal = (draws == truths).sum(0)
    return (draws < truths).sum(0) + (torch.rand(equal.shape, device=equal.device) * (equal + 1)).long().minimum(equal)


# -- the exact distribution of an empirical distribution function ---------------------------------------------


def tails(points: Tensor, size: int) -> Tensor:
    """The two-sided p-value of c of ``size`` uniform numbers being below each point, ``[points, c]``, c from 0 on."""
    from scipy.stats import binom

    counts, where = np.arange(size + 1), points.double().cpu().numpy()[:, None]
    table = np.minimum(binom.cdf(counts, size, where), binom.sf(counts - 1, size, where))
    return torch.as_tensor(2 * table).clamp(max=1)


def inside(points: Tensor, size: int, thresholds: Tensor) -> Tensor:
    """The probability that ``size`` uniform numbers have :func:`tails` above a threshold at every point.

    The counts below the points, in ascending order, are a Markov chain of binomial steps, which is run forward exactly.

    Arguments:
        points: ascending, in (0, 1), ``[points]``.
        size: how many numbers.
        thresholds: ``[T]``.

    Returns:
        ``[T]``.
    """
    table, points = tails(points, size), points.double().cpu()
    half = math.ceil(3.3 * math.sqrt(size)) + 1  # 6.6 standard deviations or more, with 1e-10 outside
    thresholds = thresholds.double().cpu() * (1 + 1e-9)
    log_factorial = torch.arange(size + 2).double().lgamma()[1:]  # of 0 to size
    state, before, counts = torch.ones(len(thresholds), 1).double(), 0.0, torch.zeros(1).long()
    for point, row in zip(points.tolist(), table, strict=True):
        new = max(0, math.floor(size * point) - half) + torch.arange(2 * half + 1)
        new = new[new <= size]
        left, step = (size - counts)[:, None], new - counts[:, None]
        possible, chance = step >= 0, (point - before) / (1 - before)
        step = step.clamp(min=0)
        log_prob = log_factorial[left] - log_factorial[step] - log_factorial[left - step]
        log_prob = log_prob + step.double() * math.log(chance) + (left - step).double() * math.log1p(-chance)
        state = (state @ log_prob.exp().where(possible, 0.0)) * (row[new] > thresholds[:, None])
        before, counts = point, new
    return state.sum(-1).clamp(0, 1)


def uniform_p_values(points: Tensor, counts: Tensor, size: int) -> Tensor:
    """How likely uniform numbers are to have an empirical distribution as far from uniform as this one.

    Arguments:
        points: at which it is looked at, ascending, in (0, 1).
        counts: how many of the numbers are below each point, ``[points, *batch]``.
        size: how many numbers there are.

    Returns:
        ``[*batch]``: the probability that the least likely of the counts, by a two-sided binomial test at its point, is
        as unlikely as that found here; exact.
    """
    least = tails(points, size).gather(1, counts.reshape(len(points), -1).long()).amin(0)
    return (1 - inside(points, size, least)).clamp(min=1e-10).reshape(counts.shape[1:])


class Band(NamedTuple):
    """Limits within which the empirical distribution of uniform numbers lies at all points at once.

    Attributes:
        points: ``[points]``, in (0, 1).
        lower: ``[points]``, a share.
        upper: ``[points]``, a share.
    """

    points: Tensor
    lower: Tensor
    upper: Tensor


def uniform_band(points: Tensor, size: int, prob: float = 0.95) -> Band:
    """The limits that hold for ``size`` uniform numbers with a probability of at least ``prob``; exact.

    Arguments:
        points: ascending, in (0, 1).
        size: how many numbers.
        prob: in (0, 1).
    """
    if not 0 < prob < 1:
        raise ValueError(f"prob must be between 0 and 1, got {prob}")
    table = tails(points, size)
    low, high = torch.tensor(0.0).double(), torch.tensor(1 - prob).double()  # the level of a point's own interval
    for _ in range(2):
        levels = low + (high - low) * torch.linspace(0, 1, 129).double()
        last = int((inside(points, size, levels) >= prob).long().sum()) - 1
        low, high = levels[max(last, 0)], levels[min(max(last, 0) + 1, 128)]
    within = (table > low).long()
    return Band(points.float(), within.argmax(1) / size, (size - within.flip(1).argmax(1)) / size)


def rank_points(draws: int) -> Tensor:
    """Ranks ``[points]`` below which the ranks are counted, from 1 to ``draws``: all, or 100 that are spread evenly."""
    return torch.linspace(1, draws, min(draws, MOST)).round().long()


def ecdf_band(replications: int, draws: int, prob: float = 0.95) -> Band:
    r"""Simultaneous limits of the empirical distribution of ranks, where the draws come from the posterior.

    .. math:: P\Big(\text{lower}_k \le \tfrac{1}{R} \sum_r 1[\text{rank}_r < (S + 1) z_k] \le \text{upper}_k
        \text{ for all } k\Big) \ge \text{prob}

    The counts at successive points are a Markov chain, so that the probability is exact, not simulated.

    References:
        Graphical Test for Discrete Uniformity and its Applications in Goodness of Fit Evaluation and Multiple Sample
        Comparison (Sailynoja, Buerkner and Vehtari, 2022) https://arxiv.org/abs/2103.10522

    Arguments:
        replications: R, how many ranks there are.
        draws: S, among which each is.
        prob: of all being inside, in (0, 1).

    Returns:
        A :class:`Band`; :meth:`Ranks.ecdf` is what belongs into it.

    Raises:
        ValueError: for numbers out of range.

    Example:
        >>> points, lower, upper = ecdf_band(100, 3)
        >>> points, lower, upper
        (tensor([0.2500, 0.5000, 0.7500]), tensor([0.1500, 0.3900, 0.6500]), tensor([0.3500, 0.6100, 0.8500]))
    """
    if replications < 1 or draws < 1:
        raise ValueError(f"a band needs a replication and a draw at least, got {replications} and {draws}")
    return uniform_band(rank_points(draws).double() / (draws + 1), replications, prob)


# -- the ranks of simulations ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """Ranks of the truth among draws, one for each replication.

    Attributes:
        ranks: site or test quantity to ``[replications, *event]``, from 0 to ``draws``.
        draws: S, among which each rank is.
        effective: the smallest effective sample size that draws of chains had, or None; where it is below ``draws``,
            the ranks come from fewer draws and are spread over 0 to S.
    """

    ranks: dict[str, Tensor]
    draws: int
    effective: float | None = None

    def __post_init__(self) -> None:
        sizes = {len(rank) for rank in self.ranks.values()}
        if len(sizes) != 1 or min(sizes) < FEWEST or self.draws < FEWEST:
            raise ValueError(
                f"ranks need {FEWEST} replications and draws or more, the same number in each site, got "
                f"{sorted(sizes)} replications and {self.draws} draws"
            )

    @property
    def replications(self) -> int:
        return len(next(iter(self.ranks.values())))

    def ecdf(self) -> dict[str, Tensor]:
        """The share of ranks below each point of :func:`ecdf_band`, ``[points, *event]``."""
        return {name: count / self.replications for name, count in self._counts().items()}

    def _counts(self) -> dict[str, Tensor]:
        below = rank_points(self.draws)
        return {name: torch.stack([(rank < k).sum(0) for k in below]) for name, rank in self.ranks.items()}

    def p_values(self) -> dict[str, Tensor]:
        """Of the test that the ranks of each number are uniform, ``[*event]``: that of :func:`ecdf_band`."""
        points = rank_points(self.draws).double() / (self.draws + 1)
        counts = self._counts()
        joined = torch.cat([count.reshape(len(points), -1) for count in counts.values()], 1)
        parts = uniform_p_values(points, joined, self.replications).split([c[0].numel() for c in counts.values()])
        return {name: part.reshape(count.shape[1:]) for (name, count), part in zip(counts.items(), parts, strict=True)}

    def adjusted(self) -> dict[str, Tensor]:
        """The p-values adjusted by Holm's method for there being one for each number, ``[*event]``."""
        found = self.p_values()
        flat = torch.cat([p.reshape(-1) for p in found.values()])
        order = flat.argsort()
        left = len(flat) - torch.arange(len(flat))  # hypotheses that are not rejected before
        adjusted = torch.empty_like(flat)
        adjusted[order] = (flat[order] * left).cummax(0).values.clamp(max=1)
        parts = adjusted.split([p.numel() for p in found.values()])
        return {name: part.reshape(p.shape) for (name, p), part in zip(found.items(), parts, strict=True)}

    def ok(self, level: float = 0.05) -> bool:
        """Whether no number's ranks differ from uniform ones, with a probability ``level`` of a false alarm."""
        return all(bool((p > level).all()) for p in self.adjusted().values())

    def findings(self, level: float = 0.05) -> tuple[str, ...]:
        """What is wrong, one sentence for each number whose ranks are not uniform, the worst first."""
        return tuple(text for _, text in sorted(self._findings(level)))

    def _findings(self, level: float) -> Iterator[tuple[float, str]]:
        for name, adjusted in self.adjusted().items():
            flat = self.ranks[name].reshape(self.replications, -1).double()
            for i in (adjusted.reshape(-1) <= level).nonzero().squeeze(-1).tolist():
                p = float(adjusted.reshape(-1)[i])
                yield p, f"{label(name, adjusted.shape, i)}: {shape_of(flat[:, i], self.draws)} (p = {p:.2g})"

    def coverage(self, levels: Tensor | None = None) -> dict[str, Coverage]:
        """How often the central intervals of the draws held the truth, for each number."""
        ranks = self.ranks.items()
        return {name: coverage_of(2 * (to_uniform(rank, self.draws) - 0.5).abs(), levels) for name, rank in ranks}

    def __str__(self) -> str:
        numbers = sum(rank[0].numel() for rank in self.ranks.values())
        found = self.findings()
        lines = [
            f"Of {numbers} numbers, the ranks of {len(found) or 'none'} are not uniform, over {self.replications} "
            f"replications among {self.draws} draws (Holm, at 5%)."
        ]
        lines += [f"  - {text}" for text in found[:10]]
        if self.effective is not None and self.effective < self.draws:
            lines.append(f"  The draws of chains were worth as few as {self.effective:.0f}, so take more of them.")
        return "\n".join(lines + [f"  and {len(found) - 10} more"] * (len(found) > 10))


def shape_of(ranks: Tensor, draws: int) -> str:
    """What the histogram of ranks ``[R]`` looks like, in words."""
    share, size = (ranks.double() + 0.5) / (draws + 1), len(ranks)
    lean = float(share.mean() - 0.5) * math.sqrt(12 * size)  # standard normal for uniform ranks, as the next two are
    ends = torch.stack([share < 1 / 6, share > 5 / 6]).double().mean(1)
    low, high = ((ends - 1 / 6) * math.sqrt(size * 36 / 5)).tolist()
    words = []
    if min(low, high) > 1.5:
        words.append("U-shaped, as of draws that are too narrow")
    if max(low, high) < -1.5:
        words.append("a hump, as of draws that are too wide")
    if abs(lean) > 2.5:
        words.append(f"sloped, as of draws that are too {'low' if lean > 0 else 'high'}")
    return "; ".join(words) or "not uniform, as of draws of another shape"


# -- how often regions hold the truth -------------------------------------------------------------------------


@dataclass(frozen=True)
class Coverage:
    """How often credible regions of the draws held the truth.

    Attributes:
        levels: of the regions, ``[levels]``, in (0, 1).
        coverage: the share of rows whose region held the truth, ``[levels, *event]``.
        rows: how many rows that is a share of.
    """

    levels: Tensor
    coverage: Tensor
    rows: int

    def band(self, prob: float = 0.95) -> Band:
        """Within which the coverage lies at all levels at once, with ``prob``, where the draws are the posterior's."""
        return uniform_band(self.levels, self.rows, prob)

    @property
    def distance(self) -> Tensor:
        """The largest difference between coverage and level, ``[*event]``, as of Kolmogorov and Smirnov."""
        levels = self.levels.reshape(-1, *(1,) * (self.coverage.dim() - 1))
        return (self.coverage - levels).abs().amax(0)

    def p_values(self) -> Tensor:
        """Of the test that coverage is equal to the level at all levels, ``[*event]``."""
        return uniform_p_values(self.levels, (self.coverage * self.rows).round(), self.rows)

    def ok(self, level: float = 0.05) -> bool:
        """Whether coverage is as it should be, by Bonferroni's method where there are several numbers."""
        p = self.p_values()
        return bool((p * p.numel() > level).all())

    def __str__(self) -> str:
        middle = int((self.levels - 0.5).abs().argmin())
        found = self.coverage[middle].reshape(-1)
        span = f"{float(found.min()):.0%}" + (f" to {float(found.max()):.0%}" if found.numel() > 1 else "")
        verdict = "as it should be" if self.ok() else "not as it should be"
        return f"Regions of {float(self.levels[middle]):.0%} hold {span} of {self.rows} truths: {verdict} (at 5%)."


def to_uniform(ranks: Tensor, draws: int) -> Tensor:
    """Ranks from 0 to S, spread at random so that uniform ranks become uniform numbers in (0, 1)."""
    return (ranks.double() + torch.rand(ranks.shape).double()) / (draws + 1)


def coverage_of(needed: Tensor, levels: Tensor | None = None) -> Coverage:
    """The coverage of regions, of the levels ``[N, *event]`` at which they just hold the truth."""
    levels = torch.linspace(0.05, 0.95, 19) if levels is None else torch.as_tensor(levels).float()
    if levels.dim() != 1 or not bool(((levels > 0) & (levels < 1)).all()) or bool((levels.diff() <= 0).any()):
        raise ValueError(f"levels must ascend inside (0, 1), got {levels.tolist()}")
    return Coverage(levels, torch.stack([(needed < level).float().mean(0) for level in levels]), len(needed))
