"""Stochastic gradient Langevin dynamics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .stepping import Sampler
from .stochastic import Now, State


@dataclass(frozen=True, kw_only=True, repr=False)
class sgld(Sampler):
    r"""Stochastic gradient Langevin dynamics: gradient descent with noise, on minibatches.

    .. math:: v \leftarrow v - \epsilon G \nabla U(v) + \sqrt{2 \epsilon T G}\, \xi,
        \qquad \epsilon = \mathrm{lr} / N, \quad \xi \sim N(0, 1)

    There is no accept step, so draws are biased by an amount that grows with the learning rate. With
    ``preconditioned`` G is one over the root mean square of each latent's gradient per row, as in RMSprop; it is
    estimated in the warm-up and held still afterwards, which makes the correction for a moving G unnecessary.

    References:
        Bayesian Learning via Stochastic Gradient Langevin Dynamics (Welling and Teh, 2011)
        https://www.stats.ox.ac.uk/~teh/research/compstats/WelTeh2011a.pdf
        Preconditioned Stochastic Gradient Langevin Dynamics for Deep Neural Networks (Li et al., 2016)
        https://arxiv.org/abs/1512.07666

    Arguments:
        preconditioned: whether each latent has a step of its own; latents of different scale need it.
        decay: of the running mean of squared gradients, between 0 and 1.
        damping: added to the root mean square.

    Raises:
        ValueError: for values out of range; when run, for latents of rows under minibatches, for a network without
            a prior, and for draws that find no room.

    Example:
        >>> sgld(lr=1e-3, draws=50)
        sgld(lr=0.001, draws=50)
    """

    preconditioned: bool = False
    decay: float = 0.99
    damping: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay < 1 or not self.damping > 0:
            raise ValueError(
                f"decay must lie between 0 and 1 and damping be positive, got {self.decay} and {self.damping}"
            )

    def start(self, position: Tensor) -> State:
        state = {"position": position}
        if self.preconditioned:
            state["square"] = torch.ones_like(position)
        return state

    def step(self, state: State, gradient: Tensor, now: Now) -> None:
        epsilon = now.lr / now.rows
        position = state["position"]
        spread = math.sqrt(2.0 * epsilon * now.temperature)
        if not self.preconditioned:
            position.add_(gradient, alpha=-epsilon)
            if spread:
                position.add_(torch.randn_like(position), alpha=spread)
            return
        if now.adapting:
            state["square"].lerp_((gradient / now.rows).square_(), 1.0 - self.decay)
        scale = (state["square"].sqrt() + self.damping).reciprocal_()
        position.addcmul_(gradient, scale, value=-epsilon)
        if spread:
            position.addcmul_(torch.randn_like(position), scale.sqrt_(), value=spread)
