"""One function from a model and data to a posterior, whatever the method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from .data import LoadedRows, Rows, as_rows
from .engines.compiled import check_mode
from .engines.ensemble import ensemble, map_, swag
from .engines.feynman_kac import feynman_kac
from .engines.laplace import laplace
from .engines.mc_dropout import mc_dropout
from .engines.nuts import hmc, nuts
from .engines.run import Event, Run
from .engines.sghmc import entropy_sghmc, sghmc
from .engines.sgld import sgld
from .engines.sgnht import sgnht
from .engines.svi import svi
from .posterior import Posterior
from .precision import check_precision
from .runtime import find_device, seeded
from .types import Engine, Guide, Model, Recipe

METHODS: dict[str, Callable[[], Engine]] = {
    "svi": svi,
    "nuts": nuts,
    "hmc": hmc,
    "sghmc": sghmc,
    "sgld": sgld,
    "sgnht": sgnht,
    "entropy_sghmc": entropy_sghmc,
    "feynman_kac": feynman_kac,
    "ensemble": ensemble,
    "swag": swag,
    "mc_dropout": mc_dropout,
    "laplace": laplace,
    "map": map_,
}


def fit(
    model: Model | Recipe,
    data: Any,
    *,
    guide: Guide | None = None,
    method: str | Engine = "svi",
    batch_size: int | None = None,
    plate: str | None = "data",
    device: str | torch.device = "auto",
    seed: int | None = None,
    progress: bool = True,
    validation: Any = None,
    callbacks: Iterable[Callable[[Event], Any]] = (),
    checkpoint: str | Path | None = None,
    check: bool = True,
    compile: bool | str = "auto",
    precision: str = "float32",
) -> Posterior:
    """Fit a Pyro model to data by any method, and get its posterior.

    The model is any Pyro function. Rows in its plate named ``plate`` are scaled to the whole data set where
    minibatches are used, so the model itself need not know N. Modules behind the model and the guide are trained in
    place; ``pyro.param`` values live in a store that is this fit's own (see ``Posterior.params``).

    Arguments:
        model: a callable with Pyro sites, or a ``Recipe`` of model, guide and method.
        data: a tensor, array, data frame or labelled array ``[N, ...]`` for ``model(x)``; a tuple for
            ``model(*data)``; a dict for ``model(**data)``; a ``DataLoader`` of any of these; None for ``model()``.
            Entries without rows, such as numbers and strings, pass through unchanged. NaN is a missing value.
        guide: samples the latents, with the model's arguments. Without one svi makes a mean-field guide for latents
            outside the plate. Samplers do without.
        method: ``"svi"``; ``"nuts"`` or ``"hmc"``; with minibatches ``"sghmc"``, ``"sgld"``, ``"sgnht"``,
            ``"entropy_sghmc"`` or ``"feynman_kac"``; ``"map"``, ``"laplace"``, ``"swag"``, ``"ensemble"`` or
            ``"mc_dropout"``, with their defaults; or a configured engine such as ``svi(epochs=20)``.
        batch_size: rows of a minibatch; all rows at once by default.
        plate: name of the plate of the rows.
        device: ``"auto"`` for a GPU where there is one, or a torch device. Modules are moved there.
        seed: makes the fit repeatable, and leaves the global random states as they were.
        progress: whether to show a progress bar.
        validation: held-out data in the form of ``data``, or the fraction of rows to hold out.
        callbacks: functions of an ``Event``, called after each evaluation; one that returns True ends the fit.
        checkpoint: folder that a sampler by stochastic gradients writes its state and draws to; a fit with the same
            settings goes on from there, to the same draws as if it had never stopped.
        check: whether to look at the posterior, for about a second, and warn (``PosteriorWarning``) where it is poor.
            Python's filters of warnings silence that as well, and spare the look.
        compile: whether steps by gradients are captured and replayed without Pyro's handlers, to the same losses:
            ``"auto"`` where so many steps will be run that it pays, as a CUDA graph on a GPU; True or ``"replay"`` at
            once; ``"inductor"`` compiled by torch, which takes half a minute; False never. What cannot be captured
            runs as it is, with a warning that says why.
        precision: ``"bf16"`` computes the layers of networks in bfloat16, and all else, such as log-weights, in
            single precision still. It is for GPUs; a CPU without instructions for it takes several times as long.

    Raises:
        ValueError: for a mistake in the model, the guide or the data; it names the site and the cure.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = fit(model, torch.randn(50) + 3.0, method=svi(steps=500), seed=0, progress=False)
        >>> 2.5 < posterior.sample(100)["mu"].mean() < 3.5
        tensor(True)
    """
    if isinstance(model, Recipe):
        model, recipe_guide, recipe_method = model
        guide = guide or recipe_guide
        method = recipe_method if method == "svi" else method
    if not callable(model):
        raise ValueError(f"the model must be a function with Pyro sites, got {type(model).__name__}")
    engine = _engine(method)
    check_mode(compile)
    check_precision(precision)
    with seeded(seed):
        rows = as_rows(data)
        rows.check_batch_size(batch_size)
        held: Rows | LoadedRows | None = None
        if isinstance(validation, float) and isinstance(rows, LoadedRows):
            raise ValueError("a DataLoader cannot be split: pass the held-out data as validation=...")
        if isinstance(validation, float):
            assert isinstance(rows, Rows)
            rows, held = rows.split(validation)
            rows.check_batch_size(batch_size)
        elif validation is not None:
            held = as_rows(validation)
        run = Run(
            data=rows,
            batch_size=batch_size,
            plate=plate,
            device=find_device(device),
            progress=progress,
            validation=held,
            callbacks=tuple(callbacks),
            checkpoint=None if checkpoint is None else Path(checkpoint),
            compile=compile,
            precision=precision,
        )
        posterior = engine(model, guide, run)
    if check:
        from .diagnostics.after_fit import warn_if_poor

        warn_if_poor(posterior)
    return posterior


def _engine(method: str | Engine) -> Engine:
    if not isinstance(method, str):
        if not callable(method):
            raise ValueError(f"method must be a name or an engine such as svi(), got {type(method).__name__}")
        return method
    if method not in METHODS:
        close = get_close_matches(method, METHODS, 1)
        raise ValueError(
            f"unknown method {method!r}"
            + (f"; did you mean {close[0]!r}?" if close else "")
            + f" Known are {', '.join(map(repr, METHODS))}, or an engine such as svi(lr=1e-3)"
        )
    return METHODS[method]()
