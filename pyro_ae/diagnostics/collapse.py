"""Which latents pay: in closed form, for linear variational autoencoders with a normal likelihood."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearCodes:
    """The optimum of a linear variational autoencoder, one number for each latent, the most used first.

    Attributes:
        variances: lambda, of the data along the directions that the latents decode to, ``[latent]``.
        weights: singular values of the decoder, 0 where a latent has collapsed, ``[latent]``.
        scales: standard deviations of the encoder, ``[latent]``.
        kl: mean KL(q(z|x) || p(z)) in nats, ``[latent]``.
    """

    variances: Tensor
    weights: Tensor
    scales: Tensor
    kl: Tensor

    @property
    def active(self) -> Tensor:
        """Which latents the decoder uses, booleans ``[latent]``."""
        return self.weights > 0


def residual_variances(y: Tensor, condition: Tensor | None = None) -> Tensor:
    r"""Variances of rows along their principal directions, once what a condition explains linearly is taken out.

    .. math:: \lambda\big(\Sigma_{yy} - \Sigma_{yx} \Sigma_{xx}^{+} \Sigma_{xy}\big)

    References:
        Beyond Vanilla Variational Autoencoders: Detecting Posterior Collapse in Conditional and Hierarchical
        Variational Autoencoders (Dang et al., 2024) https://arxiv.org/abs/2306.05023

    Arguments:
        y: what is generated, ``[N, *event]``.
        condition: what it is generated from, ``[N, *event]``.

    Returns:
        ``[D]``, the largest first, in double precision.

    Raises:
        ValueError: for fewer than two rows, missing values, or a condition with another number of rows.

    Example:
        >>> x = torch.randn(100, 3)
        >>> residual_variances(torch.cat([2 * x, x[:, :1]], 1), condition=x).max() < 1e-6
        tensor(True)
    """
    parts = [part.detach().double().flatten(1) for part in ((y,) if condition is None else (y, condition))]
    if len({len(part) for part in parts}) > 1 or len(y) < 2 or any(part.isnan().any() for part in parts):
        shapes = " and ".join(str(list(part.shape)) for part in parts)
        raise ValueError(f"variances are of two rows or more, as many of the condition, none missing; got {shapes}")
    y, *given = (part - part.mean(0) for part in parts)
    if given:
        x = given[0]
        y = y - x @ (torch.linalg.pinv(x.T @ x, hermitian=True) @ (x.T @ y))
    return torch.linalg.eigvalsh(y.T @ y / len(y)).flip(0).clamp(min=0.0)


def linear_collapse(
    variances: Tensor, noise: float, *, beta: float = 1.0, latent: int | None = None, scale: float | None = None
) -> LinearCodes:
    r"""Which latents of a linear VAE collapse, and how much the others say, from the variances of the data alone.

    .. math::
        w_i^2 = \max(0, \lambda_i - \beta \eta^2), \qquad
        KL_i = \tfrac12 \max\big(0, \log(\lambda_i / \beta \eta^2)\big)

    The model is y | z ~ N(W z + V x + b, eta^2) with a standard normal z of independent normal posteriors, and beta
    the weight of the KL divergence; the encoder is linear, with the same scales for all rows. A latent pays where the
    standard deviation along its direction exceeds sqrt(beta) eta. The condition x of a conditional VAE takes from the
    variances what it explains. Where the encoder's scale s is not learnt but given, a latent pays where the standard
    deviation exceeds sqrt(beta) eta s, and :math:`w_i^2 = \sqrt\beta \eta (\sqrt{\lambda_i} - \sqrt\beta \eta s) / s`;
    then any rotation of the latents is as good, so that the numbers are of directions rather than of single latents.

    For learnt scales: divided by beta, the objective is the ELBO of a likelihood with variance beta eta^2, so that its
    maximum is that of probabilistic PCA, whose posterior has independent latents after a rotation. V maximises the
    likelihood where it is the least squares regression, whatever W is. For given scales: for a product p = w v with the
    encoder's weight, w is best at w^4 = p^2 lambda beta eta^2 / s^2, and then p at 1 - p = sqrt(beta / lambda) eta s.

    References:
        Beyond Vanilla Variational Autoencoders: Detecting Posterior Collapse in Conditional and Hierarchical
        Variational Autoencoders (Dang et al., 2024) https://arxiv.org/abs/2306.05023
        Probabilistic Principal Component Analysis (Tipping and Bishop, 1999)
        https://doi.org/10.1111/1467-9868.00196

    Arguments:
        variances: of the data, as :func:`residual_variances` gives, ``[D]``.
        noise: eta, the standard deviation of the likelihood.
        beta: weight of the KL divergence.
        latent: how many latents there are; as many as the variances by default.
        scale: s, the encoder's standard deviation where it is held fixed.

    Raises:
        ValueError: for negative variances, or numbers that are not positive.

    Example:
        >>> found = linear_collapse(torch.tensor([4.0, 2.0, 0.5]), noise=1.0)
        >>> found.active.tolist(), [round(kl, 3) for kl in found.kl.tolist()]
        ([True, True, False], [0.693, 0.347, 0.0])
    """
    lam = _checked(variances, noise=noise, beta=beta, latent=latent, scale=scale)[:latent]
    tau = beta * noise**2
    if scale is None:
        active = lam > tau
        weights = (lam - tau).clamp(min=0.0).sqrt()
        variance = torch.where(active, tau / lam, 1.0)
        mean = 1 - variance
    else:
        part = (1 - tau**0.5 * scale / lam.sqrt()).clamp(min=0.0)  # p, also for a variance of 0
        weights = (part * (tau * lam).sqrt() / scale).sqrt()
        mean = part * (lam / tau).sqrt() * scale  # v^2 lambda, with v = p / w
        variance = torch.full_like(lam, scale**2)
    return LinearCodes(lam, weights, variance.sqrt(), 0.5 * (mean + variance - 1 - variance.log()))


@dataclass(frozen=True)
class HierarchicalCodes:
    """The optimum of a linear VAE with two levels of latents, one number for each pair of latents.

    Attributes:
        variances: lambda, of the data along the directions, ``[latent]``.
        spread: variance of z1 over all rows, ``[latent]``.
        means: part of it that is of z1's means, 0 where z1 says nothing of the row, ``[latent]``.
        kl1: mean KL(q(z1|x) || p(z1|z2)) in nats, ``[latent]``.
        kl2: mean KL(q(z2|z1) || p(z2)) in nats, 0 where z2 has collapsed, ``[latent]``.
    """

    variances: Tensor
    spread: Tensor
    means: Tensor
    kl1: Tensor
    kl2: Tensor


def hierarchical_collapse(
    variances: Tensor,
    noise: float,
    *,
    prior_noise: float,
    scale: float | None,
    beta1: float = 1.0,
    beta2: float = 1.0,
    latent: int | None = None,
) -> HierarchicalCodes:
    r"""Which latents of a linear VAE with two levels collapse.

    .. math::
        \text{with} \; \tau = \beta_2 \eta_1^2 / \beta_1: \qquad
        z_2 \; \text{is used} \iff \max\big(s^2, \; \lambda s^2 / (\beta_2 \eta^2)\big) > \tau

    The model is z2 ~ N(0, I), z1 | z2 ~ N(U2 z2, eta_1^2), x | z1 ~ N(U1 z1 + b, eta^2), and the encoder
    z1 | x ~ N(A x, s^2), z2 | z1 ~ N(B z1, S2) with S2 learnt; beta_1 and beta_2 are the weights of the levels' KL
    divergences. So z2 collapses for a larger beta_2, and for a smaller beta_1 or encoder variance s^2.

    Derived from the top: given the variance r of z1 over the rows, z2 sees a linear VAE, whose optimum costs
    :math:`h(r / \tau) \beta_2 / 2`, with h(u) = u below 1 and 1 + log u above. The best decoder U1 leaves an error of
    lambda s^2 / r, so that r minimises :math:`\lambda s^2 / (2 \eta^2 r) + h(r / \tau) \beta_2 / 2` over r of at least
    s^2. That has one minimum: lambda s^2 / (beta_2 eta^2) where it exceeds tau, else
    :math:`\sqrt{\lambda s^2 \eta_1^2 / (\beta_1 \eta^2)}`. Where s is learnt too, the size of z1 is free, and the cost
    of it is :math:`h(r / \tau) \beta_2 / 2 - \log(r) \beta_1 / 2`: for beta_2 above beta_1 it is least at r = eta_1^2,
    where z2 has collapsed whatever the data; for equal ones it is the same for all r from there on, so that nothing
    keeps z2 in use, and the smallest is given; below, there is no optimum, as r grows without end.

    References:
        Beyond Vanilla Variational Autoencoders: Detecting Posterior Collapse in Conditional and Hierarchical
        Variational Autoencoders (Dang et al., 2024) https://arxiv.org/abs/2306.05023

    Arguments:
        variances: of the data, as :func:`residual_variances` gives, ``[D]``.
        noise: eta, the standard deviation of the likelihood.
        prior_noise: eta_1, the standard deviation of z1 given z2.
        scale: s, the standard deviation of z1 given x; None where it is learnt.
        beta1: weight of the lower level's KL divergence.
        beta2: weight of the upper level's.
        latent: how many latents each level has; as many as the variances by default.

    Raises:
        ValueError: for negative variances, numbers that are not positive, or learnt scales with beta_2 below beta_1.

    Example:
        >>> lam = torch.tensor([4.0, 1.0])
        >>> hierarchical_collapse(lam, 0.5, prior_noise=1.0, scale=0.5).kl2 > 0
        tensor([ True, False])
        >>> hierarchical_collapse(lam, 0.5, prior_noise=1.0, scale=None).kl2 > 0
        tensor([False, False])
    """
    lam = _checked(
        variances, noise=noise, prior_noise=prior_noise, scale=scale, beta1=beta1, beta2=beta2, latent=latent
    )[:latent]
    tau = beta2 / beta1 * prior_noise**2
    if scale is None:
        if beta2 < beta1:
            raise ValueError(
                f"with learnt scales and beta2={beta2} below beta1={beta1} there is no optimum: z1 grows without end. "
                "Fix the scale of z1, or weigh the levels the other way"
            )
        spread = torch.full_like(lam, prior_noise**2)
        variance = spread * (beta1 * noise**2 / lam).clamp(max=1.0)
    else:
        variance = torch.full_like(lam, scale**2)
        upper = lam * variance / (beta2 * noise**2)
        spread = torch.where(upper > tau, upper, (upper * tau).sqrt()).maximum(variance)
    left = spread.clamp(max=tau)  # what of z1 the best z2 does not say
    kl1 = 0.5 * (left / prior_noise**2 - 1 + (prior_noise**2 / variance).log())
    return HierarchicalCodes(lam, spread, spread - variance, kl1, 0.5 * (spread / tau).clamp(min=1.0).log())


def _checked(variances: Tensor, **numbers: float | None) -> Tensor:
    """The variances in descending order and double precision."""
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ValueError(f"{name} must be positive, got {number!r}")
    if variances.dim() != 1 or not bool((variances >= 0).all()):
        raise ValueError(f"variances must be a vector of numbers of at least 0, got {variances}")
    return variances.detach().double().sort(descending=True).values
