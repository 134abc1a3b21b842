"""The density of a Pyro model as a JAX function over its unconstrained latents."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from ..data import LoadedRows, as_rows
from ..energy import Energy
from ..types import Model


@dataclass(frozen=True)
class JaxDensity:
    """A model's log-density as JAX functions; values are dicts of arrays, latent site to value.

    Attributes:
        log_density: unconstrained values to log p(x, z) with the log-Jacobian of the transforms, a scalar in nats.
        constrain: unconstrained values to the values of the model's sites.
        initial: unconstrained values of finite density.
        energy: the energy in torch that it was made from.
    """

    log_density: Callable[[dict[str, Any]], Any]
    constrain: Callable[[dict[str, Any]], dict[str, Any]]
    initial: dict[str, Any]
    energy: Energy


def precision(float64: bool) -> AbstractContextManager:
    """Let JAX compute in double precision, or as it is set."""
    if not float64:
        return nullcontext()
    import jax

    return jax.enable_x64(True)


def to_jax(model: Model, data: Any = None, *, init: str = "median", float64: bool = False) -> JaxDensity:
    """The log-density of a Pyro model as a JAX function, for any sampler of JAX.

    The model is run once and its computations are captured, so what it does must not depend on the values of its
    latents. Discrete latents are summed out. Parameters, buffers and data are what they are now.

    References:
        Composable Effects for Flexible and Accelerated Probabilistic Programming in NumPyro
        (Phan, Pradhan and Jankowiak, 2019) https://arxiv.org/abs/1912.11554

    Arguments:
        model: a callable with Pyro sites.
        data: as for ``fit``.
        init: of the initial point: ``"median"``, ``"prior"`` or ``"uniform"``.
        float64: whether to compute in double precision; call the result within ``jax.enable_x64(True)`` then.

    Raises:
        ValueError: for a model that is no graph, an op without a translation, a discrete latent of infinitely many
            values, or where no initial point has a finite density.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> density = to_jax(lambda: pyro.sample("s", dist.Exponential(1.0)))
        >>> float(density.log_density({"s": 0.0}))  # s = 1: log-density -1, log-Jacobian 0
        -1.0
    """
    from .capture import capture
    from .to_jax import arrays, lower

    rows = as_rows(data)
    if isinstance(rows, LoadedRows):
        raise ValueError("to_jax needs all data at once: pass tensors in place of a DataLoader")
    energy = Energy(model, rows.call())
    start = energy.init(init)
    graphs = capture(energy, start), capture(energy.constrain, start)
    with precision(float64):
        potential, constrain = map(lower, graphs)
        constants = [arrays(graph.constants) for graph in graphs]
        initial = arrays(start)
    return JaxDensity(
        log_density=lambda v: -potential(v, constants=constants[0]),
        constrain=lambda v: constrain(v, constants=constants[1]),
        initial=initial,
        energy=energy,
    )
