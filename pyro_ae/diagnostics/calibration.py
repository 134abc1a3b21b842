"""Whether probabilities are as large as what they are of is frequent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime import seeded
from .ranks import FEWEST, Coverage, coverage_of, ranks_of, to_uniform
from .simulation import simulate

if TYPE_CHECKING:
    from ..posterior import Posterior

OWN = 0x7A3C_91E5
"""Makes random numbers others than those that truths and draws of the same seed came from."""


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    r"""The expected calibration error: how far a classifier's confidence is from its accuracy.

    .. math:: \sum_{m=1}^{M} \frac{|B_m|}{N} \, \big| \text{accuracy}(B_m) - \text{confidence}(B_m) \big|

    The confidence is the largest probability of a row, and the bins :math:`((m - 1) / M, m / M]` of confidence are
    of equal width. It is a biased estimate: with few rows it is above 0 for a calibrated classifier too.

    References:
        On Calibration of Modern Neural Networks (Guo, Pleiss, Sun and Weinberger, 2017)
        https://arxiv.org/abs/1706.04599

    Arguments:
        probabilities: of the classes, ``[N, C]``, rows that sum to 1.
        labels: the true classes ``[N]``, whole numbers in [0, C).
        bins: M.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: for shapes that do not match, rows that are no probabilities, labels out of range, or no bins.

    Example:
        >>> calibration_error(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        0.25
    """
    labels = labels.long()
    if probabilities.dim() != 2 or labels.shape != probabilities.shape[:1] or not labels.numel():
        raise ValueError(
            f"calibration_error takes probabilities [N, C] and labels [N] of at least one row, got shapes "
            f"{tuple(probabilities.shape)} and {tuple(labels.shape)}"
        )
    if bool((probabilities < 0).any()) or not torch.allclose(
        probabilities.sum(-1), probabilities.new_ones(()), atol=1e-3
    ):
        raise ValueError("the rows of probabilities must sum to 1 and be at least 0; pass logits through softmax(-1)")
    if int(labels.min()) < 0 or int(labels.max()) >= probabilities.shape[1]:
        raise ValueError(
            f"labels must be in [0, {probabilities.shape[1]}), got {int(labels.min())} to {int(labels.max())}"
        )
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    confidence, guess = probabilities.max(-1)
    excess = confidence.double() - (guess == labels).double()
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return float(excess.new_zeros(bins).index_add(0, bin_of, excess).abs().sum() / len(excess))


def central_coverage(draws: Tensor, truths: Tensor, *, levels: Tensor | None = None, seed: int = 0) -> Coverage:
    r"""How often the central intervals of draws hold the truth, for each number.

    .. math:: \frac{1}{N} \sum_n 1\big[ z_n \in (F_n^{-1}(\tfrac{1 - \alpha}{2}), F_n^{-1}(\tfrac{1 + \alpha}{2})) \big]

    It is above the level where the draws are too wide, and below it where they are too narrow or misplaced. Draws of a
    guide that is the prior are covered as they should be.

    Arguments:
        draws: of each row, ``[S, N, *event]``.
        truths: ``[N, *event]``.
        levels: ascending, in (0, 1); 0.05, 0.1, ..., 0.95 by default.
        seed: ties, and levels between those of whole draws, are settled at random.

    Returns:
        :class:`~pyro_ae.diagnostics.ranks.Coverage` of ``[levels, *event]``.

    Raises:
        ValueError: for shapes that do not match, fewer than 10 rows or draws, NaN, or levels out of range.

    Example:
        >>> print(central_coverage(torch.randn(99, 1000), torch.randn(1000)))
        Regions of 50% hold 52% of 1000 truths: as it should be (at 5%).
    """
    _check(draws, truths, "[S, N, *event]")
    with seeded(seed ^ OWN):
        return coverage_of(2 * (to_uniform(ranks_of(truths, draws), len(draws)) - 0.5).abs(), levels)


def expected_coverage(
    draws: Tensor,
    truths: Tensor,
    *,
    references: Tensor | None = None,
    levels: Tensor | None = None,
    seed: int = 0,
) -> Coverage:
    r"""How often a ball that holds a given share of the draws holds the truth, all numbers of a row together.

    .. math:: \frac{1}{N} \sum_n 1\big[ \|z_n - r_n\| < \text{the } \alpha \text{ quantile of } \|z_{ns} - r_n\| \big]

    This is TARP. The balls are around random reference points, uniform in the box of all truths, in units of which
    distances are; draws are the posterior's if and only if coverage is equal to the level for every way to choose the
    references from the data. References that do not depend on the data do not see a guide that ignores the data; a
    reference such as a posterior mean or a part of the row itself may.

    References:
        Sampling-Based Accuracy Testing of Posterior Estimators for General Inference (Lemos, Coogan, Hezaveh and
        Perreault-Levasseur, 2023) https://arxiv.org/abs/2302.03026

    Arguments:
        draws: of each row, ``[S, N, d]``.
        truths: ``[N, d]``.
        references: ``[N, d]``, a function of the rows' data or of chance, not of the truths.
        levels: ascending, in (0, 1); 0.05, 0.1, ..., 0.95 by default.
        seed: of the reference points.

    Returns:
        :class:`~pyro_ae.diagnostics.ranks.Coverage` of ``[levels]``.

    Raises:
        ValueError: for shapes that do not match, fewer than 10 rows or draws, NaN, or levels out of range.

    Example:
        >>> expected_coverage(torch.randn(99, 1000, 2), torch.randn(1000, 2)).ok()
        True
    """
    _check(draws, truths, "[S, N, d]")
    if truths.dim() != 2:
        raise ValueError(f"expected_coverage takes truths [N, d], got {tuple(truths.shape)}: flatten the event dims")
    with seeded(seed ^ OWN):
        low, high = truths.amin(0), truths.amax(0)
        width = torch.where(high > low, high - low, 1.0)
        if references is None:
            references = low + width * torch.rand(truths.shape)
        if references.shape != truths.shape or references.isnan().any():
            raise ValueError(
                f"references must be numbers of shape {tuple(truths.shape)}, got {tuple(references.shape)} with "
                f"{int(references.isnan().sum())} NaN"
            )
        distances = ((draws - references) / width).norm(dim=-1)
        ranks = ranks_of(((truths - references) / width).norm(dim=-1), distances)
        return coverage_of(to_uniform(ranks, len(draws)), levels)


def simulated_coverage(
    posterior: Posterior,
    replications: int = 200,
    draws: int = 100,
    *,
    data: Any = None,
    references: Callable[[Any], Mapping[str, Tensor]] | None = None,
    levels: Tensor | None = None,
    seed: int = 0,
) -> dict[str, Coverage]:
    """The :func:`expected_coverage` of an amortised guide, on rows that its model simulates.

    Central intervals, number by number, are in the ranks of
    :func:`~pyro_ae.diagnostics.simulation.simulation_based_calibration`, by their ``coverage()``.

    References:
        Sampling-Based Accuracy Testing of Posterior Estimators for General Inference (Lemos, Coogan, Hezaveh and
        Perreault-Levasseur, 2023) https://arxiv.org/abs/2302.03026

    Arguments:
        posterior: of a guide, where all that is latent belongs to the rows.
        replications: N, how many rows are simulated.
        draws: S, of the guide for each row.
        data: rows that covariates and missing values are taken from, spread evenly; those of the fit by default.
        references: from the simulated rows, as the model takes them, to ``{site: [N, *event]}``; random by default.
        levels: ascending, in (0, 1); 0.05, 0.1, ..., 0.95 by default.
        seed: of the simulation and the reference points; the global random states stay as they were.

    Returns:
        Site to :class:`~pyro_ae.diagnostics.ranks.Coverage` of ``[levels]``.

    Raises:
        ValueError: as for :func:`~pyro_ae.diagnostics.simulation.simulation_based_calibration`.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), seed=0, progress=False)
        >>> simulated_coverage(posterior)["z"].coverage.shape
        torch.Size([19])
    """
    with seeded(seed):
        found = simulate(posterior, replications, draws, data=data)
    given = {} if references is None else references(found.data)
    return {
        name: expected_coverage(
            found.draws[name].reshape(draws, replications, -1).float(),
            truth.reshape(replications, -1).float(),
            references=given[name].reshape(replications, -1) if name in given else None,
            levels=levels,
            seed=seed,
        )
        for name, truth in found.truths.items()
    }


def _check(draws: Tensor, truths: Tensor, shape: str) -> None:
    if draws.dim() < 2 or draws.shape[1:] != truths.shape or min(*draws.shape[:2]) < FEWEST:
        raise ValueError(
            f"coverage is of draws {shape} and their truths, {FEWEST} of each or more, got shapes "
            f"{tuple(draws.shape)} and {tuple(truths.shape)}"
        )
