"""The loss and gradients of a step: by the program itself, or by a tape of one of its runs where that is quicker."""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Call, LoadedRows, Rows, missing_values
from ..lowering.backends import cuda_graph, inductor, seconds
from ..lowering.capture import CaptureError
from ..lowering.tape import Tape, Values, record
from ..program import Program
from ..schedules import Asked, progress
from ..settings import changed, settings

MODES = ("auto", True, False, "replay", "inductor")

REPLAY_PAYS = 500
"""Steps from which on a tape is worth its recording and its check, which take what replays save in 250 steps."""

INDUCTOR_PAYS = 300.0
"""Seconds of replays from which on a compiler is tried: it takes up to a minute, and spares a third or a tenth."""

ROUNDING = 1e-5
"""Of the largest entry of a gradient: by how much a replay may be off."""

REORDERED = 1e-3
"""The same where a compiler sums in another order: log-weights in the hundreds cost 1e-4."""

CHECKS = (0, 10, 100, 1_000, 10_000, 100_000)
"""Replays after which the next one is compared with the program itself."""


def check_mode(compile: Any) -> None:
    """Refuse what ``fit(compile=...)`` is not."""
    if not any(compile is mode or (isinstance(compile, str) and compile == mode) for mode in MODES):
        raise ValueError(f"compile must be one of {', '.join(map(repr, MODES))}, got {compile!r}")


@dataclass
class _Taped:
    """A tape for one shape of a batch, what runs it, and how often it was run."""

    tape: Tape
    asked: Asked
    run: Callable[..., Values]
    count: int = 0
    seconds: float = 0.0
    compiled: bool = False


@dataclass
class Steps:
    """What a program's loss and gradients are at each step.

    A run is recorded for each shape of a batch and replayed from then on: see :class:`pyro_ae.lowering.tape.Tape`.
    Before its first use a replay is compared with the program at other parameters and another part of the fit, and
    now and again afterwards. A program that cannot be recorded runs as it is, and that is said once.

    Arguments:
        evaluate: of a batch, a list of tensors, or None for some.
        program: that it runs.
        loss: that it runs; its buffers and settings are watched as the program's are.
        mode: as for ``fit(compile=...)``.
        data: of the fit, to know whether values are missing.

    Attributes:
        reason: why the program runs as it is, where it cannot be recorded.
    """

    evaluate: Callable[[Call], Values]
    program: Program
    loss: Any
    mode: bool | str
    data: Rows | LoadedRows
    reason: str | None = None
    _taped: dict[tuple, _Taped] = field(default_factory=dict)
    _seen: dict[tuple, int] = field(default_factory=dict)
    _settings: dict[str, Any] | None = None
    _whole: bool | None = None

    def __call__(self, batch: Call, done: float, left: int, ready: bool) -> Values:
        """The values of a step.

        Arguments:
            batch: rows.
            done: the part of the fit that is done.
            left: steps from this one to the last.
            ready: whether the program has run before, as it is to run now.
        """
        if self.mode is False or self.reason is not None:
            return self._run(batch, done)
        tensors = [v for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)]
        missing = self._missing_in(tensors)
        given = [(n, None if isinstance(v, Tensor) else repr(v)) for n, v in _named(batch)]
        key = (*missing, *given, *((t.shape, t.dtype, t.is_contiguous()) for t in tensors))
        if (taped := self._taped.get(key)) is not None:
            return self._replay(taped, batch, tensors, done, left)
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        expected = left * seen / sum(self._seen.values())
        if not ready or (self.mode == "auto" and (seen < 3 or expected < REPLAY_PAYS)):
            return self._run(batch, done)
        if self._settings is None:
            return self._look(batch, done)
        return self._record(key, batch, tensors, missing, done)

    def reset(self) -> None:
        """Forget the tapes: what is trained has changed."""
        self._taped.clear()

    def refresh(self) -> None:
        """Forget the tapes if someone has changed a setting since they were made."""
        if self._settings is not None and changed(self._settings, self._now()):
            self._settings = None
            self.reset()

    def _run(self, batch: Call, done: float) -> Values:
        with progress(done):
            return self.evaluate(batch)

    def _missing_in(self, tensors: list[Tensor]) -> list[bool]:
        """Whether each of the batch's tensors has missing values, which is another tape."""
        if self._whole is None and isinstance(self.data, Rows) and self.data.nbytes < 2**30:
            self._whole = not self.data.has_missing
        return [not self._whole and t.is_floating_point() and bool(torch.isnan(t).any()) for t in tensors]

    def _modules(self) -> list[nn.Module]:
        own = list(self.loss.modules()) if isinstance(self.loss, nn.Module) else []
        return [*self.program.parameters.submodules(), *own]

    def _now(self) -> dict[str, Any]:
        program = self.program
        guide = None if program.guide is None else program.guide.fn
        return settings({"model": program.model.fn, "guide": guide, "loss": self.loss}, self._modules())

    def _buffers(self) -> list[Tensor]:
        return list({id(b): b for m in self._modules() for b in m._buffers.values() if b is not None}.values())

    def _parameters(self) -> list[Tensor]:
        own = [p for m in self._modules() for p in m._parameters.values() if p is not None]
        return list({id(p): p for p in (*self.program.parameters.named().values(), *own)}.values())

    # ------------------------------------------------------------------------------------------------ recording

    def _look(self, batch: Call, done: float) -> Values:
        """Run the program, and see whether Python keeps something from one step to the next."""
        before, outside = self._now(), _random_states()
        values = self._run(batch, done)
        self._settings = self._now()
        if moved := changed(before, self._settings):
            self._give_up(f"each step changes what Python keeps: {', '.join(moved[:3])}")
        elif _random_states() != outside:
            self._give_up("each step draws random numbers by NumPy or random, which a replay would repeat")
        return values

    def _record(self, key: tuple, batch: Call, tensors: list[Tensor], missing: list[bool], done: float) -> Values:
        """Run the program under the eyes of a tape."""
        asked, buffers = Asked(self.program.device), self._buffers()

        def run(*tensors: Tensor) -> Values:
            with asked, missing_values(_known(tensors, missing)):
                return self.evaluate(_with(batch, tensors))

        with _restored(buffers) as keep, progress(done), quiet():
            try:
                values, tape = record(run, *tensors, live=[*self._parameters(), *buffers, asked.cells])
                keep()
                self._taped[key] = _Taped(tape, asked, tape)
                return values
            except CaptureError as error:
                self._give_up(str(error))
        return self._run(batch, done)

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self.reset()
        warnings.warn(
            "the loss cannot be captured, so each step runs the model and guide themselves, which is slower "
            f"(fit(..., compile=False) says nothing): {self.reason}",
            stacklevel=2,
        )

    # ------------------------------------------------------------------------------------------------ replaying

    def _replay(self, taped: _Taped, batch: Call, tensors: list[Tensor], done: float, left: int) -> Values:
        if taped.count in CHECKS:
            try:
                self._compare(taped, batch, tensors, done)
            except CaptureError as error:
                if taped.count:
                    raise CaptureError(
                        f"after {taped.count} steps {error}, so the fit went wrong somewhere: pass compile=False"
                    ) from error
                self._give_up(str(error))
                return self._run(batch, done)
        if self._compiles(taped, left):
            self._compile(taped, batch, tensors, done)
        taped.count += 1
        with progress(done):
            if taped.asked.schedules:
                taped.asked.set()
            if taped.count > 100:
                return taped.run(*tensors)
            start = time.perf_counter()
            values = taped.run(*tensors)
            taped.seconds += time.perf_counter() - start
            return values

    def _compare(self, taped: _Taped, batch: Call, tensors: list[Tensor], done: float) -> None:
        """Check a replay: the first one at other parameters, if the program can be run there."""
        if taped.count == 0:
            try:
                return self._check(taped, batch, tensors, done, elsewhere=True)
            except CaptureError:
                raise
            except (RuntimeError, ValueError):
                pass
        try:
            self._check(taped, batch, tensors, done, elsewhere=False)
        except RuntimeError as error:
            raise CaptureError(f"a replay fails: {error}") from error

    def _check(self, taped: _Taped, batch: Call, tensors: list[Tensor], done: float, elsewhere: bool) -> None:
        """Compare a replay with the program, in all that they give and change."""
        parameters = self._parameters() if elsewhere else []
        written = list({id(t): t for t in (*self._buffers(), *taped.tape.written)}.values())
        done = 0.618 * done + 0.2 if elsewhere else done
        with _restored([*written, *parameters], anyway=True) as restart, torch.no_grad():
            noise = torch.Generator(self.program.device).manual_seed(0)
            for p in parameters:
                if p.is_floating_point():
                    step = torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=noise)
                    p.add_(0.02 * (p.abs().mean() + 1e-2) * step)
            moved = [p.clone() for p in parameters]
            with progress(done):
                taped.asked.set()
                replayed = [None if t is None else t.clone() for t in taped.run(*tensors)]
            after: Values = [t.clone() for t in written]
            state = torch.get_rng_state()
            restart()
            for p, value in zip(parameters, moved, strict=True):
                p.copy_(value)
            with torch.enable_grad():
                ours = self._run(batch, done)
            slack = REORDERED if taped.compiled else ROUNDING
            pairs: list[tuple[str, Values, Values, float]] = [
                ("other values", replayed[:1], ours[:1], ROUNDING),
                ("other gradients", replayed[1:], ours[1:], slack),
                ("buffers other values", after, [*written], slack),
            ]
            for name, theirs, mine, tolerance in pairs:
                if not _close(theirs, mine, tolerance):
                    raise CaptureError(f"a replay gives {name} than the model and guide do")
            if self.program.device.type == "cpu" and not torch.equal(state, torch.get_rng_state()):
                raise CaptureError("a replay draws other random numbers than the model and guide do")

    # ------------------------------------------------------------------------------------------------ compiling

    def _compiles(self, taped: _Taped, left: int) -> bool:
        if taped.compiled or self.mode == "replay" or any(t.compiled for t in self._taped.values()):
            return False
        if self.program.device.type == "cuda" or self.mode == "inductor":
            return True
        return taped.count == 100 and left * taped.seconds / 100 > INDUCTOR_PAYS

    def _compile(self, taped: _Taped, batch: Call, tensors: list[Tensor], done: float) -> None:
        """Have the tape compiled, and keep what comes out if it is right and quicker."""
        taped.compiled = True
        slow = taped.run
        make = cuda_graph if self.program.device.type == "cuda" and self.mode != "inductor" else inductor
        written = list({id(t): t for t in (*self._buffers(), *taped.tape.written)}.values())
        try:
            with _restored(written, anyway=True):
                taped.run = make(taped.tape, tensors)
                quick = self.mode == "inductor" or seconds(taped.run, tensors) < seconds(slow, tensors)
            self._compare(replace(taped, count=0), batch, tensors, done)
        except Exception as error:  # a compiler may fail in any way, and its lack is no fault of the fit
            taped.run, quick = slow, True
            if self.mode == "inductor":
                warnings.warn(f"the loss cannot be compiled, so it is replayed: {str(error)[:300]}", stacklevel=2)
        if not quick:
            taped.run = slow


def _known(tensors: tuple[Tensor, ...], missing: list[bool]) -> Callable[[Tensor], bool]:
    """What the tape of a batch takes for granted: which of its tensors have missing values."""
    whole = {t.untyped_storage()._cdata for t, m in zip(tensors, missing, strict=True) if not m}
    parts = {id(t) for t, m in zip(tensors, missing, strict=True) if m}

    def known(x: Tensor) -> bool:
        if x.untyped_storage()._cdata in whole or id(x) in parts:
            return id(x) in parts
        try:
            return bool(torch.isnan(x).any())  # the model's own data
        except CaptureError:
            return any(missing)

    return known


def _named(batch: Call) -> list[tuple[str, Any]]:
    return [*((str(i), v) for i, v in enumerate(batch.args)), *batch.kwargs.items()]


def _with(batch: Call, tensors: tuple[Tensor, ...]) -> Call:
    """The same call with other tensors."""
    given = iter(tensors)
    values = [next(given) if isinstance(v, Tensor) else v for _, v in _named(batch)]
    count = len(batch.args)
    return Call(tuple(values[:count]), dict(zip(batch.kwargs, values[count:], strict=True)))


def apart(gradients: Mapping[str, Tensor | None], parameters: Mapping[str, Tensor]) -> Values:
    """Gradients that an optimiser may write to: each with memory of its own, laid out as its parameter's."""
    storages = {p.untyped_storage()._cdata for p in parameters.values()}
    own: Values = []
    for name, g in gradients.items():
        if g is not None and g.layout is torch.strided:
            if g.untyped_storage()._cdata in storages or g.stride() != parameters[name].stride():
                g = torch.empty_like(parameters[name]).copy_(g)
            storages.add(g.untyped_storage()._cdata)
        own.append(g)
    return own


def _close(theirs: Values, ours: Values, slack: float) -> bool:
    """Whether two lists agree, but for rounding; the gradient of a bias below a batch norm is nothing else."""
    most = max([_size(t) for t in ours if t is not None], default=0.0)
    for a, b in zip(theirs, ours, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        elif a.shape != b.shape or not torch.allclose(
            a.double(), b.double(), rtol=max(1e-4, slack), atol=slack * _size(b) + 1e-6 * most, equal_nan=True
        ):
            return False
    return True


def _size(t: Tensor) -> float:
    return float(t.detach().double().abs().nan_to_num(0.0, 0.0, 0.0).amax()) if t.numel() else 0.0


@contextmanager
def _restored(tensors: list[Tensor], *, anyway: bool = False) -> Iterator[Callable[[], None]]:
    """Put tensors and torch's random states back at the end.

    It gives a function that keeps them as they are instead; with ``anyway`` one that puts them back at once as well.
    """
    saved = [t.detach().clone() for t in tensors]
    cuda = torch.cuda.is_initialized()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    on_cuda = torch.cuda.get_rng_state_all() if cuda else []
    kept = False

    def keep() -> None:
        nonlocal kept
        kept = True
        if anyway:
            put_back()

    def put_back() -> None:
        with torch.no_grad():
            for t, value in zip(tensors, saved, strict=True):
                t.copy_(value)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(on_cuda)

    try:
        yield keep
    finally:
        if anyway or not kept:
            put_back()


def _random_states() -> tuple:
    """Of the random numbers that torch does not draw, and no replay draws anew."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), kind, keys.tobytes(), *rest  # type: ignore[union-attr]


@contextmanager
def quiet() -> Iterator[None]:
    """Have Pyro's ELBOs not look at their values, as a sum in Python or for NaN: the fit looks after each step."""
    instead: dict[str, Callable[..., Any]] = {
        "warn_if_nan": lambda value, *args, **kwargs: value,
        "warn_if_inf": lambda value, *args, **kwargs: value,
        "torch_item": lambda value: value.detach() if isinstance(value, Tensor) else value,
    }
    modules = [m for n, m in list(sys.modules.items()) if n.startswith("pyro.infer.")]
    with ExitStack() as stack:
        for module in modules:
            for name in (n for n in instead if hasattr(module, n)):
                stack.enter_context(patch.object(module, name, instead[name]))
        yield
