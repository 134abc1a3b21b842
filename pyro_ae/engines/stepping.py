"""What samplers and optimisers by stochastic gradients share: their settings, and what each adds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data import Call
from ..posterior import Posterior
from ..schedules import Schedule
from ..types import Guide, Model
from .run import Run
from .stacked import StackedEnergy
from .starts import check_init, shown_init
from .stochastic import Now, Plan, Stacked, State


@dataclass(frozen=True, kw_only=True)
class Stepping:
    """What moves flat positions ``[chains, d]`` side by side by gradients of minibatches; others add how.

    Arguments:
        lr: learning rate for energies in nats per row, as for svi; a number, or a schedule of the whole run.
        chains: how many.
        prior_temperature: the prior counts one over it times.
        own_batches: whether each chain has minibatches of its own, in place of the same for all.
        init: ``"start"`` for what the model proposes (``bayesian`` does for weights), else the median of draws from
            the prior; ``"prior"``, ``"median"`` or ``"uniform"``; or a fitted posterior.
        dtype: as which draws are kept, such as ``torch.float16``; as they are by default.
        memory: GiB of draws beyond which they go to a temporary file.
        parameter_lr: Adam's learning rate for what the model has to train in the warm-up, such as the deterministic
            parts of a ``bayesian`` network; they are held still while draws are kept.
    """

    lr: Schedule = 1e-2
    chains: int = 4
    prior_temperature: float = 1.0
    own_batches: bool = False
    init: str | Posterior = field(default="start", repr=False)
    dtype: torch.dtype | None = None
    memory: float = 4.0
    parameter_lr: float = 1e-3

    temperature: ClassVar[float] = 1.0
    anytime: ClassVar[bool] = False
    """Whether the point where a run is interrupted is worth keeping."""

    def __post_init__(self) -> None:
        for name in ("chains", "draws", "thinning", "steps", "snapshots"):
            value = getattr(self, name, 1)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("lr", "prior_temperature", "memory", "parameter_lr"):
            value = getattr(self, name)
            if not callable(value) and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        for name in ("warmup", "temperature"):
            if getattr(self, name, 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        check_init(self.init)

    def __repr__(self) -> str:
        given = [f for f in fields(self) if f.repr and getattr(self, f.name) != f.default]
        inside = [f"{f.name}={getattr(self, f.name)!r}" for f in given]
        if not isinstance(self.init, str) or self.init != "start":
            inside.append(f"init={shown_init(self.init)}")
        return f"{type(self).__name__}({', '.join(inside)})"

    def __call__(self, model: Model, guide: Guide | None, run: Run) -> Posterior:
        return Stacked(self, model, run).run()

    @property
    def lengths(self) -> tuple[int, int]:
        """Steps of the whole run, and how often something is kept."""
        raise NotImplementedError

    def plan(self, step: int) -> Plan:
        raise NotImplementedError

    def prepare(self, energy: StackedEnergy, position: Tensor) -> Stepping:
        """The method for one model and the positions ``[chains, d]`` to begin at: itself, unless it must know them."""
        return self

    def start(self, position: Tensor) -> State:
        """The state of chains that begin at a position ``[chains, d]``."""
        return {"position": position}

    def step(self, state: State, gradient: Tensor, now: Now) -> None:
        """Move the chains, in place, by the gradient of their energies."""
        raise NotImplementedError

    def energies(self, state: State, energy: StackedEnergy, batch: Call, parameters: Any) -> tuple[Tensor, ...]:
        """The energies ``[chains]``, their gradient for ``step``, and that in the parameters."""
        return energy(state["position"], batch, parameters)

    def kept(self, state: State) -> Tensor:
        """What is kept of a state, ``[at once, d]``."""
        return state["position"]

    def finish(self, kept: Tensor) -> Tensor:
        """The draws ``[chains, draws, d]`` of the posterior, from what was kept, ``[at once, kept, d]``."""
        return kept


@dataclass(frozen=True, kw_only=True, repr=False)
class Sampler(Stepping):
    """A sampler by stochastic gradients: a warm-up, and then a draw every so many steps.

    Arguments:
        draws: kept of each chain.
        warmup: steps that nothing is kept of; over all cycles where there are several.
        thinning: steps from one draw to the next.
        temperature: of the posterior; 1 is Bayes' rule, below it is a cold posterior.
        cycles: None for a learning rate as it is given; else it falls to zero along a cosine this many times, each
            time with its share of the warm-up, without noise, and of the draws.
    """

    draws: int = 100
    warmup: int = 2000
    thinning: int = 20
    temperature: float = 1.0  # type: ignore[misc]
    cycles: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cycles is not None and (self.cycles < 1 or self.draws % self.cycles or self.warmup % self.cycles):
            raise ValueError(
                f"draws={self.draws} and warmup={self.warmup} must both be shared out evenly among cycles={self.cycles}"
            )

    @property
    def lengths(self) -> tuple[int, int]:
        return self.warmup + self.draws * self.thinning, self.draws

    def plan(self, step: int) -> Plan:
        cycles = self.cycles or 1
        length, warmup, draws = self.lengths[0] // cycles, self.warmup // cycles, self.draws // cycles
        cycle, within = divmod(step, length)
        after = within - warmup + 1
        kept = cycle * draws + after // self.thinning - 1 if after > 0 and after % self.thinning == 0 else None
        if self.cycles is None:
            return Plan(1.0, 1.0, step < warmup, kept)
        return Plan(0.5 * (1.0 + math.cos(math.pi * within / length)), float(after > 0), step < warmup, kept)
