"""Stochastic gradient Hamiltonian Monte Carlo, with steps adapted to each latent's scale; and along flat basins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import Call
from .stacked import StackedEnergy
from .stepping import Sampler
from .stochastic import Now, State

ADAPTED = ("window", "gradient", "square")


@dataclass(frozen=True, kw_only=True, repr=False)
class sghmc(Sampler):
    r"""Stochastic gradient Hamiltonian Monte Carlo: descent with momentum, friction and noise, on minibatches.

    .. math:: p \leftarrow (1 - \alpha) p - \eta M^{-1} \nabla U(v) + N(0, 2 \alpha \eta T M^{-1}),
        \qquad v \leftarrow v + p

    With ``adaptive`` the inverse mass is one over the root mean square of each latent's gradient,
    :math:`M^{-1} = \hat V^{-1/2}`, estimated in the warm-up with a window that adapts itself, so that one learning
    rate, :math:`\eta = \mathrm{lr}`, does for all latents and any N; the papers' learning rate is its square root.
    Without, :math:`M = 1` and :math:`\eta = \mathrm{lr} / N`. The papers take :math:`\eta^2` off the variance for the
    noise that minibatch gradients bring by themselves. Batches here are passes over all rows in a new order, whose
    noise cancels within a pass, so that this would make the posterior too narrow; ``subtract_noise`` does it.

    References:
        Stochastic Gradient Hamiltonian Monte Carlo (Chen, Fox and Guestrin, 2014) https://arxiv.org/abs/1402.4102
        Bayesian Optimization with Robust Bayesian Neural Networks (Springenberg, Klein, Falkner and Hutter, 2016)
        https://proceedings.neurips.cc/paper/2016/hash/a96d3afec184766bfeca7a9f989fc7e7-Abstract.html
        Model Selection for Bayesian Autoencoders (Tran et al., 2021) https://arxiv.org/abs/2106.06245

    Arguments:
        friction: alpha, the part of the momentum that is lost at each step, in (0, 1].
        adaptive: whether to adapt to the scale of each latent.
        subtract_noise: whether to take the variance of minibatch gradients off that of the noise, as the papers do.

    Raises:
        ValueError: as ``sgld`` does.

    Example:
        >>> sghmc(friction=0.01, chains=2)
        sghmc(chains=2, friction=0.01)
    """

    lr: Any = 1e-4
    friction: float = 0.05
    adaptive: bool = True
    subtract_noise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.friction <= 1:
            raise ValueError(f"friction must lie in (0, 1], got {self.friction}")

    def start(self, position: Tensor) -> State:
        state = {"position": position, "momentum": torch.zeros_like(position)}
        if self.adaptive:
            state |= {name: torch.ones_like(position) for name in (*ADAPTED, "inverse_mass")}
        return state

    def step(self, state: State, gradient: Tensor, now: Now) -> None:
        position, momentum = state["position"], state["momentum"]
        if not self.adaptive:
            eta = now.lr / now.rows
            momentum.mul_(1.0 - self.friction).add_(gradient, alpha=-eta)
            spread = (2.0 * self.friction * eta * now.temperature) ** 0.5
            if spread:
                momentum.add_(torch.randn_like(momentum), alpha=spread)
            position.add_(momentum)
            return
        if now.adapting:
            self._adapt(state, gradient)
        else:
            for name in ADAPTED:
                state.pop(name, None)  # only what came of them is needed any more
        inverse_mass = state["inverse_mass"]
        momentum.mul_(1.0 - self.friction).addcmul_(gradient, inverse_mass, value=-now.lr)
        if now.temperature:
            variance = inverse_mass * (2.0 * self.friction * now.lr * now.temperature)
            if now.noisy and self.subtract_noise:
                variance.sub_(now.lr**2).clamp_(min=1e-16)
            momentum.addcmul_(torch.randn_like(momentum), variance.sqrt_())
        position.add_(momentum)

    @staticmethod
    def _adapt(state: State, gradient: Tensor) -> None:
        """Running means of gradient and square whose window is short where the gradient is mostly its mean."""
        window, mean, square = state["window"], state["gradient"], state["square"]
        rate = (window + 1.0).reciprocal_()
        spare = mean.square().div_(square + 1e-16)
        window.addcmul_(window, spare, value=-1.0).add_(1.0)
        mean.lerp_(gradient, rate)
        square.lerp_(torch.square(gradient, out=spare), rate)
        torch.sqrt(square, out=state["inverse_mass"]).add_(1e-16).reciprocal_()


@dataclass(frozen=True, kw_only=True, repr=False)
class entropy_sghmc(sghmc):
    r"""Entropy-MCMC: chains coupled to an auxiliary one that sees the posterior smoothed, and so likes flat basins.

    .. math:: U(v, a) = U(v) + \frac{1}{2 \eta} \lVert v - a \rVert^2

    Both v and the auxiliary a move by ``sghmc``. The marginal of v is the posterior as it is; that of a is the
    posterior smoothed by a Gaussian of variance ``flatness``. Of both are draws kept, those of a as further chains.
    Bound together they go half as far a step as one of them would. ``friction=1.0, adaptive=False`` is the paper's own
    dynamics, those of Langevin.

    References:
        Entropy-MCMC: Sampling from Flat Basins with Ease (Li and Zhang, 2024) https://arxiv.org/abs/2310.05401

    Arguments:
        flatness: :math:`\eta`, the variance that couples the two, in the unconstrained space.
        keep: draws of ``"both"``, of the ``"posterior"`` alone, or of the ``"smoothed"`` one.

    Raises:
        ValueError: as ``sghmc`` does.

    Example:
        >>> entropy_sghmc(flatness=1e-2).keep
        'both'
    """

    flatness: float = 1e-2
    keep: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.flatness > 0:
            raise ValueError(f"flatness must be positive, got {self.flatness}")
        if self.keep not in ("both", "posterior", "smoothed"):
            raise ValueError(f"keep must be 'both', 'posterior' or 'smoothed', got {self.keep!r}")

    def start(self, position: Tensor) -> State:
        return super().start(position.repeat(1, 2))

    def energies(self, state: State, energy: StackedEnergy, batch: Call, parameters: Any) -> tuple[Tensor, ...]:
        v, a = state["position"].chunk(2, 1)
        energies, gradient, *rest = energy(v, batch, parameters)
        pull = (v - a) / self.flatness
        return (energies, torch.cat([gradient + pull, -pull], 1), *rest)

    def kept(self, state: State) -> Tensor:
        v, a = state["position"].chunk(2, 1)
        return {"both": torch.cat([v, a]), "posterior": v, "smoothed": a}[self.keep]
