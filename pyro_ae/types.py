"""The contracts between models, guides, objectives and engines; imports nothing of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor
from torch.distributions import Distribution

if TYPE_CHECKING:
    from .engines.run import Run
    from .posterior import Posterior

Model: TypeAlias = Callable[..., Any]
"""Any callable with Pyro sites."""

Guide: TypeAlias = Callable[..., Any]
"""A callable with its model's arguments that samples every latent site of the model, and no other.

A module of it may have a method ``finish(model, batches)``, which ``svi`` calls once it is done, with the model scaled
to the whole data and a list of calls and the share of the rows that each has."""

Head: TypeAlias = Callable[[Tensor], Distribution]
"""Features ``[*, h]`` to a distribution with batch shape ``[*]`` and event shape ``[d]``."""

Bound: TypeAlias = Callable[[Tensor], Tensor]
"""Log-weights ``[K, *batch]`` to a bound on log p(x), ``[*batch]``."""


class Sides(NamedTuple):
    """A loss with a scalar for each side's parameters, in nats of the whole data set; the history shows the model's."""

    model: Tensor
    guide: Tensor
    critic: Tensor | None = None
    """For the loss's own parameters, such as those of an adversary."""


Loss: TypeAlias = Callable[..., "Tensor | Sides"]
"""``(model, guide, *args, **kwargs)`` to a scalar to be minimised, in nats of the whole data set, or to ``Sides``."""

Draws: TypeAlias = Mapping[str, Tensor]
"""Site name to values, draws first."""


class PosteriorWarning(UserWarning):
    """A posterior came out of a fit that is not to be trusted."""


class Engine(Protocol):
    """A configured way to get a posterior, such as ``svi(lr=1e-3)`` or ``nuts(draws=500)``."""

    def __call__(self, model: Model, guide: Guide | None, run: Run) -> Posterior: ...


class Recipe(NamedTuple):
    """A model, a guide and a method that belong together, as a paper fixes them; ``fit`` takes it as it is."""

    model: Model
    guide: Guide | None = None
    method: str | Engine = "svi"
