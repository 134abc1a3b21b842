"""Products of two densities of one family, normalised: what a conjugate prior and a potential make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from .sites import elements_of, is_latent
from .types import Draws


def product(prior: Distribution, potential: Distribution) -> Distribution:
    r"""The distribution whose density is proportional to the product of two.

    .. math:: q(z) \propto p(z) \, \psi(z)

    Normal densities, independent or not, add their precisions; categorical and Bernoulli ones their logits. For other
    families it is the ``conjugate_update`` of Pyro's distribution, such as that of ``Gamma`` and ``GaussianHMM``.

    References:
        Composing Graphical Models with Neural Networks for Structured Representations and Fast Inference
        (Johnson et al., 2016) https://arxiv.org/abs/1603.06277

    Arguments:
        prior: batch ``[*]`` and event ``[*event]``.
        potential: of the same event shape; its batch broadcasts against the prior's.

    Raises:
        ValueError: for different event shapes, or families of which no product is known.

    Example:
        >>> q = product(dist.Normal(0.0, 1.0), dist.Normal(2.0, 1.0))
        >>> round(float(q.mean), 3), round(float(q.variance), 3)
        (1.0, 0.5)
    """
    if prior.event_shape != potential.event_shape:
        raise ValueError(
            f"the prior has event shape {tuple(prior.event_shape)} and its potential {tuple(potential.event_shape)}: "
            "give the potential's head the site's shape as latent="
        )
    p, q = elements_of(prior), elements_of(potential)
    normal, full = torch.distributions.Normal, torch.distributions.MultivariateNormal
    events = len(prior.event_shape)
    if isinstance(p, normal) and isinstance(q, normal):
        precisions = p.scale**-2, q.scale**-2
        variance = 1 / (precisions[0] + precisions[1])
        loc = variance * (precisions[0] * p.loc + precisions[1] * q.loc)
        return dist.Normal(loc, variance.sqrt()).to_event(events)
    if events == 1 and isinstance(p, normal | full) and isinstance(q, normal | full):
        (first, one), (second, two) = _natural(p), _natural(q)
        factor = torch.linalg.cholesky(first + second)
        loc = torch.cholesky_solve((one + two).unsqueeze(-1), factor).squeeze(-1)
        return dist.MultivariateNormal(loc, precision_matrix=first + second)
    for family in (dist.Bernoulli, dist.OneHotCategorical, dist.Categorical):
        if isinstance(p, family.__mro__[1]) and isinstance(q, family.__mro__[1]):
            made = family(logits=p.logits + q.logits)
            return made.to_event(events - len(made.event_shape))
    try:
        made, _ = p.conjugate_update(q)
    except (NotImplementedError, AttributeError, AssertionError):
        raise ValueError(
            f"the product of a {type(p).__name__} prior with a {type(q).__name__} potential is of no known family: use "
            "a potential of the prior's own, or a guide that does not use the prior, such as Amortized"
        ) from None
    return made.to_event(events - len(made.event_shape))


def _natural(fn: Any) -> tuple[Tensor, Tensor]:
    """Precision ``[*, d, d]``, and precision times mean ``[*, d]``, of a normal distribution of vectors."""
    precision = fn.precision_matrix if hasattr(fn, "precision_matrix") else torch.diag_embed(fn.scale**-2)
    return precision, (precision @ fn.mean.unsqueeze(-1)).squeeze(-1)


class AllDrawn(Exception):
    """Nothing that the model does after its last latent concerns the guide."""


class Multiplied(Messenger):
    """Draw latents from their prior times a potential; of all other sites nobody outside hears.

    Arguments:
        potentials: site to a distribution whose density is its potential.
        values: of the other latents.

    Raises:
        AllDrawn: once the last of them is drawn.
    """

    def __init__(self, potentials: Mapping[str, Distribution], values: Draws) -> None:
        super().__init__()
        self.left = dict(potentials)
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.left and is_latent(msg):
            try:
                msg["fn"] = product(msg["fn"], self.left[msg["name"]])
            except ValueError as error:
                error.add_note(f"This was site '{msg['name']}'.")
                raise
        elif not site_is_subsample(msg):
            msg["stop"] = True
            if msg["name"] in self.values:
                msg["value"], msg["done"] = self.values[msg["name"]], True
            elif is_latent(msg):
                raise ValueError(
                    f"the guide has no potential for the latent site '{msg['name']}': add a head for it, or a guide of "
                    "it as shared="
                )

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.left.pop(msg["name"], None) is not None and not self.left:
            raise AllDrawn
