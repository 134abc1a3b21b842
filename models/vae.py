"""The variational autoencoder's generative model: a standard normal code and a network for the likelihood."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ae.data import observe
from pyro_ae.plates import batch_plate


def bernoulli(logits: Tensor) -> Distribution:
    """Independent binary values.

    Arguments:
        logits: ``[*, d]``; the event shape is ``[d]``.
    """
    return dist.Bernoulli(logits=logits).to_event(1)


class VAE(nn.Module):
    r"""A latent-variable model with a network in the likelihood.

    .. math:: z \sim N(0, I), \qquad x \mid z \sim \text{likelihood}(\text{decoder}(z))

    References:
        Auto-Encoding Variational Bayes (Kingma and Welling, 2014) https://arxiv.org/abs/1312.6114

    Arguments:
        decoder: a network from z ``[*, latent]`` to the parameters of the likelihood.
        latent: size of z.
        likelihood: from the decoder's output ``[*, ...]`` to a distribution with batch shape ``[*]`` and the event
            shape of a row of x; by default Bernoulli over a vector of logits.
    """

    def __init__(
        self, decoder: nn.Module, latent: int, likelihood: Callable[[Tensor], Distribution] = bernoulli
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.latent = latent
        self.likelihood = likelihood

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        with batch_plate(x, size):
            zeros = next(self.decoder.parameters()).new_zeros(self.latent)
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            return observe("x", self.likelihood(self.decoder(z)), x)


def example() -> tuple[VAE, nn.Module, Tensor]:
    """A small instance, a guide for it, and 16 binary rows."""
    from pyro_ae.nn import MLP

    from ..guides.amortized import Amortized
    from ..guides.mean_field import MeanField

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = VAE(MLP(2, [16], 12), latent=2)
        guide = Amortized(MLP(12, [16]), MeanField(16, 2))
        x = torch.bernoulli(torch.full((16, 12), 0.4))
    return model, guide, x
