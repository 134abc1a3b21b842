"""The one loop that moves chains side by side by gradients of minibatches, and keeps what they come by."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..bayesian import Bayesian
from ..data import Call, LoadedRows
from ..energy import Energy
from ..parameters import unknown_leaves
from ..plates import tempered
from ..posterior import Posterior
from ..program import Program
from ..schedules import now as value_of
from ..schedules import progress
from ..sites import quote
from ..types import Model
from .run import Event, NonFiniteError, Run, fetched_at_once
from .stacked import StackedEnergy
from .starts import starting_points
from .store import Store
from .stream import (
    Stream,
    optimizer_state,
    random_state,
    read_state,
    set_optimizer_state,
    set_random_state,
    write_state,
)

if TYPE_CHECKING:
    from .stepping import Stepping

State: TypeAlias = dict[str, Tensor]
"""Name to tensor, chains first; ``position`` holds the flat unconstrained latents, ``[chains, d]``."""


class Now(NamedTuple):
    """What a step is told of where the run stands.

    Attributes:
        lr: the learning rate, for energies in nats per row.
        rows: N, by which gradients of the whole energy are to be divided for that.
        temperature: of the noise; 0 for none.
        adapting: whether this is the warm-up, in which a sampler may tune itself.
        noisy: whether gradients are of minibatches.
    """

    lr: float
    rows: float
    temperature: float
    adapting: bool
    noisy: bool


class Plan(NamedTuple):
    """What happens at a step.

    Attributes:
        lr: factor of the learning rate.
        heat: factor of the temperature.
        adapting: whether this is the warm-up.
        kept: number of the draw that the step ends with, or None.
    """

    lr: float
    heat: float
    adapting: bool
    kept: int | None


class Stacked:
    """One run of chains side by side."""

    def __init__(self, config: Stepping, model: Model, run: Run) -> None:
        self.config, self.circumstances = config, run
        self.program = Program(model, None, plate=run.plate, total=run.data.size, device=run.device)
        first = run.data.first(run.batch_size, run.device)
        self.program.build(first, minibatched=run.minibatched)
        self.trained = self._trained()
        self._refuse()
        self.history: dict[str, list[float]] = {"step": [], "energy": []}
        self.done = self.drawn = 0
        self.moving = False  # whether a step is under way, so that the state is neither of before nor of after
        with self.program.active():
            target = self.program.model
            if config.prior_temperature != 1:
                target = tempered(target, 1.0 / config.prior_temperature)  # type: ignore[assignment]
            self.energy = Energy(target, first)
            data = run.data
            missing = isinstance(data, LoadedRows) or data.has_missing
            self.stacked = StackedEnergy(
                self.energy,
                own=config.own_batches,
                missing=missing,
                compile=run.compile,
                precision=run.precision,
            )
            self._check_leaves(first)
            points = starting_points(config.init, self.energy, config.chains)
            position = self.stacked.pack({n: torch.stack([p[n] for p in points]) for n in points[0]})
            self.config = config = config.prepare(self.stacked, position)
            self.state = config.start(position)
            at_once, size = config.kept(self.state).shape
        file = None
        if run.checkpoint is not None:
            run.checkpoint.mkdir(parents=True, exist_ok=True)
            file = run.checkpoint / "draws.bin"
        self.steps, keeps = config.lengths
        self.store = Store(at_once, keeps, size, config.dtype or position.dtype, config.memory, file)
        self.densities = torch.zeros(config.chains, keeps)
        self.optimizer = torch.optim.Adam(self.trained, lr=config.parameter_lr) if self.trained else None
        own = config.chains if config.own_batches and run.minibatched else None
        self.stream = Stream(data.resident(run.device), run.batch_size, run.device, own)

    def _refuse(self) -> None:
        run, program, name = self.circumstances, self.program, type(self.config).__name__
        local = program.layout.local(run.plate)
        if run.minibatched and local:
            raise ValueError(
                f"{quote(local)} belong to the rows, of which each minibatch has others, so {name} cannot hold a chain "
                "over them: leave out batch_size, sum them out, or fit with svi and a guide that is a function of rows"
            )
        if self.config.own_batches and isinstance(run.data, LoadedRows):
            raise ValueError("own_batches needs the rows, and a DataLoader brings one batch for all: pass tensors")
        if run.checkpoint is not None and isinstance(run.data, LoadedRows):
            raise ValueError("a DataLoader cannot be resumed in the middle of a pass: pass tensors, or no checkpoint")

    def _trained(self) -> list[Tensor]:
        """The parameters that a network made Bayesian has left to train; any other has no prior."""
        named = self.program.parameters.trainable()
        networks = [m for m in self.program.parameters.submodules() if isinstance(m, Bayesian)]
        meant = {id(p) for network in networks for p in network.parameters()}
        without = [n for n, p in named.items() if id(p) not in meant]
        if without:
            raise ValueError(
                f"{quote(without[:4])} {'and others ' if len(without) > 4 else ''}have no prior, so they have no "
                "posterior to sample: make their network's weights latent with bayesian(network), where deterministic= "
                "leaves chosen parts to be trained along; or hold them as they are with .requires_grad_(False)"
            )
        return list(named.values())

    def _check_leaves(self, batch: Call) -> None:
        v = {n: x.requires_grad_() for n, x in self.energy.init("uniform").items()}
        named = self.program.parameters.named()
        unknown = unknown_leaves(self.energy(v, batch), named | v)
        if unknown:
            raise ValueError(
                f"the energy depends on {len(unknown)} tensors that require a gradient (of shape "
                f"{', '.join(str(tuple(t.shape)) for t in unknown[:4])}), have no prior and belong to no module that "
                "fit can see: use bayesian(network), make the model a torch.nn.Module, or .requires_grad_(False)"
            )

    def run(self) -> Posterior:
        config, run = self.config, self.circumstances
        interrupted = False
        interval = max(1, self.steps // 100)
        energies: list[Tensor] = []
        saved = time.monotonic()
        with self.program.active(), torch.no_grad(), run.bar(self.steps, "step", type(config).__name__) as bar:
            try:
                self._resume()
                bar.update(self.done)
                while self.done < self.steps:
                    energies.append(self._step())
                    bar.update()
                    if self.done % interval and self.done < self.steps:
                        continue
                    self._record(energies)
                    energies = []
                    if run.progress:
                        where = f"{self.drawn} draws" if self.drawn else "warm-up"
                        bar.set_postfix_str(f"{where}, energy {self.history['energy'][-1]:.4g}", refresh=False)
                    if run.checkpoint and (time.monotonic() - saved > 30 or self.done == self.steps):
                        self._save()
                        saved = time.monotonic()
                    if self._told_to_stop():
                        break
            except KeyboardInterrupt:
                interrupted = True
                if run.checkpoint and not self.moving:
                    self._save()
        if not self.drawn and config.anytime:
            self.store.keep(0, config.kept(self.state))
            self.drawn = 1
        if not self.drawn:
            what = "stopped during the warm-up, before any draw"
            raise KeyboardInterrupt(what) if interrupted else ValueError(f"a callback {what}")
        return self._posterior(interrupted)

    def _step(self) -> Tensor:
        config, program = self.config, self.program
        self.moving = True
        plan = config.plan(self.done)
        parameters = self.trained if plan.adapting else []
        if not parameters:
            self.stacked.settle()
        batch = next(self.stream)
        with progress(self.done / self.steps):
            energies, gradient, *rest = config.energies(self.state, self.stacked, batch, parameters)
            # a chain that has left does not come back, so it is found when one looks
            look = plan.kept is not None or self.done % fetched_at_once(program.device) == 0
            if look and not torch.isfinite(energies).all():
                self._fail(gradient)
            config.step(
                self.state,
                gradient,
                Now(
                    lr=value_of(config.lr) * plan.lr,
                    rows=float(program.rows),
                    temperature=config.temperature * plan.heat,
                    adapting=plan.adapting,
                    noisy=self.circumstances.minibatched,
                ),
            )
        if rest and self.optimizer is not None:
            for p, g in zip(self.trained, rest, strict=True):
                p.grad = g / (program.rows * config.chains)
            self.optimizer.step()
        if plan.kept is not None:
            self.store.keep(plan.kept, config.kept(self.state))
            self.densities[:, plan.kept] = -energies
            self.drawn = plan.kept + 1
        self.done += 1
        self.moving = False
        return energies

    def _fail(self, gradient: Tensor) -> None:
        position = self.state["position"].abs().nan_to_num(torch.inf)[:, : self.stacked.size]
        steep = gradient.abs().nan_to_num(torch.inf)[:, : self.stacked.size]
        worst = {
            n: (float(g.max()), float(x.max()))
            for (n, g), x in zip(
                self.stacked.unpack(steep).items(), self.stacked.unpack(position).values(), strict=True
            )
        }
        site = max(worst, key=worst.__getitem__)
        error = NonFiniteError(
            f"the chains left for infinity: the energy is not finite at step {self.done}, and the largest gradient is "
            f"that of site '{site}'. Try a smaller lr than {value_of(self.config.lr):.3g}, or a look at that site's "
            "prior" + ("; what was drawn before is the error's .posterior" if self.drawn else "")
        )
        error.posterior = self._posterior(False) if self.drawn else None
        raise error

    def _record(self, energies: list[Tensor]) -> None:
        self.history["step"].append(self.done)
        self.history["energy"].append(float(torch.stack(energies).mean()) / self.program.rows)

    def _told_to_stop(self) -> bool:
        event = Event(self.done, 0, {n: v[-1] for n, v in self.history.items()} | {"drawn": self.drawn}, self.history)
        return any([callback(event) is True for callback in self.circumstances.callbacks])

    def _posterior(self, interrupted: bool) -> Posterior:
        with self.program.active(), torch.no_grad():
            kept = self.store.values[:, : self.drawn]
            flat = self.config.finish(kept)
            draws = self.energy.constrain(self.stacked.unpack(flat))
        densities = self.densities[:, : self.drawn]
        as_kept = flat.shape == kept.shape and flat.equal(kept)  # else the densities are of other points than the draws
        stats = {"lp": densities} if as_kept else {}
        return Posterior(
            self.program,
            data=self.circumstances.data,
            method=repr(self.config),
            history=self.history,
            draws=draws,
            stats=stats,
            interrupted=interrupted,
            batch_size=self.circumstances.batch_size,
        )

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _save(self) -> None:
        folder = self.circumstances.checkpoint
        assert folder is not None
        parts = {
            "state": self.state,
            "random": random_state(self.program.device),
            "stream": self.stream.state(),
            "parameters": self.program.parameters.state(),
            "optimizer": {} if self.optimizer is None else optimizer_state(self.optimizer),
            "chains": {"densities": self.densities},
        }
        about = {"method": repr(self.config), "done": self.done, "drawn": self.drawn, "history": self.history}
        write_state(folder / "state.safetensors", parts, about)

    def _resume(self) -> None:
        folder = self.circumstances.checkpoint
        if folder is None or not (folder / "state.safetensors").exists():
            return
        parts, about = read_state(folder / "state.safetensors")
        ours, theirs = self.state["position"].shape, parts["state"]["position"].shape
        if about["method"] != repr(self.config) or ours != theirs:
            raise ValueError(
                f"{folder} holds the state of {about['method']} over {theirs[-1]} latents, another fit than "
                f"{self.config!r} over {ours[-1]}: give a new folder, or the same settings"
            )
        self.state = {n: v.to(self.program.device) for n, v in parts["state"].items()}
        self.program.parameters.load(parts.get("parameters", {}))
        if self.optimizer is not None:
            set_optimizer_state(self.optimizer, parts.get("optimizer", {}))
        self.densities.copy_(parts["chains"]["densities"])
        self.history, self.done, self.drawn = about["history"], about["done"], about["drawn"]
        self.stream.resume(parts["stream"])
        set_random_state(parts["random"], self.program.device)
