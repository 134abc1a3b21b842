"""The flow head: any of zuko's normalizing flows, given the features, on any support."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_ae.flows import Affine, Layer, Pushforward, Zuko, unvalidated, zuko
from pyro_ae.heads import Readout, free_size, onto, scale_of

BISECTED = ("GF", "NAF", "UNAF", "BPF", "SOSPF")
"""Flows of zuko whose univariate maps have no inverse in closed form."""


class Flow(nn.Module):
    r"""Features to a normalizing flow, carried onto the support of the latent.

    .. math:: z = T\big(m(h) + s(h) \, f^{-1}(\epsilon; h)\big), \qquad \epsilon \sim N(0, I)

    The flow f is conditional on the features, and its draws are shifted and scaled, so that a spline covers them. By
    default f is inverted: draws and their densities take one pass then, which is what variational inference needs, and
    the density at other values takes one for each dimension, or bisection.

    References:
        Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016)
        https://arxiv.org/abs/1606.04934

    Arguments:
        features: size h of the features ``[*, h]``.
        latent: size d of the latent, or its event shape, such as ``()`` for a scalar.
        flow: a name in ``zuko.flows``, such as ``"NSF"``, ``"MAF"``, ``"NAF"``, ``"RealNVP"`` or ``"CNF"``, or a
            function ``(features=d, context=h, **options)`` that makes a ``zuko.flows.Flow`` of a standard normal.
        inverse: whether draws take the flow's forward map.
        support: a constraint of torch, such as ``constraints.positive`` or ``constraints.simplex``.
        options: of the flow, such as ``transforms=3`` and ``hidden_features=(64, 64)``.

    Raises:
        ValueError: for an unknown flow, options that it does not take, ``inverse=False`` where that flow draws by
            bisection, or a support that is not continuous; when called, for features of another width.
    """

    def __init__(
        self,
        features: int,
        latent: int | Sequence[int],
        flow: str | Callable[..., Any] = "NSF",
        *,
        inverse: bool = True,
        support: constraints.Constraint = constraints.real,
        **options: Any,
    ) -> None:
        super().__init__()
        self.latent, self.inverse, self.support = latent, inverse, support
        size = free_size(latent, support)
        self.linear = Readout(features, 2 * size)
        self.flow = _make(flow, size, features, options)
        if not inverse and flow in BISECTED:
            raise ValueError(f"the draws of {flow} are found by bisection, within [-10, 10] alone: keep inverse=True")

    def forward(self, features: Tensor) -> Distribution:
        loc, log_scale = self.linear(features).chunk(2, -1)
        with unvalidated():
            transform = self.flow.transform(features)
        layers: list[Layer] = [Zuko(transform if self.inverse else transform.inv), Affine(loc, scale_of(log_scale))]
        base = dist.Normal(torch.zeros_like(loc), 1.0).to_event(1)
        return onto(Pushforward(base, layers), self.latent, self.support)


def _make(flow: str | Callable[..., Any], size: int, context: int, options: dict[str, Any]) -> Any:
    flows = zuko().flows
    names = [n for n, f in vars(flows).items() if isinstance(f, type) and issubclass(f, flows.Flow) and f != flows.Flow]
    if isinstance(flow, str) and flow not in names:
        raise ValueError(f"zuko has no flow {flow!r}: choose one of {', '.join(names)}")
    make = getattr(flows, flow) if isinstance(flow, str) else flow
    try:
        with unvalidated():
            made = make(features=size, context=context, **options)
            normal = type(made.base(None)).__name__ == "DiagNormal"
            made.transform(torch.zeros(2, context))(torch.zeros(2, size))
    except (TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{flow!r} makes no flow of {size} dimensions with the options {options}: {error}") from error
    if not normal:
        raise ValueError(f"the base of {flow!r} is no normal distribution, as that of a flow of real vectors must be")
    return made


def example() -> tuple[Flow, Tensor]:
    """A small instance and features for 16 rows."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Flow(8, 2, transforms=2, hidden_features=(16,)), torch.randn(16, 8)
