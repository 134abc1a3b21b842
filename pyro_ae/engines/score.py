"""How good a fit is at some point, and whether that is better than before or only noise."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Score(NamedTuple):
    """An evaluation: values of independent batches, and their weights."""

    values: Tensor
    weights: Tensor
    paired: bool

    @property
    def mean(self) -> float:
        return float((self.values * self.weights).sum() / self.weights.sum())

    def improves(self, best: Score | None) -> bool:
        """Whether it is lower than the best by more than the standard error of the difference."""
        if best is None:
            return True
        if self.paired and self.values.shape == best.values.shape:
            # same batches, same noise: the difference has far less noise than either
            error = _standard_error(best.values - self.values)
        else:
            error = math.hypot(_standard_error(self.values), _standard_error(best.values))
        return best.mean - self.mean > error


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
