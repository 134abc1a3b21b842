"""The Sylvester head: a normal distribution that layers bend along several orthogonal directions at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_ae.flows import Pushforward, tanh_root
from pyro_ae.heads import Readout, free_size, onto, scale_of


class Sylvester(nn.Module):
    r"""Features to an orthogonal Sylvester flow of independent normals, carried onto the support of the latent.

    .. math:: f(z) = z + Q(h) R(h) \tanh\big(\tilde{R}(h) Q(h)^\top z + b(h)\big)

    Q has orthonormal columns, both R are triangular with diagonals in (-1, 1). The inverse is by bisection, column by
    column of Q, so the density is known at any value.

    References:
        Sylvester Normalizing Flows for Variational Inference (van den Berg et al., 2018)
        https://arxiv.org/abs/1803.05649

    Arguments:
        features: size h of the features ``[*, h]``.
        latent: size d of the latent, or its event shape, such as ``()`` for a scalar.
        layers: how many.
        directions: columns of Q; all by default.
        support: a constraint of torch, such as ``constraints.positive`` or ``constraints.simplex``.

    Raises:
        ValueError: for numbers out of range or a discrete support; when called, for features of another width.
    """

    def __init__(
        self,
        features: int,
        latent: int | Sequence[int],
        *,
        layers: int = 4,
        directions: int | None = None,
        support: constraints.Constraint = constraints.real,
    ) -> None:
        super().__init__()
        m = free_size(latent, support)
        n = m if directions is None else directions
        if layers < 1 or not 1 <= n <= m:
            raise ValueError(f"layers must be at least 1 and directions in 1 ... {m}, got {layers} and {directions}")
        self.latent, self.layers, self.support = latent, layers, support
        self.free, self.directions = m, n
        self.linear = Readout(features, 2 * m + layers * n * (m + n + 3))

    def forward(self, features: Tensor) -> Distribution:
        return self.distribution(self.linear(features))

    def distribution(self, parameters: Tensor) -> Distribution:
        """The distribution of parameters ``[*, p]``: locations, logarithms of scales; of each layer Q, R's and b."""
        m, n = self.free, self.directions
        loc, log_scale, rest = parameters.split([m, m, self.layers * n * (m + n + 3)], -1)
        layers = []
        for layer in rest.chunk(self.layers, -1):
            free, square, diagonal, other, b = layer.split([m * n, n * n, n, n, n], -1)
            q = torch.linalg.qr(free.unflatten(-1, (m, n)))[0]
            square = square.unflatten(-1, (n, n))  # one triangle for each, without the diagonal
            r, other = (0.999 * v.tanh().diag_embed() for v in (diagonal, other))
            layers.append(_Sylvester(q, square.triu(1) + r, square.tril(-1).mT + other, b))
        base = dist.Normal(loc, scale_of(log_scale)).to_event(1)
        return onto(Pushforward(base, layers), self.latent, self.support)


class _Sylvester(NamedTuple):
    q: Tensor
    r: Tensor
    other: Tensor
    b: Tensor

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._at(z, _times(self.q.mT, z), 1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        target = _times(self.q.mT, x)
        y = torch.zeros_like(target)  # found from the last one on, as the map of y = Q^T z is triangular
        for i in reversed(range(y.shape[-1])):
            here, after = slice(i, i + 1), slice(i + 1, None)
            shift = _times(self.other, y) + self.b
            rest = target[..., here] - _times(self.r[..., here, after], shift[..., after].tanh())
            root = tanh_root(rest, self.r[..., here, i], self.other[..., here, i], shift[..., here])
            y = torch.cat([y[..., :i], root, y[..., after]], -1)
        return self._at(x, y, -1)

    def _at(self, v: Tensor, y: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        height = torch.tanh(_times(self.other, y) + self.b)
        slopes = (self.r * self.other).diagonal(dim1=-2, dim2=-1) * (1 - height.square())
        return v + sign * _times(self.q, _times(self.r, height)), slopes.log1p().sum(-1)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def example() -> tuple[Sylvester, Tensor]:
    """A small instance and features for 16 rows."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Sylvester(8, 2, layers=2), torch.randn(16, 8)
