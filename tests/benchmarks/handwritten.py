"""The loop a user would write by hand in PyTorch for a VAE with binary data: what ours is measured against."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXELS = 784


def mlp(*sizes: int) -> list[nn.Module]:
    """Linear layers, each followed by a tanh."""
    layers: list[nn.Module] = []
    for before, after in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return layers


def binary(logits: Tensor, x: Tensor) -> Tensor:
    return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


def normal(mean: Tensor, x: Tensor) -> Tensor:
    """With unit variance."""
    return -0.5 * (x - mean).square().sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


class Networks(nn.Module):
    """A chain of latents: networks up from x and down again that give means and log-scales, and one that gives x."""

    def __init__(
        self,
        encoders: Sequence[nn.Sequential],
        decoder: nn.Module,
        priors: Sequence[nn.Sequential] = (),
        likelihood: Callable[[Tensor, Tensor], Tensor] = binary,
    ) -> None:
        super().__init__()
        self.encoders, self.priors, self.decoder = nn.ModuleList(encoders), nn.ModuleList(priors), decoder
        self.likelihood = likelihood

    def log_weights(self, x: Tensor, particles: int) -> Tensor:
        """log p(x, z) - log q(z | x), in which the constants of the normals cancel: ``[particles, B]``."""
        below, latents, terms = x, [], []
        for encoder in self.encoders:
            loc, log_scale = encoder(below).chunk(2, -1)
            noise = torch.randn(particles, *loc.shape[-2:], device=x.device)
            below = loc + log_scale.exp() * noise
            latents.append(below)
            terms.append(0.5 * noise.square() + log_scale)
        for layer, prior in enumerate(self.priors):
            loc, log_scale = prior(latents[layer + 1]).chunk(2, -1)
            terms[layer] = terms[layer] - 0.5 * ((latents[layer] - loc) / log_scale.exp()).square() - log_scale
        terms[-1] = terms[-1] - 0.5 * latents[-1].square()
        log_w = self.likelihood(self.decoder(latents[0]), x)
        for term in terms:
            log_w = log_w + term.sum(-1)
        return log_w

    def bound(self, x: Tensor, particles: int) -> Tensor:
        return self.log_weights(x, particles).logsumexp(0) - math.log(particles)


def perceptrons(latent: int = 50, hidden: int = 200) -> Networks:
    """784-200-200-50 and back, as in Importance Weighted Autoencoders."""
    encoder = nn.Sequential(*mlp(PIXELS, hidden, hidden), nn.Linear(hidden, 2 * latent))
    return Networks([encoder], nn.Sequential(*mlp(latent, hidden, hidden), nn.Linear(hidden, PIXELS)))


def two_layers() -> Networks:
    """784-200-200-100 and 100-100-100-50, and back: two layers of latents, as there."""
    first = nn.Sequential(*mlp(PIXELS, 200, 200), nn.Linear(200, 2 * 100))
    second = nn.Sequential(*mlp(100, 100, 100), nn.Linear(100, 2 * 50))
    prior = nn.Sequential(*mlp(50, 100, 100), nn.Linear(100, 2 * 100))
    return Networks([first, second], nn.Sequential(*mlp(100, 200, 200), nn.Linear(200, PIXELS)), [prior])


class Decoder(nn.Sequential):
    """Layers that know no dims before the batch's, such as convolutions."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z.flatten(0, -2)).unflatten(0, z.shape[:-1])


def convolutional(latent: int = 20) -> Networks:
    """Two convolutions that halve 28 x 28 pixels, and back."""
    encoder = nn.Sequential(
        nn.Unflatten(-1, (1, 28, 28)),
        nn.Sequential(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 2 * latent),
    )
    decoder = Decoder(
        *(nn.Linear(latent, 32 * 7 * 7), nn.ReLU(), nn.Unflatten(-1, (32, 7, 7))),
        *(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Flatten()),
    )
    return Networks([encoder], decoder)


def stepper(networks: Networks, particles: int, *, lr: float = 1e-3) -> Callable[[Tensor], None]:
    """A step of Adam on a batch."""
    optimizer = torch.optim.Adam(networks.parameters(), lr=lr, fused=True)

    def step(rows: Tensor) -> None:
        loss = -networks.bound(rows, particles).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def graphed(networks: Networks, particles: int, rows: Tensor, *, lr: float = 1e-3) -> Callable[[Tensor], None]:
    """The same step as a CUDA graph, captured on rows as many as there will be at each step."""
    optimizer = torch.optim.Adam(networks.parameters(), lr=lr, fused=True, capturable=True)
    static = rows.clone()

    def step() -> None:
        optimizer.zero_grad()
        (-networks.bound(static, particles).mean()).backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(rows: Tensor) -> None:
        static.copy_(rows)
        graph.replay()

    return replay


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    """Of one pass over shuffled rows after the other, without end."""
    while True:
        for index in torch.randperm(len(x), device=x.device).split(size):
            yield x[index]


def train(step: Callable[[Tensor], object], rows: Iterable[Tensor], steps: int) -> None:
    for batch in islice(rows, steps):
        step(batch)


@torch.no_grad()
def evaluate(networks: Networks, x: Tensor, particles: int) -> float:
    return torch.cat([networks.bound(rows, particles) for rows in x.split(100)]).mean().item()
