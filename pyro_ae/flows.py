"""Distributions made by layers of invertible maps, which remember the density of their draws; zuko's among them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Protocol

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints


class Layer(Protocol):
    """An invertible map of vectors ``[*, d]``; both ways give the logarithm of its determinant at z, ``[*]``, too."""

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]: ...

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]: ...


class Pushforward(dist.TorchDistribution):
    r"""The distribution of a base's draws after layers of invertible maps.

    .. math:: \log q(x) = \log q_0(z) - \sum_l \log |\det J_l|

    A draw's density is found on the way, and remembered for that very tensor. At other values, and where a gradient is
    asked for that the draw was made without, the layers are inverted.

    References:
        Variational Inference with Normalizing Flows (Rezende and Mohamed, 2015) https://arxiv.org/abs/1505.05770

    Arguments:
        base: over vectors, event ``[d]``, such as a normal distribution.
        layers: the first is the one next to the base.

    Example:
        >>> base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> q = Pushforward(base, [Affine(torch.ones(2), torch.tensor([1.0, 2.0]))])
        >>> q.log_prob(torch.ones(2))
        tensor(-2.5310)
    """

    has_rsample = True
    support = constraints.independent(constraints.real, 1)
    arg_constraints: ClassVar[dict] = {}

    def __init__(self, base: Distribution, layers: Sequence[Layer]) -> None:
        self.base, self.layers = base, layers
        self._drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        z = self.base.rsample(torch.Size(sample_shape))
        log_q = self.base.log_prob(z)
        for layer in self.layers:
            z, log_det = layer(z)
            log_q = log_q - log_det
        self._drawn = z, log_q
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is not None:
            drawn, log_q = self._drawn
            if value is drawn and (log_q.requires_grad or not torch.is_grad_enabled()):
                return log_q
        log_dets = []
        for layer in reversed(self.layers):
            value, log_det = layer.inverse(value)
            log_dets.append(log_det)
        return self.base.log_prob(value) - sum(log_dets)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Pushforward:
        new = copy.copy(self)
        new.base, new._batch_shape, new._drawn = (
            self.base.expand(torch.Size(batch_shape)),
            torch.Size(batch_shape),
            None,
        )
        return new


@dataclass(frozen=True)
class Affine:
    """The layer x = loc + scale z, element by element."""

    loc: Tensor
    scale: Tensor

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc + self.scale * z, self.scale.log().sum(-1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x - self.loc) / self.scale, self.scale.log().sum(-1)


@dataclass(frozen=True)
class Zuko:
    """A transform of zuko as a layer."""

    transform: Any

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.call_and_ladj(z)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.transform.inv.call_and_ladj(x)
        return z, -log_det


def zuko() -> ModuleType:
    """The module zuko, imported now; its import switches validation off in the whole process, which is put back."""
    validated = Distribution._validate_args
    import zuko

    Distribution.set_default_validate_args(validated)
    return zuko


@contextmanager
def unvalidated() -> Iterator[None]:
    """No validation of distributions that are made here, as zuko's own need."""
    validated = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(validated)


def tanh_root(target: Tensor, gain: Tensor, slope: Tensor | float, shift: Tensor) -> Tensor:
    """The a for which a + gain tanh(slope a + shift) is the target, element by element, with its first derivatives.

    There is one where gain times slope is above -1.
    """
    with torch.no_grad():
        low, high = target - gain.abs(), target + gain.abs()
        for _ in range(torch.finfo(target.dtype).bits):  # halvings of the bracket, to the last bit
            middle = (low + high) / 2
            over = middle + gain * torch.tanh(slope * middle + shift) > target
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        root = (low + high) / 2
    height = torch.tanh(slope * root + shift)
    residual = root + gain * height - target
    rise = 1 + gain * slope * (1 - height.square())
    return root - (residual - residual.detach()) / rise.detach()
