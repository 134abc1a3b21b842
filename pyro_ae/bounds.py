"""Bounds on log p(x): each a function of log-weights ``[K, *batch]``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[[Tensor], Tensor])


def linear(bound: F) -> F:
    """Mark a bound as linear in the log-weights.

    Only such a bound stays one when the rows share a latent and are subsampled: the N/B scale may then
    stand inside the log-weights. A bound without the mark is refused there.

    Arguments:
        bound: function of log-weights ``[K, *batch]``.

    Example:
        >>> linear(lambda log_w: log_w.mean(0)).linear
        True
    """
    bound.linear = True  # type: ignore[attr-defined]
    return bound


def is_linear(bound: Callable[[Tensor], Tensor]) -> bool:
    return getattr(bound, "linear", False)


@linear
def elbo(log_weights: Tensor) -> Tensor:
    r"""The evidence lower bound, averaged over particles.

    .. math:: \frac{1}{K} \sum_k \log w_k

    References:
        Auto-Encoding Variational Bayes (Kingma and Welling, 2014) https://arxiv.org/abs/1312.6114

    Arguments:
        log_weights: ``[K, *batch]``, in nats.

    Example:
        >>> elbo(torch.tensor([[1.0], [3.0]]))
        tensor([2.])
    """
    return log_weights.mean(0)


def iwae(log_weights: Tensor) -> Tensor:
    r"""The importance-weighted bound: the log of the particles' mean weight.

    .. math:: \log \frac{1}{K} \sum_k w_k

    Tighter than the ELBO for K > 1, and equal to log p(x) in the limit of many particles.

    References:
        Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016) https://arxiv.org/abs/1509.00519

    Arguments:
        log_weights: ``[K, *batch]``, in nats.

    Example:
        >>> iwae(torch.tensor([[0.0], [0.0]]))
        tensor([0.])
    """
    return torch.logsumexp(log_weights, 0) - math.log(log_weights.shape[0])
