"""Where chains begin."""

from __future__ import annotations

import torch
from torch import Tensor

from ..energy import INITS, Energy
from ..posterior import Posterior
from ..sites import quote


def check_init(init: str | Posterior) -> None:
    if isinstance(init, str) and init not in INITS:
        raise ValueError(f"unknown init {init!r}; known are {', '.join(INITS)}, or a fitted posterior")


def shown_init(init: str | Posterior) -> str:
    return repr(init) if isinstance(init, str) else f"<a posterior by {init.method}>"


def starting_points(init: str | Posterior, energy: Energy, chains: int) -> list[dict[str, Tensor]]:
    """An unconstrained point for each chain: found by a strategy, or draws of a posterior from first to last."""
    if isinstance(init, str):
        return [energy.init(init) for _ in range(chains)]
    values = unconstrained_draws(init, energy)
    held = len(next(iter(values.values())))
    chosen: list[int] = torch.linspace(0, held - 1, chains).long().tolist()
    return [{n: x[i].clone() for n, x in values.items()} for i in chosen]


def unconstrained_draws(init: Posterior, energy: Energy, draws: int = 500) -> dict[str, Tensor]:
    """Draws of a fitted posterior in a model's unconstrained space: all that chains hold, or some of a guide's.

    Raises:
        ValueError: where the posterior is not of this model's latents.
    """
    held = init.sample(draws if init.draws is None else None)
    missing = [n for n in energy.transforms if n not in held]
    if missing:
        raise ValueError(
            f"init is a posterior over {quote(held)}, which lacks {quote(missing)} of the model: fit the same model"
        )
    return {n: x.detach() for n, x in energy.unconstrain({n: held[n] for n in energy.transforms}).items()}
