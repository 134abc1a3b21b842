"""The Bernoulli head: binary codes."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ae.heads import Readout, event_of


class Bernoulli(nn.Module):
    r"""Features to independent bits.

    .. math:: z_i \sim \text{Bernoulli}\big(\text{sigmoid} \, a_i(h)\big)

    It has no reparameterised sampler: train it with the estimators ``straight_through()`` or ``gumbel()``, which are
    biased, or ``score_function()``, which is not, as in ``importance(iwae, 8, score_function())``.

    References:
        Neural Variational Inference and Learning in Belief Networks (Mnih and Gregor, 2014)
        https://arxiv.org/abs/1402.0030

    Arguments:
        features: size h of the features ``[*, h]``.
        latent: the number of bits, or their event shape, such as ``()`` for a single one.

    Raises:
        ValueError: for a size below 1; when called, for features of another width.
    """

    def __init__(self, features: int, latent: int | Sequence[int]) -> None:
        super().__init__()
        self.event = event_of(latent)
        self.linear = Readout(features, self.event.numel())

    def forward(self, features: Tensor) -> Distribution:
        return self.distribution(self.linear(features))

    def distribution(self, parameters: Tensor) -> Distribution:
        """The distribution of logits ``[*, bits]``."""
        logits = parameters.reshape(*parameters.shape[:-1], *self.event)
        return dist.Bernoulli(logits=logits).to_event(len(self.event))


def example() -> tuple[Bernoulli, Tensor]:
    """A small instance and features for 16 rows."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Bernoulli(8, 3), torch.randn(16, 8)
