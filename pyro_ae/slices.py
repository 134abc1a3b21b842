"""Sliced Wasserstein distances that look for the directions, or the curves, that tell two samples apart best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .critics import Distance
from .divergences import check_samples, wasserstein_1d


def _check(projections: int, steps: int, lr: float, p: float) -> None:
    if projections < 1 or steps < 1 or not lr > 0 or not p >= 1:
        raise ValueError(
            f"projections, steps and p must be at least 1 and lr positive, got {projections}, {steps}, {p} and {lr}"
        )


def _sorted(values: Tensor) -> Tensor:
    """Each row of ``[L, n]`` in ascending order."""
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return values.sort(-1).values
    # NumPy's argsort is vectorised and takes half the time of torch's sort.
    return values.gather(-1, torch.from_numpy(np.argsort(values.detach().numpy(), -1)))


def _distances(a: Tensor, b: Tensor, p: float) -> Tensor:
    """As ``wasserstein_1d``, of each row of ``[L, n]`` and ``[L, m]``, whose values are next to one another."""
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    if a.shape[1] % b.shape[1]:
        return wasserstein_1d(a.T, b.T, p)
    # a whole number of values of the larger sample falls to each of the smaller
    gaps = _sorted(a).unflatten(-1, (b.shape[1], -1)) - _sorted(b).unsqueeze(-1)
    return (gaps.square() if p == 2 else gaps.abs().pow(p)).mean((-2, -1))


def _along(directions: Tensor, p: float) -> Distance:
    """The mean distance along given directions, columns of ``[d, L]``."""
    return lambda a, b: _distances(directions.T @ a.T, directions.T @ b.T, p).mean()


@dataclass(frozen=True)
class max_sliced_wasserstein:
    r"""The Wasserstein distance to the power p along the direction in which it is largest.

    .. math:: \max_{\|\theta\| = 1} W_p^p \big( \theta^\top a, \theta^\top b \big)

    The direction is found by ascent, from the best of a few at random, so it may be a local maximum.

    References:
        Max-Sliced Wasserstein Distance and its Use for GANs (Deshpande et al., 2019) https://arxiv.org/abs/1904.05877

    Arguments:
        steps: of ascent, by Adam.
        lr: learning rate.
        p: order of the distance, at least 1.

    Raises:
        ValueError: for values out of range; when called, for samples that are not ``[n, d]`` and ``[m, d]``.

    Example:
        >>> a = torch.randn(500, 3)
        >>> 3.5 < max_sliced_wasserstein()(a, a + torch.tensor([0.0, 2.0, 0.0])) < 4.5
        tensor(True)
    """

    steps: int = 50
    lr: float = 0.05
    p: float = 2.0

    def __post_init__(self) -> None:
        _check(1, self.steps, self.lr, self.p)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fitted(a, b)(a, b)

    def fitted(self, a: Tensor, b: Tensor) -> Distance:
        """The distance along the direction that tells these samples apart best, as a function of others."""
        check_samples(a, b)
        a, b = a.detach(), b.detach()
        tried = normalize(torch.randn(a.shape[1], 32, dtype=a.dtype, device=a.device), dim=0)
        with torch.enable_grad():
            best = _distances(tried.T @ a.T, tried.T @ b.T, self.p).argmax()
            direction = tried[:, best : best + 1].clone().requires_grad_()
            ascent = torch.optim.Adam([direction], lr=self.lr)
            for _ in range(self.steps):
                loss = -_along(normalize(direction, dim=0), self.p)(a, b)
                (direction.grad,) = torch.autograd.grad(loss, [direction])
                ascent.step()
        return _along(normalize(direction.detach(), dim=0), self.p)


class distributional_sliced_wasserstein(nn.Module):
    r"""The sliced Wasserstein distance over a distribution of directions that is learned.

    .. math:: \max_f\ E_{\theta \sim U} \big[ W_p^p \big( f(\theta)^\top a, f(\theta)^\top b \big) \big]
        - \lambda\, E_{\theta, \theta'} \big[ \lvert f(\theta)^\top f(\theta') \rvert \big]

    A network f turns directions at random into directions that matter; the second term keeps them from all becoming
    one, which would be the max-sliced distance, while a large :math:`\lambda` leaves the sliced one. The network is
    made for the width of the first samples, and goes on learning where it was with each pair that it is fitted to.
    Projecting and sorting are most of the work, so it is quickest where one sample's size is a multiple of the other's.

    References:
        Distributional Sliced-Wasserstein and Applications to Generative Modeling (Nguyen, Ho, Pham and Bui, 2021)
        https://arxiv.org/abs/2002.07367
        Model Selection for Bayesian Autoencoders (Tran et al., 2021) https://arxiv.org/abs/2106.06245

    Arguments:
        projections: directions at once.
        steps: of the network for each pair of samples, by Adam.
        lr: its learning rate.
        diversity: lambda.
        p: order of the distance, at least 1.
        sum: whether a projection's distance is the sum over rows in place of their mean, as in the code of the second
            paper; lambda is against that sum then.

    Raises:
        ValueError: as ``max_sliced_wasserstein`` does; when called, for samples of another width than the first.

    Example:
        >>> distance = distributional_sliced_wasserstein(projections=50)
        >>> distance(torch.zeros(20, 3), torch.ones(30, 3)).shape
        torch.Size([])
    """

    def __init__(
        self,
        projections: int = 1000,
        steps: int = 30,
        lr: float = 5e-4,
        diversity: float = 100.0,
        p: float = 2.0,
        *,
        sum: bool = False,
    ) -> None:
        super().__init__()
        _check(projections, steps, lr, p)
        if diversity < 0:
            raise ValueError(f"diversity must not be negative, got {diversity}")
        self.projections, self.steps, self.lr = projections, steps, lr
        self.diversity, self.p, self.sum = diversity, p, sum
        self.network: nn.Linear | None = None

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fitted(a, b)(a, b)

    def fitted(self, a: Tensor, b: Tensor) -> Distance:
        """The distance over the directions that this pair has taught the network, as a function of others."""
        check_samples(a, b)
        a, b = a.detach(), b.detach()
        network = self._network(a)
        parameters = list(network.parameters())
        with torch.enable_grad():
            for _ in range(self.steps):
                directions = self.directions()
                # a mean over pairs, so half of its gradient is that in the first of the two: no other is worked out
                alike = 2.0 * (directions.T @ directions.detach()).abs().mean()
                loss = self.diversity * alike - self._scale(a, b) * _along(directions, self.p)(a, b)
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    parameter.grad = gradient
                self._ascent.step()
        directions = self.directions().detach()
        return lambda a, b: self._scale(a, b) * _along(directions, self.p)(a, b)

    def directions(self) -> Tensor:
        """Directions from the learned distribution, ``[d, projections]``."""
        assert self.network is not None, "it learns when it is called"
        weight = self.network.weight
        theta = torch.randn(self.projections, self.network.in_features, dtype=weight.dtype, device=weight.device)
        return normalize(self.network(normalize(theta, dim=1)), dim=1).T

    def state(self) -> dict[str, Tensor]:
        """What it has learned so far, for :meth:`resume`: the network, and its optimiser's averages."""
        if self.network is None:
            return {}
        named = self.network.named_parameters()
        return {f"{n}.{k}": v for n, p in named for k, v in {"value": p.detach(), **self._ascent.state[p]}.items()}

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on learning where a :meth:`state` was."""
        self.network = None
        if not state:
            return
        for name, p in self._network(state["weight.value"]).named_parameters():
            held = {n.removeprefix(f"{name}."): v.clone() for n, v in state.items() if n.startswith(f"{name}.")}
            p.data = held.pop("value").to(p)
            self._ascent.state[p] = {k: v.to(p) if v.dim() else v for k, v in held.items()}

    def _network(self, samples: Tensor) -> nn.Linear:
        """The network, made for the width of the samples if there is none yet."""
        width = samples.shape[1]
        if self.network is None:
            self.network = nn.Linear(width, width).to(samples)
            self._ascent = torch.optim.Adam(self.network.parameters(), lr=self.lr)
        if self.network.in_features != width:
            raise ValueError(
                f"the network of directions was made for samples of width {self.network.in_features}, and these have "
                f"{width}: use another {type(self).__name__} for them"
            )
        return self.network

    def __repr__(self) -> str:
        names = ("projections", "steps", "lr", "diversity", "p", "sum")
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"

    def _scale(self, a: Tensor, b: Tensor) -> float:
        return float(max(len(a), len(b))) if self.sum else 1.0


@dataclass(frozen=True)
class generalised_sliced_wasserstein:
    r"""The Wasserstein distance to the power p of distances to points at random, averaged over the points.

    .. math:: E_\theta\, W_p^p \big( \|a - r \theta\|, \|b - r \theta\| \big), \qquad \theta \sim U(\{\|\theta\| = 1\})

    It slices along circles, in place of straight lines: the circular defining function of the paper. Samples that
    differ in a curved way differ in few of these projections, where many straight ones would be needed.

    References:
        Generalized Sliced Wasserstein Distances (Kolouri et al., 2019) https://arxiv.org/abs/1902.00434

    Arguments:
        radius: r, in units of the samples; by default the largest norm in them.
        projections: how many points.
        p: order of the distance, at least 1.

    Raises:
        ValueError: as ``max_sliced_wasserstein`` does.

    Example:
        >>> generalised_sliced_wasserstein()(torch.zeros(20, 3), torch.ones(30, 3)).shape
        torch.Size([])
    """

    radius: float | None = None
    projections: int = 50
    p: float = 2.0

    def __post_init__(self) -> None:
        _check(self.projections, 1, 1.0, self.p)
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"radius must be positive, got {self.radius}")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        check_samples(a, b)
        points = normalize(torch.randn(self.projections, a.shape[1], dtype=a.dtype, device=a.device), dim=1)
        radius = self.radius or float(torch.cat([a, b]).detach().norm(dim=1).max().clamp(min=1e-6))
        ours, theirs = (torch.cdist(s, radius * points, compute_mode="donot_use_mm_for_euclid_dist") for s in (a, b))
        return wasserstein_1d(ours, theirs, self.p).mean()
