"""Guides that follow the structure of their model: products with the prior, ladders, several latents."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from truth import ladder

from pyro_ae import batch_plate, elbo, fit, importance, iwae, log_weights, svi
from pyro_ae.conjugate import product
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.full_rank import FullRank
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.guides.shared import Shared
from pyro_ae.guides.structured import Structured
from pyro_ae.guides.together import Together
from pyro_ae.guides.top_down import TopDown
from pyro_ae.nn import MLP

GRID = torch.linspace(-12, 12, 4001)


@pytest.mark.parametrize(
    ("prior", "potential", "points"),
    [
        (dist.Normal(0.5, 1.0), dist.Normal(-1.0, 0.5), GRID),
        (dist.Gamma(2.0, 1.0), dist.Gamma(3.0, 0.5), GRID[2001:]),
        (dist.Beta(2.0, 3.0), dist.Beta(1.5, 2.0), torch.linspace(0.001, 0.999, 999)),
        (dist.Bernoulli(0.3), dist.Bernoulli(0.8), torch.tensor([0.0, 1.0])),
        (dist.Categorical(torch.tensor([0.2, 0.3, 0.5])), dist.Categorical(torch.ones(3)), torch.arange(3.0)),
        (
            dist.OneHotCategorical(torch.tensor([0.2, 0.8])),
            dist.OneHotCategorical(torch.tensor([0.6, 0.4])),
            torch.eye(2),
        ),
        (
            dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.8], [0.8, 1.5]])),
            dist.Normal(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0])).to_event(1),
            torch.randn(50, 2),
        ),
        (
            dist.Normal(torch.zeros(2), 1.0).to_event(1),
            dist.MultivariateNormal(torch.ones(2), torch.tensor([[1.0, -0.3], [-0.3, 0.4]])),
            torch.randn(50, 2),
        ),
    ],
    ids=lambda v: type(v).__name__,
)
def test_products_of_densities(prior, potential, points) -> None:
    """The log-density differs from the sum of both by a constant, and is normalised."""
    q = product(prior, potential)
    difference = prior.log_prob(points) + potential.log_prob(points) - q.log_prob(points)
    assert difference.std() < 1e-4
    if q.event_shape == () and points.is_floating_point() and len(points) > 10:
        assert float(torch.trapezoid(q.log_prob(points).exp(), points)) == pytest.approx(1.0, abs=1e-2)


def test_products_that_are_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match="Gamma prior with a Normal potential"):
        product(dist.Gamma(1.0, 1.0), dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match=r"event shape \(2,\) and its potential \(3,\)"):
        product(dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.Normal(torch.zeros(3), 1.0).to_event(1))


@pytest.mark.parametrize("kind", ["structured", "top_down", "chained"])
def test_a_guide_of_two_layers_reaches_the_posterior(kind) -> None:
    """All three can be exact for linear normals, with heads of full covariance: then the ELBO is the evidence."""
    torch.manual_seed(1)
    model, x, evidence = ladder()
    linear = partial(nn.Linear, 5, 12)
    guide = {
        # the potential of z1 is the likelihood's and the prior does the rest; z2's is what x says of it
        "structured": lambda: Structured(model, linear(), {"z2": FullRank(12, 2), "z1": FullRank(12, 3)}),
        "top_down": lambda: TopDown((linear(), FullRank(14, 3)), (nn.Linear(12, 10), FullRank(10, 2))),
        "chained": lambda: Amortized(linear(), {"z2": FullRank(12, 2), "z1": FullRank(14, 3)}, chained=True),
    }[kind]()
    method = svi(lr=2e-2, steps=800, schedule="cosine", loss=importance(elbo, 4))
    posterior = fit(model, x, guide=guide, method=method, seed=0, progress=False)
    with torch.no_grad():
        bound = elbo(log_weights(model, posterior.guide, x, particles=200)[0])
    assert (evidence - bound).mean() < 0.03
    torch.testing.assert_close(posterior.log_evidence(x, 500), evidence, atol=0.1, rtol=0)


def test_structured_takes_other_latents_from_a_guide_of_theirs() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    x = torch.randn(20, 3)
    guide = Structured(model, nn.Identity(), MeanField(3, 3), shared=Shared(model))
    log_w, _ = log_weights(model, guide, x, particles=4)
    assert log_w.shape == (4,)
    with pytest.raises(ValueError, match="no potential for the latent site 'mean'"):
        log_weights(model, Structured(model, nn.Identity(), MeanField(3, 3)), x)
    everything = Together(Shared(model), Amortized(nn.Identity(), MeanField(3, 3)))
    with pytest.raises(ValueError, match="no latent site 'y'"):
        log_weights(model, Structured(model, nn.Identity(), MeanField(3, 3), site="y", shared=everything), x)


def test_one_encoder_for_several_latents() -> None:
    def model(x: Tensor) -> None:
        with batch_plate(x):
            s = pyro.sample("s", dist.Gamma(2.0, 2.0))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.repeat(*[1] * (z.dim() - 1), 2), s.unsqueeze(-1)).to_event(1), obs=x)

    x = torch.randn(12, 4)
    positive = dist.constraints.positive
    for chained, width in [(False, 8), (True, 9)]:
        heads = {"s": MeanField(8, (), support=positive), "z": FullRank(width, 2)}
        guide = Amortized(MLP(4, [8]), heads, chained=chained)
        posterior = fit(model, x, guide=guide, method=svi(steps=3, loss=importance(iwae, 3)), progress=False)
        draws = posterior.sample(5)
        assert draws["s"].shape == (5, 12) and (draws["s"] > 0).all()
        assert draws["z"].shape == (5, 12, 2)
        assert posterior.encode().keys() == {"s", "z"}
    with pytest.raises(ValueError, match="a head for each latent"):
        Amortized(MLP(4, [8]), {})
