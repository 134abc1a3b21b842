"""The Bayesian autoencoder: an autoencoder whose weights are latent, with a prior that can be tuned."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import chain
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ae.bayesian import STANDARD, Bayesian, Priors
from pyro_ae.continuous_bernoulli import ContinuousBernoulli
from pyro_ae.data import fill_missing, observe
from pyro_ae.plates import batch_plate


class BayesianAutoencoder(nn.Module):
    r"""An autoencoder with a prior over the weights of its encoder and decoder; codes are a function of rows.

    .. math:: w \sim p_\psi(w), \qquad z_n = \text{encoder}(x_n; w), \qquad
        x_n \mid w \sim \text{likelihood}(\text{decoder}(z_n; w))

    Rows and their codes have no density of their own, so that new rows are decoded from codes of another density:
    ``posterior.generate(n, density=...)``; without one, of a standard normal. With ``prior=learnable(loc="module",
    per="weight")`` each weight has a mean and a variance, which ``match_prior`` tunes.

    References:
        Model Selection for Bayesian Autoencoders (Tran et al., 2021) https://arxiv.org/abs/2106.06245

    Arguments:
        encoder: a network from rows ``[*, *event]`` to codes ``[*, latent]``; with missing values it takes the mask of
            what is observed as well. A copy is taken.
        decoder: a network from codes ``[*, latent]`` to the parameters of the likelihood. A copy is taken.
        latent: size of a code.
        likelihood: from the decoder's output to a distribution of rows; dims to the right of the rows become its event.
        prior: of the weights, as for ``bayesian``.
        bayesian: which of ``"encoder"`` and ``"decoder"`` have latent weights; what is left out is trained along.
            With neither, it is a plain autoencoder, fitted by maximum likelihood.
        start: where samplers start, as for ``bayesian``.

    Attributes:
        encoder, decoder: the networks, whose weights are the sites ``"encoder.*"`` and ``"decoder.*"``.

    Raises:
        ValueError: as ``bayesian`` does; for other names of parts.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent: int,
        likelihood: Callable[[Tensor], Distribution] = ContinuousBernoulli,
        *,
        prior: Priors = STANDARD,
        bayesian: Collection[str] = ("encoder", "decoder"),
        start: str = "fresh",
    ) -> None:
        super().__init__()
        parts = {"encoder": encoder, "decoder": decoder}
        if isinstance(bayesian, str) or not set(bayesian) <= set(parts):
            raise ValueError(f'bayesian is a collection of "encoder" and "decoder", got {bayesian!r}')
        self.encoder, self.decoder = (
            Bayesian(module, prior, deterministic=() if name in bayesian else ("*",), name=name, start=start)
            for name, module in parts.items()
        )
        self.latent = latent
        self.likelihood = likelihood

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        if x is None:
            with batch_plate(size=size):
                zeros = next(chain(self.parameters(), self.buffers())).new_zeros(self.latent)
                z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
        else:
            filled, observed = fill_missing(x)
            z = pyro.deterministic("z", self.encoder(*(v for v in (filled, observed) if v is not None)), event_dim=1)
        p: Any = self.likelihood(self.decoder(z))
        with batch_plate(x, size):
            return observe("x", p.to_event(len(p.batch_shape) - (z.dim() - 1)), x)


def example() -> tuple[BayesianAutoencoder, nn.Module, Tensor]:
    """A small instance, a guide for it, and 16 rows of grey levels."""
    from pyro.infer.autoguide import AutoNormal

    from pyro_ae.nn import MLP

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = BayesianAutoencoder(MLP(12, [8], 2), MLP(2, [8], 12), latent=2)
        guide = AutoNormal(model)
        x = torch.rand(16, 12)
    return model, guide, x
