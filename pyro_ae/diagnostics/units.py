"""Which dimensions of a latent say anything about the rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
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


class Kinds(NamedTuple):
    """The kind of each dimension of a latent; exactly one is true of each.

    Attributes:
        active: surely known for every row, ``[*latent]``.
        mixed: neither of the others, such as known for some rows and not for others.
        passive: as uncertain for every row as it is under the prior.
    """

    active: Tensor
    mixed: Tensor
    passive: Tensor

    @property
    def names(self) -> list[str]:
        """``"active"``, ``"mixed"`` or ``"passive"``, for each of the flattened dimensions."""
        which = torch.stack([kind.flatten() for kind in self]).int().argmax(0)
        return [self._fields[int(i)] for i in which]


def kinds(variances: Tensor, tolerance: float = 0.1, *, prior: Tensor | float = 1.0) -> Kinds:
    r"""Which dimensions of a latent are used for all rows, for some, and for none.

    .. math:: v_{nd} = \text{Var}[z_d \mid x_n] / \text{Var}[z_d]

    A dimension is passive where v varies by less than the tolerance over the rows and its mean is within the tolerance
    of 1, active where v varies as little and its mean is at most the tolerance, and mixed otherwise. Means of passive
    dimensions still differ a little from row to row, and may be strongly correlated: leave them out before a model
    that minds that.

    References:
        Be More Active! Understanding the Differences between Mean and Sampled Representations of Variational
        Autoencoders (Bonheme and Grzes, 2023) https://arxiv.org/abs/2109.12679

    Arguments:
        variances: of each row's posterior, ``[N, *latent]``.
        tolerance: of the mean of v over rows, and of its variance.
        prior: variance of the prior, which broadcasts against ``variances``.

    Raises:
        ValueError: for fewer than two rows, and for variances that are negative or not finite.

    Example:
        >>> kinds(torch.tensor([[0.01, 0.02, 0.99], [0.02, 0.98, 1.01]])).names
        ['active', 'mixed', 'passive']
    """
    if variances.dim() < 1 or variances.shape[0] < 2:
        raise ValueError(f"kinds are a matter of at least two rows, got variances of shape {tuple(variances.shape)}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance!r}")
    ratio = variances / prior
    if not bool((torch.isfinite(ratio) & (ratio >= 0)).all()):
        raise ValueError(
            "kinds needs variances that are finite and at least 0, relative to a prior's that is positive: give "
            "variances, not their logarithms, and look for rows that the guide gives NaN"
        )
    steady, mean = ratio.var(0) < tolerance, ratio.mean(0)
    active, passive = steady & (mean <= tolerance), steady & ((mean - 1).abs() <= tolerance)
    passive = passive & ~active
    return Kinds(active, ~(active | passive), passive)


def collapsed(kl: Tensor, epsilon: float = 0.01, delta: float = 0.05) -> Tensor:
    r"""Which dimensions of a latent have a posterior that is the prior, up to epsilon, for all rows but a share delta.

    .. math:: P_n \big( KL(q(z_d \mid x_n) \,\|\, p(z_d)) < \epsilon \big) \ge 1 - \delta

    References:
        Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse (Lucas, Tucker, Grosse and Norouzi, 2019)
        https://arxiv.org/abs/1911.02469

    Arguments:
        kl: divergences in nats, ``[N, *latent]``.
        epsilon: nats below which a row's posterior counts as the prior.
        delta: share of rows that may be above.

    Returns:
        Booleans ``[*latent]``.

    Raises:
        ValueError: for no rows, a NaN, or thresholds out of range.

    Example:
        >>> collapsed(torch.tensor([[2.0, 0.001], [0.0, 0.002]]))
        tensor([False,  True])
    """
    if kl.dim() < 1 or kl.shape[0] < 1:
        raise ValueError(f"collapse is a matter of rows, got divergences of shape {tuple(kl.shape)}")
    if not (epsilon > 0 and 0 <= delta < 1):
        raise ValueError(f"epsilon must be positive and delta in [0, 1), got {epsilon!r} and {delta!r}")
    if bool(kl.isnan().any()):
        raise ValueError(f"{int(kl.isnan().sum())} of the divergences are NaN: look at the guide and the rows")
    return (kl >= epsilon).sum(0) <= delta * len(kl) + 1e-9
