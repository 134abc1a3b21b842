"""Densities of an autoencoder's codes, to draw new ones from: configured functions of codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import AffineTransform, Distribution, TransformedDistribution

from .flows import unvalidated, zuko

LatentDensity: TypeAlias = Callable[[Tensor], Distribution]
"""Codes ``[N, d]`` to a distribution of codes, with event shape ``[d]``."""


def _check(codes: Tensor, rows: int) -> Tensor:
    if codes.dim() != 2 or len(codes) < rows:
        raise ValueError(f"expected codes [N, d] of at least {rows} rows, got a tensor of {tuple(codes.shape)}")
    if not torch.isfinite(codes).all():
        raise ValueError("the codes are not finite, so no density fits them: look at the encoder")
    return codes.detach().cpu()


@dataclass(frozen=True)
class gaussian:
    """A Gaussian with the mean and covariance of the codes.

    Arguments:
        jitter: added to the variances.

    Raises:
        ValueError: when called, for codes that are not ``[N, d]`` with N above one, or not finite.

    Example:
        >>> gaussian()(torch.randn(50, 2)).sample((3,)).shape
        torch.Size([3, 2])
    """

    jitter: float = 1e-6

    def __call__(self, codes: Tensor) -> Distribution:
        codes = _check(codes, 2)
        covariance = codes.T.cov().reshape(codes.shape[1], -1)
        return dist.MultivariateNormal(codes.mean(0), covariance + self.jitter * torch.eye(codes.shape[1]))


@dataclass(frozen=True)
class mixture:
    """A mixture of Gaussians with full covariances, by scikit-learn's EM, or a Dirichlet process of them.

    References:
        From Variational to Deterministic Autoencoders (Ghosh, Sajjadi, Vergari, Black and Scholkopf, 2020)
        https://arxiv.org/abs/1903.12436
        Model Selection for Bayesian Autoencoders (Tran et al., 2021) https://arxiv.org/abs/2106.06245

    Arguments:
        components: how many; at most, for a Dirichlet process, which leaves those empty that it does not need.
        dirichlet_process: whether weights have the stick-breaking prior of one, of concentration 1 / N.
        steps: of EM, at most.

    Raises:
        ValueError: for no component; when called, for fewer codes than components.

    Example:
        >>> codes = torch.cat([torch.randn(50, 2), torch.randn(50, 2) + 9.0])
        >>> mixture(2)(codes).mixture_distribution.probs.sort().values
        tensor([0.5000, 0.5000])
    """

    components: int = 10
    dirichlet_process: bool = False
    steps: int = 500

    def __post_init__(self) -> None:
        if self.components < 1 or self.steps < 1:
            raise ValueError(f"components and steps must be at least 1, got {self.components} and {self.steps}")

    def __call__(self, codes: Tensor) -> Distribution:
        from sklearn.mixture import BayesianGaussianMixture, GaussianMixture

        codes = _check(codes, self.components)
        seed = int(torch.randint(2**31 - 1, ()))
        options = {"n_components": self.components, "max_iter": self.steps, "random_state": seed}
        if self.dirichlet_process:
            fitted = BayesianGaussianMixture(**options, weight_concentration_prior=1.0 / len(codes))
        else:
            fitted = GaussianMixture(**options)
        fitted.fit(codes.double().numpy())
        # in double precision, as few codes of many dims leave covariances that are singular in single
        roots = torch.linalg.cholesky(torch.as_tensor(fitted.covariances_))
        weights, means, roots = (torch.as_tensor(v).to(codes) for v in (fitted.weights_, fitted.means_, roots))
        return dist.MixtureSameFamily(dist.Categorical(weights), dist.MultivariateNormal(means, scale_tril=roots))


@dataclass(frozen=True)
class nearest:
    r"""A kernel density whose width at each code is the distance to its k-th nearest neighbour.

    .. math:: \frac{1}{N} \sum_n N\big(z;\, z_n, \tfrac{s^2 r_n^2}{d} I\big), \qquad r_n = \|z_n - z_{n(k)}\|

    References:
        Variable Kernel Estimates of Multivariate Densities (Breiman, Meisel and Purcell, 1977)
        https://doi.org/10.1080/00401706.1977.10489521

    Arguments:
        k: which neighbour.
        scale: s; smaller keeps closer to the codes.

    Raises:
        ValueError: for values out of range; when called, for k codes or fewer.

    Example:
        >>> nearest(k=3)(torch.randn(50, 2)).sample((4,)).shape
        torch.Size([4, 2])
    """

    k: int = 5
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.k < 1 or not self.scale > 0:
            raise ValueError(f"k must be at least 1 and scale positive, got {self.k} and {self.scale}")

    def __call__(self, codes: Tensor) -> Distribution:
        from sklearn.neighbors import NearestNeighbors

        codes = _check(codes, self.k + 1)
        distances, _ = NearestNeighbors(n_neighbors=self.k + 1).fit(codes.numpy()).kneighbors(codes.numpy())
        widths = torch.as_tensor(distances[:, -1]).to(codes).clamp(min=1e-6) * self.scale / codes.shape[1] ** 0.5
        kernels = dist.Normal(codes, widths.unsqueeze(-1).expand_as(codes)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(codes))), kernels)


@dataclass(frozen=True)
class flow:
    """A neural spline flow of the standardised codes, by zuko, fitted by maximum likelihood.

    The state with the best likelihood of a tenth of the codes, held out, is kept.

    References:
        Neural Spline Flows (Durkan, Bekasov, Murray and Papamakarios, 2019) https://arxiv.org/abs/1906.04032

    Arguments:
        transforms: how many, one after the other.
        hidden: sizes of the hidden layers of each.
        steps: of Adam, with up to 256 codes each.
        lr: learning rate.

    Raises:
        ValueError: for values out of range; when called, for fewer than ten codes.

    Example:
        >>> flow(steps=5)(torch.randn(50, 2)).sample((3,)).shape
        torch.Size([3, 2])
    """

    transforms: int = 3
    hidden: tuple[int, ...] = (64, 64)
    steps: int = 1000
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.transforms < 1 or self.steps < 1 or not self.lr > 0:
            raise ValueError(f"transforms and steps must be at least 1 and lr positive, got {self!r}")

    def __call__(self, codes: Tensor) -> Distribution:
        codes = _check(codes, 10)
        loc, scale = codes.mean(0), codes.std(0).clamp(min=1e-6)
        z = ((codes - loc) / scale)[torch.randperm(len(codes))]
        held, rest = z[: len(z) // 10], z[len(z) // 10 :]
        with unvalidated():
            network = zuko().flows.NSF(z.shape[1], transforms=self.transforms, hidden_features=self.hidden)
            optimizer = torch.optim.Adam(network.parameters(), lr=self.lr)
            best, kept = torch.inf, network.state_dict()
            with torch.enable_grad():
                for step in range(self.steps):
                    batch = rest[torch.randint(len(rest), (min(256, len(rest)),))]
                    loss = -network().log_prob(batch).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    if step % 20 == 19 or step == self.steps - 1:
                        with torch.no_grad():
                            score = float(-network().log_prob(held).mean())
                        if score < best:
                            best, kept = score, {n: v.clone() for n, v in network.state_dict().items()}
            network.load_state_dict(kept)
            network.requires_grad_(False)
            return TransformedDistribution(network(), [AffineTransform(loc, scale, event_dim=1)], validate_args=False)
