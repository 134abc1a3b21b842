"""Where a fit's course is kept: callbacks for TensorBoard, Weights & Biases and MLflow.

    fit(model, x, guide=guide, callbacks=[tensorboard("runs/1")])

Each logs what the history holds, at the step of the fit. None is needed for a fit: each looks for its package when it
is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .engines.run import Event


def tensorboard(folder: str | Path) -> Callable[[Event], None]:
    """Curves for TensorBoard, which ``tensorboard --logdir folder`` shows.

    Arguments:
        folder: of the fit, made where it is not there; one beside others is compared with them.

    Raises:
        ValueError: where the package is not installed.

    Example:
        >>> callback = tensorboard("runs/beta=4")  # doctest: +SKIP
    """
    _needed("tensorboard", "tensorboard")
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder))

    def log(event: Event) -> None:
        for name, value in event.metrics.items():
            writer.add_scalar(name, value, event.step)
        writer.flush()  # no one says that the fit is over

    return log


def wandb(run: Any = None, **options: Any) -> Callable[[Event], None]:
    """Curves for Weights & Biases.

    Arguments:
        run: of ``wandb.init``, which the user finishes; by default a new one.
        options: of ``wandb.init`` for a new one, such as ``project="vae"`` and ``mode="offline"``.

    Raises:
        ValueError: where the package is not installed, and for options of a run that is there already.

    Example:
        >>> callback = wandb(project="vae", config={"beta": 4.0})  # doctest: +SKIP
    """
    if run is not None and options:
        raise ValueError(f"the run is there already: give {', '.join(options)} to wandb.init")
    run = _needed("wandb", "wandb").init(**options) if run is None else run

    def log(event: Event) -> None:
        run.log(dict(event.metrics), step=event.step)

    return log


def mlflow(run_id: str | None = None, **options: Any) -> Callable[[Event], None]:
    """Curves for MLflow, which takes no brackets: what is ``log p(x)`` in the history is ``log p x`` there.

    Arguments:
        run_id: of the run to log to; by default the active one, or else a new one.
        options: of ``mlflow.log_metrics``, such as ``synchronous=False``.

    Raises:
        ValueError: where the package is not installed.

    Example:
        >>> callback = mlflow(synchronous=False)  # doctest: +SKIP
    """
    package = _needed("mlflow", "mlflow-skinny")

    def log(event: Event) -> None:
        package.log_metrics({_plain(n): v for n, v in event.metrics.items()}, step=event.step, run_id=run_id, **options)

    return log


def _plain(name: str) -> str:
    return re.sub(r"[^\w\-. :/]+", " ", name).strip()


def _needed(package: str, install: str) -> ModuleType:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ValueError(f"the tracker {package} needs its package: pip install {install}") from None
