"""What the networks take: shapes, checked, and values beside the mask of which are observed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_shape(x: Tensor, shape: Sequence[int | str], what: str) -> None:
    """Refuse what is not ``[*, *shape]``; a size that is a word may be any.

    Raises:
        ValueError: that says what was expected.
    """
    found = x.shape[max(x.dim() - len(shape), 0) :]
    if len(found) != len(shape) or any(isinstance(n, int) and n != k for n, k in zip(shape, found, strict=True)):
        raise ValueError(f"expected {what} [*, {', '.join(map(str, shape))}], got a tensor of {tuple(x.shape)}")


def with_mask(x: Tensor, observed: Tensor | None, dim: int, *, missing: bool, name: str) -> Tensor:
    """The values, and beside them along a dim, for a network that takes missing ones, which are observed.

    What stands for a missing value, NaN too, is not looked at.

    Raises:
        ValueError: for a mask that the network does not take, or of another shape.
    """
    if observed is not None and not missing:
        raise ValueError(f"the input has missing values: build the network with {name}(..., missing=True)")
    if observed is not None and observed.shape != x.shape:
        raise ValueError(f"the mask of {tuple(observed.shape)} has another shape than the values of {tuple(x.shape)}")
    if not missing:
        return x
    if observed is None:
        return torch.cat([x, torch.ones_like(x)], dim)
    return torch.cat([torch.where(observed, x, 0.0), observed.to(x.dtype)], dim)
