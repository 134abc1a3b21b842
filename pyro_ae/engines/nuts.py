"""Hamiltonian Monte Carlo over all latents of a model, with the whole data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..data import LoadedRows
from ..energy import Energy
from ..posterior import Posterior
from ..program import Program
from ..types import Guide, Model
from .run import Run
from .starts import check_init, shown_init, starting_points, unconstrained_draws

Chains: TypeAlias = tuple[dict[str, Tensor], dict[str, Tensor], bool]
"""Unconstrained draws ``[chains, draws, *shape]``, sampler statistics ``[chains, draws]``, and whether interrupted."""

BACKENDS = ("numpyro", "pyro")


@dataclass(frozen=True)
class nuts:
    """The No-U-Turn sampler.

    All latents are sampled jointly, those of the rows included, so there are no minibatches; discrete latents are
    summed out. The model is captured as a graph and sampled by NumPyro's compiled kernel, all chains together; a model
    whose control flow depends on its latents, and an op that has no translation, are for ``backend="pyro"``, which
    runs the model itself at each step and is slower by far. An interrupted run keeps what was drawn.

    References:
        The No-U-Turn Sampler: Adaptively Setting Path Lengths in Hamiltonian Monte Carlo (Hoffman and Gelman, 2014)
        https://jmlr.org/papers/v15/hoffman14a.html

    Arguments:
        draws: of each chain, after warm-up.
        warmup: draws to adapt step size and mass matrix on, which are not kept.
        chains: R-hat needs at least two.
        target_accept: of the step size adaptation, between 0 and 1; nearer to 1 means smaller steps.
        max_tree_depth: a trajectory has at most 2 to this power steps.
        dense_mass: whether the mass matrix has off-diagonal terms.
        init: ``"median"`` or ``"prior"`` of draws from the prior, or ``"uniform"`` in (-2, 2), unconstrained; or a
            fitted posterior, whose draws are the initial points and, with NumPyro, give the initial mass matrix.
        backend: ``"numpyro"`` or ``"pyro"``.
        float64: whether to compute in double precision, with NumPyro.

    Raises:
        ValueError: for values out of range; when run, for minibatches, for a model without a latent or one that cannot
            be lowered, and for a discrete latent of infinitely many values.

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
    init: str | Posterior = "median"
    backend: str = "numpyro"
    float64: bool = False

    def __post_init__(self) -> None:
        if self.max_tree_depth < 1:
            raise ValueError(f"max_tree_depth must be at least 1, got {self.max_tree_depth}")
        _check(self)

    def __call__(self, model: Model, guide: Guide | None, run: Run) -> Posterior:
        return _run(self, model, run)

    def __repr__(self) -> str:
        return _shown(self)


@dataclass(frozen=True)
class hmc:
    """Hamiltonian Monte Carlo with trajectories of one length.

    As ``nuts``, which finds the length by itself and is what to use first.

    References:
        MCMC Using Hamiltonian Dynamics (Neal, 2011) https://arxiv.org/abs/1206.1901

    Arguments:
        trajectory_length: of the dynamics, in units where the latents have about unit scale; 2 pi by default.
        draws: of each chain, after warm-up.
        warmup: draws to adapt step size and mass matrix on, which are not kept.
        chains: R-hat needs at least two.
        target_accept: of the step size adaptation, between 0 and 1.
        dense_mass: whether the mass matrix has off-diagonal terms.
        init: as for ``nuts``.
        backend: ``"numpyro"`` or ``"pyro"``.
        float64: whether to compute in double precision, with NumPyro.

    Raises:
        ValueError: as ``nuts`` does.

    Example:
        >>> hmc(trajectory_length=1.5).chains
        4
    """

    trajectory_length: float = 6.283185307179586
    draws: int = 1000
    warmup: int = 1000
    chains: int = 4
    target_accept: float = 0.8
    dense_mass: bool = False
    init: str | Posterior = "median"
    backend: str = "numpyro"
    float64: bool = False

    def __post_init__(self) -> None:
        if not self.trajectory_length > 0:
            raise ValueError(f"trajectory_length must be positive, got {self.trajectory_length}")
        _check(self)

    def __call__(self, model: Model, guide: Guide | None, run: Run) -> Posterior:
        return _run(self, model, run)

    def __repr__(self) -> str:
        return _shown(self)


def _check(config: nuts | hmc) -> None:
    for name in ("draws", "chains"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.warmup < 0:
        raise ValueError(f"warmup must not be negative, got {config.warmup}")
    if not 0 < config.target_accept < 1:
        raise ValueError(f"target_accept must lie between 0 and 1, got {config.target_accept}")
    check_init(config.init)
    if config.backend not in BACKENDS:
        raise ValueError(f"unknown backend {config.backend!r}; known are {', '.join(BACKENDS)}")
    if config.float64 and config.backend == "pyro":
        raise ValueError("float64 is for backend='numpyro'; with Pyro, give the model parameters and data in float64")


def _shown(config: nuts | hmc) -> str:
    values = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "init"}
    inside = ", ".join(f"{name}={value!r}" for name, value in values.items())
    return f"{type(config).__name__}({inside}, init={shown_init(config.init)})"


def _run(config: nuts | hmc, model: Model, run: Run) -> Posterior:
    if run.minibatched:
        raise ValueError(
            f"{type(config).__name__} needs all data at once: a chain over minibatches does not have the posterior as "
            "its limit. Leave out batch_size, and pass tensors in place of a DataLoader"
        )
    run.refuse_checkpoint(type(config).__name__)
    run.refuse_precision(type(config).__name__)
    assert not isinstance(run.data, LoadedRows)
    program = Program(model, None, plate=run.plate, total=run.data.size, device=run.device)
    batch = run.data.to(run.device).call()
    program.build(batch)
    with program.active():
        energy = Energy(program.model, batch)
        starts = starting_points(config.init, energy, config.chains)
        if config.backend == "numpyro":
            from .numpyro_chains import sample as by_numpyro

            draws, stats, interrupted = by_numpyro(config, energy, starts, run, inverse_mass=_spread(config, energy))
        else:
            from .pyro_chains import sample as by_pyro

            draws, stats, interrupted = by_pyro(config, energy, starts, run)
        kinds = {"diverging": torch.bool, "tree_depth": torch.int64, "n_steps": torch.int64}
        with torch.no_grad():
            constrained = {
                n: v.cpu() for n, v in energy.constrain({n: v.to(run.device) for n, v in draws.items()}).items()
            }
    return Posterior(
        program,
        data=run.data,
        method=repr(config),
        draws=constrained,
        stats={n: v.to(kinds.get(n, torch.get_default_dtype())) for n, v in stats.items()},
        interrupted=interrupted,
    )


def _spread(config: nuts | hmc, energy: Energy) -> Tensor | None:
    """The inverse mass matrix where a posterior gives one."""
    if isinstance(config.init, str):
        return None
    v = unconstrained_draws(config.init, energy)
    flat = torch.cat([v[n].reshape(len(v[n]), -1) for n in sorted(v)], 1)
    return flat.T.cov() if config.dense_mass else flat.var(0)
