"""Densities of Pyro programs: log-weights for bounds, and the energy over unconstrained latents for samplers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import (
    InitMessenger,
    init_to_median,
    init_to_sample,
    init_to_uniform,
)
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from .data import call_with
from .plates import particle_plate
from .types import Draws, Guide, Model

INITS = {"prior": init_to_sample, "median": init_to_median, "uniform": init_to_uniform}


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
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True
        elif self.generate and msg["is_observed"] and not is_deterministic(msg) and not site_is_factor(msg):
            self.generated.append(msg["name"])
            msg["is_observed"], msg["value"], msg["done"] = False, None, False

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites:
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


@dataclass(frozen=True)
class Site:
    """One sample site as one run of the program showed it, without particles."""

    kind: Literal["latent", "observed", "deterministic", "auxiliary"]
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
    broadcasts: bool | None = None

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
        with Recorder(values) as p:
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
        raise ValueError(f"the guide samples {_quote(observed)}, which the model observes: remove it from the guide")
    extra = sorted(sampled - set(layout.names("latent")))
    missing = sorted(n for n in layout.names("latent") if n not in sampled and not layout.model[n].enumerated)
    if extra or missing:
        raise ValueError(
            "the guide must sample exactly the latent sites of the model"
            + (f"; it lacks {_quote(missing)}" if missing else "")
            + (f"; it samples {_quote(extra)}, which the model does not have" if extra else "")
            + f". The model's latent sites are {_quote(layout.names('latent')) or 'none'}: "
            "rename the sites so that both sides agree"
        )
    for name in sampled:
        ours, theirs = ({p[0] for p in side[name].plates} for side in (layout.guide, layout.model))
        if ours != theirs:
            raise ValueError(
                f"site '{name}' stands in plates {_quote(sorted(theirs)) or 'none'} in the model but in "
                f"{_quote(sorted(ours)) or 'none'} in the guide: its density would be counted wrong"
            )


def _quote(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names)


class Weights(NamedTuple):
    """Log-weights with what a loss has to know about them."""

    log_weights: Tensor
    """``[K, *batch]`` over the plates that all sites share, or ``[K]`` where there is none."""
    scale: float
    """N/B: what a sum over the rows is multiplied with to stand for the whole data set."""
    shared: tuple[str, ...]
    """Sites outside the subsampled plate, which make a nonlinear bound wrong; empty where every bound holds."""


def _common_plates(sites: list[dict]) -> tuple:
    stacks = [frozenset(f for f in s["cond_indep_stack"] if f.vectorized and f.name != "_particles") for s in sites]
    return tuple(sorted(frozenset.intersection(*stacks), key=lambda f: f.dim)) if stacks else ()


def _reduce(log_prob: Tensor, keep: tuple[int, ...], sizes: tuple[int, ...], name: str) -> Tensor:
    """Sum a site's log-density over all dims but those in ``keep`` (negative, ascending)."""
    ndim = log_prob.dim()
    if keep and ndim < -keep[0]:
        log_prob = log_prob.expand((1,) * (-keep[0] - ndim) + log_prob.shape)
        ndim = log_prob.dim()
    drop = [d for d in range(-ndim, 0) if d not in keep]
    reduced = log_prob.sum(drop) if drop else log_prob
    if reduced.shape != sizes:
        if any(r not in (1, s) for r, s in zip(reduced.shape, sizes, strict=True)):
            raise ValueError(
                f"site '{name}' has log-densities of shape {tuple(log_prob.shape)}, which do not fit plates of "
                f"sizes {tuple(sizes)}: does its distribution need .to_event, or a plate?"
            )
        reduced = reduced.expand(sizes)
    return reduced


def _run(model: Model, guide: Guide, batch: Any, particles: int, nesting: int) -> tuple[list[dict], list[dict]]:
    """The scored sites of guide and model in one vectorised run."""
    args, kwargs = call_with(batch)
    with particle_plate(particles, nesting) if particles > 1 else nullcontext():
        with Recorder() as q:
            guide(*args, **kwargs)
        values = {name: site["value"] for name, site in q.sites.items()}
        with Recorder(values) as p:
            model(*args, **kwargs)
    guided, modelled = q.scored, p.scored
    for site in modelled:
        if not site["is_observed"] and site["name"] not in values:
            raise ValueError(
                f"the guide does not sample the latent site '{site['name']}' of the model: add it to the guide"
            )
        if site["is_observed"] and site["name"] in q.sites and is_latent(q.sites[site["name"]]):
            raise ValueError(f"the guide samples '{site['name']}', which the model observes: remove it from the guide")
    for site in guided:
        if is_latent(site) and not is_auxiliary(site) and site["name"] not in p.sites:
            raise ValueError(f"the guide samples '{site['name']}', which the model does not have")
    return guided, modelled


def weigh(
    model: Model,
    guide: Guide,
    batch: Any,
    particles: int,
    *,
    layout: Layout | None = None,
    reparameterised: bool = False,
) -> Weights:
    """Log-weights of ``particles`` draws from the guide, all drawn in one vectorised run.

    A model that does not broadcast over particles is run once for each; that is said once. With
    ``reparameterised`` a guide is refused whose draws carry no gradient.
    """
    if particles < 1:
        raise ValueError(f"particles must be at least 1, got {particles}")
    layout = layout or getattr(model, "layout", None) or inspect_sites(model, guide, batch)
    run = partial(_weigh, model, guide, batch, nesting=layout.nesting, reparameterised=reparameterised)
    if particles > 1 and layout.broadcasts is None:
        layout.broadcasts = _broadcasts(model, guide, batch, layout.nesting)
    if particles > 1 and not layout.broadcasts:
        runs = [run(particles=1) for _ in range(particles)]
        return runs[0]._replace(log_weights=torch.cat([r.log_weights for r in runs]))
    return run(particles=particles)


def _weigh(
    model: Model, guide: Guide, batch: Any, particles: int, nesting: int, reparameterised: bool = False
) -> Weights:
    guided, modelled = _run(model, guide, batch, particles, nesting)
    if reparameterised:
        for site in guided:
            if is_latent(site) and not site["fn"].has_rsample:
                raise ValueError(
                    f"the guide's site '{site['name']}' has no reparameterised sampler, so this loss would leave out "
                    "part of its gradient: use a reparameterised distribution, or one of Pyro's losses such as "
                    "svi(loss=TraceGraph_ELBO())"
                )
    common = _common_plates([*guided, *modelled])
    scale = math.prod(f.full_size / f.size for f in common if f.full_size)
    keep = tuple(f.dim for f in common)
    sizes = tuple(f.size for f in common)
    if particles > 1:
        keep, sizes = (-nesting - 1, *keep), (particles, *sizes)
    total: Tensor | float = 0.0
    for sign, sites in ((1, modelled), (-1, guided)):
        for site in sites:
            log_prob = site_log_prob(site, site["scale"] if scale == 1 else site["scale"] / scale)
            total = total + sign * _reduce(log_prob, keep, sizes, site["name"])
    if not isinstance(total, Tensor):
        raise ValueError("the model has no sample site, so there is nothing to weigh")
    subsampled = {
        f.name
        for s in modelled
        for f in s["cond_indep_stack"]
        if f.full_size and f.full_size != f.size and f not in common
    }
    shared = tuple(
        s["name"] for s in modelled if subsampled and not any(f.name in subsampled for f in s["cond_indep_stack"])
    )
    return Weights(total if particles > 1 else total.unsqueeze(0), scale, shared)


def _broadcasts(model: Model, guide: Guide, batch: Any, nesting: int) -> bool:
    """Whether model and guide run under a particle plate; says so once where they do not."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            _weigh(model, guide, batch, 2, nesting)
    except (ValueError, RuntimeError, IndexError, AssertionError, NotImplementedError, TypeError) as error:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            _weigh(model, guide, batch, 1, nesting)  # a mistake that has nothing to do with particles shows here
        warnings.warn(
            "the model or guide does not broadcast over particles, so they are run one by one, which is slower "
            f"(networks must accept any leading dims; pyro_ae.plates.batched helps): {str(error).splitlines()[0]}",
            stacklevel=2,
        )
        return False
    return True


def log_weights(model: Model, guide: Guide, batch: Any, *, particles: int = 1) -> tuple[Tensor, float]:
    r"""The log-weights of draws from a guide, and the scale of a minibatch.

    .. math:: \log w_k = \log p(x, z_k) - \log q(z_k \mid x), \qquad z_k \sim q(z \mid x)

    Every bound, the effective sample size, k-hat and estimates of the evidence are functions of them. Rows are
    those plates that all sites of model and guide share; a latent outside them ties the rows together, and then
    there is one weight for each particle.

    References:
        Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016) https://arxiv.org/abs/1509.00519

    Arguments:
        model: a callable with Pyro sites.
        guide: samples the latent sites of the model.
        batch: as for ``fit``: ``model(x)``, ``model(*tuple)`` or ``model(**dict)``.
        particles: K, the number of draws.

    Returns:
        The log-weights in nats, ``[K, *batch]``, and N/B, which is taken out of them.

    Raises:
        ValueError: where the sites of guide and model do not fit, or where a latent outside a subsampled plate
            makes the weights of the whole data set unknown.

    Example:
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> log_weights(model, guide, x, particles=5)[0].shape
        torch.Size([5, 16])
    """
    weights = weigh(model, guide, batch, particles)
    refuse_shared(weights, "log_weights")
    return weights.log_weights, weights.scale


def refuse_shared(weights: Weights, what: str) -> None:
    if weights.shared:
        raise ValueError(
            f"{what} needs the whole data set where {_quote(weights.shared)} stands outside the subsampled plate: "
            "a nonlinear bound of a subsample is no bound. Use elbo, or fit without batch_size"
        )


def log_joint(model: Model, values: Draws, batch: Any) -> Tensor:
    r"""The log-density of the model at given latents, :math:`\log p(x, z)`.

    Arguments:
        model: a callable with Pyro sites.
        values: latent site to value, in the shape that the model samples.
        batch: as for ``fit``.

    Returns:
        One value in nats for each row ``[*batch]``, or a scalar where a site outside ties the rows together.

    Raises:
        ValueError: where a latent site has no value.

    Example:
        >>> from pyro_ae.models import ppca
        >>> model, guide, x = ppca.example()
        >>> log_joint(model, {"z": torch.zeros(16, 2)}, x).shape
        torch.Size([16])
    """
    args, kwargs = call_with(batch)
    with Recorder(values) as p:
        model(*args, **kwargs)
    missing = [n for n, s in p.sites.items() if is_latent(s) and n not in values]
    if missing:
        raise ValueError(f"log_joint needs a value for {_quote(missing)}; it was given {_quote(values)}")
    common = _common_plates(p.scored)
    keep, sizes = tuple(f.dim for f in common), tuple(f.size for f in common)
    return torch.stack([_reduce(site_log_prob(s), keep, sizes, s["name"]) for s in p.scored]).sum(0)


def site_terms(model: Model, guide: Guide, batch: Any) -> dict[str, float]:
    """Each site's share in the ELBO of one draw: ``log p(x)``, ``log p(z)`` and ``log q(z)``, in nats."""
    layout = getattr(model, "layout", None) or inspect_sites(model, guide, batch)
    with torch.no_grad():
        guided, modelled = _run(model, guide, batch, 1, layout.nesting)
        terms = {f"log p({s['name']})": site_log_prob(s).sum() for s in modelled}
        terms |= {f"log q({s['name']})": site_log_prob(s).sum() for s in guided}
    return {name: float(value) for name, value in terms.items()}


def first_bad_site(model: Model, guide: Guide | None, batch: Any) -> str | None:
    """The first site, guide first, whose value or log-density is not finite in a new run."""
    args, kwargs = call_with(batch)
    with torch.no_grad():
        values: dict[str, Tensor] = {}
        for side, fn in (("guide", guide), ("model", model)):
            if fn is None:
                continue
            with Recorder(values) as r:
                fn(*args, **kwargs)
            for site in r.scored:
                where = f"'{site['name']}' of the {side}"
                if is_latent(site) and not torch.isfinite(site["value"]).all():
                    return f"{where} (its draws are not finite)"
                if not torch.isfinite(site_log_prob(site)).all():
                    return f"{where} (its log-density is not finite)"
            values = {name: site["value"] for name, site in r.sites.items()}
    return None


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
    if layout.broadcasts is not False:
        padded = {n: pad_particles(v, sites[n], layout.nesting) if n in sites else v for n, v in values.items()}
        try:
            with particle_plate(particles, layout.nesting), Recorder(padded, generate=generate) as r:
                fn(*args, **kwargs)
            return [r]
        except (ValueError, RuntimeError, IndexError, AssertionError, TypeError):
            if layout.broadcasts:
                raise
            layout.broadcasts = False
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
        out[name] = torch.stack(values) if len(runs) > 1 else strip_particles(values[0], sites[name], particles)
    return out


class Energy:
    r"""The potential of a model over its unconstrained latents, with all that a sampler needs.

    .. math:: U(v) = -\log p(x, T(v)) - \log \lvert \det J_T(v) \rvert

    Arguments:
        model: a callable with Pyro sites; its discrete latents must have been marginalised.
        batch: as for ``fit``.

    Attributes:
        transforms: latent site to the transform T from unconstrained to constrained values.
        layout: the sites of the model.

    Raises:
        ValueError: for a discrete latent, or one whose support depends on another.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> energy = Energy(lambda: pyro.sample("s", dist.Exponential(1.0)), None)
        >>> energy({"s": torch.tensor(0.0)})  # s = 1: log-density -1, log-Jacobian 0
        tensor(1.)
    """

    def __init__(self, model: Model, batch: Any) -> None:
        self.model = model
        self.batch = batch
        self.layout = inspect_sites(InitMessenger(init_to_uniform)(model), None, batch)
        again = inspect_sites(InitMessenger(init_to_uniform)(model), None, batch)
        self.transforms: dict[str, Any] = {}
        for name in self.layout.names("latent"):
            support = self.layout.model[name].support
            if support.is_discrete:
                raise ValueError(
                    f"site '{name}' is discrete, so the energy has no gradient in it: marginalise it, or fit with svi"
                )
            if not _same(support, again.model[name].support):
                raise ValueError(
                    f"the support of site '{name}' depends on another latent: sample it on a fixed support and "
                    "transform it with pyro.deterministic"
                )
            self.transforms[name] = biject_to(support)
        if not self.transforms:
            raise ValueError("the model has no latent site, so there is nothing to sample")

    def __call__(self, v: Draws, batch: Any = None) -> Tensor:
        """The energy, a scalar in nats, at unconstrained values; on another batch where one is given."""
        args, kwargs = call_with(self.batch if batch is None else batch)
        values = self.constrain(v)
        with Recorder(values) as r:
            self.model(*args, **kwargs)
        log_prob = sum(site_log_prob(s).sum() for s in r.scored)
        jacobian = sum(t.log_abs_det_jacobian(v[n], values[n]).sum() for n, t in self.transforms.items())
        return -(log_prob + jacobian)

    def constrain(self, v: Draws) -> dict[str, Tensor]:
        """Unconstrained values, with any leading dims, to the values that the model samples."""
        return {name: transform(v[name]) for name, transform in self.transforms.items()}

    def unconstrain(self, values: Draws) -> dict[str, Tensor]:
        """The inverse of :meth:`constrain`."""
        return {name: transform.inv(values[name]) for name, transform in self.transforms.items()}

    def init(self, strategy: str = "median", tries: int = 100) -> dict[str, Tensor]:
        """A point of finite energy and finite gradient.

        Arguments:
            strategy: ``"prior"`` (a draw), ``"median"`` (of draws from the prior) or ``"uniform"`` (in (-2, 2),
                unconstrained).

        Raises:
            ValueError: for an unknown strategy, or where no such point is found.
        """
        if strategy not in INITS:
            raise ValueError(f"unknown init {strategy!r}; known are {', '.join(INITS)}")
        args, kwargs = call_with(self.batch)
        for attempt in range(tries):
            init = INITS[strategy] if attempt < tries // 2 else init_to_uniform
            with torch.no_grad(), Recorder() as r, InitMessenger(init):
                self.model(*args, **kwargs)
            values = {n: r.sites[n]["value"].detach() for n in self.transforms}
            v = {n: x.detach().clone().requires_grad_() for n, x in self.unconstrain(values).items()}
            energy = self(v)
            gradients = torch.autograd.grad(energy, list(v.values()), allow_unused=True)
            if all(torch.isfinite(t).all() for t in (energy, *(g for g in gradients if g is not None))):
                return {n: x.detach() for n, x in v.items()}
        bad = first_bad_site(self.model, None, self.batch)
        raise ValueError(
            f"no starting point with a finite density in {tries} tries"
            + (f"; look at site {bad}" if bad else "; is the data inside the support of the likelihood?")
        )


def _same(a: Any, b: Any) -> bool:
    """Whether two constraints are alike, bounds included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, constraints.Constraint):
        return vars(a).keys() == vars(b).keys() and all(_same(vars(a)[k], vars(b)[k]) for k in vars(a))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
