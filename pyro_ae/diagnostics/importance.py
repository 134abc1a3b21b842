"""How well a guide's draws can stand for the posterior: functions of log-weights ``[K, *batch]``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FEWEST = 50
"""Draws below which a tail has too few of them to be fitted."""

CHUNK = 1000
"""Rows whose tails are fitted at once."""

FLAT = 1e-3
"""Log-weights that differ by less are equal, up to the rounding of float32."""


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""How many draws of the posterior itself the weighted draws are worth.

    .. math:: \frac{(\sum_k w_k)^2}{\sum_k w_k^2}

    Between 1 (one draw has all the weight) and K (the guide is the posterior). It is optimistic where the guide
    misses a part of the posterior that no draw fell in; :func:`pareto_k` often shows that.

    References:
        A Note on Importance Sampling using Standardized Weights (Kong, 1992), as derived in
        Rethinking the Effective Sample Size (Elvira, Martino and Robert, 2018) https://arxiv.org/abs/1809.04129

    Arguments:
        log_weights: ``[K, *batch]``, in nats; they need not be normalised.

    Returns:
        ``[*batch]``.

    Example:
        >>> effective_sample_size(torch.tensor([[0.0], [0.0], [-100.0]]))
        tensor([2.])
    """
    log_weights = log_weights.double()
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().to(torch.get_default_dtype())


def pareto_k(log_weights: Tensor) -> Tensor:
    r"""The shape of the importance weights' upper tail, k-hat of Pareto smoothed importance sampling.

    .. math:: P(w > t) \sim t^{-1 / k}

    Weights have a finite variance for k below 1/2 and a finite mean below 1. Above 0.7 no practical number of draws
    makes up for the guide; below 0.5 the guide is close to the posterior. Weights that are bounded have k below 0, and
    where all in the tail are equal there is nothing to fit and k is minus infinity.

    References:
        Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao and Gabry, 2024)
        https://arxiv.org/abs/1507.02646
        Yes, but Did It Work?: Evaluating Variational Inference (Yao, Vehtari, Simpson and Gelman, 2018)
        https://arxiv.org/abs/1802.02538

    Arguments:
        log_weights: ``[K, *batch]``, in nats, with K of at least 50.

    Returns:
        ``[*batch]``; infinity where the tail holds fewer than five draws, NaN where a weight is NaN or infinite.

    Raises:
        ValueError: for fewer than 50 draws.

    Example:
        >>> z = torch.randn(4000, 3)
        >>> bool((pareto_k(0.25 * z**2) > 0.2).all())  # P(w > t) ~ t^-2, k = 1/2
        True
    """
    draws = log_weights.shape[0]
    if draws < FEWEST:
        raise ValueError(f"k-hat is fitted to the largest of the weights and needs {FEWEST} draws or more, got {draws}")
    flat = log_weights.detach().double().cpu().reshape(draws, -1)
    size = math.ceil(min(draws / 5, 3 * math.sqrt(draws)))
    largest = flat.topk(size + 1, 0).values
    tail, cutoff = largest[:-1], largest[-1]
    k = torch.full_like(cutoff, torch.nan)
    finite = torch.isfinite(largest[0])  # not where a weight is NaN, nor where all are 0
    few = (tail > cutoff).sum(0) < 5
    flat_tail = tail[0] - tail[-1] < FLAT
    k[finite & few] = torch.inf
    k[finite & flat_tail] = -torch.inf
    rows = finite & ~few & ~flat_tail
    excess = (tail - tail[0]).exp() - (cutoff - tail[0]).exp()  # of the largest weight
    k[rows] = torch.cat([_shape(part) for part in excess[:, rows].T.flip(1).split(CHUNK)]) if rows.any() else k[rows]
    return k.reshape(log_weights.shape[1:]).to(torch.get_default_dtype())


def _shape(excess: Tensor) -> Tensor:
    """The shape k of a generalised Pareto distribution, of each row of ``[rows, M]``, ascending and positive.

    Zhang and Stephens' quasi-Bayesian estimate (2009): the likelihood, profiled over k, averages the other parameter
    over a grid; and, as Pareto smoothing has it, the weight of ten draws pulls k towards 1/2.
    """
    n = excess.shape[1]
    points = 30 + math.isqrt(n)
    grid = 1 - (points / (torch.arange(points, dtype=excess.dtype) + 0.5)).sqrt()
    theta = 1 / excess[:, -1:] + grid / (3 * excess[:, int(n / 4 + 0.5) - 1, None])  # [rows, points]

    def profile(theta: Tensor) -> Tensor:
        return (-theta.unsqueeze(-1) * excess.unsqueeze(1)).log1p().mean(-1)

    k = profile(theta)
    log_likelihood = n * ((-theta / k).log() - k - 1)
    mean = (log_likelihood.softmax(1) * theta).sum(1, keepdim=True)
    return (n * profile(mean).squeeze(1) + 5) / (n + 10)
