"""A variational autoencoder's generative model with several layers of latents, each the prior of the one below."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ae.data import observe
from pyro_ae.plates import batch_plate

from .vae import bernoulli


class DeepVAE(nn.Module):
    r"""A chain of latents, from a standard normal at the top down to the likelihood.

    .. math:: z_L \sim N(0, I), \qquad z_l \mid z_{l+1} \sim \text{prior}_l(z_{l+1}), \qquad
        x \mid z_1 \sim \text{likelihood}(\text{decoder}(z_1))

    The sites are ``"z1"``, the nearest to the data, to ``"zL"``.

    References:
        Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016) https://arxiv.org/abs/1509.00519

    Arguments:
        decoder: a network from z1 ``[*, d1]`` to the parameters of the likelihood.
        priors: from the bottom up, networks from a latent ``[*, d]`` to the distribution of the one below, with batch
            shape ``[*]``, such as ``nn.Sequential(MLP(2, [16]), MeanField(16, 4))``. Without any it is a VAE.
        latent: size of the latent at the top.
        likelihood: from the decoder's output ``[*, ...]`` to a distribution with batch shape ``[*]`` and the event
            shape of a row of x; by default Bernoulli over a vector of logits.
    """

    def __init__(
        self,
        decoder: nn.Module,
        *priors: nn.Module,
        latent: int,
        likelihood: Callable[[Tensor], Distribution] = bernoulli,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.priors = nn.ModuleList(priors)
        self.latent = latent
        self.likelihood = likelihood

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        with batch_plate(x, size):
            zeros = next(self.decoder.parameters()).new_zeros(self.latent)
            z = pyro.sample(f"z{len(self.priors) + 1}", dist.Normal(zeros, 1.0).to_event(1))
            for layer in range(len(self.priors), 0, -1):
                z = pyro.sample(f"z{layer}", self.priors[layer - 1](z))
            return observe("x", self.likelihood(self.decoder(z)), x)


def example() -> tuple[DeepVAE, nn.Module, Tensor]:
    """A small instance of two layers, a guide for it, and 16 binary rows."""
    from pyro_ae.nn import MLP

    from ..guides.bottom_up import BottomUp
    from ..guides.mean_field import MeanField

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = DeepVAE(MLP(4, [16], 12), nn.Sequential(MLP(2, [8]), MeanField(8, 4)), latent=2)
        guide = BottomUp((MLP(12, [16]), MeanField(16, 4)), (MLP(4, [8]), MeanField(8, 2)))
        x = torch.bernoulli(torch.full((16, 12), 0.4))
    return model, guide, x
