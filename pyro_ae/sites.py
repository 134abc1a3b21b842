"""The sample sites of Pyro programs: recorded, described, and run for many draws at once."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.distributions import Independent, biject_to, constraints

from .data import call_with
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


def elements_of(fn: Any) -> Any:
    """A distribution without the event dims that ``to_event`` gave it."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


def is_deterministic(site: dict) -> bool:
    """Whether a site only names a value: by ``pyro.deterministic``, or as ``poutine.reparam`` leaves one."""
    if site["infer"] and site["infer"].get("_deterministic"):
        return True
    fn = site["fn"]
    masked = isinstance(fn, MaskedDistribution) and fn._mask is False
    return bool(site["is_observed"]) and masked and isinstance(elements_of(fn.base_dist), Delta)


def is_latent(site: dict) -> bool:
    return not site["is_observed"] and not site_is_subsample(site) and not is_deterministic(site)


def is_auxiliary(site: dict) -> bool:
    return bool(site["infer"] and site["infer"].get("is_auxiliary"))


def is_estimated(site: dict) -> bool:
    """Whether a site's log-density is an estimate that was made with its draw, so that no other value has one."""
    return bool(site["infer"] and site["infer"].get("estimated"))


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
    enumerable: bool = False


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
        batch=shape[: -min([f.dim for f in vectorized], default=0)]
        if kind == "deterministic"
        else torch.Size(fn.batch_shape),
        plates=tuple((f.name, f.dim, f.size) for f in vectorized),
        support=getattr(fn, "support", None) if kind == "latent" else None,
        enumerated=bool(site["infer"] and site["infer"].get("enumerate")),
        enumerable=bool(getattr(fn, "has_enumerate_support", False)),
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
        with InitMessenger(draw_or_any) if guide is None else nullcontext(), _Matching(values, q.sites) as p:
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


class _Matching(Recorder):
    """A recorder that refuses values of the guide that do not belong where the model has the site."""

    def __init__(self, values: Draws, guided: dict[str, dict]) -> None:
        super().__init__(values)
        self.guided = guided

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["done"] and not site_is_subsample(msg) and is_latent(msg):
            _check_shape(msg)
            _check_support(msg, self.guided[msg["name"]])


def _check_shape(site: Any) -> None:
    wanted, found = site["fn"].shape(), site["value"].shape
    try:
        fits = torch.broadcast_shapes(wanted, found) == wanted
    except RuntimeError:
        fits = False
    if not fits:
        event = tuple(site["fn"].event_shape)
        latent = event[0] if len(event) == 1 else event
        raise ValueError(
            f"site '{site['name']}' has values of shape {tuple(found)} in the guide and of {tuple(wanted)} in the "
            f"model, of which {event} is the event: give the guide's head latent={latent}, or the model's site as many "
            "event dims (.to_event) as the guide's"
        )


def _check_support(site: Any, guided: Any) -> None:
    fn, drawn, value = site["fn"], guided["fn"], site["value"]
    if isinstance(elements_of(drawn), Delta):  # a deterministic code may lie outside, for losses without its density
        return
    try:
        support, theirs = fn.support, _without_dims(drawn.support)
        outside = not torch.isnan(value).any() and not support.check(value).all()
    except (NotImplementedError, AttributeError):
        return
    if outside or (theirs is constraints.real and _without_dims(support) is not constraints.real):
        raise ValueError(
            f"the guide's {type(elements_of(drawn)).__name__} leaves the support of site '{site['name']}', which is "
            f"{_without_dims(support)}: give its head support=, such as MeanField(..., support=constraints.positive), "
            "which carries its draws there"
        )


def _without_dims(support: Any) -> Any:
    """A constraint without the event dims that to_event gave it, of a mixture that of its components."""
    wrappers = (type(constraints.independent(constraints.real, 0)), constraints.MixtureSameFamilyConstraint)
    while isinstance(support, wrappers):
        support = support.base_constraint
    return support


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
