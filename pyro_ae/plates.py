"""Plates: the rows of the data, particles, minibatch scaling, tempering; and nets that take any leading dims."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pyro
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, get_plates
from torch import Tensor, nn

from .schedules import Schedule, now


def batch_plate(x: Tensor | None = None, size: int = 1, *, name: str = "data") -> AbstractContextManager:
    """The plate of the data's rows: as many as ``x`` has, or ``size`` where there is no ``x``.

    Arguments:
        x: the rows ``[N, ...]`` that the model observes, or None to generate.
        size: rows to generate where ``x`` is None.
        name: of the plate; ``fit`` calls it ``"data"`` unless it is told otherwise.

    Raises:
        ValueError: for an ``x`` without rows.

    Example:
        >>> import torch
        >>> with batch_plate(torch.zeros(3, 2)):
        ...     pyro.sample("z", pyro.distributions.Normal(0.0, 1.0)).shape
        torch.Size([3])
    """
    if x is not None and (x.dim() == 0 or x.shape[0] == 0):
        raise ValueError(f"plate '{name}' needs at least one row; x has shape {tuple(x.shape)}")
    return pyro.plate(name, size if x is None else x.shape[0], dim=-1)


def particle_plate(particles: int, nesting: int) -> AbstractContextManager:
    """The plate of the particles, outside ``nesting`` others."""
    return pyro.plate("_particles", particles, dim=-nesting - 1)


def running_particles() -> int | None:
    """How many particles the running program is run for at once; None outside a plate of them."""
    return next((int(f.size) for f in get_plates() if f.name == "_particles"), None)


@contextmanager
def isolated() -> Iterator[None]:
    """Run a program within another as if it ran alone: the handlers, plates and dims outside do not see it."""
    outer, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        with poutine.block():
            yield
    finally:
        _DIM_ALLOCATOR._stack = outer


class Plates:
    """The plates of a run that is over, entered again within another."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    @contextmanager
    def entered(self, frames: Iterable[Any]) -> Iterator[None]:
        """Stand in the plates of a site, but not in that of the particles.

        Arguments:
            frames: the site's ``cond_indep_stack``.
        """
        with ExitStack() as stack:
            for f in frames:
                if f.vectorized and f.name != "_particles":
                    if f.name not in self._known:
                        self._known[f.name] = pyro.plate(f.name, f.size, dim=f.dim)
                    stack.enter_context(self._known[f.name])
            yield


class Minibatch(Messenger):
    """Show a plate of B rows as what it is: a subsample of ``total`` rows.

    Sites in the plate are scaled by total / B, and its frame gets ``full_size=total``, as if the model had
    subsampled by itself. A plate that does subsample is left alone, so that nothing is scaled twice.
    """

    def __init__(self, plate: str, total: int) -> None:
        super().__init__()
        self.plate = plate
        self.total = total

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name != self.plate:
                continue
            if frame.size == -1:
                raise ValueError(
                    f"plate '{self.plate}' has no size, so its rows cannot be scaled to {self.total}: "
                    f"write pyro.plate('{self.plate}', len(x))"
                )
            if frame.full_size in (None, frame.size) and frame.size != self.total:
                msg["scale"] = msg["scale"] * (self.total / frame.size)
                msg["cond_indep_stack"] = tuple(
                    f._replace(full_size=self.total) if f is frame else f for f in msg["cond_indep_stack"]
                )
            return


class Scaled:
    """A model or guide whose row plate is scaled to the whole data set, and that knows its layout.

    Arguments:
        fn: a model or guide.
        plate: name of the plate of the rows, or None for a function that is never scaled.
        total: rows in the whole data set, or None where there are no rows.
        layout: what ``pyro_ae.sites.inspect_sites`` found.
    """

    def __init__(self, fn: Callable[..., Any], plate: str | None, total: int | None, layout: Any = None) -> None:
        self.fn = fn
        self.plate = plate
        self.total = total
        self.layout = layout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.plate is None or self.total is None:
            return self.fn(*args, **kwargs)
        with Minibatch(self.plate, self.total):
            return self.fn(*args, **kwargs)


class _Factor(Messenger):
    """Multiply the log-density of latent or of observed sites."""

    def __init__(self, factor: float, sites: frozenset[str] | None, observed: bool) -> None:
        super().__init__()
        self.factor, self.sites, self.observed = factor, sites, observed

    def _pyro_sample(self, msg: Any) -> None:
        if poutine.util.site_is_subsample(msg) or bool(msg["is_observed"]) != self.observed:
            return
        if self.sites is None or msg["name"] in self.sites:
            msg["scale"] = msg["scale"] * self.factor


class Wrapped:
    """A model or guide in a handler, with the layout of what it wraps."""

    def __init__(self, fn: Callable[..., Any], handler: Callable[[], Messenger]) -> None:
        self.fn = fn
        self.handler = handler

    @property
    def layout(self) -> Any:
        return getattr(self.fn, "layout", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.handler():
            return self.fn(*args, **kwargs)


def tempered(fn: Callable[..., Any], beta: Schedule, *, sites: Iterable[str] | None = None) -> Callable[..., Any]:
    r"""A model or guide whose latent sites count ``beta`` times.

    Applied to both, it turns the ELBO into :math:`E_q[\log p(x|z)] - \beta\,KL(q(z|x)\,\|\,p(z))`. The loss
    ``annealed`` does so, and leaves the model as it is for what comes after the fit.

    References:
        beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework
        (Higgins et al., 2017) https://openreview.net/forum?id=Sy2fzU9gl

    Arguments:
        fn: a model or guide.
        beta: a factor, or a schedule of factors such as ``linear(0.0, 1.0)``.
        sites: names of the latent sites that it is for; all of them by default.

    Example:
        >>> model = tempered(lambda: pyro.sample("z", pyro.distributions.Normal(0.0, 1.0)), 4.0)
        >>> poutine.trace(model).get_trace().nodes["z"]["scale"]
        4.0
    """
    names = None if sites is None else frozenset(sites)
    return Wrapped(fn, lambda: _Factor(now(beta), names, observed=False))


def replicated(fn: Callable[..., Any], copies: Schedule) -> Callable[..., Any]:
    r"""A model whose observed sites count ``copies`` times, as if one latent had generated so many equal rows.

    References:
        Improving latent variable descriptiveness with AutoGen (Mansbridge, Fierimonte, Feige and Barber, 2018)
        https://arxiv.org/abs/1806.04480

    Arguments:
        fn: a model.
        copies: a factor, or a schedule of factors.

    Example:
        >>> import torch
        >>> model = replicated(lambda: pyro.sample("x", pyro.distributions.Normal(0.0, 1.0), obs=torch.zeros(())), 2.0)
        >>> poutine.trace(model).get_trace().nodes["x"]["scale"]
        2.0
    """
    return Wrapped(fn, lambda: _Factor(now(copies), None, observed=True))


class batched(nn.Module):
    """A network over ``[n, *event]`` made to take any leading dims: they are folded into one and unfolded.

    Particles stand to the left of the rows, and convolutions refuse more than one such dim.

    Arguments:
        net: maps ``[n, *event]`` to ``[n, ...]``.
        event_dims: number of dims of one input, such as 3 for images ``[channels, height, width]``.

    Example:
        >>> import torch
        >>> batched(nn.Conv2d(1, 4, 3), 3)(torch.zeros(5, 2, 1, 8, 8)).shape
        torch.Size([5, 2, 4, 6, 6])
    """

    def __init__(self, net: nn.Module, event_dims: int) -> None:
        super().__init__()
        self.net = net
        self.event_dims = event_dims

    def forward(self, x: Tensor) -> Tensor:
        split = x.dim() - self.event_dims
        if split < 0:
            raise ValueError(f"expected at least {self.event_dims} dims, got a tensor of shape {tuple(x.shape)}")
        leading = x.shape[:split]
        y = self.net(x.reshape(-1, *x.shape[split:]))
        return y.reshape(*leading, *y.shape[1:]) if y.dim() > 1 else y.reshape(leading)
