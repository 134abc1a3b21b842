"""Guides of latents that rows share: any head over the unconstrained space, and the Laplace approximation."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from truth import (
    regression,
    regression_posterior,
    regression_rows,
    same_noise,
)

from pyro_ae import batch_plate, elbo, fit, importance, svi
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.flow import Flow
from pyro_ae.guides.full_rank import FullRank
from pyro_ae.guides.laplace import Laplace
from pyro_ae.guides.low_rank import LowRank
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.guides.mixture import Mixture
from pyro_ae.guides.shared import Shared
from pyro_ae.guides.together import Together
from pyro_ae.nn import MLP


def amortized(features: int = 5, latent: int = 2) -> Amortized:
    return Amortized(MLP(features, [8]), MeanField(8, latent))


HEADS = {
    "full_rank": FullRank,
    "low_rank": partial(LowRank, rank=2),
    "mixture": partial(Mixture, components=2),
    "flow": partial(Flow, flow="MAF", transforms=2, hidden_features=(16,)),
}


@pytest.mark.parametrize("name", HEADS)
def test_any_head_is_a_guide_of_shared_latents(name) -> None:
    x, y = regression_rows(40)
    x = x + x.roll(1, 1)  # so that weights correlate
    mean, covariance = regression_posterior(x, y)
    guide = Shared(regression, HEADS[name])
    method = svi(lr=3e-2, steps=500, schedule="cosine", loss=importance(elbo, 8))
    posterior = fit(regression, (x, y), guide=guide, method=method, seed=0, progress=False)
    draws = posterior.sample(4000)["w"]
    sd = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - mean) / sd).abs().max() < 0.15
    correlation = covariance / sd.outer(sd)
    assert correlation.tril(-1).abs().max() > 0.3
    if name != "mixture":  # whose components have no correlations of their own
        torch.testing.assert_close(draws.T.corrcoef(), correlation, atol=0.12, rtol=0)


def test_a_shared_guide_leaves_rows_and_enumerated_latents_to_others() -> None:
    @pyro.infer.config_enumerate
    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        moved = pyro.sample("moved", dist.Bernoulli(0.3))
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(z + 3.0 * c + moved, scale), obs=x)

    x = torch.randn(12)
    local = Amortized(MLP(1, [8]), MeanField(8, ()), inputs=lambda x: x.unsqueeze(-1))
    guide = Together(Shared(model, FullRank), local)
    posterior = fit(model, x, guide=guide, method=svi(steps=3), progress=False)
    draws = posterior.sample(6)
    assert draws["weights"].shape == (6, 2) and draws["z"].shape == (6, 12)
    assert guide.parts[0].latent_dim == 2


def test_a_shared_guides_state_is_loaded_before_its_first_call() -> None:
    x, y = regression_rows(20)
    guide = Shared(regression, FullRank)
    fit(regression, (x, y), guide=guide, method=svi(steps=5), progress=False)
    fresh = Shared(regression, FullRank)
    fresh.load_state_dict(guide.state_dict())
    ours, theirs = same_noise(lambda: guide(x, y)["w"], lambda: fresh(x, y)["w"])
    # what looks at the model in the first call takes no random numbers from the draw
    torch.testing.assert_close(guide.center, fresh.center)
    again = same_noise(lambda: fresh(x, y)["w"])[0]
    torch.testing.assert_close(ours, again)
    assert theirs.shape == (3,)


@pytest.mark.parametrize("batch_size", [None, 32])
def test_laplace_is_exact_for_normals(batch_size) -> None:
    x, y = regression_rows(200)
    mean, covariance = regression_posterior(x, y)
    guide = Laplace(regression)
    method = svi(lr=5e-2, steps=600, schedule="cosine")
    posterior = fit(regression, (x, y), guide=guide, method=method, batch_size=batch_size, seed=0, progress=False)
    factor = guide.covariance_factor
    torch.testing.assert_close(factor @ factor.T, covariance, rtol=1e-3, atol=1e-6)
    if batch_size is None:
        torch.testing.assert_close(guide.center.detach(), mean, atol=1e-3, rtol=0)
        evidence = dist.MultivariateNormal(torch.zeros(200), x @ x.T + 0.8**2 * torch.eye(200)).log_prob(y)
        assert float(posterior.log_evidence(particles=10)) == pytest.approx(float(evidence), abs=0.05)


def test_laplace_has_the_curvature_of_the_unconstrained_space() -> None:
    """Beta prior and coin tosses, in the logit of the chance p: mode a / (a + b), curvature (a + b) p (1 - p)."""
    y = torch.tensor([1.0, 1.0, 0.0, 1.0])

    def model(y: Tensor) -> None:
        chance = pyro.sample("chance", dist.Beta(2.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(chance), obs=y)

    guide = Laplace(model)
    fit(model, y, guide=guide, method=svi(lr=5e-2, steps=500, schedule="cosine"), progress=False)
    a, b = 2 + 3.0, 3 + 1.0
    p = a / (a + b)
    assert guide.center.item() == pytest.approx(math.log(a / b), abs=1e-3)
    assert guide.covariance_factor.item() == pytest.approx(((a + b) * p * (1 - p)) ** -0.5, rel=1e-3)


def test_laplace_says_where_there_is_no_mode() -> None:
    def model() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 10.0))
        pyro.factor("ridge", u**2)

    with pytest.raises(ValueError, match="no mode where the Laplace guide ended"):
        fit(model, None, guide=Laplace(model), method=svi(steps=3), progress=False)


def test_two_shared_guides_have_parameters_of_their_own() -> None:
    """Also outside a fit, where they are in Pyro's one global param store."""
    x, y = regression_rows(10)
    guides = [Shared(regression, FullRank) for _ in range(2)]
    for guide in guides:
        guide(x, y)
    with torch.no_grad():
        guides[0].center.add_(100.0)
        guides[0].head.linear.bias.add_(3.0)
    assert guides[1](x, y)["w"].abs().max() < 20
    assert not torch.equal(guides[0].head.linear.bias, guides[1].head.linear.bias)
