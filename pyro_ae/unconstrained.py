"""The latents that all rows share, as one vector without constraints: what guides over them have in common."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.infer.autoguide.guides import prototype_hide_fn
from torch import Tensor, nn

from .types import Model

_NUMBERS = itertools.count()


class Unconstrained(AutoContinuous):
    """A guide of Pyro's kind over the latents outside the rows' plate, without the traps of that kind.

    A subclass makes its parameters in :meth:`build`, ``center`` among them, for so many numbers; and gives the
    distribution of the vector in ``get_posterior``. Latents of the rows and enumerated ones are left to other guides.
    Parameters are made in the first call, or when a saved state is loaded; no two guides share them, as those of one
    class would in one param store.

    Arguments:
        model: whose latents it samples.
        plate: name of the plate of the rows; None for a guide of their latents, too.
        start: initial value of a site, one of ``pyro.infer.autoguide``'s ``init_to_...`` functions.

    Raises:
        ValueError: when first called, for a model without such latents, or with discrete ones.
    """

    center: nn.Parameter

    def __init__(self, model: Model, *, plate: str | None = "data", start: Callable[..., Any] = init_to_median) -> None:
        super().__init__(model, init_loc_fn=start)
        self._pyro_name = f"{type(self).__name__}{next(_NUMBERS)}"
        self._prototype_hide_fn = lambda site: (
            prototype_hide_fn(site)
            or any(f.name == plate for f in site["cond_indep_stack"])
            or bool(site["infer"] and site["infer"].get("enumerate"))
        )

    def build(self, size: int) -> None:
        """Make the parameters, for so many unconstrained numbers; the start is added to ``center`` afterwards."""
        raise NotImplementedError

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._setup_prototype(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"no guide of shared latents can be made for this model: {error}") from error
        start = self._init_loc()
        if not hasattr(self, "center"):
            self.build(len(start))
            self.to(start)
            with torch.no_grad():
                self.center.add_(start)
        self.to(start.device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}center" in state_dict and not hasattr(self, "center"):
            self.build(len(state_dict[f"{prefix}center"]))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        name = f"_{type(self).__name__}_latent"
        return pyro.sample(name, self.get_posterior(), infer={"is_auxiliary": True})
