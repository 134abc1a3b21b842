"""Layers of networks computed in fewer bits, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

PRECISIONS = ("float32", "bf16")

LAYERS = (
    F.linear,
    F.bilinear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.scaled_dot_product_attention,
)


def check_precision(precision: str) -> None:
    """Refuse what ``fit(precision=...)`` is not."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")


@contextmanager
def layers_in(precision: str) -> Iterator[None]:
    """Compute the layers of networks in bfloat16 where the precision is ``"bf16"``.

    Weights, what layers give, and all that is no layer stay in single precision: activations, draws, densities and
    the log-weights that are summed from them. ``torch.autocast`` would leave what layers give in bfloat16, and with it
    the densities of what is drawn from them, to 3 digits.

    Example:
        >>> with layers_in("bf16"):
        ...     F.linear(torch.tensor([1.0]), torch.tensor([[1.001]]))
        tensor([1.])
    """
    if precision == "float32":
        yield
    else:
        with _Lower():
            yield


class _Lower(TorchFunctionMode):
    """Layers take bfloat16 and give single precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in LAYERS:
            return func(*args, **kwargs)
        args, kwargs = tree_map(_lower, (args, kwargs))
        out = func(*args, **kwargs)
        return out.float() if out.dtype == torch.bfloat16 else out


def _lower(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.dtype == torch.float32 else value
