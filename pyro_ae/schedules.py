"""Values that change in the course of a fit: functions of the part of it that is done, from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Schedule: TypeAlias = float | Callable[[float], float]
"""A number, or a function of the part of the fit that is done."""

_progress: ContextVar[float] = ContextVar("progress", default=1.0)
_asked: ContextVar[Asked | None] = ContextVar("asked", default=None)


@contextmanager
def progress(done: float) -> Iterator[None]:
    """Let schedules have their values for a part of the fit.

    Arguments:
        done: from 0 to 1. Outside any fit it is 1, so that a loss is evaluated as it ends up.
    """
    token = _progress.set(done)
    try:
        yield
    finally:
        _progress.reset(token)


def now(schedule: Schedule) -> float:
    """The value of a schedule at this point of the fit, or the number that it is.

    Where a run is recorded to be replayed, a schedule's value is a tensor, so that a replay can have another.
    """
    if not callable(schedule):
        return schedule
    asked = _asked.get()
    return schedule(_progress.get()) if asked is None else asked.ask(schedule)


class Asked:
    """The schedules that a run asked for, and tensors that stand for their values; use it around the run.

    Arguments:
        device: where the tensors are.

    Attributes:
        cells: the values, of which the tensors are views.
        schedules: in the order in which they were asked for.

    Example:
        >>> with progress(0.5), Asked() as asked:
        ...     value = now(linear(0.0, 4.0))
        >>> with progress(0.75):
        ...     asked.set()
        >>> value
        tensor(3.)
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.cells = torch.zeros(64, device=device)
        # .data, as views that shared a version would not let autograd keep one when another is set
        self._views: list[Tensor] = [cell.data for cell in self.cells.unbind()]
        self.schedules: list[Callable[[float], float]] = []

    def __enter__(self) -> Asked:
        self._token = _asked.set(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        _asked.reset(self._token)

    def ask(self, schedule: Callable[[float], float]) -> Any:
        value = schedule(_progress.get())
        if len(self.schedules) == len(self._views):
            raise RuntimeError(f"a run asks for more than {len(self._views)} values of schedules")
        view = self._views[len(self.schedules)]
        self.schedules.append(schedule)
        with _disable_current_modes():  # no part of what is recorded
            view.fill_(value)
        return view

    def set(self) -> None:
        """Give the tensors the values at this point of the fit."""
        for view, schedule in zip(self._views, self.schedules, strict=False):
            view.fill_(schedule(_progress.get()))


@dataclass(frozen=True)
class linear:
    r"""From one value to another along a line, and constant before and after.

    References:
        Ladder Variational Autoencoders (Sonderby et al., 2016) https://arxiv.org/abs/1602.02282

    Arguments:
        first: value until ``begin``.
        last: value from ``end`` on.
        begin: part of the fit, in [0, 1].
        end: part of the fit, after ``begin``.

    Raises:
        ValueError: for an end that is not after the begin, or outside the fit.

    Example:
        >>> linear(0.0, 25.0, end=0.5)(0.25)
        12.5
    """

    first: float = 0.0
    last: float = 1.0
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(
                f"a schedule must end after it begins, both as parts of the fit from 0 to 1; got begin={self.begin!r} "
                f"and end={self.end!r}"
            )

    def __call__(self, done: float) -> float:
        part = min(max((done - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.first + part * (self.last - self.first)


@dataclass(frozen=True)
class cyclical:
    r"""From one value to another again and again, each time along a line and then constant.

    References:
        Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing (Fu et al., 2019)
        https://arxiv.org/abs/1903.10145

    Arguments:
        first: value at the start of each cycle.
        last: value at its end.
        cycles: how many there are in the fit.
        rising: part of each cycle until the last value is reached.

    Raises:
        ValueError: for less than one cycle, or a part outside (0, 1].

    Example:
        >>> [cyclical(cycles=2)(t) for t in (0.0, 0.125, 0.4, 0.5, 1.0)]
        [0.0, 0.5, 1.0, 0.0, 1.0]
    """

    first: float = 0.0
    last: float = 1.0
    cycles: int = 4
    rising: float = 0.5

    def __post_init__(self) -> None:
        if self.cycles < 1 or not 0 < self.rising <= 1:
            raise ValueError(
                f"there must be at least one cycle, with a rising part in (0, 1]; got cycles={self.cycles!r} and "
                f"rising={self.rising!r}"
            )

    def __call__(self, done: float) -> float:
        within = 1.0 if done >= 1 else done * self.cycles % 1.0
        return self.first + min(within / self.rising, 1.0) * (self.last - self.first)
