"""The mixture head: several normal components a row, among which its particles are shared out evenly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn.functional import one_hot
from torch.special import ndtr

from pyro_ae.heads import Jointly, Readout, free_size, onto, scale_of


class Mixture(nn.Module):
    r"""Features to a mixture of independent normals, carried onto the support of the latent.

    .. math:: z = T(u), \qquad u \sim \sum_c \pi_c(h) \, N\big(m_c(h), \text{diag} \, s_c(h)^2\big)

    Of K particles of a row, the floor or the ceiling of :math:`K \pi_c` are from component c. Draws are differentiable
    by the weights too, through the distribution function of each coordinate given those before.

    References:
        Automatic Differentiation Variational Inference with Mixtures (Morningstar et al., 2021)
        https://arxiv.org/abs/2003.01687
        Stochastic Backpropagation through Mixture Density Distributions (Graves, 2016)
        https://arxiv.org/abs/1607.05690

    Arguments:
        features: size h of the features ``[*, h]``.
        latent: size d of the latent, or its event shape, such as ``()`` for a scalar.
        components: how many.
        support: a constraint of torch, such as ``constraints.positive`` or ``constraints.simplex``.

    Raises:
        ValueError: for no component or a discrete support; when called, for features of another width.
    """

    def __init__(
        self,
        features: int,
        latent: int | Sequence[int],
        *,
        components: int = 4,
        support: constraints.Constraint = constraints.real,
    ) -> None:
        super().__init__()
        if components < 1:
            raise ValueError(f"a mixture needs at least one component, got {components}")
        self.latent, self.components, self.support = latent, components, support
        self.linear = Readout(features, components * (1 + 2 * free_size(latent, support)))

    def forward(self, features: Tensor) -> Distribution:
        return self.distribution(self.linear(features))

    def distribution(self, parameters: Tensor) -> Distribution:
        """The distribution of parameters ``[*, C (1 + 2 m)]``: of each component logit, locations, log scales."""
        each = parameters.unflatten(-1, (self.components, -1))
        loc, log_scale = each[..., 1:].chunk(2, -1)
        return onto(_Mixture(each[..., 0], loc, scale_of(log_scale)), self.latent, self.support)


class _Mixture(Jointly):
    support = constraints.independent(constraints.real, 1)

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.log_pi, self.loc, self.scale = logits.log_softmax(-1), loc, scale
        super().__init__(loc.shape[:-2], loc.shape[-1:])

    def _elements(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Of each coordinate in each component the standard score and the log-density, ``[*, C, m]``."""
        score = (z.unsqueeze(-2) - self.loc) / self.scale
        return score, -0.5 * score.square() - self.scale.log() - 0.5 * math.log(2 * math.pi)

    def log_prob(self, value: Tensor) -> Tensor:
        return (self.log_pi + self._elements(value)[1].sum(-1)).logsumexp(-1)

    def draw(self, copies: int, rows: torch.Size) -> Tensor:
        with torch.no_grad():
            # one uniform number a row, and the others from it in equal steps: the counts are right to one
            order = torch.rand(copies, *rows, device=self.loc.device).argsort(0)
            uniform = (order + torch.rand(rows, dtype=self.loc.dtype, device=self.loc.device)) / copies
            which = (uniform.unsqueeze(-1) > self.log_pi.exp().cumsum(-1)[..., :-1]).sum(-1, keepdim=True)
            own = one_hot(which, self.loc.shape[-2]).squeeze(-2).unsqueeze(-1).to(self.loc)
            loc, scale = (own * self.loc).sum(-2), (own * self.scale).sum(-2)
            z = loc + scale * torch.randn_like(loc)
        return self._attach(z) if torch.is_grad_enabled() else z

    def _attach(self, z: Tensor) -> Tensor:
        """The same values with the gradient of z in F(z_i | z_1 ... z_{i-1}) = constant, for each coordinate i."""
        score, log_n = self._elements(z)
        log_w = (self.log_pi.unsqueeze(-1) + log_n.cumsum(-1) - log_n).log_softmax(-2)  # given those before
        upper = ((log_w.exp() * ndtr(score)).sum(-2, keepdim=True) > 0.5).detach()
        tail = torch.where(upper, -ndtr(-score), ndtr(score))  # the nearer one, which is F but for a constant
        cdf = (log_w.exp() * tail).sum(-2)
        with torch.no_grad():
            density = (log_w + log_n).logsumexp(-2).exp()
            turn = (log_w.exp() * (tail - cdf.unsqueeze(-2))).mT @ (-score / self.scale)
            jacobian = (turn / density.unsqueeze(-1)).tril(-1)
        moved = (cdf - cdf.detach()) / density
        return z - torch.linalg.solve_triangular(jacobian, moved.unsqueeze(-1), upper=False, unitriangular=True)[..., 0]


def example() -> tuple[Mixture, Tensor]:
    """A small instance and features for 16 rows."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Mixture(8, 2, components=3), torch.randn(16, 8)
