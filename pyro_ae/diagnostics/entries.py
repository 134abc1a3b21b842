"""The single numbers of sites, and what they are called."""

from __future__ import annotations

import math
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
        names: of sites, or of single numbers such as ``"theta[3]"``; the first of each site in turn by default.
        most: how many, at most, where they are not named one by one.

    Raises:
        ValueError: for a name that is not there.
    """
    flat = {n: columns(v) for n, v in sites.items()}
    labels = {n: [label(n, v.shape[2:], i) for i in range(flat[n].shape[2])] for n, v in sites.items()}
    found: list[tuple[str, int]] = []
    for name in sites if names is None else names:
        if name in sites:
            found += [(name, i) for i in range(flat[name].shape[2])]
            continue
        where = [(site, of.index(name)) for site, of in labels.items() if name in of]
        if not where:
            known = ", ".join(map(repr, sites))
            raise ValueError(f"there is no {name!r}; the sites are {known}, and a single number is called 'site[0, 1]'")
        found += where
    if len(found) > most and any(n in sites for n in (names or sites)):
        share = math.ceil(most / len({site for site, _ in found}))
        some = [(s, i) for k, (s, i) in enumerate(found) if sum(s == other for other, _ in found[:k]) < share]
        found = some[:most]
    for site, i in found:
        yield labels[site][i], flat[site][..., i].numpy()
