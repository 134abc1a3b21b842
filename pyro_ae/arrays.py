"""Arrays, data frames and lists as tensors."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor


def called(name: str) -> str:
    return f"entry {name}" if name.isdigit() else f"'{name}'"


def package_of(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def labels_of(value: Any) -> tuple | None:
    """The labels of a data frame's or labelled array's rows, unless they only count."""
    if package_of(value) == "pandas" and type(value).__name__ in ("DataFrame", "Series"):
        index = value.index
        return None if type(index).__name__ == "RangeIndex" else tuple(index.tolist())
    if package_of(value) == "xarray" and value.dims:
        dim = next(iter(value.dims))
        return tuple(value.coords[dim].values.tolist()) if dim in value.coords else None
    return None


def as_tensor(value: Any, name: str) -> Any:
    if isinstance(value, Tensor):
        return _not_bytes(value, name)
    if isinstance(value, list):
        if not value:
            raise ValueError(f"the data is empty: {called(name)} is an empty list")
        try:
            value = np.asarray(value, dtype=None)
        except ValueError:
            raise ValueError(f"{called(name)} is a list whose parts differ in length; pad them with NaN") from None
        if value.dtype.kind not in "fiub":
            return value.tolist()
    if package_of(value) == "pandas" and type(value).__name__ in ("DataFrame", "Series"):
        return as_tensor(_columns(value, name), name)
    if package_of(value) == "xarray":
        value = value.values
    if not isinstance(value, np.ndarray) and hasattr(value, "__array__") and not np.isscalar(value):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or value.ndim == 0:
        return value
    if isinstance(value, np.memmap) and value.dtype in (np.int64, torch.empty(0).numpy().dtype):
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # no one writes to rows
            return torch.from_numpy(value)
    if not value.flags.writeable:  # a view into a data frame, which torch must not share
        value = value.copy()
    if value.dtype.kind == "f":
        return torch.as_tensor(value, dtype=torch.get_default_dtype())
    if value.dtype == np.uint8 or value.dtype.kind == "b":
        return _not_bytes(torch.as_tensor(value), name)
    if value.dtype.kind in "iu":
        return torch.as_tensor(value.astype(np.int64))
    raise ValueError(f"{called(name)} is an array of {value.dtype}, which is not numbers: encode it first")


def _columns(value: Any, name: str) -> np.ndarray:
    columns = dict(value.items()) if type(value).__name__ == "DataFrame" else {name: value}
    bad = [str(c) for c, v in columns.items() if getattr(v.dtype, "kind", "O") not in "fiub"]
    if bad:
        raise ValueError(f"columns {', '.join(map(repr, bad))} are not numbers: encode or drop them")
    array = value.to_numpy()
    return value.to_numpy(dtype=float, na_value=float("nan")) if array.dtype == object else array


def _not_bytes(value: Tensor, name: str) -> Tensor:
    if value.dtype == torch.uint8 and value.dim() > 1:
        raise ValueError(
            f"{called(name)} holds integer images: uint8 {tuple(value.shape)}, values up to {int(value.max())}. "
            "Scale them to [0, 1], as x.float() / 255, or take x.float() where they are counts"
        )
    return value
