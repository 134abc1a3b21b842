"""Densities of Pyro programs: log-weights of draws from a guide, and log-densities at given latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .data import call_with
from .enumeration import marginalise
from .particles import part_sizes, say_serial, why_serial
from .plates import particle_plate
from .sites import Layout, Recorder, inspect_sites, is_auxiliary, is_latent, quote, site_log_prob
from .types import Draws, Guide, Model


def _common_plates(sites: Iterable[dict]) -> tuple:
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


class Pass:
    """One run of a guide, and of its model at the guide's draws, for a number of particles at once."""

    def __init__(self, model: Model, guide: Guide, batch: Any, particles: int, nesting: int, enumerate: bool) -> None:
        self.guide, self.batch, self.particles, self.nesting = guide, batch, particles, nesting
        with self.particle_plate():
            self.drawn = self._record(guide)
            values = {name: site["value"] for name, site in self.drawn.sites.items()}
            self.values = values | {
                # a node of its own in the graph, so that an estimator can tell the model's use of a draw from others
                s["name"]: s["value"].view_as(s["value"]) if s["value"].requires_grad else s["value"]
                for s in self.drawn.scored
                if is_latent(s)
            }
        with ExitStack() as stack:
            if enumerate:
                stack.enter_context(EnumMessenger(-nesting - 2))
            stack.enter_context(self.particle_plate())
            modelled = self._record(model, self.values)
        self.guided: list[dict] = self.drawn.scored
        self.modelled, self.terms = marginalise(modelled.scored)
        self._check(modelled)
        self.plates = plates = _common_plates([*self.guided, *modelled.scored])
        self.scale = math.prod(f.full_size / f.size for f in plates if f.full_size)
        self.keep = tuple(f.dim for f in plates)
        self.sizes = tuple(f.size for f in plates)
        if particles > 1:
            self.keep, self.sizes = (-nesting - 1, *self.keep), (particles, *self.sizes)
        subsampled = {
            f.name
            for s in modelled.scored
            for f in s["cond_indep_stack"]
            if f.full_size and f.full_size != f.size and f not in plates
        }
        self.shared = tuple(
            s["name"]
            for s in modelled.scored
            if subsampled and not any(f.name in subsampled for f in s["cond_indep_stack"])
        )

    def particle_plate(self) -> AbstractContextManager:
        """The plate of the particles, where there are several."""
        return particle_plate(self.particles, self.nesting) if self.particles > 1 else nullcontext()

    def _record(self, fn: Callable[..., Any], values: Draws | None = None) -> Recorder:
        args, kwargs = call_with(self.batch)
        with Recorder(values) as recorder:
            fn(*args, **kwargs)
        return recorder

    def _check(self, modelled: Recorder) -> None:
        for site in self.modelled:
            if is_latent(site) and site["name"] not in self.values:
                discrete = getattr(site["fn"], "has_enumerate_support", False)
                raise ValueError(
                    f"the guide does not sample the latent site '{site['name']}' of the model: add it to the guide"
                    + (", or sum it out with infer={'enumerate': 'parallel'} at the site" if discrete else "")
                )
        for site in self.guided:
            name = site["name"]
            if not is_latent(site):
                continue
            if name in modelled.sites and modelled.sites[name]["is_observed"]:
                raise ValueError(f"the guide samples '{name}', which the model observes: remove it from the guide")
            if not is_auxiliary(site) and name not in modelled.sites:
                raise ValueError(f"the guide samples '{name}', which the model does not have")

    @property
    def latents(self) -> list[dict]:
        """The guide's sites that were drawn."""
        return [s for s in self.guided if is_latent(s)]

    def total(
        self, sites: Iterable[dict], read: Callable[[dict], Tensor] | None = None, *, terms: bool = False
    ) -> Tensor:
        """What ``read`` gives of each site (its log-density), summed to ``[K, *batch]``, without the rows' scale.

        With ``terms`` the model's sites from which latents were summed out are counted too.
        """
        parts = [_reduce((read or self.log_prob)(s), self.keep, self.sizes, s["name"]) for s in sites]
        if terms:
            parts += [
                _reduce(t.log_prob * self.scale_of(t.scale), self.keep, self.sizes, "', '".join(t.names))
                for t in self.terms
            ]
        out = sum(parts[1:], parts[0]) if parts else torch.zeros(self.sizes)
        return out if self.particles > 1 else out.unsqueeze(0)

    def log_prob(self, site: dict) -> Tensor:
        """A site's log-density without the scale of the rows, which stands outside every bound."""
        return site_log_prob(site, self.scale_of(site["scale"]))

    def scale_of(self, scale: float | Tensor) -> float | Tensor:
        return scale if self.scale == 1 else scale / self.scale

    @cached_property
    def log_p(self) -> Tensor:
        if not self.modelled and not self.terms:
            raise ValueError("the model has no sample site, so there is nothing to weigh")
        return self.total(self.modelled, terms=True)

    @cached_property
    def log_q(self) -> Tensor:
        return self.total(self.guided)

    def align(self, per_particle: Tensor, site: dict) -> Tensor:
        """``[K, *batch]`` so that it broadcasts against the value of a site."""
        dense = (per_particle if self.particles > 1 else per_particle.squeeze(0)).reshape(
            [self.sizes[self.keep.index(d)] if d in self.keep else 1 for d in range(min(self.keep, default=0), 0)]
        )
        return dense.reshape(*dense.shape, *(1,) * site["fn"].event_dim)

    def rescore(self, values: Draws) -> list[dict]:
        """The guide's sites at other values of its latents."""
        if len(self.latents) == 1:  # nothing in the guide depends on the draw, so its distribution stands
            return [s | {"value": values[s["name"]]} if is_latent(s) else s for s in self.guided]
        rows = {name: site["value"] for name, site in self.drawn.sites.items()}
        with self.particle_plate():
            return self._record(self.guide, rows | dict(values)).scored


@dataclass(frozen=True)
class Weights:
    """Log-weights with what a loss has to know about them, and the runs that they came from."""

    passes: list[Pass]

    @property
    def log_weights(self) -> Tensor:
        """``[K, *batch]`` over the plates that all sites share, or ``[K]`` where there is none."""
        return self.gather(lambda p: p.log_p - p.log_q)

    def gather(self, read: Callable[[Pass], Tensor]) -> Tensor:
        """What ``read`` gives of each run, over all particles, ``[K, *batch]``."""
        parts = [read(p) for p in self.passes]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def values(self, name: str) -> Tensor:
        """The guide's draws of one site, particles first."""
        if len(self.passes) == 1:
            return self.passes[0].drawn.sites[name]["value"]
        return torch.stack([p.drawn.sites[name]["value"] for p in self.passes])

    def align(self, per_particle: Tensor, site: dict) -> Tensor:
        """``[K, *batch]`` so that it broadcasts against :meth:`values` of a site."""
        if len(self.passes) == 1:
            return self.passes[0].align(per_particle, site)
        return torch.stack([p.align(part, site) for p, part in zip(self.passes, per_particle.split(1), strict=True)])

    @property
    def scale(self) -> float:
        """N/B: what a sum over the rows is multiplied with to stand for the whole data set."""
        return self.passes[0].scale

    @property
    def shared(self) -> tuple[str, ...]:
        """Sites outside the subsampled plate, which make a nonlinear bound wrong; empty where every bound holds."""
        return self.passes[0].shared


def weigh(model: Model, guide: Guide, batch: Any, particles: int, *, layout: Layout | None = None) -> Weights:
    """Log-weights of ``particles`` draws from the guide, all drawn in one vectorised run.

    A model that does not broadcast over particles is run once for each; that is said once.
    """
    if particles < 1:
        raise ValueError(f"particles must be at least 1, got {particles}")
    layout = layout or _layout(model, guide, batch)
    if particles > 1 and not layout.checked:
        layout.checked = True
        layout.serial = why_serial(guide, batch, layout.guide, layout.nesting) or why_serial(
            model, batch, layout.model, layout.nesting
        )
    for name, site in layout.guide.items():
        if site.enumerated:
            raise ValueError(
                f"the guide enumerates '{name}', which these log-weights do not: leave it out of the guide and give "
                "the model's site infer={'enumerate': 'parallel'}, which sums it out exactly"
            )
    enumerate = any(s.enumerated and n not in layout.guide for n, s in layout.model.items())
    if particles > 1 and layout.serial is not None:
        say_serial(layout.serial)
        weights = Weights([Pass(model, guide, batch, 1, layout.nesting, enumerate) for _ in range(particles)])
    else:
        weights = Weights([Pass(model, guide, batch, particles, layout.nesting, enumerate)])
    if any((s["infer"] or {}).get("weighed") for s in weights.passes[0].latents):
        refuse_shared(weights, "a guide that weighs its draws by the model")
    return weights


def _layout(model: Model, guide: Guide, batch: Any) -> Layout:
    return getattr(model, "layout", None) or inspect_sites(model, guide, batch)


def log_weights(model: Model, guide: Guide, batch: Any, *, particles: int = 1) -> tuple[Tensor, float]:
    r"""The log-weights of draws from a guide, and the scale of a minibatch.

    .. math:: \log w_k = \log p(x, z_k) - \log q(z_k \mid x), \qquad z_k \sim q(z \mid x)

    Every bound, the effective sample size, k-hat and estimates of the evidence are functions of them. Rows are
    those plates that all sites of model and guide share; a latent outside them ties the rows together, and then
    there is one weight for each particle. Discrete latents of the model with ``infer={"enumerate": "parallel"}`` that
    the guide leaves out are summed out exactly. Many particles are run in parts that fit into memory; with gradients
    the parts are run again in the backward pass.

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
    layout = _layout(model, guide, batch)
    scale = 1.0

    def part(k: int) -> Tensor:
        nonlocal scale
        weights = weigh(model, guide, batch, k, layout=layout)
        refuse_shared(weights, "log_weights")
        scale = weights.scale
        return weights.log_weights

    sizes = part_sizes(particles, layout)
    if len(sizes) > 1 and torch.is_grad_enabled():
        return torch.cat([checkpoint(part, k, use_reentrant=False) for k in sizes]), scale
    return torch.cat([part(k) for k in sizes]), scale


def refuse_shared(weights: Weights, what: str) -> None:
    if weights.shared:
        raise ValueError(
            f"{what} needs the whole data set where {quote(weights.shared)} stands outside the subsampled plate: "
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
        raise ValueError(f"log_joint needs a value for {quote(missing)}; it was given {quote(values)}")
    common = _common_plates(p.scored)
    keep, sizes = tuple(f.dim for f in common), tuple(f.size for f in common)
    return torch.stack([_reduce(site_log_prob(s), keep, sizes, s["name"]) for s in p.scored]).sum(0)


def site_terms(model: Model, guide: Guide, batch: Any) -> dict[str, float]:
    """Each site's share in the ELBO of one draw: ``log p(x)``, ``log p(z)`` and ``log q(z)``, in nats."""
    with torch.no_grad():
        (run,) = weigh(model, guide, batch, 1).passes
        terms = {f"log p({s['name']})": site_log_prob(s).sum() for s in run.modelled}
        terms |= {f"log p({', '.join(t.names)})": (t.log_prob * t.scale).sum() for t in run.terms}
        terms |= {f"log q({s['name']})": site_log_prob(s).sum() for s in run.guided}
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
