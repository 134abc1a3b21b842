"""The loss that holds the moments of a batch's mixture of posteriors to the prior's."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MixtureSameFamily, Normal, kl_divergence
from truth import ppca, same_noise

from pyro_ae import batch_plate
from pyro_ae.density import weigh
from pyro_ae.estimators import reconstruction
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mixture import Mixture
from pyro_ae.losses import aggregate_moments
from pyro_ae.models import vae
from pyro_ae.plates import Minibatch


class Posteriors(nn.Module):
    """A guide that has a normal of its own for each of the first rows."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(loc), nn.Parameter(scale.log())

    def forward(self, x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Normal(self.loc[: len(x)], self.log_scale[: len(x)].exp()).to_event(1))


def posteriors(rows: int, latent: int = 2) -> Posteriors:
    return Posteriors(torch.randn(rows, latent) + 0.7, 0.2 + torch.rand(rows, latent))


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("particles", [1, 3])
def test_is_the_divergence_of_the_mixtures_moments_and_that_of_the_spreads(within, particles):
    model, x = ppca(7)
    guide = posteriors(7)
    loc, scale = guide.loc.detach(), guide.log_scale.detach().exp()
    components = Independent(Normal(loc, scale), 1)
    mixture = MixtureSameFamily(torch.distributions.Categorical(torch.ones(7)), components)
    v = mixture.variance if within else mixture.variance - scale.square().mean(0)
    prior = Normal(torch.zeros(2), 1.0)
    of_mixture = kl_divergence(Normal(mixture.mean, v.sqrt()), prior).sum()
    of_spreads = kl_divergence(Normal(0.0, scale), prior).sum(1).mean()
    loss = aggregate_moments(0.7, 0.3, within=within, particles=particles)
    value, likelihood = same_noise(
        lambda: loss(model, guide, x), lambda: weigh(model, guide, x, particles).gather(reconstruction).mean(0).sum()
    )
    torch.testing.assert_close(value, 7 * (0.7 * of_mixture + 0.3 * of_spreads) - likelihood)


def test_moments_are_in_units_of_the_prior():
    """A latent that is moved and stretched, in the prior and in the posterior, costs the same."""
    shift, stretch = torch.tensor([3.0, -1.0]), torch.tensor([0.1, 5.0])

    def model(x: Tensor, shift: Tensor, stretch: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Normal(shift, stretch).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(5), 1.0).to_event(1), obs=x)

    x, guide = torch.randn(6, 5), posteriors(6)
    moved = Posteriors(shift + stretch * guide.loc.detach(), stretch * guide.log_scale.detach().exp())
    plain = aggregate_moments()(lambda x: model(x, torch.zeros(2), torch.ones(2)), guide, x)
    torch.testing.assert_close(aggregate_moments()(lambda x: model(x, shift, stretch), moved, x), plain)


def test_rows_of_a_minibatch_count_for_all():
    model, x = ppca(6)
    guide = posteriors(6)
    small, large = same_noise(
        lambda: aggregate_moments()(model, guide, x),
        lambda: aggregate_moments()(*(scaled(fn) for fn in (model, guide)), x),
    )
    torch.testing.assert_close(large, 10 * small)


def scaled(fn):
    def run(x: Tensor) -> None:
        with Minibatch("data", 60):
            fn(x)

    return run


@pytest.mark.parametrize("spread", [0.01, 0.1, 1.0])
def test_spreads_vanish_with_their_weight(spread):
    """Where the likelihood is a normal's, the best variance of a row's code is known, and the same for all rows."""
    model, x = ppca(50)
    guide = posteriors(50)
    loss = aggregate_moments(spread=spread, within=True, particles=400)
    optimizer = torch.optim.LBFGS(guide.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        torch.manual_seed(0)
        optimizer.zero_grad()
        value = loss(model, guide, x)
        value.backward()
        return value

    optimizer.step(closure)
    variance = (2 * guide.log_scale.detach()).exp().mean(0)
    v = guide.loc.detach().var(0, correction=0) + variance
    precision = (model.weight / model.log_noise.exp()).square().sum(0)
    torch.testing.assert_close(variance, spread / (precision + spread + 1 - 1 / v), atol=0, rtol=0.05)
    assert ((v > 0.5) & (v < 2)).all(), "the mixture keeps to the prior, whatever its parts do"


def test_a_prior_that_is_no_normal_or_a_posterior_that_is_a_mixture_is_refused():
    model, guide, x = vae.example()
    with pytest.raises(ValueError, match="elements of site 'z' are tied together"):
        aggregate_moments()(model, Amortized(guide.encoder, Mixture(16, 2)), x)

    def cauchy(x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Cauchy(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match="the elements of 'z' are Cauchy: use"):
        aggregate_moments()(cauchy, guide, x)


def test_one_row_has_no_variance_between_rows():
    model, guide, x = vae.example()
    assert torch.isfinite(aggregate_moments(within=True)(model, guide, x[:1]))
    with pytest.raises(ValueError, match="a batch of one row has no variance"):
        aggregate_moments()(model, guide, x[:1])


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match="beta must be at least 0, got -1"):
        aggregate_moments(-1.0)
    with pytest.raises(ValueError, match="spread must be at least 0, got -1"):
        aggregate_moments(spread=-1.0)
