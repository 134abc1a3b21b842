"""Reproductions of papers: a method and its baselines run under one protocol, and the paper's claims checked on it.

A paper is a file of ``tutorials/papers``. Its docstring gives in its first paragraph the claim in a sentence, in the
second the ``References:``, and then the protocol. It holds

- ``SCALES``: names of the scales it can be run at, such as ``"small"`` and ``"full"``, the paper's own;
- ``run(scale, seed, progress)``: a data frame with a row for each method and setting;
- ``CLAIMS``: each claim in words, to a function that checks it on that data frame;
- ``NOT_AT_SMALL``: claims that do not hold at scale ``"small"``, and why;
- ``PAPER``: rows that the paper printed, in columns of the data frame.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import time
import warnings
from dataclasses import dataclass
from difflib import get_close_matches
from types import ModuleType
from typing import TYPE_CHECKING

from .types import PosteriorWarning

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, repr=False, eq=False)
class Report:
    """What came of a reproduction; ``print`` shows all of it.

    Arguments:
        name: of the paper's file.
        about: the paper's claim in a sentence, and its references.
        scale: of the run.
        seed: of the run.
        table: a row for each method and setting.
        claims: each claim, to whether it holds on the table.
        excused: claims that are known not to hold at this scale, and why.
        paper: what the paper printed, in columns of the table; empty where no number is known.
        seconds: that the run took.
    """

    name: str
    about: str
    scale: str
    seed: int
    table: DataFrame
    claims: dict[str, bool]
    excused: dict[str, str]
    paper: DataFrame
    seconds: float

    @property
    def failed(self) -> list[str]:
        """Claims that do not hold, and are not known not to."""
        return [claim for claim, holds in self.claims.items() if not holds and claim not in self.excused]

    def __str__(self) -> str:
        parts = [
            self.about,
            f"{self.name}, scale {self.scale}, seed {self.seed}: {self.seconds:.0f} s",
            _aligned(self.table),
            "\n".join(self._verdict(claim, holds) for claim, holds in self.claims.items()),
        ]
        if len(self.paper):
            parts.append("The paper's numbers:\n" + _aligned(self.paper))
        return "\n\n".join(parts)

    def _verdict(self, claim: str, holds: bool) -> str:
        known = f"\n         known at this scale: {self.excused[claim]}" if claim in self.excused else ""
        return f"{'holds' if holds else 'FAILS'}    {claim}{known}"


def _aligned(table: DataFrame) -> str:
    cells = table.convert_dtypes().astype(object)  # whole numbers as such, though some are missing
    return cells.where(table.notna(), "-").to_string(index=False, float_format="{:.2f}".format)


def names() -> list[str]:
    """Names of the papers that can be reproduced.

    Example:
        >>> "importance_weighted_autoencoder" in names()
        True
    """
    from . import papers

    return sorted(info.name for info in pkgutil.iter_modules(papers.__path__))


def load(name: str) -> ModuleType:
    """The file of a paper.

    Arguments:
        name: one of :func:`names`.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> sorted(load("importance_weighted_autoencoder").SCALES)
        ['full', 'medium', 'small']
    """
    if name not in names():
        close = get_close_matches(name, names(), 3, 0.4)
        raise ValueError(
            f"there is no paper {name!r} to reproduce"
            + (f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; there are {', '.join(names())}")
        )
    return importlib.import_module(f"pyro_ae.papers.{name}")


def paragraphs(paper: ModuleType) -> list[str]:
    """The paragraphs of a paper's docstring: its claim in a sentence, its references, its protocol.

    Arguments:
        paper: what :func:`load` gives.

    Example:
        >>> paragraphs(load("importance_weighted_autoencoder"))[1].splitlines()[0]
        'References:'
    """
    return (inspect.getdoc(paper) or "").split("\n\n")


def reproduce(name: str, scale: str = "small", seed: int = 0, progress: bool = False) -> Report:
    """Run a paper's comparison, and check its claims.

    Arguments:
        name: one of :func:`names`.
        scale: ``"small"``, within seconds; or another that the paper's file has, such as the paper's own ``"full"``.
        seed: makes the run repeatable.
        progress: whether to show how far it is.

    Raises:
        ValueError: for an unknown name or scale.

    Example:
        >>> reproduce("importance_weighted_autoencoder", "huge")
        Traceback (most recent call last):
        ValueError: importance_weighted_autoencoder has no scale 'huge'; it has 'small', 'medium' and 'full'
    """
    from pandas import DataFrame

    paper = load(name)
    if scale not in paper.SCALES:
        *most, last = map(repr, paper.SCALES)
        known = f"{', '.join(most)} and {last}" if most else last
        raise ValueError(f"{name} has no scale {scale!r}; it has {known}")
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PosteriorWarning)  # what a paper compares may well be poor
        table = paper.run(scale, seed, progress)
    seconds = time.perf_counter() - start
    printed = DataFrame(paper.PAPER)
    shared = [column for column in table if column in printed]
    return Report(
        name=name,
        about="\n\n".join(paragraphs(paper)[:2]),
        scale=scale,
        seed=seed,
        table=table,
        claims={claim: bool(check(table)) for claim, check in paper.CLAIMS.items()},
        excused=dict(paper.NOT_AT_SMALL) if scale == "small" else {},
        paper=printed[[*shared, *printed.columns.difference(shared)]],
        seconds=seconds,
    )
