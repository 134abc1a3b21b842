"""Values that change in the course of a fit: functions of the part of it that is done, from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

Schedule: TypeAlias = float | Callable[[float], float]
"""A number, or a function of the part of the fit that is done."""

_progress: ContextVar[float] = ContextVar("progress", default=1.0)


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
    """The value of a schedule at this point of the fit, or the number that it is."""
    return schedule(_progress.get()) if callable(schedule) else schedule


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
