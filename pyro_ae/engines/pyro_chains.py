"""Chains by Pyro's own kernels: any model that runs, one chain after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import HMC, NUTS
from torch import Tensor

from ..energy import Energy
from ..program import validation
from .run import Event, Run

if TYPE_CHECKING:
    from .nuts import Chains, hmc, nuts

Step = tuple[dict[str, Tensor], dict[str, float]]


def sample(config: nuts | hmc, energy: Energy, starts: list[dict[str, Tensor]], run: Run) -> Chains:
    """Unconstrained draws of all chains, and sampler statistics."""
    chains: list[list[Step]] = []
    interrupted = False
    name = type(config).__name__
    with run.bar(config.chains * (config.warmup + config.draws), "draw", name) as bar:
        for chain, start in enumerate(starts):
            kept: list[Step] = []
            chains.append(kept)
            try:
                for i, (z, now) in enumerate(_chain(config, energy, start)):
                    bar.update()
                    if i % 20 == 0 and run.progress:
                        where = "warm-up" if i < config.warmup else "draws"
                        bar.set_postfix_str(
                            f"chain {chain + 1}/{config.chains} {where}, step size {now['step_size']:.2g}",
                            refresh=False,
                        )
                    if i >= config.warmup:
                        kept.append((z, now))
            except KeyboardInterrupt:
                interrupted = True
                break
            metrics = {"chain": chain + 1, "divergences": sum(s["diverging"] for _, s in kept)}
            event = Event((chain + 1) * (config.warmup + config.draws), chain + 1, metrics, {})
            if any([callback(event) is True for callback in run.callbacks]):
                break
    whole = [c for c in chains if len(c) == config.draws] or [c for c in chains[:1] if c]
    if not whole:
        raise KeyboardInterrupt("interrupted during the warm-up of the first chain, before any draw")
    draws = {n: torch.stack([torch.stack([z[n] for z, _ in c]) for c in whole]) for n in energy.transforms}
    stats = {n: torch.tensor([[s[n] for _, s in c] for c in whole]) for n in whole[0][0][1]}
    return draws, stats, interrupted


def _chain(config: nuts | hmc, energy: Energy, z: dict[str, Tensor]) -> Iterator[Step]:
    """Unconstrained draws of one chain, warm-up included, with what ArviZ calls sample_stats."""
    counter = _Counter(energy)
    kernel = _kernel(config, counter)
    kernel.initial_params = z
    kinetic: list[Tensor] = []
    measure = kernel._kinetic_energy

    def first_kinetic(r: Any) -> Tensor:
        kinetic.append(measure(r))
        return kinetic[-1]

    kernel._kinetic_energy = first_kinetic
    with validation(False):
        kernel.setup(config.warmup)
        acceptance = 0.0
        for i in range(config.warmup + config.draws):
            if i == config.warmup:
                acceptance = 0.0  # the kernel's running mean begins anew after warm-up
            start = kernel._potential_energy_last
            counter.calls, divergences = 0, len(kernel._divergences)
            kinetic.clear()
            z = kernel.sample(z)
            n = i + 1 if i < config.warmup else i - config.warmup + 1
            total = kernel._mean_accept_prob * n
            statistics = {
                "diverging": float(len(kernel._divergences) > divergences),
                "energy": kinetic[0].item() + start.item(),
                "acceptance_rate": total - acceptance,
                "step_size": float(kernel.step_size),
                "n_steps": float(counter.calls),
                "lp": -kernel._potential_energy_last.item(),
            }
            if isinstance(kernel, NUTS):
                statistics["tree_depth"] = float(math.ceil(math.log2(counter.calls + 1)))
            yield {name: v.detach() for name, v in z.items()}, statistics
            acceptance = total


def _kernel(config: nuts | hmc, potential: Any) -> Any:
    shared = {"target_accept_prob": config.target_accept, "full_mass": config.dense_mass}
    if hasattr(config, "max_tree_depth"):
        return NUTS(potential_fn=potential, max_tree_depth=config.max_tree_depth, **shared)
    return HMC(potential_fn=potential, trajectory_length=config.trajectory_length, **shared)


class _Counter:
    """An energy that counts its calls: one for each leapfrog step."""

    def __init__(self, energy: Energy) -> None:
        self.energy = energy
        self.calls = 0

    def __call__(self, z: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        return self.energy(z)
