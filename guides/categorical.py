"""The categorical head: one-hot codes."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ae.heads import Readout, event_of


class Categorical(nn.Module):
    r"""Features to one-hot vectors, in one group or in several that are independent.

    .. math:: z_g \sim \text{Categorical}\big(\text{softmax} \, a_g(h)\big)

    It has no reparameterised sampler: train it with the estimators ``straight_through()`` or ``gumbel()``, which are
    biased, or ``score_function()``, which is not, as in ``importance(iwae, 8, score_function())``.

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu and Poole, 2017) https://arxiv.org/abs/1611.01144

    Arguments:
        features: size h of the features ``[*, h]``.
        latent: the number of classes, or the event shape, with the classes last, such as ``(groups, classes)``.

    Raises:
        ValueError: for fewer than two classes; when called, for features of another width.
    """

    def __init__(self, features: int, latent: int | Sequence[int]) -> None:
        super().__init__()
        self.event = event_of(latent)
        if not self.event or self.event[-1] < 2:
            raise ValueError(f"a one-hot latent needs two classes or more as its last size, got latent={latent!r}")
        self.linear = Readout(features, self.event.numel())

    def forward(self, features: Tensor) -> Distribution:
        return self.distribution(self.linear(features))

    def distribution(self, parameters: Tensor) -> Distribution:
        """The distribution of logits ``[*, groups x classes]``."""
        return dist.OneHotCategorical(logits=parameters.unflatten(-1, self.event)).to_event(len(self.event) - 1)


def example() -> tuple[Categorical, Tensor]:
    """A small instance and features for 16 rows."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Categorical(8, 3), torch.randn(16, 8)
