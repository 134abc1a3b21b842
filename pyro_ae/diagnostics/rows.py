"""Which rows of the data a diagnostic looks at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..data import Call, LoadedRows, Rows
from ..program import Program
from .groups import View, look

T = TypeVar("T")


def evenly(total: int, most: int) -> Tensor:
    """Numbers from 0 to ``total - 1``, spread evenly: all of them, or ``most``.

    Arguments:
        total: of all.
        most: of those to be taken.

    Example:
        >>> evenly(100, 4)
        tensor([ 0, 33, 66, 99])
    """
    return torch.linspace(0, total - 1, min(most, total), dtype=torch.double, device="cpu").round().long()


def chosen_rows(total: int, rows: int | Sequence[int] | Tensor | None) -> Tensor:
    """Which of ``total`` rows are looked at: so many, spread evenly, or those of an index; all for None.

    Arguments:
        total: how many rows there are.
        rows: a number, or an index.

    Raises:
        ValueError: for a number below 1, or an index that is empty or out of range.

    Example:
        >>> chosen_rows(100, 4)
        tensor([ 0, 33, 66, 99])
    """
    if rows is None:
        return torch.arange(total)
    if isinstance(rows, int):
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        return evenly(total, rows)
    index = torch.as_tensor(rows).long().cpu()
    if index.dim() != 1 or not len(index) or int(index.min()) < 0 or int(index.max()) >= total:
        raise ValueError(f"rows must be a number or an index [n] in [0, {total}), got {index.tolist()}")
    return index


Sample = tuple[Call, Tensor | None]
"""A call, and which of its rows are meant, or None for all."""


def samples(rows: Rows | LoadedRows, most: int, device: torch.device) -> list[Sample]:
    """Some of the rows, spread evenly; and all of them, for guides that have parameters for each row."""
    if isinstance(rows, LoadedRows):
        return [(next(rows.batches(device=device)), None)]
    if rows.size is None or rows.size <= most:
        return [(rows.call(), None)]
    index = evenly(rows.size, most)
    return [(rows.take(index).call(), None), (rows.call(), index)]


def first(
    found: list[Sample], make: Callable[[Call], T], fits: Callable[[T], bool] = lambda made: True
) -> tuple[Call, Tensor | None, T]:
    """The first sample that what is made of it fits, or the last."""
    for batch, index in found[:-1]:
        try:
            made = make(batch)
        except (ValueError, RuntimeError, IndexError):
            continue
        if fits(made):
            return batch, index, made
    batch, index = found[-1]
    return batch, index, make(batch)


def some_rows(program: Program, held: Rows | LoadedRows, most: int) -> tuple[Call, Tensor | None, View]:
    """A call with some of the rows, which of its rows are meant (None for all), and its sites."""
    return first(samples(held, most, program.device), lambda batch: look(program, batch))


def numbers(rows: Rows | LoadedRows, most: int) -> Tensor | None:
    """Which rows of the data are looked at, where it is known."""
    return None if isinstance(rows, LoadedRows) or rows.size is None else evenly(rows.size, most)
