"""Sequential Monte Carlo over the stochastic part of a network, while its deterministic part is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..data import Call
from ..draws import replay
from ..energy import Energy
from ..particles import gather
from ..posterior import Posterior
from ..program import Program
from ..sites import Layout, Recorder
from ..types import Draws, Guide, Model
from .run import Run
from .stacked import StackedEnergy
from .stepping import Stepping
from .stochastic import Now, Plan, Stacked, State


@dataclass(frozen=True, kw_only=True, repr=False)
class feynman_kac(Stepping):
    r"""Sequential Monte Carlo for partial Bayesian networks: particles walk, and are resampled by each minibatch.

    .. math:: v_k^i = \tilde v_{k-1}^i + N(0, s), \quad w_k^i \propto p(y_{S_k} \mid v_k^i, \psi_{k-1}), \quad
        \psi_k = \psi_{k-1} - \mathrm{Adam}\Big( -\frac{N}{B} \sum_i w_k^i \nabla_\psi \log p(y_{S_k} \mid v_k^i, \psi)
        \Big)

    The particles begin as draws from the prior, and those of the last step, resampled, are the draws of the posterior,
    in one chain. They do not target the exact posterior, but that of the last value of a latent that walks from batch
    to batch, so that batches of long ago are forgotten: without a walk, one pass over the data has the exact posterior
    as its target, and several count the data several times. The weights need many particles for the latents there are:
    keep the stochastic part small, by ``bayesian(network, deterministic=[...])``.

    References:
        On Feynman-Kac training of partial Bayesian neural networks (Zhao, Mair, Schon and Sjolund, 2024)
        https://arxiv.org/abs/2310.19608

    Arguments:
        particles: how many.
        walk: s, the variance of a step of the walk, in the unconstrained space; 0 for none.
        lr: Adam's learning rate for the deterministic parameters.
        steps: one batch each.
        init: where the particles begin.

    Raises:
        ValueError: as ``sgld`` does.

    Example:
        >>> feynman_kac(particles=100, steps=500)
        feynman_kac(particles=100, steps=500, init='prior')
    """

    particles: int = 1000
    walk: float = 1e-2
    lr: float = 1e-2
    steps: int = 1000
    init: Any = field(default="prior", repr=False)
    chains: int = field(default=0, init=False, repr=False)
    parameter_lr: float = field(default=0.0, init=False, repr=False)
    own_batches: bool = field(default=False, init=False, repr=False)
    prior_temperature: float = field(default=math.inf, init=False, repr=False)
    """So that the energy is that of the likelihood alone; the prior counts once, in the beginning."""

    anytime: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if callable(self.lr) or self.walk < 0:
            raise ValueError(f"lr must be a number and walk at least 0, got {self.lr!r} and {self.walk}")
        object.__setattr__(self, "chains", self.particles)
        object.__setattr__(self, "parameter_lr", self.lr)
        super().__post_init__()

    def __call__(self, model: Model, guide: Guide | None, run: Run) -> Posterior:
        init = _prior(model, run, self.particles) if self.init == "prior" else self.init
        return Stacked(replace(self, init=init), model, run).run()

    @property
    def lengths(self) -> tuple[int, int]:
        return self.steps, 1

    def plan(self, step: int) -> Plan:
        return Plan(1.0, 1.0, True, 0 if step == self.steps - 1 else None)

    def start(self, position: Tensor) -> State:
        return {"position": position, "log_weight": position.new_zeros(len(position))}

    def energies(self, state: State, energy: StackedEnergy, batch: Call, parameters: Any) -> tuple[Tensor, ...]:
        """Move the particles and weigh them; the parameters' gradient is the average over the weighted particles."""
        position = state["position"]
        if self.walk:
            position.add_(torch.randn_like(position), alpha=self.walk**0.5)
        with torch.set_grad_enabled(bool(parameters)):
            energies = energy.energies(position, batch)
            log_likelihood = -energies - log_jacobian(energy.energy, energy.unpack(position))
        # the energy stands for all rows, and a weight is the likelihood of those in the batch
        state["log_weight"] = log_likelihood.detach() * _part_of_rows(energy.energy, batch)
        weights = state["log_weight"].softmax(0) * len(position)  # gradients are of a sum over chains
        gradients = torch.autograd.grad(energies, parameters, weights, allow_unused=True) if parameters else ()
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        return (energies.detach(), torch.zeros_like(position), *filled)

    def step(self, state: State, gradient: Tensor, now: Now) -> None:
        state["position"] = state["position"][stratified(state["log_weight"])]

    def finish(self, kept: Tensor) -> Tensor:
        return kept.transpose(0, 1)  # one chain, whose draws are the particles


def _prior(model: Model, run: Run, draws: int) -> Posterior:
    """Draws from the prior, by one run of the model."""
    program = Program(model, None, plate=run.plate, total=run.data.size, device=run.device)
    batch = run.data.first(run.batch_size, run.device)
    program.build(batch, minibatched=run.minibatched)

    def read(layout: Layout, runs: list[Recorder], k: int) -> dict[str, Tensor]:
        return gather(runs, layout.names("latent"), layout.model, k, lambda s: s["value"])

    values = replay(program, {"_particles": torch.empty(draws)}, batch, read)  # a name that is none of the model's
    kept = {n: v.unsqueeze(0).to(run.device) for n, v in values.items()}
    return Posterior(program, data=run.data, method="prior", draws=kept)


def stratified(log_weights: Tensor) -> Tensor:
    """Stratified resampling: one particle for each n-th part of the weights, at a random place within it.

    References:
        Monte Carlo filter and smoother for non-Gaussian nonlinear state space models (Kitagawa, 1996)
        https://doi.org/10.1080/10618600.1996.10474692

    Arguments:
        log_weights: of the particles ``[n]``, up to a constant.

    Returns:
        The particles that are kept, in order, ``[n]``.

    Example:
        >>> stratified(torch.tensor([0.0, -torch.inf, 0.0, -torch.inf])).tolist()
        [0, 0, 2, 2]
    """
    n = len(log_weights)
    ends = log_weights.double().softmax(0).cumsum(0)
    places = (torch.arange(n, device=ends.device) + torch.rand(n, dtype=ends.dtype, device=ends.device)) / n
    return torch.searchsorted(ends, places * ends[-1], right=True).clamp(max=n - 1)


def log_jacobian(energy: Energy, v: Draws) -> Tensor:
    """What an energy holds of the change of variables: log-determinants ``[n]``.

    Arguments:
        energy: of a model.
        v: unconstrained values ``[n, *shape]``.
    """
    values = energy.constrain(v)
    parts = [
        t.log_abs_det_jacobian(v[n], values[n]).reshape(len(v[n]), -1).sum(1) for n, t in energy.transforms.items()
    ]
    return torch.stack(parts).sum(0)


def _part_of_rows(energy: Energy, batch: Call) -> float:
    """B / N, where the model's rows are scaled by N / B."""
    scaled: Any = energy.model
    while not hasattr(scaled, "total"):  # tempered
        scaled = scaled.fn
    if scaled.total is None or scaled.plate not in energy.layout.plates:
        return 1.0
    rows = next(leaf for leaf in tree_leaves(tuple(batch)) if isinstance(leaf, Tensor) and leaf.dim())
    return len(rows) / scaled.total
