"""Densities of Pyro programs: log-weights of draws from a guide, and log-densities at given latents."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import call_with
from .particles import say_serial, why_serial
from .plates import particle_plate
from .sites import Layout, Recorder, inspect_sites, is_auxiliary, is_latent, quote, site_log_prob
from .types import Draws, Guide, Model


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
    if particles > 1 and not layout.checked:
        layout.checked = True
        layout.serial = why_serial(guide, batch, layout.guide, layout.nesting) or why_serial(
            model, batch, layout.model, layout.nesting
        )
    if particles > 1 and layout.serial is not None:
        say_serial(layout.serial)
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
