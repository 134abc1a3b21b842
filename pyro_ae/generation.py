"""New rows from a fitted model: codes from the prior or another density, then the likelihood."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .coding import codes
from .data import Call, LoadedRows
from .draws import mean_or_value, replay
from .particles import gather
from .sites import Layout, Recorder, quote

if TYPE_CHECKING:
    from .latent_densities import LatentDensity
    from .posterior import Posterior


def generate(
    posterior: Posterior, n: int, *, mean: bool, density: LatentDensity | None, code: str | None, data: Any
) -> dict[str, Tensor]:
    """Site to ``[n, *event]``; see :meth:`~pyro_ae.posterior.Posterior.generate`."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    program = posterior.program
    shared = [s for s in program.layout.names("latent") if s not in posterior.local]
    drawn = posterior.sample(posterior._at_most(n)) if shared else {}
    values = {s: v.repeat(-(-n // len(v)), *(1,) * (v.dim() - 1))[:n] for s, v in drawn.items() if s in shared}
    rows = 1 if shared else n  # a draw of what is shared for each row
    new = {} if density is None else _new_codes(posterior, n, density, code, data)
    values |= {s: z.reshape(-1, rows, *z.shape[1:]) for s, z in new.items()}
    batch = _blank(posterior, rows)

    def read(layout: Layout, runs: list[Recorder], k: int) -> dict[str, Tensor]:
        # what was observed in the fit is a latent where the model is given nothing to observe
        free = [m for m in layout.names("latent") if m in program.layout.names("observed")]
        ignored = [s for s in new if s not in layout.names("latent")]
        if ignored:
            raise ValueError(
                f"without rows to observe, the model does not sample {quote(ignored)}, so it cannot be given codes "
                "there: let it sample its codes where x is None"
            )
        return gather(
            runs, [*runs[0].generated, *free], layout.model, k, mean_or_value if mean else lambda s: s["value"]
        )

    out = replay(program, values, batch, read, generate=True)
    return {s: (v.flatten(0, 1) if shared or v.shape[0] == 1 else v) for s, v in out.items()}


def _new_codes(posterior: Posterior, n: int, density: LatentDensity, code: str | None, data: Any) -> dict[str, Tensor]:
    """Codes ``[n, *event]`` of each site from a density that is fitted to those of the data."""
    found = codes(posterior, data, 100, code)
    shapes = {s: z.shape[1:] for s, z in found.items()}
    drawn = density(torch.cat([z.flatten(1) for z in found.values()], 1)).sample((n,))
    parts = drawn.split([shape.numel() for shape in shapes.values()], 1)
    return {s: part.reshape(n, *shape) for (s, shape), part in zip(shapes.items(), parts, strict=True)}


def _blank(posterior: Posterior, rows: int) -> Call:
    """A call that generates ``rows`` rows."""
    model = posterior.model.forward if isinstance(posterior.model, torch.nn.Module) else posterior.model
    if "size" in inspect.signature(model).parameters:
        return Call((), {"size": rows})
    data = posterior._rows(None)
    if isinstance(data, LoadedRows):
        return data.first()
    return data.call() if data.size is None else data.take(torch.arange(rows) % data.size).call()
