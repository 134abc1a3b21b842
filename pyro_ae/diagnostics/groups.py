"""What the groups of ArviZ hold, as tensors: draws of a program, the densities at them, and predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data import Call
from ..particles import at_work, gather, part_sizes, run_particles
from ..program import Program
from ..sites import Layout, Recorder, pointwise_log_prob, quote, site_log_prob
from ..types import Draws

Groups = dict[str, dict[str, Tensor]]
"""Group to variable to ``[draws, *shape]``."""

PREDICTED = ("posterior_predictive", "prior_predictive", "log_likelihood", "observed_data")
"""Groups that need an observed site."""


@dataclass
class View:
    """The sites of a program on some data, and what one run of the model showed of them."""

    layout: Layout
    run: Recorder
    observed: list[str]
    undrawn: list[str]
    """Latents without draws, such as those that were enumerated."""
    subsampled: dict[str, str]
    """Sites in a plate that takes a subsample by itself, and that plate."""
    common: tuple[tuple[str, int, int], ...]
    """Plates (name, dim, size) in which every site stands, so that their rows are independent."""

    @property
    def latents(self) -> list[str]:
        return [n for n in self.layout.names("latent") if n not in self.undrawn]

    @property
    def determined(self) -> list[str]:
        """Deterministic sites, where the draws do determine them."""
        return [] if self.undrawn else self.layout.names("deterministic")

    @property
    def largest(self) -> int:
        return max([1, *(s.shape.numel() for s in (*self.layout.model.values(), *self.layout.guide.values()))])

    def left_out(self, *, chains: bool, stats: Mapping, constants: Mapping) -> dict[str, str]:
        """Groups that cannot be had, and why."""
        out: dict[str, str] = {}
        if not self.observed:
            why = "the model observes nothing"
            out |= dict.fromkeys(PREDICTED, why)
        if not self.latents and not self.layout.names("deterministic"):
            out |= dict.fromkeys(["posterior", "prior"], "the model has no latent site")
        if not constants:
            out["constant_data"] = "the data has no number that is not observed"
        if chains and not stats:
            out["sample_stats"] = "the sampler recorded none"
        if self.undrawn:
            why = f"the latents {quote(self.undrawn)} are enumerated, so the density at the draws is not known"
            out |= {"log_likelihood": why} if chains else {"log_likelihood": why, "sample_stats": why}
        for names, groups in (
            ([*self.latents, *self.determined], ["posterior", "prior"]),
            (self.observed, PREDICTED),
            (self.subsampled, [] if chains else ["sample_stats"]),
        ):
            for name in (n for n in names if n in self.subsampled):
                plate = self.subsampled[name]
                out |= dict.fromkeys(
                    groups,
                    f"plate '{plate}' takes a new subsample in each run, so site '{name}' is never there for all its "
                    f"rows: write pyro.plate('{plate}', len(x)) and pass batch_size to fit",
                )
        return out


def look(program: Program, batch: Call, held: Draws | None = None) -> View:
    """Run guide and model to see their sites.

    Arguments:
        program: its plate of rows is not scaled here: the rows at hand are all there are.
        batch: a call with all rows.
        held: draws of chains, ``[chains, draws, *shape]``, where there are some.
    """
    layout = program.inspect(batch, guide=held is None)
    with Recorder() as q:
        if held is None and program.guide is not None:
            program.guide.fn(*batch.args, **batch.kwargs)
    drawn = q.sites.keys() if held is None else held.keys()
    values = {n: s["value"] for n, s in q.sites.items()}
    values |= {n: v[0, 0].to(program.device) for n, v in (held or {}).items()}
    with Recorder(values) as p:
        program.model.fn(*batch.args, **batch.kwargs)
    observed = layout.names("observed")
    for name in observed:  # what stands there when it is generated
        layout.model[name] = replace(layout.model[name], shape=p.sites[name]["fn"].shape())
    subsampled = {
        n: f.name
        for n, s in (*q.sites.items(), *p.sites.items())
        for f in s["cond_indep_stack"]
        if f.full_size and f.full_size != f.size
    }
    scored = [s for s in (*layout.model.values(), *layout.guide.values()) if s.kind != "deterministic"]
    common = set.intersection(*(set(s.plates) for s in scored)) if scored else set()
    return View(
        layout,
        p,
        observed,
        [n for n in layout.names("latent") if n not in drawn],
        subsampled,
        tuple(sorted(common, key=lambda plate: plate[1])),
    )


# -- the draws -----------------------------------------------------------------------------------------------


def sizes(view: View, draws: int, prior: int) -> dict[str, int]:
    """Bytes of each group that grows with the draws."""
    run, model = view.run.sites, view.layout.model
    latent = sum(model[n].shape.numel() * run[n]["value"].element_size() for n in [*view.latents, *view.determined])
    observed = sum(model[n].shape.numel() * run[n]["value"].element_size() for n in view.observed)
    pointwise = sum(model[n].batch.numel() for n in view.observed) * torch.get_default_dtype().itemsize
    weights = (2 + math.prod(size for _, _, size in view.common)) * torch.get_default_dtype().itemsize
    return {
        "posterior": draws * latent,
        "posterior_predictive": draws * observed,
        "prior": prior * latent,
        "prior_predictive": prior * observed,
        "log_likelihood": draws * pointwise,
        "sample_stats": draws * weights,
    }


def _chunks(draws: int, view: View) -> Iterator[tuple[int, int]]:
    """Where each part of the draws begins, and how many it has."""
    start = 0
    for size in part_sizes(draws, elements=view.largest):
        yield start, size
        start += size


def _join(parts: list[Groups]) -> Groups:
    return {g: {n: torch.cat([p[g][n] for p in parts]) for n in values} for g, values in parts[0].items()}


def _cpu(groups: Groups) -> Groups:
    return {g: {n: v.cpu() for n, v in values.items()} for g, values in groups.items()}


def _value(site: dict) -> Tensor:
    return site["value"]


def at_draws(program: Program, batch: Call, view: View, chosen: list[str], held: Draws | None, draws: int) -> Groups:
    """The groups that are made at draws of the latents: those of the chains, or new ones from the guide."""
    model, layout, parts = program.model.fn, view.layout, []
    weighed = held is None and "sample_stats" in chosen
    if not weighed and not {"posterior", "posterior_predictive", "log_likelihood"} & set(chosen):
        return {}
    for start, k in _chunks(draws, view):
        guided: list[Recorder] = []
        if held is not None:
            values = at_work({n: v[start : start + k] for n, v in held.items()}, program.device)
        else:
            assert program.guide is not None
            guided = run_particles(program.guide.fn, batch, k, layout, layout.guide)
            values = gather(guided, view.latents, layout.guide, k, _value)
        part: Groups = {}
        if "posterior" in chosen:
            part["posterior"] = dict(values)
        if weighed or "log_likelihood" in chosen or ("posterior" in chosen and view.determined):
            runs = run_particles(model, batch, k, layout, layout.model, values)
            if "posterior" in chosen:
                part["posterior"] |= gather(runs, view.determined, layout.model, k, _value)
            if "log_likelihood" in chosen:
                terms = {n: replace(layout.model[n], shape=layout.model[n].batch) for n in view.observed}
                part["log_likelihood"] = gather(runs, view.observed, terms, k, pointwise_log_prob)
            if weighed:
                part["sample_stats"] = _weights(guided, runs, view, k)
        if "posterior_predictive" in chosen:
            runs = run_particles(model, batch, k, layout, layout.model, values, generate=True)
            part["posterior_predictive"] = gather(runs, view.observed, layout.model, k, _value)
        parts.append(_cpu(part))
    return _join(parts)


def from_prior(program: Program, batch: Call, view: View, chosen: list[str], draws: int) -> Groups | str:
    """Latents from the prior and the data that they make, or why they cannot be drawn."""
    parts: list[Groups] = []
    layout = view.layout
    if not {"prior", "prior_predictive"} & set(chosen):
        return {}
    for _, k in _chunks(draws, view):
        try:
            runs = run_particles(program.model.fn, batch, k, layout, layout.model, generate=True)
        except NotImplementedError as error:
            return f"a prior of the model cannot be drawn from ({error})"
        names = {"prior": [*layout.names("latent"), *layout.names("deterministic")], "prior_predictive": view.observed}
        parts.append(_cpu({g: gather(runs, n, layout.model, k, _value) for g, n in names.items() if g in chosen}))
    return _join(parts)


def _weights(guided: list[Recorder], modelled: list[Recorder], view: View, k: int) -> dict[str, Tensor]:
    """The log-densities of model and guide, ``[k]``, and the log-weights ``[k, *rows]``."""
    nesting, keep = view.layout.nesting, [dim for _, dim, _ in view.common]
    rows = [size for _, _, size in view.common]

    def total(runs: list[Recorder]) -> Tensor:
        parts = []
        for run in runs:
            part = torch.zeros(k // len(runs), *rows)
            for term in map(site_log_prob, run.scored):
                # batch dims to the right of that of the draws, which a run for one draw does not have
                depth = max(nesting, term.dim()) if view.layout.serial else nesting
                term = term.reshape((1,) * (depth + 1 - term.dim()) + term.shape)
                drop = [d for d in range(-depth, 0) if d not in keep]
                part = part + (term.sum(drop) if drop else term)
            parts.append(part)
        return torch.cat(parts)

    log_p, log_q = total(modelled), total(guided)
    return {"lp": log_p.reshape(k, -1).sum(1), "log_q": log_q.reshape(k, -1).sum(1), "log_weight": log_p - log_q}
