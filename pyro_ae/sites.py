"""The sample sites of Pyro programs: recorded, described, and run for many draws at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from .data import call_with
from .plates import particle_plate
from .types import Draws, Guide, Model


class Recorder(Messenger):
    """Replay the latent sites that are named in ``values``, and keep every sample site that goes by.

    It stands outside the handlers of the program, so it sees scales, masks and plates as they end up.

    Arguments:
        values: site to value.
        generate: whether to sample the observed sites too, whatever was observed there.
    """

    def __init__(self, values: Draws | None = None, *, generate: bool = False) -> None:
        super().__init__()
        self.values = values or {}
        self.generate = generate
        self.sites: dict[str, dict] = {}
        self.generated: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._replay_plate(msg)
        elif msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True
        elif self.generate and msg["is_observed"] and not is_deterministic(msg) and not site_is_factor(msg):
            self.generated.append(msg["name"])
            msg["is_observed"], msg["value"], msg["done"] = False, None, False

    def _replay_plate(self, msg: Any) -> None:
        """The same rows for a plate that subsamples by itself; rows that are given stay as they are."""
        if msg["name"] not in self.values or msg["value"] is not None:
            return
        size = msg["fn"].subsample_size or msg["fn"].size
        rows = self.values[msg["name"]]
        if len(rows) != size:
            raise ValueError(
                f"plate '{msg['name']}' has {len(rows)} rows in the guide and {size} in the model: a guide with "
                "parameters for each row cannot be given others"
            )
        msg["value"], msg["done"] = rows, True

    def _pyro_post_sample(self, msg: Any) -> None:
        before = self.sites.get(msg["name"])
        # a plate may be entered again, as long as it means the same rows
        again = before is not None and site_is_subsample(msg) and torch.equal(before["value"], msg["value"])
        if before is not None and not again:
            raise ValueError(f"site '{msg['name']}' is sampled twice in one run; give each site a name of its own")
        self.sites[msg["name"]] = msg

    @property
    def scored(self) -> list[dict]:
        """The sites that have a density: no subsampled indices, no deterministic sites."""
        return [s for s in self.sites.values() if not site_is_subsample(s) and not is_deterministic(s)]


def is_deterministic(site: dict) -> bool:
    return bool(site["infer"] and site["infer"].get("_deterministic"))


def is_latent(site: dict) -> bool:
    return not site["is_observed"] and not site_is_subsample(site) and not is_deterministic(site)


def is_auxiliary(site: dict) -> bool:
    return bool(site["infer"] and site["infer"].get("is_auxiliary"))


def site_log_prob(site: dict, scale: float | Tensor | None = None) -> Tensor:
    """The log-density of one recorded site, with its mask and scale (or another), shaped as its batch."""
    try:
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except (ValueError, RuntimeError) as error:
        error.add_note(f"This was the log-density of site '{site['name']}', with {site['fn']}.")
        raise
    return scale_and_mask(log_prob, site["scale"] if scale is None else scale, site["mask"])


def pointwise_log_prob(site: dict) -> Tensor:
    """As :func:`site_log_prob`, without any scale."""
    return site_log_prob(site, 1.0)


@dataclass(frozen=True)
class Site:
    """One sample site as one run of the program showed it, without particles."""

    kind: Literal["latent", "observed", "deterministic", "auxiliary", "factor"]
    shape: torch.Size
    batch: torch.Size
    plates: tuple[tuple[str, int, int], ...] = ()
    support: Any = None
    enumerated: bool = False


@dataclass
class Layout:
    """The sites of a model and its guide, and how deep their plates nest."""

    nesting: int
    model: dict[str, Site]
    guide: dict[str, Site] = field(default_factory=dict)
    checked: bool = False
    serial: str | None = None
    """Why particles must be run one by one, once that is checked; None where they need not."""

    def names(self, kind: str) -> list[str]:
        return [name for name, site in self.model.items() if site.kind == kind]

    @property
    def plates(self) -> dict[str, int]:
        """Plate names and sizes."""
        return {name: size for site in self.model.values() for name, _, size in site.plates}

    def local(self, plate: str | None) -> list[str]:
        """Names of the latents inside a plate."""
        return [n for n in self.names("latent") if any(p[0] == plate for p in self.model[n].plates)]


def _describe(site: dict) -> Site:
    if is_deterministic(site):
        kind = "deterministic"
    elif site_is_factor(site):
        kind = "factor"
    elif site["is_observed"]:
        kind = "observed"
    else:
        kind = "auxiliary" if is_auxiliary(site) else "latent"
    fn, value = site["fn"], site["value"]
    shape = value.shape if isinstance(value, Tensor) else torch.Size()
    vectorized = sorted((f for f in site["cond_indep_stack"] if f.vectorized), key=lambda f: f.dim)
    return Site(
        kind=kind,  # type: ignore[arg-type]
        shape=shape,
        batch=shape[: -min([f.dim for f in vectorized], default=0)] if kind == "deterministic" else fn.batch_shape,
        plates=tuple((f.name, f.dim, f.size) for f in vectorized),
        support=getattr(fn, "support", None) if kind == "latent" else None,
        enumerated=bool(site["infer"] and site["infer"].get("enumerate")),
    )


def inspect_sites(model: Model, guide: Guide | None, batch: Any) -> Layout:
    """Run guide and model once, without particles, and say what sites they have.

    The run also builds what Pyro's autoguides build lazily, which must not happen inside the particle plate.

    Raises:
        ValueError: where the guide does not sample the latent sites of the model, or samples others.
    """
    args, kwargs = call_with(batch)
    with torch.no_grad():
        q, values = Recorder(), {}
        if guide is not None:
            with q:
                guide(*args, **kwargs)
            values = {name: site["value"] for name, site in q.sites.items()}
        with InitMessenger(draw_or_any) if guide is None else nullcontext(), Recorder(values) as p:
            model(*args, **kwargs)
    sites = [s for s in (*q.sites.values(), *p.sites.values()) if not site_is_subsample(s)]
    nesting = max((-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized), default=0)
    layout = Layout(
        nesting=nesting,
        model={n: _describe(s) for n, s in p.sites.items() if not site_is_subsample(s)},
        guide={n: _describe(s) for n, s in q.sites.items() if not site_is_subsample(s)},
    )
    if guide is not None:
        check_names(layout)
    return layout


def check_names(layout: Layout) -> None:
    """Refuse a guide that does not sample exactly the latent sites of its model."""
    sampled = {n for n, s in layout.guide.items() if s.kind == "latent"}
    observed = sorted(sampled & set(layout.names("observed")))
    if observed:
        raise ValueError(f"the guide samples {quote(observed)}, which the model observes: remove it from the guide")
    extra = sorted(sampled - set(layout.names("latent")))
    missing = sorted(n for n in layout.names("latent") if n not in sampled and not layout.model[n].enumerated)
    if extra or missing:
        raise ValueError(
            "the guide must sample exactly the latent sites of the model"
            + (f"; it lacks {quote(missing)}" if missing else "")
            + (f"; it samples {quote(extra)}, which the model does not have" if extra else "")
            + f". The model's latent sites are {quote(layout.names('latent')) or 'none'}: "
            "rename the sites so that both sides agree"
        )
    for name in sampled:
        ours, theirs = ({p[0] for p in side[name].plates} for side in (layout.guide, layout.model))
        if ours != theirs:
            raise ValueError(
                f"site '{name}' stands in plates {quote(sorted(theirs)) or 'none'} in the model but in "
                f"{quote(sorted(ours)) or 'none'} in the guide: its density would be counted wrong"
            )


def quote(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names)


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
        again = run({n: s["value"] for n, s in alone[0].sites.items()})
        expected = {
            s["name"]: torch.stack([site_log_prob(r.sites[s["name"]]).sum() for r in alone]) for s in again.scored
        }
        repeated = {s["name"]: site_log_prob(s).sum() for s in again.scored}
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
        if any(not _close(repeated[n], expected[n][0]) for n in repeated):
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


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-3, equal_nan=True)


def anywhere(site: Any) -> Tensor:
    """A value in the support, uniform in (-2, 2) before it is constrained."""
    transform = biject_to(site["fn"].support)
    return transform(4.0 * torch.rand(transform.inverse_shape(site["fn"].shape())) - 2.0)


def draw_or_any(site: Any) -> Tensor:
    """A draw, or a value anywhere in the support where the prior is improper and cannot be drawn from."""
    try:
        return site["fn"].sample()
    except NotImplementedError:
        return anywhere(site)


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
