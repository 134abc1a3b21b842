"""Rows of data, however the user holds them; their minibatches; and missing values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.distributions import Independent
from torch import Tensor
from torch.distributions import Distribution
from torch.utils.data import DataLoader, SubsetRandomSampler

from .arrays import as_tensor, called, labels_of, package_of
from .prefetch import ahead

STREAMED = 2**30
"""Bytes of rows from which on batches are fetched ahead of their use: such rows may lie in a file."""


class Call(NamedTuple):
    """The arguments of one call of a model and its guide."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}


def call_with(batch: Any) -> Call:
    """How a model is called on a batch: ``model(x)``, ``model(*tuple)`` or ``model(**dict)``."""
    if isinstance(batch, Call):
        return batch
    if batch is None:
        return Call()
    if isinstance(batch, Mapping):
        return Call((), dict(batch))
    return Call(batch if isinstance(batch, tuple) else (batch,))


_missing: ContextVar[bool | Callable[[Tensor], bool] | None] = ContextVar("missing", default=None)


@contextmanager
def missing_values(known: bool | Callable[[Tensor], bool]) -> Iterator[None]:
    """Where it is known whether data, or a tensor, have missing values, nothing looks: no look can be captured."""
    token = _missing.set(known)
    try:
        yield
    finally:
        _missing.reset(token)


def _is_missing(x: Tensor) -> Tensor | None:
    """Which values are missing, or None where none is."""
    known = _missing.get() if x.is_floating_point() else False
    known = known(x) if callable(known) else known
    if known is False:
        return None
    missing = torch.isnan(x)
    return missing if known or missing.any() else None


def observe(name: str, distribution: Distribution, x: Tensor | None) -> Tensor:
    """Observe ``x``, leaving out its missing values (NaN) element by element; sample where ``x`` is None.

    Arguments:
        name: of the site.
        distribution: of one row, with its event dims by ``.to_event``.
        x: values ``[*batch, *event]``, NaN where missing.

    Raises:
        ValueError: where single elements are missing of a distribution that has no density element by element, such
            as a multivariate normal. Events that are missing as a whole are left out of any distribution.

    Example:
        >>> normal = pyro.distributions.Normal(torch.zeros(2, 3), 1.0).to_event(1)
        >>> x = torch.tensor([[0.0, 0.0, float("nan")], [0.0, 0.0, 0.0]])
        >>> site = pyro.poutine.trace(observe).get_trace("x", normal, x).nodes["x"]
        >>> site["fn"].log_prob(site["value"])  # -0.9189 for each of 2 and of 3 values
        tensor([-1.8379, -2.7568])
    """
    if x is None:
        return pyro.sample(name, distribution)
    missing = _is_missing(x)
    if missing is None:
        return pyro.sample(name, distribution, obs=x)
    return pyro.sample(name, masked(name, distribution, missing), obs=torch.where(missing, _inside(distribution), x))


def _inside(distribution: Distribution) -> Tensor:
    """A value inside the support, to stand where a value is missing: its density is masked out."""
    support = getattr(distribution, "support", None)
    zero = torch.zeros(())
    if support is None or bool(support.check(zero.expand(distribution.event_shape)).all()):
        return zero
    return distribution.sample()


def masked(name: str, distribution: Distribution, missing: Tensor) -> Distribution:
    """A distribution whose density leaves out missing elements, or events that are missing as a whole."""
    base, dims = distribution, 0
    while isinstance(base, (Independent, torch.distributions.Independent)):
        dims += base.reinterpreted_batch_ndims
        base = base.base_dist
    joint = len(base.event_shape)
    if joint == 0:
        observed, inner = ~missing, base
    else:
        whole = missing.flatten(-joint).all(-1)
        if not torch.equal(missing.flatten(-joint).any(-1), whole):
            raise ValueError(
                f"site '{name}': single elements are missing (NaN), and {type(base).__name__} has no density element "
                "by element: use a distribution with .to_event, or leave out whole events"
            )
        observed, inner = ~whole, base
    result = inner.mask(observed)  # type: ignore[attr-defined]
    return result.to_event(dims) if dims else result


def fill_missing(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Zeros for missing values and the mask of what is observed, or None where nothing is missing."""
    missing = _is_missing(x)
    if missing is None:
        return x, None
    return x.masked_fill(missing, 0.0), ~missing


@dataclass(frozen=True)
class Rows:
    """The data of a fit: entries that are rows, entries that are settings, and how the model is called with them.

    Attributes:
        form: ``"one"`` for ``model(x)``, ``"tuple"`` for ``model(*data)``, ``"dict"`` for ``model(**data)``,
            ``"none"`` for ``model()``.
        entries: name (or position) to value; rows are tensors with at least one dim.
        labels: of the rows, where the data had an index.
    """

    form: str
    entries: dict[str, Any]
    labels: tuple | None = None

    @property
    def rows(self) -> dict[str, Tensor]:
        return {name: v for name, v in self.entries.items() if isinstance(v, Tensor) and v.dim() > 0}

    @property
    def lengths(self) -> dict[str, int]:
        return {name: v.shape[0] for name, v in self.rows.items()}

    @property
    def size(self) -> int | None:
        """N, or None where entries differ in length or none is rows."""
        lengths = set(self.lengths.values())
        return lengths.pop() if len(lengths) == 1 else None

    def call(self) -> Call:
        """The arguments of a call with all rows."""
        return self._call(self.entries)

    def _call(self, entries: dict[str, Any]) -> Call:
        if self.form == "dict":
            return Call((), entries)
        return Call(tuple(entries.values()))

    def take(self, index: Any) -> Rows:
        """Some rows, by an index, a slice or a mask."""
        rows = self.rows
        entries = {name: v[index] if name in rows else v for name, v in self.entries.items()}
        labels = None
        if self.labels is not None:
            chosen = np.arange(len(self.labels))[index.cpu().numpy() if isinstance(index, Tensor) else index]
            labels = tuple(self.labels[i] for i in chosen)
        return replace(self, entries=entries, labels=labels)

    def need_size(self) -> int:
        """N; an error where the entries do not agree on it."""
        if self.size is not None:
            return self.size
        if not self.lengths:
            raise ValueError("batch_size needs rows: the data has no tensor or array with at least one dim")
        lengths = ", ".join(f"{called(n)} has {k}" for n, k in self.lengths.items())
        raise ValueError(
            f"batch_size needs entries with one row each for the same N, but {lengths}. Bind what is not rows to the "
            "model with functools.partial, or leave out batch_size"
        )

    def check_batch_size(self, batch_size: int | None) -> None:
        if batch_size is None:
            return
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        size = self.need_size()
        if batch_size > size:
            raise ValueError(f"batch_size={batch_size} is larger than the {size} rows of the data")

    def batches(self, batch_size: int | None, *, shuffle: bool = True, device: Any = None) -> Iterator[Call]:
        """Minibatches of rows, the last one smaller where it must be; all rows at once without a batch size."""
        if batch_size is None:
            yield self.to(device).call()
            return
        size = self.need_size()
        where = next(iter(self.rows.values())).device
        order = torch.randperm(size, device=where) if shuffle else torch.arange(size, device=where)
        crossing = device is not None and torch.device(device).type != where.type
        taken: Iterator[Rows]
        if crossing or self.nbytes >= STREAMED:
            taken = ahead(lambda index: self.take(index).pinned(crossing), order.split(batch_size))
        else:
            taken = map(self.take, order.split(batch_size))
        for rows in taken:
            yield rows.to(device).call()

    def first(self, batch_size: int | None, device: Any = None) -> Call:
        return (self if batch_size is None else self.take(slice(0, batch_size))).to(device).call()

    def split(self, fraction: float) -> tuple[Rows, Rows]:
        """A random part of the rows to train on, and the rest, ``fraction`` of them, held out."""
        if not 0 < fraction < 1:
            raise ValueError(f"validation must be data, or a fraction between 0 and 1, got {fraction}")
        size = self.need_size()
        held = max(1, round(fraction * size))
        if held >= size:
            raise ValueError(f"validation={fraction} of {size} rows leaves nothing to train on")
        order = torch.randperm(size)
        return self.take(order[held:]), self.take(order[:held])

    def to(self, device: Any) -> Rows:
        if device is None or all(v.device == torch.device(device) for v in self.rows.values()):
            return self
        entries = {n: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for n, v in self.entries.items()}
        return replace(self, entries=entries)

    def resident(self, device: torch.device) -> Rows:
        """The rows on a device where they take less than half of what is free, else where they are."""
        if device.type == "cuda" and self.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            return self
        return self.to(device)

    def pinned(self, on: bool = True) -> Rows:
        """The rows in memory that a GPU can fetch from while the CPU goes on."""
        if not on:
            return self
        return replace(self, entries={n: v.pin_memory() if n in self.rows else v for n, v in self.entries.items()})

    @property
    def nbytes(self) -> int:
        return sum(v.nbytes for v in self.rows.values())

    @property
    def has_missing(self) -> bool:
        # part by part, as the rows may be more than memory holds
        parts = (part for v in self.rows.values() if v.is_floating_point() for part in v.split(_rows_of(v, 2**24)))
        return any(bool(torch.isnan(part).any()) for part in parts)

    def __repr__(self) -> str:
        if not self.entries:
            return "no data"
        parts = [
            f"{called(n)} {list(v.shape)}" if isinstance(v, Tensor) else f"{called(n)}={v!r}"
            for n, v in self.entries.items()
        ]
        return ", ".join(parts)


@dataclass(frozen=True)
class LoadedRows:
    """Rows that a ``DataLoader`` brings, batch by batch, as it likes."""

    loader: DataLoader
    labels: None = None

    @property
    def size(self) -> int:
        if isinstance(self.loader.sampler, SubsetRandomSampler):
            return len(self.loader.sampler)
        try:
            return len(self.loader.dataset)  # type: ignore[arg-type]
        except TypeError:
            raise ValueError(
                "the DataLoader's data set has no length, and N is needed to scale minibatches: give it __len__"
            ) from None

    def check_batch_size(self, batch_size: int | None) -> None:
        if batch_size is not None:
            raise ValueError(
                f"a DataLoader makes its own batches: leave out batch_size={batch_size}, or set it in the DataLoader"
            )
        if self.size == 0:
            raise ValueError("the data is empty: the DataLoader's data set has no rows")

    def batches(self, batch_size: int | None = None, *, shuffle: bool = True, device: Any = None) -> Iterator[Call]:
        for batch in self.loader:
            yield as_rows(tuple(batch) if isinstance(batch, list) else batch).to(device).call()

    def first(self, batch_size: int | None = None, device: Any = None) -> Call:
        # the loader may shuffle: its random state is not part of the fit's
        with torch.random.fork_rng(devices=()):
            return next(iter(self.batches(device=device)))

    def to(self, device: Any) -> LoadedRows:
        return self

    def resident(self, device: torch.device) -> LoadedRows:
        return self

    def call(self) -> Call:
        raise ValueError("this needs all data at once, and a DataLoader brings it in batches: pass tensors or arrays")

    def __repr__(self) -> str:
        return f"DataLoader of {self.size} rows"


def as_rows(data: Any) -> Rows | LoadedRows:
    """Data in any form that ``fit`` takes, as rows.

    Arrays, data frames and lists of numbers become tensors: floats in torch's default dtype, whole numbers as
    int64. Arrays in files (``numpy.memmap``) that have these dtypes stay there, and are read batch by batch. Tensors
    stay as they are. What is neither is a setting and passes through.

    Raises:
        ValueError: for empty data, for columns or arrays that are not numbers, and for images as bytes.
    """
    if isinstance(data, Rows | LoadedRows):
        return data
    if isinstance(data, DataLoader):
        return LoadedRows(data)
    if data is None:
        return Rows("none", {})
    labels = labels_of(data)
    if package_of(data) == "xarray" and hasattr(data, "data_vars"):
        data = {str(name): data[name] for name in data.data_vars}
    if isinstance(data, Mapping):
        form, entries = "dict", {str(name): v for name, v in data.items()}
    elif isinstance(data, tuple):
        form, entries = "tuple", {str(i): v for i, v in enumerate(data)}
    else:
        form, entries = "one", {"0": data}
    if not entries:
        raise ValueError("the data is empty; pass None for a model without arguments")
    converted = {name: as_tensor(v, name) for name, v in entries.items()}
    for value in entries.values():
        labels = labels or labels_of(value)
    rows = Rows(form, converted, labels)
    if form == "one" and not rows.rows:
        raise ValueError(
            f"data of type {type(data).__name__} has no rows: pass a tensor or array with at least one dim"
        )
    for name, length in rows.lengths.items():
        if length == 0:
            raise ValueError(f"the data is empty: {called(name)} has shape {tuple(rows.rows[name].shape)}")
    return rows


def _rows_of(v: Tensor, elements: int) -> int:
    """About how many rows have so many elements."""
    return max(1, elements // max(1, v[0].numel()))
