"""The numbers, names and switches that Python objects keep: what a recorded run takes for granted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))

MOST = 20_000
"""Values that are looked at; an object with more of them is data."""

MANY = 1000
"""Entries of a container that are looked at."""

CACHES = ("_cached_", "_pyro_context")
"""What attributes begin with that torch and Pyro write in each run for that run; plates and traces are such, too."""


def settings(roots: Mapping[str, Any], modules: Iterable[nn.Module] = ()) -> dict[str, Any]:
    """Plain values that are reached from functions and modules, and which tensors they hold, by where they were found.

    Attributes of objects, entries of containers, and the variables of a function's closure and of its file are
    followed. Of a tensor it counts which one it is and whether it is trained, and not its values.

    Arguments:
        roots: name to object.
        modules: looked at as well.

    Example:
        >>> scale = [1.0]
        >>> settings({"model": lambda: scale[0]})
        {'model.scale[0]': 1.0, 'model.scale': 1}
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    stack = [*roots.items(), *((f"{type(m).__name__}", m) for m in modules)][::-1]
    while stack and len(found) < MOST:
        path, value = stack.pop()
        if isinstance(value, PLAIN):
            found[path] = value
        elif isinstance(value, Tensor):
            found[path] = (id(value), value.requires_grad)
        elif id(value) not in seen and not isinstance(value, type | ModuleType | Messenger | Trace):
            seen.add(id(value))
            # two modules of one kind have one name
            stack += [(f"{path}{'' if f'{path}{n}' not in found else id(value)}{n}", v) for n, v in _parts(value)]
    return found


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [("", len(value)), *((f"[{n!r}]", v) for n, v in islice(list(value.items()), MANY))]
    if isinstance(value, list | tuple | set | frozenset):
        return [("", len(value)), *((f"[{i}]", v) for i, v in enumerate(islice(value, MANY)))]
    if isinstance(value, MethodType):
        return [("", value.__self__), ("", value.__func__)]
    if isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        inside = [(f".{n}", c.cell_contents) for n, c in cells if _filled(c)]
        names = [n for n in value.__code__.co_names if n in value.__globals__]
        outside = [(f".{n}", value.__globals__[n]) for n in names if _own(value.__globals__[n])]
        wrapped = [(".__wrapped__", value.__wrapped__)] if hasattr(value, "__wrapped__") else []
        return [*inside, *outside, *wrapped]
    kept = getattr(value, "__dict__", None)
    parts = [] if kept is None else [(f".{n}", v) for n, v in list(kept.items()) if not n.startswith(CACHES)]
    parts += [(f".{n}", getattr(value, n)) for n in _slots(type(value)) if hasattr(value, n)]
    if hasattr(value, "func") and hasattr(value, "keywords"):  # a partial
        parts += [("", value.func), ("", value.args), ("", value.keywords)]
    return parts


def _slots(kind: type) -> list[str]:
    if kind.__module__.partition(".")[0] in ("builtins", "torch", "numpy", "pyro"):
        return []
    slots = [vars(k).get("__slots__", ()) for k in kind.__mro__]
    return [n for names in slots for n in ([names] if isinstance(names, str) else names)]


def _own(value: Any) -> bool:
    """Whether a variable of a file is a setting and no import."""
    return isinstance(value, PLAIN) or type(value) in (list, dict, tuple, set)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Where two looks at settings differ.

    Example:
        >>> changed({"a": 1, "b": 2}, {"a": 1, "b": 3})
        ['b']
    """
    names = dict.fromkeys((*before, *after))
    missing = object()
    return [n for n in names if not _equal(before.get(n, missing), after.get(n, missing))]


def _equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and (a == b or (a != a and b != b)))
