"""Which dimensions of a latent say anything about the rows."""

from __future__ import annotations

from torch import Tensor


def active_units(means: Tensor, threshold: float = 0.01) -> Tensor:
    r"""Which dimensions of a latent move with the data.

    .. math:: \text{Var}_n \big( E[z_d \mid x_n] \big) > \text{threshold}

    The posterior of a dimension that has collapsed to the prior has the same mean for every row. The threshold is for
    latents whose prior has a variance of about 1.

    References:
        Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016) https://arxiv.org/abs/1509.00519

    Arguments:
        means: posterior mean of each row, ``[N, *latent]``.
        threshold: of the variance over rows.

    Returns:
        Booleans ``[*latent]``.

    Raises:
        ValueError: for fewer than two rows.

    Example:
        >>> import torch
        >>> active_units(torch.tensor([[1.0, 0.02], [-1.0, 0.01]]))
        tensor([ True, False])
    """
    if means.dim() < 1 or means.shape[0] < 2:
        raise ValueError(f"active units are a matter of at least two rows, got means of shape {tuple(means.shape)}")
    return means.var(0) > threshold
