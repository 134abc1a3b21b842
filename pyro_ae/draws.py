"""A program run for many draws at once, in parts that fit into memory; results come back on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from pyro.distributions import Delta
from torch import Tensor

from .data import Call, LoadedRows, Rows
from .density import Weights, refuse_shared, weigh
from .enumeration import enumerating, marginalise
from .particles import at_work, chunk_size, gather, part_sizes, run_particles
from .program import Program, validation
from .sites import Layout, Recorder, elements_of, is_auxiliary, is_estimated, pointwise_log_prob, quote
from .types import Draws


@contextmanager
def _running(program: Program) -> Iterator[None]:
    with torch.no_grad(), program.active(), validation(False):
        yield


def _chunked(draws: int, layout: Layout, part: Callable[[int, int], dict[str, Tensor]]) -> dict[str, Tensor]:
    sizes = part_sizes(draws, layout)
    parts = [part(size, sum(sizes[:i])) for i, size in enumerate(sizes)]
    return {n: torch.cat([p[n].cpu() for p in parts]) for n in parts[0]}


def draw(program: Program, draws: int, batch: Call) -> dict[str, Tensor]:
    """Draws of the latents from the guide, site to ``[draws, *shape]``."""
    guide = program.guide
    assert guide is not None
    with _running(program):
        layout = program.inspect(batch, model=False)

        def part(k: int, start: int) -> dict[str, Tensor]:
            runs = run_particles(guide, batch, k, layout, layout.model)
            return gather(runs, layout.names("latent"), layout.model, k, lambda s: s["value"])

        return _chunked(draws, layout, part)


def replay(
    program: Program,
    values: Draws,
    batch: Call,
    read: Callable[[Layout, list[Recorder], int], dict[str, Tensor]],
    *,
    generate: bool = False,
    enumerate: bool = False,
) -> dict[str, Tensor]:
    """Run the model at draws of its latents ``[draws, *shape]`` and read sites from the runs.

    Arguments:
        values: latent to draws; latents without are sampled from the prior, in one draw where none has any.
        read: the layout, the runs and the number of draws in them, to site and ``[draws, *shape]``.
        generate: whether to sample the observed sites.
        enumerate: whether to run all values of discrete latents that have no draws, in place of sampling them.
    """
    particles = len(next(iter(values.values()))) if values else 1
    with _running(program):
        layout = program.inspect(batch, guide=False)

        def part(k: int, start: int) -> dict[str, Tensor]:
            some = at_work({n: v[start : start + k] for n, v in values.items()}, program.device)
            with enumerating(layout.nesting + 1) if enumerate else nullcontext():  # to the left of the particles
                runs = run_particles(program.model, batch, k, layout, layout.model, some, generate=generate)
            return read(layout, runs, k)

        return _chunked(particles, layout, part)


def average(
    program: Program,
    values: Draws,
    batch: Call,
    names: Callable[[Layout], list[str]],
    of: Callable[[dict], Tensor],
    *,
    generate: bool = False,
) -> dict[str, Tensor]:
    """What is read of sites, averaged over draws, of which only some are held at a time: site to ``[*shape]``."""

    def read(layout: Layout, runs: list[Recorder], k: int) -> dict[str, Tensor]:
        found = gather(runs, names(layout), layout.model, k, of)
        return {n: k * v.mean(0, keepdim=True) for n, v in found.items()}

    sums = replay(program, values, batch, read, generate=generate)
    return {n: v.sum(0) / (len(next(iter(values.values()))) if values else 1) for n, v in sums.items()}


def means(program: Program, values: Draws, batch: Call) -> dict[str, Tensor]:
    """The likelihood's mean of each observed site at draws of the latents, ``[draws, *shape]``."""

    def read(layout: Layout, runs: list[Recorder], k: int) -> dict[str, Tensor]:
        return gather(runs, layout.names("observed"), layout.model, k, mean_or_value)

    return replay(program, values, batch, read)


def log_likelihood(program: Program, values: Draws, batch: Call) -> dict[str, Tensor]:
    """The log-density of each observed site at draws of the latents, ``[draws, *batch]``; others are summed out."""

    def read(layout: Layout, runs: list[Recorder], k: int) -> dict[str, Tensor]:
        found: list[dict[str, Tensor]] = []
        for run in runs:
            sites, terms = marginalise(run.scored)
            densities = {s["name"]: pointwise_log_prob(s) for s in sites}
            for term in terms:
                observed = [n for n in term.names if layout.model[n].kind == "observed"]
                if len(observed) != 1 or observed[0] in densities:
                    raise ValueError(
                        f"the observed sites {quote(observed)} share latents that are summed out, so none has a "
                        "likelihood of its own"
                    )
                densities[observed[0]] = term.log_prob
            found.append(densities)
        out = {}
        for name in layout.names("observed"):
            value = torch.stack([f[name] for f in found]) if len(found) == k > 1 else found[0][name]
            wanted = torch.Size((k, *layout.model[name].batch))
            out[name] = value.reshape(wanted) if value.numel() == wanted.numel() else value.expand(wanted)
        return out

    latents = {n: s for n, s in program.layout.model.items() if s.kind == "latent" and n not in values}
    return replay(program, values, batch, read, enumerate=any(s.enumerable for s in latents.values()))


def log_evidence(program: Program, batch: Call, particles: int) -> Tensor:
    """The importance-weighted bound of each row, ``[rows]``, or of all where a latent ties them together."""
    assert program.guide is not None
    model, guide = program.model.fn, program.guide.fn  # unscaled: the rows at hand are all there are
    with _running(program):
        layout = program.inspect(batch)
        total = None
        for size in part_sizes(particles, layout):
            weights = weigh(model, guide, batch, size, layout=layout)
            refuse_shared(weights, "log_evidence")
            _refuse_points(weights)
            part = weights.log_weights.logsumexp(0)
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return (total - math.log(particles)).cpu()


def _refuse_points(weights: Weights) -> None:
    latents = weights.passes[0].latents
    points = [s["name"] for s in latents if isinstance(elements_of(s["fn"]), Delta)]
    # Pyro's autoguides draw in an auxiliary site and hand its density over to a Delta
    if points and not any(is_auxiliary(s) or is_estimated(s) for s in latents):
        raise ValueError(
            f"the guide gives {quote(points)} a single point, which has no density to weigh, so it says nothing of "
            "log p(x): use a guide with a density, such as MeanField, for the evidence"
        )


def encode(program: Program, batch: Call, draws: int) -> dict[str, Tensor]:
    """The mean of each row's latents: the guide's own where it has one site, else an average over draws."""
    guide = program.guide
    assert guide is not None
    with _running(program):
        layout = program.inspect(batch)
        local = layout.local(program.plate)
        if [s.kind for s in layout.guide.values()] == ["latent"]:
            with Recorder() as r:
                guide(*batch.args, **batch.kwargs)
            mean = mean_of(r.sites[local[0]])
            if mean is not None:
                return {local[0]: mean.cpu()}
    values = draw(program, draws, batch)
    return {n: values[n].mean(0) for n in local}


def row_chunks(program: Program, rows: Rows | LoadedRows, particles: int) -> Iterator[Call]:
    """Calls on rows few enough to be worked on at once; on all rows where latents tie them together."""
    if isinstance(rows, Rows) and (rows.size is None or _tied(program)):
        yield rows.call()
        return
    size = None
    if isinstance(rows, Rows):
        try:
            with _running(program):
                one = program.inspect(rows.take(slice(0, 1)).call())
        except (ValueError, RuntimeError):  # a guide with parameters for each row of the fit
            yield rows.call()
            return
        size = min(rows.need_size(), max(1, chunk_size(one) // min(particles, 64)))
    yield from rows.batches(size, shuffle=False, device=program.device)


def _tied(program: Program) -> bool:
    sites = [s for s in program.layout.model.values() if s.kind in ("latent", "observed")]
    return not all(any(p[0] == program.plate for p in s.plates) for s in sites)


def mean_of(site: dict) -> Tensor | None:
    """The mean of a recorded site's distribution, or None where it has none that is finite."""
    try:
        mean = site["fn"].mean
    except (NotImplementedError, AttributeError):
        return None
    return mean if torch.isfinite(mean).all() else None


def mean_or_value(site: dict) -> Tensor:
    """The mean of a recorded site's distribution, or its value where there is no mean."""
    mean = mean_of(site)
    return site["value"] if mean is None else mean
