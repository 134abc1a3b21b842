"""Models with known answers, for tests of bounds, engines and guides."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ae import Posterior, batch_plate, observe
from pyro_ae.data import as_rows
from pyro_ae.density import log_joint
from pyro_ae.models.deep_vae import DeepVAE
from pyro_ae.models.ppca import PPCA
from pyro_ae.program import Program


def ppca(rows: int = 40) -> tuple[PPCA, Tensor]:
    """Probabilistic PCA and rows from it, with nothing to be trained."""
    model = PPCA(features=5, latent=2, noise=0.7)
    with torch.no_grad():
        model.mean.normal_()
        x = model.marginal().sample((rows,))
    return model.requires_grad_(False), x


def exact_guide(model: PPCA):
    """The exact posterior of a PPCA as a guide."""

    def guide(x: Tensor | None = None, *, size: int = 1) -> None:
        with batch_plate(x, size):
            pyro.sample("z", model.posterior(x))

    return guide


def biased_guide(model: PPCA, shift: float = 0.3, stretch: float = 1.3):
    """A guide that is off, so that bounds differ from the evidence."""

    def guide(x: Tensor | None = None, *, size: int = 1) -> None:
        with batch_plate(x, size):
            exact = model.posterior(x)
            pyro.sample("z", dist.MultivariateNormal(exact.loc + shift, stretch * exact.covariance_matrix))

    return guide


def gaussian_mean(y: Tensor) -> None:
    """A conjugate model: the mean of normal observations, with prior N(1, 2^2)."""
    mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.5), obs=y)


def gaussian_mean_posterior(y: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and standard deviation of mu in :func:`gaussian_mean`."""
    precision = 1 / 4 + len(y) / 1.5**2
    return (0.25 + y.sum() / 1.5**2) / precision, torch.tensor(precision**-0.5)


def gaussian_mean_evidence(y: Tensor) -> Tensor:
    """Exact log p(y) of :func:`gaussian_mean`."""
    covariance = 1.5**2 * torch.eye(len(y)) + 4 * torch.ones(len(y), len(y))
    return dist.MultivariateNormal(torch.ones(len(y)), covariance).log_prob(y)


def same_noise(*runs):
    """What each function gives with the same random numbers."""
    out = []
    for run in runs:
        torch.manual_seed(7)
        out.append(run())
    return out


def stubborn(model: PPCA):
    """The same model, of which only one particle at a time can be run."""

    def one_by_one(x: Tensor) -> None:
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            assert z.dim() == 2, "only [rows, latent]"
            loc = z @ model.weight.T + model.mean
            pyro.sample("x", dist.Normal(loc, model.log_noise.exp()).to_event(1), obs=x)

    return one_by_one


def untrained(model, guide, data, **state) -> Posterior:
    """A posterior of a guide as it is, or of draws that are made up (``draws=``)."""
    rows = as_rows(data)
    program = Program(model, guide, total=rows.size)
    program.build(rows.first(None))
    return Posterior(program, data=rows, method="nuts(max_tree_depth=10)", **state)


class Linear(nn.Module):
    """A linear map with normal noise."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.map = nn.Linear(inputs, outputs)

    def forward(self, z: Tensor) -> Distribution:
        return dist.Normal(self.map(z), 0.7).to_event(1)


def ladder(missing: bool = False) -> tuple[DeepVAE, Tensor, Tensor]:
    """Two layers of linear normals with nothing to be trained, 100 rows, and the rows' evidence."""
    top, bottom = Linear(2, 3), Linear(3, 5)
    model = DeepVAE(bottom.map, top, latent=2, likelihood=lambda mean: dist.Normal(mean, 0.5).to_event(1))
    model.requires_grad_(False)
    w2, w1 = top.map.weight, bottom.map.weight
    mean = bottom.map(top.map.bias)
    covariance = w1 @ (w2 @ w2.T + 0.49 * torch.eye(3)) @ w1.T + 0.25 * torch.eye(5)
    x = model(size=100)
    seen = [0, 2, 3, 4] if missing else [0, 1, 2, 3, 4]
    evidence = torch.distributions.MultivariateNormal(mean[seen], covariance[seen][:, seen]).log_prob(x[:, seen])
    if missing:
        x[:, 1] = torch.nan
    return model, x, evidence


NOISE = 0.8
"""Of :func:`regression`."""


def regression(x: Tensor, y: Tensor | None = None) -> None:
    """Linear regression on three features of different size, with a standard normal prior."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with batch_plate(x):
        pyro.sample("y", dist.Normal((x * w).sum(-1), NOISE), obs=y)


def regression_rows(rows: int = 200) -> tuple[Tensor, Tensor]:
    """The same rows each time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, generator=generator) * torch.tensor([1.0, 0.5, 2.0])
    return x, x @ torch.tensor([1.0, -2.0, 0.5]) + NOISE * torch.randn(rows, generator=generator)


def regression_posterior(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the weights."""
    covariance = torch.linalg.inv(x.T @ x / NOISE**2 + torch.eye(3))
    return covariance @ x.T @ y / NOISE**2, covariance


def banana(x: Tensor | None = None, *, size: int = 1) -> Tensor:
    """A latent of two dims whose posterior is bent: only z2 + z1^2 is seen, with noise."""
    with batch_plate(x, size):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return observe("x", dist.Normal((z[..., 1] + z[..., 0] ** 2).unsqueeze(-1), 0.4).to_event(1), x)


def moons(x: Tensor | None = None, *, size: int = 1) -> Tensor:
    """A latent of two dims whose posterior is two crescents: its distance from the origin is seen, and roughly |z1|."""
    with batch_plate(x, size):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = torch.stack([z.norm(dim=-1), z[..., 0].abs()], -1)
        return observe("x", dist.Normal(loc, torch.tensor([0.15, 0.4])).to_event(1), x)


def on_a_grid(model, x: Tensor) -> Tensor:
    """log p(x) of each row of a model with two standard normal latents, by summing over a grid."""
    points = torch.linspace(-6, 6, 601)
    z = torch.cartesian_prod(points, points).unsqueeze(1)
    parts = []
    with torch.no_grad():
        for rows in x.split(8):  # as many as fit into memory at once
            with pyro.plate("_grid", len(z), dim=-2):
                log_p = log_joint(model, {"z": z.expand(-1, len(rows), -1)}, rows)
            parts.append(log_p.reshape(len(z), len(rows)).logsumexp(0))
    return torch.cat(parts) + 2 * torch.log(points[1] - points[0])
