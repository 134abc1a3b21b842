"""Whether two samples are from one distribution: divergences, beside what they are between random halves of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..divergences import check_samples, imq, wasserstein_1d


@dataclass(frozen=True)
class Discrepancy:
    """How far two samples are apart, and how far random halves of them are.

    Attributes:
        value: between the two samples.
        usual: exceeded by 5% of the splits of both samples into random halves.
        p_value: share of the splits that are as far apart as the two samples; below 0.05, the two differ.
    """

    value: float
    usual: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.value:.2g} (up to {self.usual:.2g} where there is no difference, p = {self.p_value:.2g})"


def permutation_test(a: Tensor, b: Tensor, splits: int = 200, projections: int = 50) -> tuple[Discrepancy, Discrepancy]:
    r"""The squared maximum mean discrepancy and sliced Wasserstein distance of two samples, with their yardsticks.

    .. math:: p = \frac{1 + \#\{s : D_s \ge D\}}{1 + S}

    Both are those of ``pyro_ae.divergences``, unbiased, with the kernel ``imq()`` and of order 2. D_s is the same
    divergence between random halves of both samples.

    References:
        A Kernel Two-Sample Test (Gretton et al., 2012) https://jmlr.org/papers/v13/gretton12a.html

    Arguments:
        a: ``[n, d]``.
        b: ``[n, d]``, of variance about 1 for the kernel's width to fit.
        splits: S.
        projections: random lines, the same for all splits.

    Returns:
        The two discrepancies.

    Raises:
        ValueError: for samples of other shapes, of unequal size or fewer than two rows, or not finite.

    Example:
        >>> [d.p_value < 0.05 for d in permutation_test(torch.randn(100, 2), torch.randn(100, 2) + 1)]
        [True, True]
    """
    check_samples(a, b, rows=2)
    n, both = len(a), torch.cat([a, b])
    if len(b) != n:
        raise ValueError(f"the samples must be of one size to be split in halves, got {n} and {len(b)} rows")
    if not bool(torch.isfinite(both).all()):
        raise ValueError("some rows of the samples are NaN or infinite: leave them out")
    order = torch.rand(splits, 2 * n, device=a.device).argsort(1)
    first = torch.cat([torch.arange(2 * n, device=a.device).unsqueeze(0), order]) < n  # the samples, then the splits

    kernel = imq()(both, both).fill_diagonal_(0.0)
    u = first.to(a.dtype).T
    to_first, to_all = kernel @ u, kernel.sum(1, keepdim=True)
    within = (u * to_first + (1 - u) * (to_all - to_first)).sum(0)
    mmd = within / (n * (n - 1)) - 2 * ((1 - u) * to_first).sum(0) / n**2

    lines = torch.randn(a.shape[1], projections if a.shape[1] > 1 else 1, dtype=a.dtype, device=a.device)
    along, rank = (both @ normalize(lines, dim=0)).sort(0)
    sliced = torch.zeros_like(mmd)
    for values, ranks in zip(along.T, rank.T, strict=True):
        members = first[:, ranks]
        ordered = values.expand_as(members)
        one, other = (ordered[mask].reshape(-1, n).T for mask in (members, ~members))
        sliced += wasserstein_1d(one, other, 2.0) / along.shape[1]
    return _among(mmd), _among(sliced)


def _among(found: Tensor) -> Discrepancy:
    value, splits = found[0], found[1:]
    share = (1 + (splits >= value).sum()) / (1 + len(splits))
    return Discrepancy(float(value), float(splits.quantile(0.95)), float(share))
