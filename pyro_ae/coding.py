"""Rows to their codes and back: latents of the rows, or codes that are a function of the row and of latent weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data import Call
from .draws import average, draw, encode, mean_or_value
from .sites import quote
from .types import Draws

if TYPE_CHECKING:
    from .posterior import Posterior

CODE = "z"
"""What a model calls the codes that it makes of its rows by ``pyro.deterministic``."""


def code_sites(posterior: Posterior, code: str | None, what: str) -> list[str]:
    """Names of the sites of the codes: one by name, else the latents of the rows, else the deterministic site z.

    Raises:
        ValueError: where there is none; it says for what they are wanted.
    """
    local, known = posterior.local, posterior.program.layout.names("deterministic")
    if code is None and (local or CODE in known):
        return local or [CODE]
    if code in local or code in known:
        return [code]
    asked = "" if code is None else f" and no site {code!r}, by pyro.deterministic or inside that plate"
    shared = quote(posterior.program.layout.names("latent")) or "none"
    raise ValueError(
        f"{what} is for models with a latent for each row, inside plate '{posterior.program.plate}', or with codes by "
        f"pyro.deterministic('{CODE}', ...); this one has {shared} outside it{asked}. See sample and predict"
    )


def codes(posterior: Posterior, data: Any, draws: int, code: str | None) -> dict[str, Tensor]:
    """The posterior mean of each row's codes, site to ``[N, *event]``; see :meth:`.posterior.Posterior.encode`."""
    sites = code_sites(posterior, code, "encode")
    if sites[0] not in posterior.local:
        batch = posterior._rows(data).call()
        values = _shared_draws(posterior, draws, data)
        return average(posterior.program, values, batch, lambda _: sites, lambda s: s["value"])
    if posterior.draws is not None or posterior.program.guide is None:
        values = posterior.sample(None, data)
        return {n: values[n].mean(0) for n in sites}
    parts = [encode(posterior.program, batch, draws) for batch in posterior._chunks(data, 1)]
    return {n: torch.cat([p[n] for p in parts]) for n in sites}


def reconstruct(posterior: Posterior, data: Any, draws: int) -> dict[str, Tensor]:
    """The likelihood's mean given each row, site to ``[N, *event]``; see :meth:`.posterior.Posterior.reconstruct`."""
    program = posterior.program
    sites = code_sites(posterior, None, "reconstruct")

    def mean_of_rows(values: Draws, batch: Call) -> dict[str, Tensor]:
        return average(program, values, batch, lambda layout: layout.names("observed"), mean_or_value)

    if posterior.draws is None and sites[0] in posterior.local:
        parts = [mean_of_rows(draw(program, draws, batch), batch) for batch in posterior._chunks(data, draws)]
        return {n: torch.cat([p[n] for p in parts]) for n in parts[0]}
    return mean_of_rows(_shared_draws(posterior, draws, data), posterior._rows(data).call())


def _shared_draws(posterior: Posterior, draws: int, data: Any) -> dict[str, Tensor]:
    return posterior.sample(posterior._at_most(draws), data) if posterior.program.layout.names("latent") else {}
