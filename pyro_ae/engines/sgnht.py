"""The stochastic gradient Nose-Hoover thermostat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .stepping import Sampler
from .stochastic import Now, State


@dataclass(frozen=True, kw_only=True, repr=False)
class sgnht(Sampler):
    r"""Stochastic gradient Nose-Hoover thermostat: momentum whose friction finds its own strength.

    .. math:: p \leftarrow (1 - \zeta) p - \eta \nabla U(v) + N(0, 2 a \eta T), \quad v \leftarrow v + p, \quad
        \zeta \leftarrow \zeta + a^2 \Bigl( \frac{\lVert p \rVert^2}{d\, \eta T} - 1 \Bigr), \qquad
        \eta = \mathrm{lr} / N

    The friction grows while the chain is hotter than the temperature and falls while it is colder, so noise of
    unknown size in the gradients is taken up without being estimated. The thermostat's mass is :math:`\eta / a^2`
    where the paper has 1: with that, a friction that rose in the first descent would take a million steps to fall.

    References:
        Bayesian Sampling Using Stochastic Gradient Thermostats (Ding et al., 2014)
        https://papers.nips.cc/paper/2014/hash/21fe5b8ba755eeaece7a450849876228-Abstract.html

    Arguments:
        friction: a, where the thermostat begins, in (0, 1].

    Raises:
        ValueError: as ``sgld`` does.

    Example:
        >>> sgnht(lr=1e-3)
        sgnht(lr=0.001)
    """

    friction: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.friction <= 1:
            raise ValueError(f"friction must lie in (0, 1], got {self.friction}")

    def start(self, position: Tensor) -> State:
        thermostat = torch.full_like(position[:, :1], self.friction)
        return {"position": position, "momentum": torch.zeros_like(position), "thermostat": thermostat}

    def step(self, state: State, gradient: Tensor, now: Now) -> None:
        eta, momentum, thermostat = now.lr / now.rows, state["momentum"], state["thermostat"]
        momentum.mul_(1.0 - thermostat).add_(gradient, alpha=-eta)
        spread = (2.0 * self.friction * eta * now.temperature) ** 0.5
        if spread:
            momentum.add_(torch.randn_like(momentum), alpha=spread)
        state["position"].add_(momentum)
        if now.temperature:
            heat = momentum.square().mean(1, keepdim=True) / (eta * now.temperature)
            thermostat.add_(heat - 1.0, alpha=self.friction**2).clamp_(-1.0, 1.0)
