"""What heads share: the map from features to parameters, supports, and draws of one row that are made together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to, constraints
from torch.distributions.transforms import ReshapeTransform


class Readout(nn.Linear):
    """The linear map of a head, from features ``[*, h]`` to the parameters of a distribution ``[*, p]``.

    Without features, h = 0, it is a constant that is learnt, which begins near zero.

    Raises:
        ValueError: when called, for features of another width.
    """

    def __init__(self, features: int, parameters: int) -> None:
        if features < 0:
            raise ValueError(f"a head has 0 or more features, got {features}")
        super().__init__(features, parameters)

    def reset_parameters(self) -> None:
        if self.in_features:
            super().reset_parameters()
        else:
            nn.init.uniform_(self.bias, -0.1, 0.1)

    def forward(self, features: Tensor) -> Tensor:
        if features.dim() == 0 or features.shape[-1] != self.in_features:
            raise ValueError(
                f"the head takes features [*, {self.in_features}], and the encoder gave {list(features.shape)}: make "
                "the encoder's outputs and the head's features the same number"
            )
        return super().forward(features)


def event_of(latent: int | Sequence[int]) -> torch.Size:
    """The event shape of a latent: ``[d]`` for a number, ``()`` for the empty tuple, a scalar.

    Raises:
        ValueError: for a size below 1.
    """
    shape = torch.Size([latent] if isinstance(latent, int) else latent)
    if any(size < 1 for size in shape):
        raise ValueError(f"latent must be a positive size or a shape of such, got {latent!r}")
    return shape


def free_size(latent: int | Sequence[int], support: constraints.Constraint) -> int:
    """How many unconstrained numbers make one value of a latent, such as d - 1 on the simplex.

    Raises:
        ValueError: for a support that no unconstrained space is mapped to, such as that of discrete values.
    """
    try:
        return biject_to(support).inverse_shape(event_of(latent)).numel()
    except NotImplementedError:
        raise ValueError(f"the head's draws are real numbers, and no transform takes them onto {support}") from None


def is_vector(latent: int | Sequence[int], support: constraints.Constraint) -> bool:
    """Whether unconstrained vectors ``[d]`` are values of the latent as they are."""
    return len(event_of(latent)) == 1 and biject_to(support) == biject_to(constraints.real)


def onto(free: Distribution, latent: int | Sequence[int], support: constraints.Constraint) -> Distribution:
    """A distribution over unconstrained vectors ``[m]``, carried onto the shape and support of the latent."""
    if is_vector(latent, support):
        return free
    to_support = biject_to(support)
    shape = to_support.inverse_shape(event_of(latent))
    # with their caches a draw finds the unconstrained value that it came from, and a flow that value's density
    transforms = [] if len(shape) == 1 else [ReshapeTransform(free.event_shape, shape, cache_size=1)]
    if to_support != biject_to(constraints.real):
        transforms.append(to_support.with_cache(1))
    return _Onto.of(free, transforms, constraints.independent(support, len(event_of(latent)) - support.event_dim))


class _Onto(dist.TransformedDistribution):
    """A transformed distribution that knows its support, of which torch forgets the bounds."""

    _support: constraints.Constraint

    @classmethod
    def of(cls, free: Distribution, transforms: list, support: constraints.Constraint) -> _Onto:
        new = cls(free, transforms)
        new._support = support
        return new

    @property
    def support(self) -> constraints.Constraint:
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Onto:
        new: _Onto = super().expand(batch_shape, _instance)
        new._support = self._support
        return new


def scale_of(log_scale: Tensor) -> Tensor:
    """A positive scale, within (e^-7, e^5): far outside it over- or underflows."""
    return torch.clamp(log_scale, -7.0, 5.0).exp()


class Jointly(dist.TorchDistribution):
    """A distribution whose draws of one row are made with one another, so that they cover it evenly.

    A head gives a distribution for each row, and particles expand it: dims that were not there at first hold copies of
    a row. Each draw by itself has the distribution; those of a row are not independent. What a subclass defines is
    :meth:`draw` and ``log_prob``.

    Arguments:
        rows: the batch shape that the head gave.
        event: the event shape.
    """

    has_rsample = True
    arg_constraints: ClassVar[dict] = {}

    def __init__(self, rows: torch.Size, event: torch.Size) -> None:
        self.rows = rows
        super().__init__(rows, event, validate_args=False)

    def draw(self, copies: int, rows: torch.Size) -> Tensor:
        """That many draws for each row, ``[copies, *rows, *event]``."""
        raise NotImplementedError

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        split = len(self.batch_shape) - len(self.rows)
        copies, rows = torch.Size(sample_shape) + self.batch_shape[:split], self.batch_shape[split:]
        return self.draw(copies.numel(), rows).reshape(copies + rows + self.event_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new


def beside(features: Tensor, value: Tensor, event_dims: int) -> Tensor:
    """Features ``[*, h]`` and a latent ``[*, *event]`` as features for what comes after it, ``[*, h + d]``."""
    flat = value.flatten(value.dim() - event_dims) if event_dims else value.unsqueeze(-1)
    leading = torch.broadcast_shapes(features.shape[:-1], flat.shape[:-1])
    parts = [part.expand(*leading, part.shape[-1]) for part in (features, flat.to(features.dtype))]
    return torch.cat(parts, -1)
