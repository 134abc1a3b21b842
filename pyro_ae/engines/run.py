"""What an engine is told about one fit: the data, and how to go about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..data import LoadedRows, Rows

if TYPE_CHECKING:
    from ..posterior import Posterior


class NonFiniteError(ValueError):
    """A loss, energy or gradient that is not finite; ``posterior`` holds what was found until then, if anything."""

    posterior: Posterior | None = None


@dataclass(frozen=True)
class Event:
    """What a callback sees after each evaluation.

    Attributes:
        step: optimiser steps (or draws) so far.
        epoch: passes over the data so far.
        metrics: the newest entry of the history.
        history: name to the values so far.
    """

    step: int
    epoch: int
    metrics: dict[str, float]
    history: dict[str, list[float]]


def fetched_at_once(device: torch.device) -> int:
    """After how many steps losses are fetched: a look at a GPU's values would have it wait for the next step."""
    return 16 if device.type == "cuda" else 1


@dataclass(frozen=True)
class Run:
    """One fit: its data and its circumstances; every engine is given one.

    Attributes:
        data: the rows.
        batch_size: rows of a minibatch, or None for all.
        plate: name of the plate that the rows sit in.
        device: where to compute.
        progress: whether to show a bar.
        validation: held-out rows.
        callbacks: called with an :class:`Event` after each evaluation; one that returns True ends the fit.
        checkpoint: folder for the state of the fit, from which it goes on if it is there.
        compile: how steps are captured, as for ``fit``.
        precision: of the layers of networks, as for ``fit``.
    """

    data: Rows | LoadedRows
    batch_size: int | None = None
    plate: str | None = "data"
    device: torch.device = torch.device("cpu")
    progress: bool = True
    validation: Rows | LoadedRows | None = None
    callbacks: Iterable[Callable[[Event], Any]] = ()
    checkpoint: Path | None = None
    compile: bool | str = "auto"
    precision: str = "float32"

    @property
    def minibatched(self) -> bool:
        return self.batch_size is not None or isinstance(self.data, LoadedRows)

    def refuse_checkpoint(self, engine: str) -> None:
        if self.checkpoint is not None:
            raise ValueError(
                f"{engine} keeps no checkpoint; samplers by stochastic gradients do, such as sghmc. Leave it out, and "
                "save the posterior when the fit is done; an interrupted fit (Ctrl-C) gives one too"
            )

    def refuse_precision(self, engine: str) -> None:
        if self.precision != "float32":
            raise ValueError(
                f"{engine} needs the precision that it is given: leave out precision={self.precision!r}, which is for "
                "svi and for samplers and optimisers by stochastic gradients"
            )

    def bar(self, total: int, unit: str, description: str = "") -> tqdm:
        return tqdm(
            total=total,
            unit=unit,
            desc=description,
            disable=not self.progress,
            dynamic_ncols=True,
            leave=True,
        )
