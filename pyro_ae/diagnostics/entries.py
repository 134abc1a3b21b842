"""The single numbers of sites, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor


def label(name: str, shape: Sequence[int], index: int) -> str:
    """What number ``index`` of a site, counted along its flattened ``shape``, is called.

    Arguments:
        name: of the site.
        shape: of its values, without chains and draws.
        index: from 0.

    Example:
        >>> label("theta", [2, 3], 4), label("mu", [], 0)
        ('theta[1, 1]', 'mu')
    """
    where = ", ".join(str(int(k)) for k in np.unravel_index(index, tuple(shape))) if len(shape) else ""
    return f"{name}[{where}]" if where else name


def columns(draws: Tensor) -> Tensor:
    """Draws ``[chains, draws, *shape]`` as ``[chains, draws, numbers]``, in double precision on the CPU.

    Arguments:
        draws: of a site.
    """
    return draws.detach().cpu().double().reshape(*draws.shape[:2], -1)


def pick(sites: Mapping[str, Tensor], names: Sequence[str] | None, most: int) -> Iterator[tuple[str, np.ndarray]]:
    """Some of the sites' numbers, each with its name and its draws ``[chains, draws]``.

    Arguments:
        sites: name to draws ``[chains, draws, *shape]``.
        names: of sites, or of single numbers such as ``"theta[3]"``; some of each site by default.
        most: how many, at most, where they are not named one by one.

    Raises:
        ValueError: for a name that is not there.
    """
    named = list(sites if names is None else names)
    counts = _shares({n: sites[n].shape[2:].numel() for n in named if n in sites}, most)
    for name in named:
        site, numbers = (name, range(counts[name])) if name in sites else _parse(sites, name)
        flat = sites[site].reshape(*sites[site].shape[:2], -1)
        for i in numbers:
            yield label(site, sites[site].shape[2:], i), columns(flat[..., i])[..., 0].numpy()


def _shares(sizes: Mapping[str, int], most: int) -> dict[str, int]:
    """How many numbers of each site, dealt out in turn until there are ``most`` or no more."""
    counts = dict.fromkeys(sizes, 0)
    while sum(counts.values()) < min(most, sum(sizes.values())):
        for name in sizes:
            if counts[name] < sizes[name] and sum(counts.values()) < most:
                counts[name] += 1
    return counts


def _parse(sites: Mapping[str, Tensor], name: str) -> tuple[str, list[int]]:
    """The site and the place of a single number, from what it is called."""
    found = re.fullmatch(r"(.*)\[(\d+(?:, ?\d+)*)\]", name)
    if found and found[1] in sites:
        shape, where = sites[found[1]].shape[2:], [int(k) for k in found[2].split(",")]
        if len(where) == len(shape) and all(k < size for k, size in zip(where, shape, strict=True)):
            return found[1], [int(np.ravel_multi_index(where, tuple(shape)))]
    known = ", ".join(map(repr, sites))
    raise ValueError(f"there is no {name!r}; the sites are {known}, and a single number is called 'site[0, 1]'")
