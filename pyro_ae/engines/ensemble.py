"""Points of highest posterior density: one, many, or the Gaussians that descent draws around them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .stepping import Stepping
from .stochastic import Now, Plan, State


@dataclass(frozen=True, kw_only=True, repr=False)
class ensemble(Stepping):
    r"""A deep ensemble: the highest posterior density, found from several starting points by Adam, side by side.

    The members are the posterior's draws. Density is that of the unconstrained latents.

    References:
        Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles
        (Lakshminarayanan, Pritzel and Blundell, 2017) https://arxiv.org/abs/1612.01474

    Arguments:
        members: how many.
        steps: of Adam, with a learning rate that falls to zero along a cosine.

    Raises:
        ValueError: as ``sgld`` does.

    Example:
        >>> ensemble(members=10, steps=500)
        ensemble(members=10, steps=500)
    """

    members: int = 5
    chains: int = field(default=0, init=False, repr=False)
    steps: int = 2000

    anytime: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "chains", self.members)
        super().__post_init__()

    @property
    def lengths(self) -> tuple[int, int]:
        return self.steps, 1

    def plan(self, step: int) -> Plan:
        last = step == self.steps - 1
        return Plan(0.5 * (1.0 + math.cos(math.pi * step / self.steps)), 0.0, not last, 0 if last else None)

    def start(self, position: Tensor) -> State:
        first, second, count = torch.zeros_like(position), torch.zeros_like(position), torch.zeros(len(position), 1)
        return {"position": position, "first": first, "second": second, "count": count.to(position)}

    def step(self, state: State, gradient: Tensor, now: Now) -> None:
        """Adam, with its usual constants."""
        count = float(state["count"].add_(1.0)[0, 0])
        gradient = gradient / now.rows
        state["first"].lerp_(gradient, 0.1)
        state["second"].lerp_(gradient.square_(), 0.001)
        root = (state["second"] / (1.0 - 0.999**count)).sqrt_().add_(1e-8)
        state["position"].addcdiv_(state["first"], root, value=-now.lr / (1.0 - 0.9**count))

    def finish(self, kept: Tensor) -> Tensor:
        return kept.transpose(0, 1)  # one chain, whose draws are the members


@dataclass(frozen=True, kw_only=True, repr=False)
class map_(ensemble):
    """The maximum a posteriori: one point, which is an ensemble of one.

    Density is that of the unconstrained latents, so a scale's maximum is that of its logarithm.

    Arguments:
        steps: of Adam, with a learning rate that falls to zero along a cosine.

    Raises:
        ValueError: as ``sgld`` does.

    Example:
        >>> map_(steps=500)
        map_(steps=500)
    """

    members: int = field(default=1, init=False, repr=False)


@dataclass(frozen=True, kw_only=True, repr=False)
class swag(Stepping):
    r"""SWAG: a Gaussian with the moments of the points that descent with a high, constant step passes.

    .. math:: v = \bar v + \tfrac{1}{\sqrt 2} \Sigma_{\mathrm{diag}}^{1/2} \xi_1
        + \tfrac{1}{\sqrt{2 (K - 1)}} D \xi_2

    D holds the last K deviations of the snapshots from their mean. Several chains make it MultiSWAG.

    References:
        A Simple Baseline for Bayesian Uncertainty in Deep Learning (Maddox et al., 2019)
        https://arxiv.org/abs/1902.02476
        Bayesian Deep Learning and a Probabilistic Perspective of Generalization (Wilson and Izmailov, 2020)
        https://arxiv.org/abs/2002.08791

    Arguments:
        draws: of each chain's Gaussian.
        warmup: steps of descent before the first snapshot.
        snapshots: how many points the moments are of.
        thinning: steps from one snapshot to the next; an epoch in the paper.
        rank: K, at most the number of snapshots.
        momentum: of the descent.

    Raises:
        ValueError: as ``sgld`` does.

    Example:
        >>> swag(snapshots=30)
        swag(snapshots=30)
    """

    chains: int = 1
    draws: int = 100
    warmup: int = 2000
    snapshots: int = 40
    thinning: int = 50
    rank: int = 20
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.rank <= self.snapshots or not 0 <= self.momentum < 1:
            raise ValueError(
                f"rank must be from 2 to snapshots={self.snapshots} and momentum in [0, 1), got {self.rank} and "
                f"{self.momentum}"
            )

    @property
    def lengths(self) -> tuple[int, int]:
        return self.warmup + self.snapshots * self.thinning, self.snapshots

    def plan(self, step: int) -> Plan:
        after = step - self.warmup + 1
        kept = after // self.thinning - 1 if after > 0 and after % self.thinning == 0 else None
        return Plan(1.0, 0.0, step < self.warmup, kept)

    def start(self, position: Tensor) -> State:
        return {"position": position, "momentum": torch.zeros_like(position)}

    def step(self, state: State, gradient: Tensor, now: Now) -> None:
        state["momentum"].mul_(self.momentum).add_(gradient, alpha=-now.lr / now.rows)
        state["position"].add_(state["momentum"])

    def finish(self, kept: Tensor) -> Tensor:
        mean, variance = kept.mean(1, keepdim=True), kept.var(1, correction=0, keepdim=True)
        last = (kept - mean)[:, -self.rank :]
        shape = (len(kept), self.draws)
        wide = torch.randn(*shape, kept.shape[2], dtype=kept.dtype) * (0.5 * variance).sqrt()
        deep = torch.randn(*shape, last.shape[1], dtype=kept.dtype) @ last / math.sqrt(2.0 * max(last.shape[1] - 1, 1))
        return mean + wide + deep
