"""Stochastic variational inference: minimise a loss over the parameters of model and guide."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..data import Call, LoadedRows, Rows
from ..density import first_bad_site, site_terms
from ..losses import importance
from ..lowering.tape import Values
from ..parameters import unknown_leaves
from ..posterior import Posterior
from ..precision import layers_in
from ..program import Program, validation
from ..schedules import progress
from ..types import Guide, Loss, Model, Sides
from .compiled import Steps, apart
from .run import Event, NonFiniteError, Run, fetched_at_once
from .score import Score

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
}

CHECKED = 1000
"""Steps of the first pass over the data in which distributions are checked, as a pass over many rows may be all."""


@dataclass(frozen=True)
class svi:
    """Stochastic variational inference with any loss, on minibatches or on all rows.

    Losses in the history are in nats per row where the model has a plate of rows, else in nats. The first pass
    over the data, or its first 1000 steps, checks distributions' arguments and supports; later steps skip that to be
    faster.

    References:
        Stochastic Variational Inference (Hoffman et al., 2013) https://jmlr.org/papers/v14/hoffman13a.html

    Arguments:
        loss: ``(model, guide, *args, **kwargs)`` to a scalar; Pyro's ELBO objects are taken as they are.
        lr: learning rate; 1e-3 by default, 1e-2 for an automatic guide.
        optimizer: parameter groups to a ``torch.optim.Optimizer``, such as an optimizer class or a partial of one;
            Pyro's optimizers are taken too. Adam by default.
        groups: pattern of parameter names to options of that group, such as ``{"guide.*": {"lr": 1e-4}}``; the
            first pattern that matches counts. Names begin with ``model.`` and ``guide.``.
        schedule: factor of the learning rate as a function of the part of the run that is done, from 0 to 1; or
            ``"constant"``, ``"linear"`` or ``"cosine"``.
        epochs: passes over the data; 100 by default with minibatches.
        steps: optimiser steps, in place of ``epochs``; 5000 by default without minibatches.
        clip: largest norm of the gradient (of the loss as it stands in the history).
        early_stopping: evaluations without an improvement that exceeds the estimate's standard error before the
            fit ends; True for 10. Evaluations are on held-out data where ``fit`` is given some.

    Raises:
        ValueError: for values out of range, or both of ``epochs`` and ``steps``.
        NonFiniteError: when run, for a loss or gradient that is not finite.

    Example:
        >>> svi(lr=1e-3, epochs=20).lr
        0.001
    """

    loss: Loss = field(default_factory=importance)
    lr: float | None = None
    optimizer: Any = None
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    schedule: str | Callable[[float], float] = "constant"
    epochs: int | None = None
    steps: int | None = None
    clip: float | None = None
    early_stopping: bool | int = False

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        for name in ("lr", "epochs", "steps", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; known are {', '.join(SCHEDULES)}, or a function")
        if isinstance(self.loss, ELBO) and not hasattr(self.loss, "differentiable_loss"):
            raise ValueError(f"{type(self.loss).__name__} has no differentiable_loss: use importance(renyi(alpha), K)")

    def __repr__(self) -> str:
        given = {n: getattr(self, n) for n in ("lr", "epochs", "steps", "clip", "early_stopping")}
        loss = type(self.loss).__name__ if hasattr(self.loss, "differentiable_loss") else repr(self.loss)
        return "svi(" + ", ".join([f"loss={loss}"] + [f"{n}={v}" for n, v in given.items() if v]) + ")"

    def __call__(self, model: Model, guide: Guide | None, run: Run) -> Posterior:
        run.refuse_checkpoint("svi")
        program = Program(model, guide, plate=run.plate, total=run.data.size, device=run.device)
        first = run.data.first(run.batch_size, run.device)
        program.build(first, minibatched=run.minibatched, automatic=True)
        return _Fit(self, program, run).run()

    def _optimizer(self, named: Mapping[str, Tensor], lr: float) -> torch.optim.Optimizer:
        make: Any = self.optimizer or partial(torch.optim.Adam, fused=True)
        if hasattr(make, "pt_optim_constructor"):  # one of Pyro's, with its arguments
            make = partial(make.pt_optim_constructor, **make.pt_optim_args)
        left = dict(named)
        groups: list[dict[str, Any]] = []
        for pattern, options in self.groups.items():
            members = [left.pop(n) for n in list(left) if fnmatch(n, pattern)]
            if not members:
                raise ValueError(f"no parameter matches {pattern!r}; there are {', '.join(named)}")
            groups.append({"params": members, **options})
        if left:
            groups.append({"params": list(left.values())})
        if self.lr is None and self.optimizer is not None:
            return make(groups)
        return make(groups, lr=lr)


def _shown(loss: Tensor | Sides) -> Tensor:
    """What the history shows of a loss."""
    return (loss if isinstance(loss, Tensor) else loss.model).detach()


class _Fit:
    """One run of svi."""

    def __init__(self, config: svi, program: Program, run: Run) -> None:
        self.config, self.program, self.circumstances = config, program, run
        loss = config.loss
        self.loss: Loss = loss.differentiable_loss if hasattr(loss, "differentiable_loss") else loss
        self.lr = config.lr or (1e-2 if program.automatic_guide else 1e-3)
        self.schedule = SCHEDULES[config.schedule] if isinstance(config.schedule, str) else config.schedule
        if isinstance(loss, nn.Module):
            loss.to(program.device)
        self.named = self._trainable()
        if not self.named:
            raise ValueError("neither the model nor the guide has a parameter to train")
        self.store_size = program.parameters.store_size()
        self.optimizer = config._optimizer(self.named, self.lr)
        self.base_lrs = [g["lr"] for g in self.optimizer.param_groups]
        data, size = run.data, run.batch_size
        if isinstance(data, LoadedRows):
            self.per_epoch = len(data.loader)
        else:
            self.per_epoch = 1 if size is None else math.ceil(data.need_size() / size)
        if config.steps is None and (config.epochs is not None or run.minibatched):
            self.total = (config.epochs or 100) * self.per_epoch
        else:
            self.total = config.steps or 5000
        # an evaluation runs the program once more: after each pass, but less often than that where passes are short
        passes = max(1, min(math.ceil(10 / self.per_epoch), self.total // self.per_epoch // 100))
        self.interval = passes * self.per_epoch if run.minibatched else max(1, self.total // 100)
        self.patience = 10 if config.early_stopping is True else int(config.early_stopping)
        self.guided: set[str] = set()  # names in the param store that are the guide's
        self.history: dict[str, list[float]] = {}
        self.step = self.epoch = 0
        fused = all(group.get("fused") for group in self.optimizer.param_groups)  # it can leave out a step by itself
        self.at_once = fetched_at_once(program.device) if fused else 1
        self.pending: list[tuple[int, Call, Tensor]] = []
        self.steps = Steps(self._evaluate, program, config.loss, run.compile, data)

    def run(self) -> Posterior:
        resident = self.circumstances.data.resident(self.program.device)
        interrupted = False
        best: Score | None = None
        reference: Score | None = None
        best_state = None
        stale = 0
        losses: list[float] = []
        with (
            self.program.active(train=True),
            self.circumstances.bar(self.total, "step", "svi") as bar,
        ):
            try:
                while self.step < self.total:
                    with ExitStack() as checked:
                        checked.enter_context(validation(self.epoch == 0))
                        for batch in resident.batches(self.circumstances.batch_size, device=self.program.device):
                            if self.step == CHECKED:
                                checked.enter_context(validation(False))
                            losses.extend(self._update(batch))
                            self.step += 1
                            bar.update()
                            if self.step >= self.total:
                                break
                    losses.extend(self._fetch())
                    self.epoch += 1
                    if self.step % self.interval and self.step < self.total:
                        continue
                    score = self._validate() or Score(torch.tensor(losses), torch.ones(len(losses)), False)
                    self._record(losses, score, batch)
                    losses = []
                    if self.circumstances.progress:
                        bar.set_postfix(_brief(self.history), refresh=False)
                    if score.paired and (best is None or score.mean < best.mean):
                        best, best_state = score, self.program.parameters.state()
                    if score.improves(reference):
                        reference, stale = score, 0
                    else:
                        stale += 1
                    if self._told_to_stop() or (self.patience and stale >= self.patience):
                        break
            except KeyboardInterrupt:
                interrupted = True
            if best_state is not None:
                self.program.parameters.load(best_state)
            self._finish(resident)
        return self._posterior(interrupted)

    def _posterior(self, interrupted: bool = False) -> Posterior:
        return Posterior(
            self.program,
            data=self.circumstances.data,
            method=repr(self.config),
            history=self.history,
            interrupted=interrupted,
            batch_size=self.circumstances.batch_size,
        )

    def _finish(self, resident: Rows | LoadedRows) -> None:
        """Have the parts of the guide that have something to compute from all the data do so."""
        guide = self.program.parameters.modules.get("guide")
        program, size = self.program, self.circumstances.batch_size
        parts: list[Any] = [] if guide is None else [m for m in guide.modules() if hasattr(m, "finish")]
        for part in parts:
            calls = resident.batches(size, shuffle=False, device=program.device)
            with program.parameters.mode(train=False), validation(False):
                part.finish(program.model, [(call, self._share(call)) for call in calls])

    def _share(self, batch: Call) -> float:
        """The part of all rows that a batch has."""
        if self.circumstances.batch_size is None and not isinstance(self.circumstances.data, LoadedRows):
            return 1.0
        rows = next(t for t in (*batch.args, *batch.kwargs.values()) if isinstance(t, Tensor) and t.dim())
        return len(rows) / self.program.rows

    def _update(self, batch: Call) -> list[float]:
        """Take a step; the losses that came to be known."""
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * self.schedule(self.step / self.total)
        first_pass = self.epoch == 0 and torch.distributions.Distribution._validate_args
        done, left = self.step / self.total, self.total - self.step
        scalars, *gradients = self.steps(batch, done, left, ready=self.step > 0 and not first_pass)
        assert scalars is not None
        self.pending.append((self.step, batch, scalars))
        losses = self._fetch(gradients) if len(self.pending) >= self.at_once else []
        for p, gradient in zip(self.named.values(), gradients, strict=True):
            p.grad = gradient
        if self.config.clip is not None:
            clip_grads_with_norm_(list(self.named.values()), self.config.clip, scalars[1])
        if self.at_once > 1:  # on the device, as no one has looked at the loss yet
            self.optimizer.found_inf = 1.0 - scalars.isfinite().all().float()  # type: ignore[attr-defined]
        self.optimizer.step()
        for p in self.named.values():
            p.grad = None  # or they would still be there when the next step's are
        return losses

    def _fetch(self, gradients: Sequence[Tensor | None] = ()) -> list[float]:
        """The losses of the steps since the last time; an error where one of them failed."""
        if not self.pending:
            return []
        values = torch.stack([scalars for _, _, scalars in self.pending]).tolist()
        for (step, batch, _), (value, norm) in zip(self.pending, values, strict=True):
            if not math.isfinite(value):
                self._fail(f"the loss is {value}", step, batch)
            if not math.isfinite(norm):
                given = zip(self.named, gradients, strict=False) if step == self.step else ()
                names = [repr(n) for n, g in given if g is not None and not torch.isfinite(g).all()]
                self._fail(f"the gradient{' of ' * bool(names)}{', '.join(names[:4])} is not finite", step, batch)
        self.pending.clear()
        return [value for value, _ in values]

    def _evaluate(self, batch: Call) -> Values:
        """The loss to be shown and the norm of its gradient, in one tensor; and the gradient of each parameter."""
        program = self.program
        with layers_in(self.circumstances.precision):
            loss = self.loss(program.model, program.guide, *batch.args, **batch.kwargs)
        if self.step == 0:
            self._check_leaves(loss, batch)
        if program.parameters.store_size() != self.store_size:
            self._adopt()
        gradients = self._gradients(loss)
        norm = get_total_norm([g for g in gradients if g is not None])
        shown = _shown(loss) / program.rows
        return [torch.stack([shown, norm.to(shown)]), *gradients]

    def _gradients(self, loss: Tensor | Sides) -> list[Tensor | None]:
        """Of each parameter its gradient, which an optimiser may write to; None where it has none."""
        rows, named = self.program.rows, self.named
        found: dict[str, Tensor | None] = dict.fromkeys(named)
        if isinstance(loss, Tensor):
            found.update(zip(named, grad(loss / rows, list(named.values()), allow_unused=True), strict=True))
        else:
            sides = {name: self._side(name) for name in named}
            for side, scalar in loss._asdict().items():
                names = [n for n in named if sides[n] == side]
                if scalar is not None and scalar.requires_grad and names:
                    members, keep = [named[n] for n in names], side != "critic"
                    found.update(zip(names, grad(scalar / rows, members, None, keep, allow_unused=True), strict=True))
        return apart(found, named)

    def _side(self, name: str) -> str:
        side = name.split(".")[0]
        if side in ("model", "guide") and side in self.program.parameters.modules:
            return side
        if name.startswith("loss.") and isinstance(self.config.loss, nn.Module):
            return "critic"
        return "guide" if name in self.guided else "model"

    def _trainable(self) -> dict[str, Tensor]:
        named = self.program.parameters.trainable()
        loss = self.config.loss
        if isinstance(loss, nn.Module):
            named |= {f"loss.{name}": p for name, p in loss.named_parameters() if p.requires_grad}
        return named

    def _adopt(self) -> None:
        """Train parameters too that a program made only now."""
        now = self._trainable()
        new = [p for n, p in now.items() if n not in self.named]
        if new:
            self.optimizer.add_param_group({"params": new})
            self.base_lrs.append(self.lr)
            self.steps.reset()
        self.named = now
        self.store_size = self.program.parameters.store_size()

    def _check_leaves(self, loss: Tensor | Sides, batch: Call) -> None:
        scalars = [loss] if isinstance(loss, Tensor) else [s for s in loss if s is not None and s.requires_grad]
        if not scalars or not any(s.requires_grad for s in scalars):
            raise ValueError("the loss does not depend on any parameter of the model or guide")
        if isinstance(loss, Sides):
            self.guided = self.program.parameters.sampled_by(self.program.guide, batch)
        known = self.program.parameters.named() | self.named
        unknown = unknown_leaves(sum(scalars[1:], scalars[0]), known)
        if unknown and not all(isinstance(t, nn.Parameter) for t in unknown):
            # a tensor that a run makes for itself, such as noise that is differentiated, is another in the next run
            with torch.random.fork_rng(devices=()), progress(0.0):
                again = self.loss(self.program.model, self.program.guide, *batch.args, **batch.kwargs)
            parts = [again] if isinstance(again, Tensor) else [s for s in again if s is not None and s.requires_grad]
            lasting = unknown_leaves(sum(parts[1:], parts[0]), known)
            unknown = [t for t in unknown if isinstance(t, nn.Parameter) or any(t is other for other in lasting)]
        if unknown:
            shapes = ", ".join(str(tuple(t.shape)) for t in unknown[:4])
            raise ValueError(
                f"the loss depends on {len(unknown)} tensors that require a gradient (of shape {shapes}) but belong "
                "to no module or param that fit can see, so they would never be trained. Register their network with "
                "pyro.module('net', net) in the model or guide, make it a part of a torch.nn.Module, or freeze it "
                "with net.requires_grad_(False)"
            )

    def _fail(self, what: str, step: int, batch: Call) -> None:
        site = first_bad_site(self.program.model, self.program.guide, batch)
        error = NonFiniteError(
            f"{what} at step {step} (epoch {self.epoch}, batch {step % self.per_epoch})"
            + (f"; the first bad site is {site}" if site else "; no site is bad by itself")
            + ". The last good state is kept in the model and guide, and as the error's .posterior. Try a smaller lr, "
            "clip=, or a look at that site's distribution"
        )
        error.posterior = self._posterior()
        raise error

    def _validate(self) -> Score | None:
        held = self.circumstances.validation
        if held is None:
            return None
        device, program = self.program.device, self.program
        size = self.circumstances.batch_size
        if isinstance(held, Rows):
            # several batches even of a small set: the spread between them is the estimate's noise
            size = max(1, min(size or held.need_size(), math.ceil(held.need_size() / 8)))
        values, weights = [], []
        devices = [device] if device.type == "cuda" else []
        with (
            torch.no_grad(),
            program.parameters.mode(train=False),
            validation(False),
            torch.random.fork_rng(devices=devices),
        ):
            torch.manual_seed(0)  # the same noise each time, so that differences are those of the parameters
            for batch in held.batches(size, shuffle=False, device=device):
                rows = next(t for t in (*batch.args, *batch.kwargs.values()) if isinstance(t, Tensor) and t.dim())
                loss = self.loss(program.model, program.guide, *batch.args, **batch.kwargs)
                values.append(_shown(loss).item() / program.rows)
                weights.append(float(rows.shape[0]))
        return Score(torch.tensor(values), torch.tensor(weights), True)

    def _record(self, losses: list[float], score: Score, batch: Call) -> None:
        metrics = {"step": self.step, "epoch": self.epoch, "loss": sum(losses) / len(losses)}
        if score.paired:
            metrics["validation"] = score.mean
        if not any(s.enumerated for s in self.program.layout.guide.values()):
            with self.program.parameters.mode(train=False), torch.random.fork_rng(devices=()):
                terms = site_terms(self.program.model, self.program.guide, batch)  # type: ignore[arg-type]
            metrics |= {name: value / self.program.rows for name, value in terms.items()}
        for name, value in metrics.items():
            self.history.setdefault(name, []).append(value)

    def _told_to_stop(self) -> bool:
        metrics = {n: v[-1] for n, v in self.history.items()}
        event = Event(self.step, self.epoch, metrics, self.history)
        told = [callback(event) is True for callback in self.circumstances.callbacks]
        if told:
            self.steps.refresh()
        return any(told)


def _brief(history: Mapping[str, list[float]]) -> dict[str, str]:
    return {n: f"{history[n][-1]:.4g}" for n in ("loss", "validation") if n in history}
