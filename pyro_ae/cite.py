"""References as the docstrings give them."""

from __future__ import annotations

import inspect
from typing import Any


def cite(thing: Any) -> str:
    """The references of a model, guide, objective or engine, as its docstring gives them.

    Arguments:
        thing: an object, class, function or module.

    Returns:
        One reference a line; for a module those of all it defines.

    Raises:
        ValueError: for a thing without references.

    Example:
        >>> from pyro_ae import elbo
        >>> print(cite(elbo))
        Auto-Encoding Variational Bayes (Kingma and Welling, 2014) https://arxiv.org/abs/1312.6114
    """
    if inspect.ismodule(thing):
        parts = [v for v in vars(thing).values() if getattr(v, "__module__", None) == thing.__name__]
        found = list(dict.fromkeys(r for p in (thing, *parts) for r in references(p)))
    else:
        found = references(thing) or references(type(thing))
    if not found:
        name = getattr(thing, "__name__", type(thing).__name__)
        raise ValueError(f"{name} has no References section in its docstring")
    return "\n".join(found)


def references(thing: Any) -> list[str]:
    """The entries of a docstring's References section; an entry ends with its address."""
    lines = (inspect.getdoc(thing) or "").splitlines()
    if "References:" not in lines:
        return []
    entries, words = [], []
    for line in lines[lines.index("References:") + 1 :]:
        if line and not line.startswith(" "):
            break
        words += line.split()
        if words and words[-1].startswith("http"):
            entries.append(" ".join(words))
            words = []
    return [*entries, " ".join(words)] if words else entries
