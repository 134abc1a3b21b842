"""The No-U-Turn sampler over all latents of a model, with the whole data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import NUTS
from torch import Tensor

from ..data import LoadedRows
from ..energy import INITS, Energy
from ..posterior import Posterior
from ..program import Program, validation
from ..types import Guide, Model
from .run import Event, Run


@dataclass(frozen=True)
class nuts:
    """The No-U-Turn sampler, with Pyro's kernel.

    All latents are sampled jointly, those of the rows included, so there are no minibatches. A guide is not
    needed and not looked at. An interrupted run keeps the chains that are complete, or the draws of the first.

    References:
        The No-U-Turn Sampler: Adaptively Setting Path Lengths in Hamiltonian Monte Carlo (Hoffman and Gelman, 2014)
        https://jmlr.org/papers/v15/hoffman14a.html

    Arguments:
        draws: of each chain, after warm-up.
        warmup: draws to adapt step size and mass matrix on, which are not kept.
        chains: run one after the other; R-hat needs at least two.
        target_accept: of the step size adaptation, between 0 and 1; nearer to 1 means smaller steps.
        max_tree_depth: a trajectory has at most 2 to this power steps.
        dense_mass: whether the mass matrix has off-diagonal terms.
        init: ``"median"`` or ``"prior"`` of draws from the prior, or ``"uniform"`` in (-2, 2), unconstrained.

    Raises:
        ValueError: for values out of range; when run, for minibatches, and for a discrete latent.

    Example:
        >>> nuts(draws=500, chains=2).warmup
        1000
    """

    draws: int = 1000
    warmup: int = 1000
    chains: int = 4
    target_accept: float = 0.8
    max_tree_depth: int = 10
    dense_mass: bool = False
    init: str = "median"

    def __post_init__(self) -> None:
        for name in ("draws", "chains", "max_tree_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, got {self.warmup}")
        if not 0 < self.target_accept < 1:
            raise ValueError(f"target_accept must lie between 0 and 1, got {self.target_accept}")
        if self.init not in INITS:
            raise ValueError(f"unknown init {self.init!r}; known are {', '.join(INITS)}")

    def __call__(self, model: Model, guide: Guide | None, run: Run) -> Posterior:
        if run.minibatched:
            raise ValueError(
                "nuts needs all data at once: a chain over minibatches does not have the posterior as its limit. Leave "
                "out batch_size, and pass tensors in place of a DataLoader"
            )
        assert not isinstance(run.data, LoadedRows)
        program = Program(model, None, plate=run.plate, total=run.data.size, device=run.device)
        batch = run.data.to(run.device).call()
        program.build(batch)
        chains: list[list[tuple[dict[str, Tensor], dict[str, float]]]] = []
        interrupted = False
        with program.active(), run.bar(self.chains * (self.warmup + self.draws), "draw", "nuts") as bar:
            energy = Energy(program.model, batch)
            for chain in range(self.chains):
                kept: list[tuple[dict[str, Tensor], dict[str, float]]] = []
                chains.append(kept)
                try:
                    for i, (z, now) in enumerate(self._chain(energy)):
                        bar.update()
                        if i % 20 == 0 and run.progress:
                            where = "warm-up" if i < self.warmup else "draws"
                            bar.set_postfix_str(
                                f"chain {chain + 1}/{self.chains} {where}, step size {now['step_size']:.2g}",
                                refresh=False,
                            )
                        if i >= self.warmup:
                            kept.append((z, now))
                except KeyboardInterrupt:
                    interrupted = True
                    break
                metrics = {"chain": chain + 1, "divergences": sum(s["diverging"] for _, s in kept)}
                event = Event((chain + 1) * (self.warmup + self.draws), chain + 1, metrics, {})
                if any([callback(event) is True for callback in run.callbacks]):
                    break
        kept_chains = [c for c in chains if len(c) == self.draws] or [c for c in chains[:1] if c]
        if not kept_chains:
            raise KeyboardInterrupt("interrupted during the warm-up of the first chain, before any draw")
        draws = {n: torch.stack([torch.stack([z[n] for z, _ in c]) for c in kept_chains]) for n in energy.transforms}
        recorded = {n: torch.tensor([[s[n] for _, s in c] for c in kept_chains]) for n in kept_chains[0][0][1]}
        kinds = {"diverging": torch.bool, "tree_depth": torch.int64, "n_steps": torch.int64}
        stats = {n: v.to(kinds.get(n, v.dtype)) for n, v in recorded.items()}
        with torch.no_grad():
            constrained = {n: v.cpu() for n, v in energy.constrain(draws).items()}
        return Posterior(
            program, data=run.data, method=repr(self), draws=constrained, stats=stats, interrupted=interrupted
        )

    def _chain(self, energy: Energy) -> Iterator[tuple[dict[str, Tensor], dict[str, float]]]:
        """Unconstrained draws of one chain, warm-up included, with what ArviZ calls sample_stats."""
        z = energy.init(self.init)
        counter = _Counter(energy)
        kernel: Any = NUTS(
            potential_fn=counter,
            target_accept_prob=self.target_accept,
            max_tree_depth=self.max_tree_depth,
            full_mass=self.dense_mass,
        )
        kernel.initial_params = z
        kinetic: list[Tensor] = []
        measure = kernel._kinetic_energy

        def first_kinetic(r: Any) -> Tensor:
            kinetic.append(measure(r))
            return kinetic[-1]

        kernel._kinetic_energy = first_kinetic
        with validation(False):
            kernel.setup(self.warmup)
            acceptance = 0.0
            for i in range(self.warmup + self.draws):
                if i == self.warmup:
                    acceptance = 0.0  # the kernel's running mean begins anew after warm-up
                start = kernel._potential_energy_last
                counter.calls, divergences = 0, len(kernel._divergences)
                kinetic.clear()
                z = kernel.sample(z)
                n = i + 1 if i < self.warmup else i - self.warmup + 1
                total = kernel._mean_accept_prob * n
                potential = kernel._potential_energy_last.item()
                yield (
                    {name: v.detach() for name, v in z.items()},
                    {
                        "diverging": float(len(kernel._divergences) > divergences),
                        "energy": kinetic[0].item() + start.item(),
                        "tree_depth": float(math.ceil(math.log2(counter.calls + 1))),
                        "acceptance_rate": total - acceptance,
                        "step_size": float(kernel.step_size),
                        "n_steps": float(counter.calls),
                        "lp": -potential,
                    },
                )
                acceptance = total


class _Counter:
    """An energy that counts its calls: one for each leapfrog step."""

    def __init__(self, energy: Energy) -> None:
        self.energy = energy
        self.calls = 0

    def __call__(self, z: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        return self.energy(z)
