"""Whether a classifier is as sure as it is right."""

from __future__ import annotations

import torch
from torch import Tensor


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
