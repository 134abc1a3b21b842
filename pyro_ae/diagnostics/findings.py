"""What the checks of a posterior found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

GOOD, USABLE, POOR = range(3)


@dataclass(frozen=True)
class Picture:
    """A figure that is drawn when it is looked at."""

    title: str
    caption: str
    draw: Callable[[], Any]
    """Gives the axes."""


@dataclass
class Findings:
    """Sentences with how bad they are, numbers of the whole and of single rows, and pictures."""

    sentences: list[tuple[int, str]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    point: bool = False
    """Whether the guide draws one value, as those of maximum a posteriori do."""

    def add(self, level: int, sentence: str) -> None:
        self.sentences.append((level, sentence))

    def show(self, title: str, caption: str, draw: Callable[[], Any]) -> None:
        self.pictures.append(Picture(title, caption, draw))

    @property
    def worst(self) -> int:
        return max((level for level, _ in self.sentences), default=GOOD)
