"""The continuous Bernoulli distribution by its logits, precise wherever they are."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property


class ContinuousBernoulli(TorchDistribution):
    r"""Values in [0, 1], such as grey levels.

    .. math:: p(x) = e^{\eta x} \Big/ \int_0^1 e^{\eta t} dt

    Torch's own, by probabilities, has near one half a gradient of rounding errors, and for logits beyond 16 none at all
    and a wrong mean.

    References:
        The continuous Bernoulli: fixing a pervasive error in variational autoencoders
        (Loaiza-Ganem and Cunningham, 2019) https://arxiv.org/abs/1907.06845

    Arguments:
        logits: :math:`\eta`, ``[*]``.

    Example:
        >>> ContinuousBernoulli(torch.zeros(3)).log_prob(torch.tensor([0.0, 0.5, 1.0])).exp()  # uniform
        tensor([1., 1., 1.])
    """

    arg_constraints = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ContinuousBernoulli:
        new = self._get_checked_instance(ContinuousBernoulli, _instance)
        new.logits = self.logits.expand(batch_shape)
        super(ContinuousBernoulli, new).__init__(new.logits.shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @lazy_property
    def probs(self) -> Tensor:
        """The density at 1 over the sum of those at 0 and 1."""
        return self.logits.sigmoid()

    @property
    def _size(self) -> tuple[Tensor, Tensor]:
        """Where logits are so small that series are precise, and their sizes elsewhere."""
        small = self.logits.abs() < 0.4
        return small, torch.where(small, 1.0, self.logits.abs())

    @property
    def _log_normaliser(self) -> Tensor:
        """Log of the integral of exp(eta (t - 1/2))."""
        small, size = self._size
        square = self.logits.square()
        series = square * (1.0 / 24.0 - square * (1.0 / 2880.0 - square / 181_440.0))
        return torch.where(small, series, 0.5 * size + torch.log1p(-torch.exp(-size)) - size.log())

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return (value - 0.5) * self.logits - self._log_normaliser

    @property
    def mean(self) -> Tensor:
        small, size = self._size
        square = self.logits.square()
        series = 0.5 + self.logits * (1.0 / 12.0 - square * (1.0 / 720.0 - square / 30_240.0))
        above = -1.0 / torch.expm1(-size) - 1.0 / size
        return torch.where(small, series, torch.where(self.logits > 0, above, 1.0 - above))

    @property
    def variance(self) -> Tensor:
        small, size = self._size
        square = self.logits.square()
        series = 1.0 / 12.0 - square * (1.0 / 240.0 - square * (1.0 / 6048.0 - square / 172_800.0))
        return torch.where(small, series, size**-2 - torch.exp(-size) / torch.expm1(-size).square())

    def icdf(self, value: Tensor) -> Tensor:
        tiny = self.logits.abs() < 1e-3
        size = torch.where(tiny, 1.0, self.logits.abs())
        series = value + 0.5 * self.logits * value * (1.0 - value)
        above = self.logits > 0
        below = torch.log1p(torch.where(above, 1.0 - value, value) * torch.expm1(-size)) / -size
        return torch.where(tiny, series, torch.where(above, 1.0 - below, below))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.logits.dtype, device=self.logits.device)
        least = torch.finfo(u.dtype).eps
        return self.icdf(u.clamp(least, 1.0 - least))

    def entropy(self) -> Tensor:
        return self._log_normaliser - (self.mean - 0.5) * self.logits
