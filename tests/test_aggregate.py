"""Losses that match the codes of all rows to the prior."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from truth import same_noise

from pyro_ae import batch_plate, elbo, fit, importance, svi
from pyro_ae.density import weigh
from pyro_ae.divergences import adversarial, mmd, sliced_wasserstein
from pyro_ae.estimators import analytic_kl, reconstruction
from pyro_ae.losses import aggregate, info_vae, wasserstein
from pyro_ae.models import ppca as ppca_file
from pyro_ae.plates import Scaled


def test_info_vae_without_preference_is_the_elbo():
    model, guide, x = ppca_file.example()
    ours, plain = same_noise(
        lambda: info_vae(alpha=0.0, weight=1.0)(model, guide, x),
        lambda: importance(elbo, 1, analytic_kl)(model, guide, x),
    )
    torch.testing.assert_close(ours, plain)


def test_aggregate_compares_codes_with_draws_of_the_prior():
    seen = []

    def divergence(codes, prior):
        seen.append((codes, prior))
        return (codes.mean() - 3).square()

    model, guide, x = ppca_file.example()
    runs = 0

    def counted(x):
        nonlocal runs
        result = model(x)
        runs += 1
        return result

    scaled = [Scaled(fn, "data", 160) for fn in (counted, guide)]
    loss = aggregate(divergence, weight=5.0)
    (likelihood,) = same_noise(lambda: reconstruction(weigh(model, guide, x, 1).passes[0]))
    before = runs
    value = loss(*scaled, x)
    ((codes, prior),) = seen
    assert codes.shape == prior.shape == (16, 2)
    assert not prior.requires_grad
    assert runs - before == 2, "the prior's draws need no decoder"
    assert torch.isfinite(value)
    aggregate(divergence, particles=3)(*scaled, x)
    assert [v.shape for v in seen[-1]] == [(48, 2)] * 2
    loss = aggregate(lambda a, b: torch.tensor(2.0), weight=5.0)
    (value,) = same_noise(lambda: loss(*scaled, x))
    torch.testing.assert_close(value, 160 * 5.0 * 2.0 - 10 * likelihood.sum())


def point_guide(encoder: nn.Module) -> nn.Module:
    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: Tensor) -> None:
            with batch_plate(x):
                pyro.sample("z", dist.Delta(self.encoder(x), event_dim=1))

    return Point()


def critic() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))


# an adversary needs a pace of its own, and circles around its aim: it gets near and no nearer
@pytest.mark.parametrize(
    ("make", "lr", "left"),
    [
        (mmd, {"lr": 0.05}, 0.02),
        (sliced_wasserstein, {"lr": 0.05}, 0.02),
        (lambda: adversarial(critic()), {"lr": 0.003, "groups": {"loss.*": {"lr": 0.03}}}, 0.25),
    ],
    ids=["mmd", "sliced", "adversarial"],
)
def test_deterministic_codes_take_the_shape_of_the_prior(make, lr, left):
    """Codes far away from the prior come to have its mean and spread, and the adversary is trained on the way."""
    torch.manual_seed(0)
    x = torch.randn(512, 2) * torch.tensor([0.5, 2.0]) + torch.tensor([2.0, -1.0])
    encoder = nn.Linear(2, 2)
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(2))
        encoder.bias.zero_()
    method = svi(loss=wasserstein(make(), weight=100.0), epochs=300, schedule="linear", **lr)
    fit(Line2(), x, guide=point_guide(encoder), method=method, batch_size=128, progress=False, seed=0)
    codes, prior = encoder(x).detach(), torch.randn(2000, 2)
    assert mmd()(codes, prior) < left * mmd()(x, prior)
    if left < 0.1:
        torch.testing.assert_close(codes.mean(0), torch.zeros(2), atol=0.3, rtol=0)
        torch.testing.assert_close(codes.std(0), torch.ones(2), atol=0.3, rtol=0)


class Line2(nn.Module):
    """Two latents and a linear likelihood that any invertible code suits."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(2, 2)

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        with batch_plate(x, size):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)


def test_codes_outside_a_bounded_prior_still_reconstruct():
    """The prior is compared with by its draws alone, so its density need not reach the codes."""

    def model(x):
        with batch_plate(x):
            z = pyro.sample("z", dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pyro.validation_enabled(False):
        loss = wasserstein(sliced_wasserstein())(model, point_guide(nn.Linear(2, 2)), 5 * torch.randn(8, 2))
    assert torch.isfinite(loss)


def test_several_latents_need_a_name():
    def model(x):
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            u = pyro.sample("u", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(u, 1.0), obs=x)

    def guide(x):
        with batch_plate(x):
            pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("u", dist.Normal(x, 1.0))

    x = torch.randn(5)
    with pytest.raises(ValueError, match="the guide's are 'z', 'u': name it with site="):
        aggregate(mmd())(model, guide, x)
    assert torch.isfinite(aggregate(mmd(), site="u")(model, guide, x))
