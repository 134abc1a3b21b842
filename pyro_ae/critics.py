"""Distances between samples that a network learns, and is then asked of other samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .nn import MLP

Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Samples ``[n, d]`` and ``[m, d]`` to a scalar, such as ``sliced_wasserstein()`` of ``pyro_ae.divergences``.

One that has to be learned has a method ``fitted(a, b)``: from one pair of samples it makes the function that is then
taken of another pair, so that it does not judge the samples it has learned from.
"""


@dataclass(frozen=True)
class wasserstein_critic:
    r"""The 1-Wasserstein distance, by a critic: a network that tells two samples apart with slopes of about one.

    .. math:: \max_\phi\ E_a[\phi(a)] - E_b[\phi(b)] - \lambda\, E_t\big[(\|\nabla \phi(t a + (1 - t) b)\| - 1)_+^2\big]

    The penalty lets the slope, and with it the distance W, be too large by a factor of about :math:`1 + W / 2 \lambda`;
    a critic that has not converged makes it too small. Called with one pair of samples, it learns from what it judges,
    so the distance of few samples in many dimensions is too large; ``match_prior`` takes a fresh pair. The papers
    penalise slopes below one as well; in one dimension, a critic that starts with the wrong slope then keeps it.

    References:
        All You Need is a Good Functional Prior for Bayesian Deep Learning (Tran et al., 2022)
        https://arxiv.org/abs/2011.12829
        Improved Training of Wasserstein GANs (Gulrajani et al., 2017) https://arxiv.org/abs/1704.00028

    Arguments:
        hidden: sizes of the critic's layers, with softplus between them.
        lr: learning rate, of Adagrad.
        steps: of the critic, which starts anew each time.
        penalty: lambda.
        tolerance: norm of the gradient below which the critic is done; 0.1 in the papers' code.
        two_sided: whether slopes below one are penalised as well, as in the papers.

    Raises:
        ValueError: for values out of range; when called, for samples that are not ``[n, d]`` and ``[m, d]``.

    Example:
        >>> critic = wasserstein_critic(hidden=(20,), lr=0.1)
        >>> 0.8 < critic(torch.zeros(50, 1), torch.ones(50, 1)) < 1.2
        tensor(True)
    """

    hidden: tuple[int, ...] = (200, 200)
    lr: float = 0.02
    steps: int = 200
    penalty: float = 10.0
    tolerance: float = 0.0
    two_sided: bool = False

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.steps > 0 and self.penalty > 0 and self.tolerance >= 0):
            raise ValueError(f"lr, steps and penalty must be positive and tolerance not negative, got {self!r}")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fitted(a, b)(a, b)

    def fitted(self, a: Tensor, b: Tensor) -> Distance:
        """A critic that has learned to tell these samples apart, as a function of others.

        Arguments:
            a: samples ``[n, d]``.
            b: samples ``[m, d]``.
        """
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
            raise ValueError(f"expected samples [n, d] and [m, d], got shapes {tuple(a.shape)} and {tuple(b.shape)}")
        a, b = a.detach(), b.detach()
        critic = MLP(a.shape[1], self.hidden, 1, activation=nn.Softplus).to(a)
        for layer in critic.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.normal_(layer.bias)
        parameters = list(critic.parameters())
        descent = torch.optim.Adagrad(parameters, lr=self.lr)
        pairs = min(len(a), len(b))
        for _ in range(self.steps):
            t = torch.rand(pairs, 1, dtype=a.dtype, device=a.device)
            between = torch.lerp(b[:pairs], a[:pairs], t).requires_grad_()
            (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            excess = slope.norm(dim=1) - 1.0
            excess = excess if self.two_sided else excess.clamp(min=0.0)
            loss = critic(b).mean() - critic(a).mean() + self.penalty * excess.square().mean()
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            if torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm() < self.tolerance:
                break
            descent.step()
        critic.requires_grad_(False)
        return lambda a, b: critic(a).mean() - critic(b).mean()
