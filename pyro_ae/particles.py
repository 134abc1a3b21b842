"""Many draws of a program in one vectorised run, where that is right; and one by one where it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from .data import call_with
from .plates import particle_plate
from .sites import Layout, Recorder, Site, draw_or_any, site_log_prob
from .types import Draws

CHUNK = 2**24
"""Elements of the largest site that are worked on at once (64 MiB in float32)."""


def chunk_size(*layouts: Layout, elements: int = 1) -> int:
    """How many particles, draws or rows are run at once, by the elements of the largest site of one of them."""
    sites = [s for layout in layouts for s in (*layout.model.values(), *layout.guide.values())]
    return max(1, CHUNK // max([elements, *(s.shape.numel() for s in sites)]))


def part_sizes(particles: int, *layouts: Layout, elements: int = 1) -> list[int]:
    """How many of the particles or draws are in each of the parts that fit into memory."""
    size = chunk_size(*layouts, elements=elements)
    return [min(size, particles - start) for start in range(0, particles, size)]


def at_work(values: Draws, device: torch.device | str) -> dict[str, Tensor]:
    """Draws as the model takes them: on its device, and not in the half precision that they may be kept in."""
    half = (torch.float16, torch.bfloat16)
    return {n: v.to(device, torch.get_default_dtype() if v.dtype in half else v.dtype) for n, v in values.items()}


def pad_particles(value: Tensor, site: Site, nesting: int) -> Tensor:
    """``[K, *shape]`` with ones between particles and batch, as the particle plate wants it."""
    return value.reshape(value.shape[0], *(1,) * (nesting - len(site.batch)), *value.shape[1:])


def strip_particles(value: Tensor, site: Site, particles: int) -> Tensor:
    """The inverse of :func:`pad_particles`; a value that no particle changed is repeated."""
    wanted = torch.Size((particles, *site.shape))
    if value.shape == site.shape:
        return value.expand(wanted)
    if value.shape == wanted:
        return value
    return value.reshape(wanted)


def why_serial(fn: Callable[..., Any], batch: Any, sites: Mapping[str, Site], nesting: int) -> str | None:
    """Why a program cannot be run for many particles at once; None where it can.

    A few draws of its latents are run alone and together: densities and deterministic values must agree, as a network
    or a product that mixes particles up need not raise an error. A program with randomness of its own is only run.
    """
    args, kwargs = call_with(batch)
    # a number of particles that is the size of no other dim, or one could be taken for the other
    taken = {size for site in sites.values() for size in site.shape}
    particles = next(k for k in range(2, len(taken) + 3) if k not in taken)

    def run(values: Draws) -> Recorder:
        with InitMessenger(draw_or_any), Recorder(values) as r:
            fn(*args, **kwargs)
        return r

    with torch.no_grad(), torch.random.fork_rng(devices=()):
        alone = [run({})]
        plates = {n: s["value"] for n, s in alone[0].sites.items() if n not in sites}  # the same rows in each run
        alone += [run(plates) for _ in range(particles - 1)]
        again = [run({n: s["value"] for n, s in r.sites.items()}) for r in alone]
        names = [s["name"] for s in again[0].scored]
        expected, repeated = (
            {n: torch.stack([site_log_prob(r.sites[n]).sum() for r in runs]) for n in names} for runs in (alone, again)
        )
        values = dict(plates)
        for name, site in sites.items():
            if site.kind in ("latent", "auxiliary"):
                values[name] = pad_particles(torch.stack([r.sites[name]["value"] for r in alone]), site, nesting)
        try:
            with particle_plate(particles, nesting):
                together = run(values)
            densities = {s["name"]: site_log_prob(s) for s in together.scored}
        except (ValueError, RuntimeError, IndexError, AssertionError, TypeError) as error:
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        if any(not _close(repeated[n], expected[n], 1e-4) for n in names):
            return None
        for name, log_prob in densities.items():
            if log_prob.dim() > nesting + 1:
                return f"site '{name}' has batch shape {tuple(log_prob.shape)}, more than its plates and particles"
            full = log_prob.dim() > nesting
            found = log_prob.reshape(particles, -1).sum(1) if full else log_prob.sum().expand(particles)
            if not _close(found, expected[name]):
                return f"site '{name}' has another density when particles are run together"
        for name in (n for n, site in sites.items() if site.kind == "deterministic"):
            value = together.sites[name]["value"]
            wanted = torch.stack([r.sites[name]["value"] for r in alone])
            fits = value.shape == sites[name].shape or value.numel() == wanted.numel()
            if not fits or not _close(strip_particles(value, sites[name], particles), wanted):
                return f"site '{name}' has another value when particles are run together"
    return None


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def say_serial(reason: str) -> None:
    """Tell the user, once, that particles are run one by one."""
    warnings.warn(
        "the model or guide does not broadcast over particles, so they are run one by one, which is slower "
        f"(networks must accept any leading dims; pyro_ae.plates.batched helps): {reason}",
        stacklevel=3,
    )


def run_particles(
    fn: Callable[..., Any],
    batch: Any,
    particles: int,
    layout: Layout,
    sites: Mapping[str, Site],
    values: Draws | None = None,
    generate: bool = False,
) -> list[Recorder]:
    """Run a program for ``particles`` draws: one vectorised run, or one run a particle where it must be.

    Arguments:
        sites: the program's sites, for their shapes.
        values: latents to replay, ``[particles, *shape]``.
        generate: whether to sample the observed sites.
    """
    args, kwargs = call_with(batch)
    values = values or {}
    if not layout.checked:
        layout.checked, layout.serial = True, why_serial(fn, batch, sites, layout.nesting)
    if layout.serial is None:
        padded = {n: pad_particles(v, sites[n], layout.nesting) if n in sites else v for n, v in values.items()}
        with particle_plate(particles, layout.nesting), Recorder(padded, generate=generate) as r:
            fn(*args, **kwargs)
        return [r]
    say_serial(layout.serial)
    runs = []
    for k in range(particles):
        with Recorder({n: v[k] for n, v in values.items()}, generate=generate) as r:
            fn(*args, **kwargs)
        runs.append(r)
    return runs


def gather(
    runs: list[Recorder],
    names: Iterable[str],
    sites: Mapping[str, Site],
    particles: int,
    read: Callable[[dict], Tensor],
) -> dict[str, Tensor]:
    """What ``read`` gives of each named site in the runs, ``[particles, *shape]``."""
    out = {}
    for name in names:
        values = [read(r.sites[name]) for r in runs if name in r.sites]
        if not values:
            continue
        out[name] = (
            torch.stack(values) if len(runs) == particles > 1 else strip_particles(values[0], sites[name], particles)
        )
    return out
