"""The importance-weighted guide: draws of another guide, weighed by the model and resampled."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ae.data import Call
from pyro_ae.density import Pass, weigh
from pyro_ae.particles import part_sizes
from pyro_ae.plates import Plates, isolated, running_particles
from pyro_ae.sites import Layout, inspect_sites
from pyro_ae.types import Draws, Guide, Model


class ImportanceWeighted(nn.Module):
    r"""Sampling-importance-resampling: draws from the posterior that a bound of importance weights implies.

    .. math::
        z_1, \ldots, z_K \sim q, \quad i \sim \text{Categorical}(w_1, \ldots, w_K), \quad z = z_i, \qquad
        \tilde q(z) = p(x, z) \Big/ \frac{1}{K} \sum_k w_k

    A guide that was trained by ``importance(iwae, K)`` is not itself near the posterior: what this draws is. The ELBO
    with it is IWAE of K particles of the guide within. Its density is an estimate made with each draw, so that
    ``dreg`` and ``sticking_the_landing``, which need it elsewhere, refuse it.

    References:
        Reinterpreting Importance-Weighted Autoencoders (Cremer, Morris and Duvenaud, 2017)
        https://arxiv.org/abs/1704.02916

    Arguments:
        model: what weighs the draws: the model of the fit.
        guide: what makes them.
        particles: K, at least 2.

    Raises:
        ValueError: for fewer than two particles; when trained, for latents without a reparameterised sampler, and for
            minibatches where a latent ties the rows together.
    """

    def __init__(self, model: Model, guide: Guide, particles: int = 50) -> None:
        super().__init__()
        if particles < 2:
            raise ValueError(f"resampling needs at least 2 particles, got {particles}")
        self.guide = guide
        self.particles = particles
        self._model = (model,)  # no part of this module, as its parameters are the model's
        self._layout: Layout | None = None

    def forward(self, *args: Any, **kwargs: Any) -> None:
        outer, batch = running_particles(), Call(args, kwargs)
        with isolated():
            layout = self._layout = self._layout or inspect_sites(self._model[0], self.guide, batch)
            whole = outer is None or torch.is_grad_enabled()  # else as many at once as fit into memory
            sizes = [outer or 1] if whole else part_sizes(outer or 1, elements=self.particles * self._largest(batch))
            parts = [self._resample(batch, k, layout) for k in sizes]
        run, plates = parts[0][2], Plates()
        for site in (s for s in run.latents if s["name"] in parts[0][0]):
            value = torch.cat([values[site["name"]] for values, _, _ in parts])
            if outer is None:  # no dims for particles then
                value = value.reshape(value.shape[value.dim() - len(layout.guide[site["name"]].shape) :])
            fn = dist.Delta(value, event_dim=site["fn"].event_dim)
            with plates.entered(site["cond_indep_stack"]):
                pyro.sample(site["name"], fn, infer={"estimated": True, "weighed": True})
        dims = {f.dim: f.size for f in run.plates}
        shape = [dims.get(d, 1) for d in range(min(dims, default=0), 0)]
        if outer is not None:
            shape = [outer, *(1,) * (run.nesting - len(shape)), *shape]
        with plates.entered(run.plates):
            log_q = torch.cat([log_q for _, log_q, _ in parts])
            pyro.factor("_resampled", log_q.reshape(shape), has_rsample=True)

    def _largest(self, batch: Call) -> int:
        """Elements of the largest site with this batch."""
        with torch.random.fork_rng(devices=()):
            now = inspect_sites(self._model[0], self.guide, batch)
        return max(s.shape.numel() for s in (*now.model.values(), *now.guide.values()))

    def _resample(self, batch: Call, copies: int, layout: Layout) -> tuple[Draws, Tensor, Pass]:
        """Of K draws for each copy one, ``[copies, ...]``, its density, and the run that they came from."""
        weights = weigh(self._model[0], self.guide, batch, copies * self.particles, layout=layout)
        run, split = weights.passes[0], (copies, self.particles)
        log_w = weights.log_weights.unflatten(0, split)
        log_p = weights.gather(lambda p: p.log_p).unflatten(0, split)
        chosen = dist.Categorical(logits=log_w.detach().movedim(1, -1)).sample().unsqueeze(1)
        log_q = log_p.take_along_dim(chosen, 1).squeeze(1) - log_w.logsumexp(1) + math.log(self.particles)
        index, values = chosen.expand(log_w.shape).flatten(0, 1), {}
        for site in (s for s in run.latents if s["name"] in layout.names("latent")):
            if torch.is_grad_enabled() and not site["fn"].has_rsample:
                raise ValueError(
                    f"the guide's site '{site['name']}' has no reparameterised sampler, so weights have no gradient: "
                    "train that guide by importance(iwae, ..., score_function()), and resample then"
                )
            at = weights.align(index, site).unflatten(0, split)[:, :1]
            drawn = weights.values(site["name"]).unflatten(0, split)
            values[site["name"]] = drawn.take_along_dim(at, 1).squeeze(1)
        return values, log_q, run


def example() -> tuple[Any, ImportanceWeighted, Tensor]:
    """A model, its guide and 16 rows."""
    from ..models.ppca import example as ppca

    model, guide, x = ppca()
    return model, ImportanceWeighted(model, guide, 3), x
