"""Divergences between two samples: each a configured function of ``a`` ``[n, d]`` and ``b`` ``[m, d]``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize, softplus

Kernel: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Samples ``[n, d]`` and ``[m, d]`` to a positive definite function of each pair, ``[n, m]``."""


def check_samples(a: Tensor, b: Tensor, rows: int = 1, cure: str = "") -> None:
    """Refuse what is no pair of samples ``[n, d]`` and ``[m, d]``."""
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    found = f"expected samples [n, d] and [m, d], got shapes {shapes}"
    if min(a.dim(), b.dim()) < 2:
        raise ValueError(f"{found}: give values of one dimension as [n, 1], by .reshape(-1, 1)")
    if max(a.dim(), b.dim()) > 2:
        raise ValueError(f"{found}: flatten the leading dims, by .flatten(0, -2)")
    if a.shape[1] != b.shape[1] or a.shape[1] == 0:
        raise ValueError(f"{found}: both need the same number d of dimensions, at least 1")
    if min(len(a), len(b)) < rows:
        raise ValueError(f"{found}: each needs at least {rows} row{'s' * (rows > 1)}{cure}")
    if a.dtype != b.dtype or not a.is_floating_point():
        raise ValueError(f"expected samples of one floating point type, got {a.dtype} and {b.dtype}: try .float()")


def _distances(a: Tensor, b: Tensor) -> Tensor:
    check_samples(a, b)
    # Not by |a|^2 + |b|^2 - 2 a b, which loses near points to cancellation, and not by a difference [n, m, d], which
    # takes d times the memory. Where points coincide cdist's gradient is zero, even if what it is multiplied by is
    # infinite, as for a root of the distance. There is no second derivative.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _check_scales(scales: tuple[float, ...]) -> None:
    if not isinstance(scales, tuple) or not scales or not all(scale > 0 for scale in scales):
        raise ValueError(f"scales must be a tuple of one positive number or more, got {scales!r}")


@dataclass(frozen=True)
class rbf:
    r"""The Gaussian kernel, summed over lengthscales.

    .. math:: k(a, b) = \sum_l \exp\left( -\frac{\|a - b\|^2}{2 l^2} \right)

    Without lengthscales there is one, with l^2 = d / 2. Two draws from N(0, I) are about 2 d apart in squared distance,
    so k is about exp(-2) for them in any dimension. The code that came with InfoVAE has l^2 = d^2 / 2; there k is
    about exp(-2 / d), so that in high dimension it sees little but the means.

    References:
        A Kernel Two-Sample Test (Gretton et al., 2012) https://jmlr.org/papers/v13/gretton12a.html
        InfoVAE: Balancing Learning and Inference in Variational Autoencoders (Zhao, Song and Ermon, 2019)
            https://arxiv.org/abs/1706.02262

    Arguments:
        scales: lengthscales l, in units of the samples; None for the one that depends on d.

    Raises:
        ValueError: for a scale that is not positive, or none.

    Example:
        >>> rbf()(torch.zeros(2, 3), torch.zeros(4, 3)).shape
        torch.Size([2, 4])
    """

    scales: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.scales is not None:
            _check_scales(self.scales)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        squared = _distances(a, b).square()
        scales = ((a.shape[1] / 2) ** 0.5,) if self.scales is None else self.scales
        return sum(((-squared / (2 * scale**2)).exp() for scale in scales), torch.zeros_like(squared))


@dataclass(frozen=True)
class imq:
    r"""The inverse multiquadric kernel, summed over scales.

    .. math:: k(a, b) = \sum_s \frac{C_s}{C_s + \|a - b\|^2}, \qquad C_s = 2 s d \sigma^2

    Its tails are heavier than a Gaussian's, so codes far from the prior still have a gradient. The Wasserstein
    auto-encoder's paper has the one scale 1, its authors' code the sum over seven that is the default here.

    References:
        Wasserstein Auto-Encoders (Tolstikhin et al., 2018) https://arxiv.org/abs/1711.01558

    Arguments:
        scales: factors s of the squared width; 1 is the expected squared distance of two draws from the prior.
        sigma: standard deviation of the prior.

    Raises:
        ValueError: for a scale or a sigma that is not positive.

    Example:
        >>> imq(scales=(0.5, 1.0))(torch.zeros(1, 2), torch.ones(1, 2))
        tensor([[1.1667]])
    """

    scales: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    sigma: float = 1.0

    def __post_init__(self) -> None:
        _check_scales(self.scales)
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, got {self.sigma!r}")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        squared = _distances(a, b).square()
        widths = [2 * scale * a.shape[1] * self.sigma**2 for scale in self.scales]
        return sum((width / (width + squared) for width in widths), torch.zeros_like(squared))


def _contrast(kernel: Kernel, a: Tensor, b: Tensor, unbiased: bool) -> Tensor:
    """E k(a, a') + E k(b, b') - 2 E k(a, b)."""

    def within(k: Tensor) -> Tensor:
        n = len(k)
        return (k.sum() - k.trace()) / (n * (n - 1)) if unbiased else k.mean()

    return within(kernel(a, a)) + within(kernel(b, b)) - 2 * kernel(a, b).mean()


@dataclass(frozen=True)
class mmd:
    r"""The squared maximum mean discrepancy.

    .. math:: E \, k(a, a') + E \, k(b, b') - 2 E \, k(a, b)

    The unbiased estimate leaves a row's pair with itself out; it is negative about half the time where the two
    distributions are equal. The biased one is the squared distance of the samples' mean embeddings, never negative.

    References:
        A Kernel Two-Sample Test (Gretton et al., 2012) https://jmlr.org/papers/v13/gretton12a.html

    Arguments:
        kernel: samples ``[n, d]`` and ``[m, d]`` to ``[n, m]``, such as ``imq()`` or ``rbf()``.
        unbiased: whether to leave out the pairs of a row with itself.

    Raises:
        ValueError: when called, for samples that are not ``[n, d]`` and ``[m, d]``, and for one row where the estimate
            is unbiased.

    Example:
        >>> a = torch.randn(100, 2)
        >>> float(mmd(unbiased=False)(a, a))
        0.0
    """

    kernel: Kernel = imq()
    unbiased: bool = True

    def __post_init__(self) -> None:
        if not callable(self.kernel):
            raise ValueError(f"kernel must be a function of two samples such as imq() or rbf(), got {self.kernel!r}")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        if self.unbiased:
            check_samples(a, b, rows=2, cure=" for an unbiased estimate; mmd(unbiased=False) takes one")
        else:
            check_samples(a, b)
        return _contrast(self.kernel, a, b, self.unbiased)


@dataclass(frozen=True)
class energy_distance:
    r"""The energy distance, estimated without bias.

    .. math:: 2 E \|a - b\|^p - E \|a - a'\|^p - E \|b - b'\|^p

    The squared maximum mean discrepancy for the kernel :math:`-\|a - b\|^p`, which has no width to be chosen. No root
    is taken. Its gradient is finite everywhere: points that coincide do not move one another.

    References:
        Energy statistics: A class of statistics based on distances (Szekely and Rizzo, 2013)
            https://doi.org/10.1016/j.jspi.2013.03.018

    Arguments:
        p: power of the Euclidean distance, within (0, 2); for 2 only the means would count.

    Raises:
        ValueError: for a power out of range; when called, for samples that are not ``[n, d]`` and ``[m, d]`` or have
            fewer than two rows.

    Example:
        >>> float(energy_distance()(torch.zeros(2, 1), torch.ones(3, 1)))
        2.0
    """

    p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.p < 2:
            raise ValueError(f"p must be within (0, 2), got {self.p!r}")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        check_samples(a, b, rows=2)
        return _contrast(self._kernel, a, b, unbiased=True)

    def _kernel(self, a: Tensor, b: Tensor) -> Tensor:
        return -_distances(a, b).pow(self.p)


def wasserstein_1d(a: Tensor, b: Tensor, p: float) -> Tensor:
    """The Wasserstein distance to the power p of each column of ``[n, L]`` and ``[m, L]``."""
    a, b = a.sort(0).values, b.sort(0).values
    n, m = len(a), len(b)
    if n == m:
        return (a - b).abs().pow(p).mean(0)
    # The quantile functions are steps that end at multiples of 1/n and of 1/m. In units of 1/(n m) these are whole
    # numbers, so the merged grid is exact; an end that both have gives a step of width zero.
    rows = [torch.arange(1, k + 1, device=a.device) for k in (n, m)]
    ends = torch.cat([rows[0] * m, rows[1] * n]).sort().values
    widths = ends.diff(prepend=ends.new_zeros(1)).to(a.dtype) / (n * m)
    return widths @ (a[(ends - 1) // m] - b[(ends - 1) // n]).abs().pow(p)


@dataclass(frozen=True)
class sliced_wasserstein:
    r"""The Wasserstein distance to the power p, averaged over projections onto random lines.

    .. math:: \frac{1}{L} \sum_{l=1}^{L} W_p^p \big( \theta_l^\top a, \theta_l^\top b \big),
        \qquad \theta_l \sim U(\{\theta : \|\theta\| = 1\})

    No root is taken. New directions are drawn at each call. Each projection's distance is exact, of samples of unequal
    sizes too; in one dimension there is but one direction, so the result is exact and not random.

    References:
        Sliced-Wasserstein Autoencoder: An Embarrassingly Simple Generative Model (Kolouri, Martin and Rohde, 2018)
            https://arxiv.org/abs/1804.01947

    Arguments:
        projections: L, the number of directions.
        p: order of the distance, at least 1.

    Raises:
        ValueError: for an order below 1 or no projections; when called, for samples that are not ``[n, d]`` and
            ``[m, d]``.

    Example:
        >>> float(sliced_wasserstein()(torch.zeros(3, 1), torch.full((5, 1), 2.0)))
        4.0
    """

    projections: int = 50
    p: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.projections, int) or self.projections < 1:
            raise ValueError(f"projections must be a whole number of at least 1, got {self.projections!r}")
        if not self.p >= 1:
            raise ValueError(f"p must be at least 1, got {self.p!r}")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        check_samples(a, b)
        if a.shape[1] > 1:
            directions = normalize(torch.randn(a.shape[1], self.projections, dtype=a.dtype, device=a.device), dim=0)
            a, b = a @ directions, b @ directions
        return wasserstein_1d(a, b, self.p).mean()


class adversarial(nn.Module):
    r"""A divergence that is learned: how well a critic tells ``a``, the codes, from ``b``, draws from the prior.

    .. math:: -\frac{1}{n} \sum_i \log \text{sigmoid}(\text{critic}(a_i))

    This non-saturating penalty has a gradient for ``a`` alone, and leaves the critic and its buffers as they are. The
    critic learns by a second optimiser from ``critic_loss``; at its best its logit is log p_b - log p_a.

    References:
        Generative Adversarial Nets (Goodfellow et al., 2014) https://arxiv.org/abs/1406.2661
        Adversarial Autoencoders (Makhzani et al., 2016) https://arxiv.org/abs/1511.05644
        Wasserstein Auto-Encoders (Tolstikhin et al., 2018) https://arxiv.org/abs/1711.01558

    Arguments:
        critic: a network from rows ``[n, d]`` to the logits ``[n]`` or ``[n, 1]`` that they come from ``b``.

    Raises:
        ValueError: for a critic that is no module; when called, for samples that are not ``[n, d]`` and ``[m, d]``, or
            logits of another shape.

    Example:
        >>> penalty = adversarial(nn.Linear(2, 1))
        >>> codes = torch.randn(5, 2, requires_grad=True)
        >>> penalty(codes, torch.randn(5, 2)).backward()
        >>> codes.grad is None, penalty.critic.weight.grad is None
        (False, True)
    """

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        if not isinstance(critic, nn.Module):
            raise ValueError(f"critic must be a module from [n, d] to logits [n] or [n, 1], got {critic!r}")
        self.critic = critic

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        check_samples(a, b)
        # A batch norm's statistics are buffers that a call changes in place: it changes these copies.
        state = {name: parameter.detach() for name, parameter in self.critic.named_parameters()}
        state |= {name: buffer.clone() for name, buffer in self.critic.named_buffers()}
        return softplus(-_logits(functional_call(self.critic, state, (a,)), a)).mean()

    def critic_loss(self, a: Tensor, b: Tensor) -> Tensor:
        r"""What the critic minimises: its binary cross-entropy on ``a``, labelled 0, plus that on ``b``, labelled 1.

        .. math:: -\frac{1}{n} \sum_i \log \big( 1 - \text{sigmoid}(\text{critic}(a_i)) \big)
            - \frac{1}{m} \sum_j \log \text{sigmoid}(\text{critic}(b_j))

        Twice log 2 for a critic that knows nothing. It has a gradient for the critic alone.

        Arguments:
            a: codes ``[n, d]``.
            b: draws from the prior, ``[m, d]``.

        Example:
            >>> adversarial(nn.Linear(2, 1)).critic_loss(torch.randn(5, 2), torch.randn(7, 2)).shape
            torch.Size([])
        """
        check_samples(a, b)
        a, b = a.detach(), b.detach()
        return softplus(_logits(self.critic(a), a)).mean() + softplus(-_logits(self.critic(b), b)).mean()


def _logits(logits: Tensor, rows: Tensor) -> Tensor:
    if logits.shape not in ((len(rows),), (len(rows), 1)):
        raise ValueError(
            f"the critic must give one logit a row, [n] or [n, 1], and gave {tuple(logits.shape)} for rows of shape "
            f"{tuple(rows.shape)}: end it with a layer of one output"
        )
    return logits
