"""A VAE of given networks in each library, and ``fit`` beside the loop by hand: test bounds on binarised MNIST.

Run from the top of the repository: ``python tests/benchmarks/vae.py mnist``. What a step costs is in ``table.py``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from handwritten import PIXELS, Networks, batches, evaluate, normal, perceptrons, stepper, train
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import Tensor, nn
from torch.distributions import Distribution
from watch import peak as peak  # for sgmcmc.py

from pyro_ae import datasets, fit, importance, iwae, svi
from pyro_ae.guides.bottom_up import BottomUp
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.models.deep_vae import DeepVAE
from pyro_ae.models.vae import bernoulli


def gaussian(mean: Tensor) -> Distribution:
    return dist.Normal(mean, 1.0).to_event(1)


def likelihood_of(networks: Networks) -> Callable[[Tensor], Distribution]:
    return gaussian if networks.likelihood is normal else bernoulli


def parts(network: nn.Sequential) -> tuple[nn.Sequential, MeanField]:
    """A network as an encoder and a head."""
    *layers, last = network
    head = MeanField(last.in_features, last.out_features // 2)
    head.linear = last
    return nn.Sequential(*layers), head


def program(networks: Networks) -> tuple[DeepVAE, BottomUp]:
    """Model and guide with these networks."""
    first, *above = map(parts, networks.encoders)
    priors = (nn.Sequential(*parts(prior)) for prior in networks.priors)
    latent = networks.encoders[-1][-1].out_features // 2
    model = DeepVAE(networks.decoder, *priors, latent=latent, likelihood=likelihood_of(networks))
    return model, BottomUp(first, *above)


def plain(networks: Networks) -> tuple[Callable, Callable]:
    """Model and guide with these networks as one writes them for Pyro."""

    def normal_of(network: nn.Module, h: Tensor) -> Any:
        loc, log_scale = network(h).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def model(x: Tensor) -> None:
        pyro.module("networks", networks)
        layers, latent = len(networks.encoders), networks.encoders[-1][-1].out_features // 2
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z{layers}", dist.Normal(x.new_zeros(latent), 1.0).to_event(1))
            for layer in range(layers - 1, 0, -1):
                z = pyro.sample(f"z{layer}", normal_of(networks.priors[layer - 1], z))
            pyro.sample("x", likelihood_of(networks)(networks.decoder(z)), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("networks", networks)
        z = x
        with pyro.plate("data", len(x)):
            for layer, encoder in enumerate(networks.encoders, 1):
                z = pyro.sample(f"z{layer}", normal_of(encoder, z))

    return model, guide


def of_pyro(particles: int) -> Any:
    """Pyro's bound."""
    if particles == 1:
        return Trace_ELBO()
    return RenyiELBO(alpha=0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1)


def of_pythae(networks: Networks, particles: int) -> Any:
    """pythae's model with these networks, of one layer; an ImportError where it is not installed."""
    from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = networks.encoders[0]

        def forward(self, x: Tensor) -> Any:
            loc, log_scale = self.network(x).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=2 * log_scale)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = networks.decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.network(z).sigmoid())

    shared = {"input_dim": (PIXELS,), "latent_dim": networks.encoders[0][-1].out_features // 2}
    if particles == 1:
        return VAE(VAEConfig(reconstruction_loss="bce", **shared), Encoder(), Decoder())
    config = IWAEConfig(reconstruction_loss="bce", number_samples=particles, **shared)
    return IWAE(config, Encoder(), Decoder())


def mnist(epochs: int, seeds: int, particles: int) -> None:
    data = datasets.load("mnist_static_binarized")
    assert data.test is not None
    x, test = data.train["x"].flatten(1), data.test["x"].flatten(1)[::5]
    print(f"test bound in nats (K=100, every fifth test image) after {epochs} epochs, trained with K={particles}")
    print(f"{'seed':>4} {'by hand':>9} {'fit':>9}")
    for seed in range(seeds):
        torch.manual_seed(seed)
        by_hand = perceptrons()
        mine = copy.deepcopy(by_hand)
        train(stepper(by_hand, particles), batches(x, 128), epochs * -(-len(x) // 128))
        model, guide = program(mine)
        method = svi(loss=importance(iwae, particles), epochs=epochs)
        options = {"batch_size": 128, "seed": seed + 100, "progress": False, "device": "cpu"}
        posterior = fit(model, x, guide=guide, method=method, **options)
        # one evaluation for both, and ours once more through the library
        bounds = [evaluate(n, test, 100) for n in (by_hand, mine)]
        library = posterior.log_evidence(test, particles=100).mean().item()
        print(f"{seed:>4} {bounds[0]:>9.2f} {bounds[1]:>9.2f}   by log_evidence {library:.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["mnist"])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--particles", type=int, default=1)
    options = parser.parse_args()
    mnist(options.epochs, options.seeds, options.particles)
