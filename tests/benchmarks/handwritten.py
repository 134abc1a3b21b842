"""The loop a user would write by hand in PyTorch for a VAE with binary data: what ours is measured against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Networks(nn.Module):
    """784-200-200-50 and back, as in Importance Weighted Autoencoders."""

    def __init__(self, latent: int = 50, hidden: int = 200) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.head = nn.Linear(hidden, 2 * latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 784)
        )

    def log_weights(self, x: Tensor, particles: int) -> Tensor:
        loc, log_scale = self.head(self.encoder(x)).chunk(2, -1)
        noise = torch.randn(particles, *loc.shape)
        z = loc + log_scale.exp() * noise
        logits = self.decoder(z)
        likelihood = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        # log p(z) - log q(z | x); the constants of both normals cancel
        return likelihood + (0.5 * noise.square() - 0.5 * z.square() + log_scale).sum(-1)

    def bound(self, x: Tensor, particles: int) -> Tensor:
        return self.log_weights(x, particles).logsumexp(0) - math.log(particles)


def train(
    networks: Networks, x: Tensor, *, batch_size: int, steps: int, particles: int, lr: float, fused: bool
) -> None:
    optimizer = torch.optim.Adam(networks.parameters(), lr=lr, fused=fused)
    done = 0
    while done < steps:
        for rows in torch.randperm(len(x)).split(batch_size):
            loss = -networks.bound(x[rows], particles).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if done == steps:
                return


@torch.no_grad()
def evaluate(networks: Networks, x: Tensor, particles: int) -> float:
    return torch.cat([networks.bound(rows, particles) for rows in x.split(100)]).mean().item()
