"""Latents of the rows at draws of a guide: averages over draws, and densities of draws under all rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution, kl_divergence

from ..data import Call
from ..estimators import base_of
from ..heads import Jointly
from ..losses.aggregate import _Reached, _Until
from ..particles import CHUNK, gather, part_sizes, run_particles, strip_particles
from ..program import Program
from ..sites import Recorder, elements_of, pointwise_log_prob
from .groups import View

PAIRS = 2**27
"""Numbers, over all pairs of a draw and a row, that the mutual information is averaged over."""

SLOW_PAIRS = 2**16
"""Pairs of a draw and a row for densities that may take a search, as those of some flows do."""

FEWEST = 16
"""Numbers that a pair counts for at least: small latents take memory too."""


class Local:
    """How the values of a site lie, and averages over its draws."""

    def __init__(self, name: str, view: View, plate: str, index: Tensor | None) -> None:
        self.name, self.site, self.index = name, view.layout.guide[name], index
        (dim,) = (d for n, d, _ in self.site.plates if n == plate)
        self.axis = 1 + len(self.site.batch) + dim  # of the rows, where the draws come first
        self.shape = self.site.shape[len(self.site.batch) :]
        self.averages: dict[str, Tensor] = {}
        self.kl_by = ""
        self.kept: list[Tensor] = []

    def rows_first(self, value: Tensor) -> Tensor:
        """Draws ``[k, *batch, ...]`` with the rows that are meant after the draws, ``[k, N, *others, ...]``."""
        value = value.movedim(self.axis, 1)
        return value if self.index is None else value[:, self.index.to(value.device)]

    def by_row(self, value: Tensor) -> Tensor:
        """Draws ``[k, *batch, ...]`` as ``[k, N, numbers]``."""
        value = self.rows_first(value)
        return value.reshape(*value.shape[:2], -1)

    @property
    def most_pairs(self) -> int:
        """Of a draw and a row, whose densities are worked out."""
        rows = self.site.batch[self.axis - 1]
        return PAIRS // max(FEWEST, self.site.shape.numel() // rows)

    def pairs(self, fn: Distribution, draws: Tensor) -> Tensor:
        """The log-density of draws ``[M, *others, *event]`` under each row's distribution, ``[M, N]``."""
        some = draws.unsqueeze(self.axis).split(max(1, CHUNK // self.site.shape.numel()))
        return torch.cat([self.by_row(fn.log_prob(z.expand(len(z), *self.site.shape))).sum(2) for z in some])

    def add(self, pairs: list[tuple[dict, dict]], k: int, share: float) -> None:
        """Count in k draws: of each run the guide's and the model's site; ``share`` is that of one draw."""
        found = [_terms(q, p) for q, p in pairs]
        self.kl_by = found[0][1]
        for name in found[0][0]:
            values = [terms[name].double() for terms, _ in found]
            layout = replace(self.site, shape=self.site.batch) if name == "row_kl" else self.site
            value = torch.stack(values) if len(values) == k > 1 else strip_particles(values[0], layout, k)
            self.averages[name] = self.averages.get(name, 0.0) + share * self.by_row(value).sum(0)


def _terms(q: dict, p: dict) -> tuple[dict[str, Tensor], str]:
    """What is averaged over draws, in the shape of the site, or of its batch for ``row_kl``; and how KLs are known."""
    z = q["value"].double()
    mean, within = _moments(q["fn"]) or (z, torch.zeros_like(z))
    terms = {"mean": mean, "square": mean.double().square(), "within": within}
    if prior := _moments(p["fn"]):
        terms |= {"prior_mean": prior[0], "prior_variance": prior[1]}
    try:
        terms["kl"], by = _kl(base_of(q), base_of(p), q["value"])
    except ValueError:  # elements that are tied together have none of their own
        terms["row_kl"], by = _kl(q["fn"], p["fn"], q["value"])[0], ""
    return terms, by


def _kl(q: Distribution, p: Distribution, z: Tensor) -> tuple[Tensor, str]:
    try:
        return kl_divergence(q, p), "closed form"
    except NotImplementedError:
        return q.log_prob(z) - p.log_prob(z), "draws"


def _moments(fn: Distribution) -> tuple[Tensor, Tensor] | None:
    """Mean and variance, where a distribution has both."""
    try:
        mean, variance = fn.mean, fn.variance
    except (NotImplementedError, AttributeError):
        return None
    return (mean, variance) if bool(torch.isfinite(mean).all() & torch.isfinite(variance).all()) else None


def is_slow(fn: Any) -> bool:
    """Whether a density may have to be found by inverting a flow step by step, as far as one can tell."""
    fn = elements_of(fn)
    known = isinstance(fn, Jointly) or type(fn).__module__.startswith(("pyro.distributions", "torch.distributions"))
    return not known or isinstance(fn, TransformedDistribution)


def until(fn: Callable[..., Any], last: str) -> Callable[..., None]:
    """A program that ends after a site, so that no decoder runs for nothing."""

    def run(*args: Any, **kwargs: Any) -> None:
        with suppress(_Reached), _Until(last):
            fn(*args, **kwargs)

    return run


def average(program: Program, batch: Call, view: View, latents: list[Local], draws: int) -> list[dict[str, Tensor]]:
    """Averages for each latent, given draws of the others; returned are the first two draws of all."""
    assert program.guide is not None
    layout = view.layout
    first: list[dict[str, Tensor]] = []
    model = until(program.model.fn, [n for n in layout.model if n in {s.name for s in latents}][-1])
    for k in part_sizes(draws, elements=view.largest):
        guided = run_particles(program.guide.fn, batch, k, layout, layout.guide)
        values = gather(guided, view.latents, layout.guide, k, lambda s: s["value"])
        modelled = run_particles(model, batch, k, layout, layout.model, values)
        first += [{n: v[i] for n, v in values.items()} for i in range(min(k, 2 - len(first)))]
        for latent in latents:
            sites = [(q.sites[latent.name], p.sites[latent.name]) for q, p in zip(guided, modelled, strict=True)]
            latent.add(sites, k, 1 / draws)
            most = max(1, latent.most_pairs // latent.site.batch[latent.axis - 1] ** 2) - sum(map(len, latent.kept))
            latent.kept.append(values[latent.name][: max(0, most)].clone())
    return first


def alike(fn: Callable[..., Any], batch: Call, name: str, first: list[dict[str, Tensor]]) -> tuple[dict, bool]:
    """A latent's site in a run without particles, and whether it is the same for other values of the other latents."""
    sites = []
    for values in first:
        with Recorder(values | {name: first[0][name]}) as run:
            fn(*batch.args, **batch.kwargs)
        sites.append(run.sites[name])
    one, other = map(pointwise_log_prob, sites)
    return sites[0], torch.allclose(one, other, rtol=1e-4, atol=1e-4)
