"""A reference for a posterior: long chains on some rows, with the model as it was learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .data import LoadedRows, Rows
from .diagnostics.comparison import row_dim, rows_drawn
from .diagnostics.rows import chosen_rows
from .engines.nuts import nuts
from .fit import fit
from .posterior import Posterior
from .runtime import seeded
from .types import Model

STARTS = 500
"""Draws that the chains' initial points and mass matrix are made of."""


def reference(
    posterior: Posterior,
    data: Any = None,
    *,
    rows: int | Sequence[int] | Tensor = 10,
    draws: int = 1000,
    chains: int = 4,
    warmup: int = 500,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Posterior:
    r"""The No-U-Turn sampler's draws of the latents of some rows, with the model's parameters held fixed.

    .. math:: z_n \sim p_\theta(z \mid x_n)

    This is what a guide stands in for, so ``compare(posterior, reference(posterior))`` shows where the guide is wrong.
    All rows are sampled in one run; given the parameters they are independent. The chains begin at draws of the given
    posterior, which also give the first mass matrix; where that misses a mode by far, so may they. Whether they can be
    trusted themselves is what the result's ``report`` says. Latents that all rows share need all rows, so then all
    latents of the model are sampled with the whole data. Discrete latents are summed out and have no draws.

    References:
        The No-U-Turn Sampler: Adaptively Setting Path Lengths in Hamiltonian Monte Carlo (Hoffman and Gelman, 2014)
        https://jmlr.org/papers/v15/hoffman14a.html

    Arguments:
        posterior: of any engine; its model is not changed.
        data: rows; those of the fit by default.
        rows: how many of them, spread evenly, or which, where each has latents of its own.
        draws: of each chain, after warm-up.
        chains: R-hat needs at least two.
        warmup: draws of each chain to adapt on.
        seed: of the chains; the global random states stay as they were.
        progress: whether to show a progress bar.
        options: of ``nuts``, such as ``target_accept=0.95``, ``float64=True`` or ``backend="pyro"``.

    Returns:
        A posterior of chains, whose draws have the names and shapes of ``posterior.sample(data=those rows)``. Its data
        is the chosen rows, labelled by their place in the data where they had no labels.

    Raises:
        ValueError: for a ``DataLoader``, a model without a latent, and as ``nuts`` does.

    Example:
        >>> from pyro_ae import fit, svi
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> posterior = fit(model, x, guide=guide, method=svi(steps=10), progress=False)
        >>> found = reference(posterior, rows=3, draws=50, warmup=50, chains=2, progress=False)
        >>> found.draws["z"].shape, found.data.labels
        (torch.Size([2, 50, 3, 2]), (0, 8, 15))
    """
    program, held = posterior.program, posterior._rows(data)
    latents = program.layout.names("latent")
    if not latents:
        raise ValueError("the model has no latent site, so there is nothing to draw")
    if isinstance(held, LoadedRows):
        raise ValueError("a reference is for rows at hand, and a DataLoader brings them in batches: pass data=tensors")
    index, some = None, held
    if set(latents) == set(posterior.local) and held.size is not None:
        index = chosen_rows(held.size, rows)
        some = held.take(index)
        some = replace(some, labels=some.labels or tuple(index.tolist()))
    with seeded(seed):
        method = nuts(draws=draws, warmup=warmup, chains=chains, init=_starts(posterior, held, some, index), **options)
        return fit(
            _as_learnt(posterior),
            some,
            method=method,
            plate=program.plate,
            device=program.device,
            seed=seed,
            progress=progress,
        )


def _as_learnt(posterior: Posterior) -> Model:
    """The model with what it learnt by ``pyro.param``, which another fit would begin anew."""
    learnt = {n: v for n, v in posterior.params.items() if "$$$" not in n}  # networks hold their own
    return poutine.substitute(posterior.model, data=learnt) if learnt else posterior.model


def _starts(posterior: Posterior, held: Rows, some: Rows, index: Tensor | None) -> Posterior | str:
    """Draws of the posterior on the chosen rows, where they have a spread, as chains are started from."""
    if posterior.draws is not None:
        values = posterior.sample(None, None if held is posterior.data else held)
        values = (
            values
            if index is None
            else {n: v.index_select(1 + row_dim(posterior, n), index) for n, v in values.items()}
        )
    else:
        values = posterior.sample(STARTS, held) if index is None else rows_drawn(posterior, STARTS, held, index)
    if any(torch.equal(v, v[:1].expand_as(v)) for v in values.values()):  # a point, which gives no mass matrix
        return "median"
    draws = {n: v.unsqueeze(0) for n, v in values.items()}
    return Posterior(posterior.program, data=some, method=posterior.method, draws=draws)
