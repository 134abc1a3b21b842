"""The implicit posterior: what a network makes of noise, with the density of the network made linear at each draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn

from pyro_ae.nn import MLP
from pyro_ae.types import Model
from pyro_ae.unconstrained import Unconstrained


class Matrices(nn.Module):
    """A generator of very many latents with about 2 width sqrt(n) parameters: elements of a matrix U tanh(X(z)) V.

    References:
        Implicit Variational Inference for High-Dimensional Posteriors (Uppal et al., 2023)
        https://arxiv.org/abs/2310.06643

    Arguments:
        latent, size, width: d, n and the width of the square matrix X.
    """

    def __init__(self, latent: int, size: int, width: int = 32) -> None:
        super().__init__()
        self.size, self.inner = size, MLP(latent, [64], (width, width), activation=nn.Tanh)
        self.sides = nn.Parameter(torch.randn(2, int(size**0.5) + 1, width))

    def forward(self, z: Tensor) -> Tensor:
        return (self.sides[0] @ self.inner(z).tanh() @ self.sides[1].T).flatten(-2)[..., : self.size]


class Implicit(Unconstrained):
    r"""All latents at once, correlated and of any shape: what a network makes of a few random numbers, and noise.

    .. math:: \theta = G(z) + \sigma \epsilon, \qquad \tilde q(\theta) = N(\theta; G(z) - J z, J J^\top + \sigma^2 I)

    The density is of G made linear at the draw's z, with derivative J: exact for a linear G, else an estimate, and no
    bound. ``smallest`` has d log(s^2 + sigma^2) for log det(J'J + sigma^2), s the smallest singular value: a lower
    ELBO, by one column's gradient. All terms count once; the paper's code gives prior and z 8.5e-4 times J's weight.

    References:
        Implicit Variational Inference for High-Dimensional Posteriors (Uppal et al., 2023)
        https://arxiv.org/abs/2310.06643

    Arguments:
        model: whose shared latents it samples.
        latent: d, the size of z.
        generator: of d and the size n of theta makes a network, such as ``Matrices``; by default a perceptron.
        noise: sigma, which is not learnt.
        smallest: whether to bound the determinant.
        plate, start, scale: as for ``Shared``.

    Raises:
        ValueError: for values out of range; when first called, for a model that no such guide can be made of.
    """

    def __init__(
        self,
        model: Model,
        latent: int = 10,
        *,
        generator: Callable[[int, int], nn.Module] = lambda d, n: MLP(d, (64, 64), n, activation=nn.Tanh),
        noise: float = 1e-3,
        smallest: bool = False,
        plate: str | None = "data",
        start: Callable[..., Any] = init_to_median,
        scale: float = 0.1,
    ) -> None:
        if latent < 1 or not (noise > 0 and scale > 0):
            raise ValueError(f"{latent=} must be at least 1, {noise=} and {scale=} positive")
        super().__init__(model, plate=plate, start=start)
        self.latent, self.noise, self.smallest, self.make, self.scale = latent, noise, smallest, generator, scale

    def build(self, size: int) -> None:
        self.generator = self.make(self.latent, size)
        draws = self.generator(torch.randn(32, self.latent)).detach()
        self.spread = nn.Parameter(self.scale / draws.std(0))
        self.center = nn.Parameter(-draws.mean(0) * self.spread.detach())

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        plates = [(f.size, *(1,) * (-f.dim - 1)) for f in pyro.poutine.runtime.get_plates() if f.vectorized]
        network, loc, spread, v = self.generator, self.center, self.spread, self.noise**2
        z, noise = (torch.randn(*torch.broadcast_shapes((), *plates), n).to(loc) for n in (self.latent, len(loc)))
        mean, pull = torch.func.vjp(lambda z: loc + spread * network(z), z)  # type: ignore[misc]
        push = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(mean))[1]  # J along a direction
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.smallest):
            J = torch.vmap(lambda v: push(v.expand_as(z))[0], out_dims=-1)(torch.eye(self.latent).to(z)).double()
            q = dist.LowRankMultivariateNormal(0 * J[..., 0], J, 0 * J[..., 0] + v)  # squares J, hence the double
            density = q.log_prob((J * z.unsqueeze(-2)).sum(-1) + self.noise * noise)
        if self.smallest:
            squares, axes = torch.linalg.eigh(J.mT @ J)
            (column,) = push(axes[..., 0].to(z))
            density = density + ((squares + v) / (column.double().square().sum(-1, True) + v)).log().sum(-1) / 2
        site = dist.Delta(mean + self.noise * noise, log_density=density.to(z), event_dim=1)
        return pyro.sample("_Implicit_latent", site, infer={"is_auxiliary": True, "estimated": True})


def example() -> tuple[Any, Implicit, Tensor]:
    """A model, its guide and 16 rows."""
    from .shared import example as shared

    model, _, x = shared()
    return model, Implicit(model, 3), x
