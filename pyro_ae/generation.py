"""New rows from a fitted model: codes from the prior or another density, then the likelihood."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .coding import codes
from .data import Call, LoadedRows
from .draws import average, mean_or_value, replay
from .particles import gather
from .sites import Layout, Recorder, quote

if TYPE_CHECKING:
    from .latent_densities import LatentDensity
    from .posterior import Posterior


def generate(
    posterior: Posterior,
    n: int,
    *,
    mean: bool,
    density: LatentDensity | None,
    code: str | None,
    data: Any,
    sites: Iterable[str] | None,
) -> dict[str, Tensor]:
    """Site to ``[n, *event]``; see :meth:`~pyro_ae.posterior.Posterior.generate`."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if density is not None:
        fits = _fits(posterior)
        if len(fits) > 1:
            sizes = [len(part) for part in torch.arange(n).tensor_split(len(fits)) if len(part)]
            parts = [
                generate(fit, size, mean=mean, density=density, code=code, data=data, sites=sites)
                for fit, size in zip(fits, sizes, strict=False)
            ]
            return {s: torch.cat([part[s] for part in parts]) for s in parts[0]}
    program = posterior.program
    shared = [s for s in program.layout.names("latent") if s not in posterior.local]
    averaged = mean and density is not None  # the same codes for all draws
    drawn = posterior.sample(posterior._at_most(100 if averaged else n)) if shared else {}
    values = {s: drawn[s] for s in shared}
    draws = len(drawn[shared[0]]) if shared else 1
    rows = n if averaged else -(-n // draws)  # of each draw of what is shared
    new = {} if density is None else _new_codes(posterior, n if averaged else draws * rows, density, code, data)
    values |= {s: z.reshape(-1, rows, *z.shape[1:]).expand(draws, rows, *z.shape[1:]) for s, z in new.items()}
    batch = blank(posterior, rows)

    def names(layout: Layout) -> list[str]:
        ignored = [s for s in new if s not in layout.names("latent")]
        if ignored:
            raise ValueError(
                f"without rows to observe, the model does not sample {quote(ignored)}, so it cannot be given codes "
                "there: let it sample its codes where x is None"
            )
        # what was observed in the fit is a latent where the model is given nothing to observe
        wanted = program.layout.names("observed") if sites is None else list(sites)
        unknown = [s for s in wanted if s not in layout.model]
        if unknown:
            raise ValueError(f"no site {unknown[0]!r} to generate; there are {quote(layout.model)}")
        return wanted

    if averaged:
        return average(program, values, batch, names, mean_or_value, generate=True)

    def read(layout: Layout, runs: list[Recorder], k: int) -> dict[str, Tensor]:
        return gather(runs, names(layout), layout.model, k, mean_or_value if mean else lambda s: s["value"])

    return {s: v.flatten(0, 1)[:n] for s, v in replay(program, values, batch, read, generate=True).items()}


def _fits(posterior: Posterior) -> list[Posterior]:
    """Each chain, or member of an ensemble, for itself: what a code means to one, it does not mean to another."""
    if posterior.draws is None:
        return [posterior]
    alone = posterior.method.split("(")[0] == "ensemble"  # whose members are the draws of one chain
    draws = {s: v.transpose(0, 1) if alone else v for s, v in posterior.draws.items()}
    chains = len(next(iter(draws.values())))
    return [
        type(posterior)(
            posterior.program,
            data=posterior.data,
            method="a chain",
            draws={s: v[c : c + 1] for s, v in draws.items()},
            batch_size=posterior.batch_size,
        )
        for c in range(chains)
    ]


def _new_codes(posterior: Posterior, n: int, density: LatentDensity, code: str | None, data: Any) -> dict[str, Tensor]:
    """Codes ``[n, *event]`` of each site from a density that is fitted to those of the data."""
    found = codes(posterior, data, 100, code)
    shapes = {s: z.shape[1:] for s, z in found.items()}
    drawn = density(torch.cat([z.flatten(1) for z in found.values()], 1)).sample((n,))
    parts = drawn.split([shape.numel() for shape in shapes.values()], 1)
    return {s: part.reshape(n, *shape) for (s, shape), part in zip(shapes.items(), parts, strict=True)}


def blank(posterior: Posterior, rows: int) -> Call:
    """A call that generates ``rows`` rows."""
    model = posterior.model.forward if isinstance(posterior.model, torch.nn.Module) else posterior.model
    if "size" in inspect.signature(model).parameters:
        return Call((), {"size": rows})
    data = posterior._rows(None)
    if isinstance(data, LoadedRows):
        return data.first()
    return data.call() if data.size is None else data.take(torch.arange(rows) % data.size).call()
