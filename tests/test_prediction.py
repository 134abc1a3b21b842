"""Predictions and their uncertainty in two parts, against closed forms and sums over draws."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from truth import NOISE, regression, regression_posterior, regression_rows

from pyro_ae import batch_plate, bayesian, fit, sghmc, svi
from pyro_ae.models import vae

NEW = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 2.0], [10.0, -5.0, 3.0]])
MANY = sghmc(lr=5e-4, chains=60, draws=50)


def test_a_regression_has_noise_of_its_own_and_the_variance_of_its_weights():
    posterior = fit(regression, regression_rows(), method=MANY, seed=0, progress=False)
    found = posterior.uncertainty((NEW, None))
    mean, covariance = regression_posterior(*regression_rows())
    torch.testing.assert_close(found.aleatoric, torch.full((3,), NOISE**2))
    torch.testing.assert_close(found.epistemic, (NEW @ covariance * NEW).sum(1), rtol=0.12, atol=1e-6)
    torch.testing.assert_close(found.mean, NEW @ mean, rtol=0.02, atol=0.02)
    means = posterior.sample()["w"] @ NEW.T
    torch.testing.assert_close(found.mean, means.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.epistemic, means.var(0, correction=0), rtol=1e-3, atol=1e-6)


def test_parts_that_fit_into_memory_give_the_same(monkeypatch):
    posterior = fit(regression, regression_rows(), method=MANY, seed=0, progress=False)
    whole = posterior.uncertainty((NEW, None))
    monkeypatch.setattr("pyro_ae.particles.CHUNK", 3 * 7)
    for a, b in zip(posterior.uncertainty((NEW, None)), whole, strict=True):
        torch.testing.assert_close(a, b)


def classify(net, one_hot=False):
    def model(x, y=None):
        logits = net(x)
        kind = dist.OneHotCategorical if one_hot else dist.Categorical
        with batch_plate(x):
            pyro.sample("y", kind(logits=logits), obs=y)

    return model


@pytest.mark.parametrize("one_hot", [False, True])
def test_the_entropies_of_classes(one_hot):
    x = torch.randn(60, 3)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 1).long()
    net = bayesian(nn.Linear(3, 3))
    given = (x, nn.functional.one_hot(y, 3).float() if one_hot else y)
    method = sghmc(lr=1e-3, warmup=200, draws=20)
    posterior = fit(classify(net, one_hot), given, method=method, seed=0, progress=False)
    found = posterior.uncertainty((NEW, None))
    draws = posterior.sample()
    probs = (torch.einsum("kij,nj->kni", draws["w.weight"], NEW) + draws["w.bias"][:, None]).softmax(-1)
    torch.testing.assert_close(found.mean, probs.mean(0), rtol=1e-4, atol=1e-5)
    inner = dist.Categorical(probs).entropy().mean(0)
    torch.testing.assert_close(found.aleatoric, inner, rtol=1e-4, atol=1e-5)
    total = dist.Categorical(probs.mean(0)).entropy()
    torch.testing.assert_close(found.epistemic, total - inner, rtol=1e-3, atol=1e-5)
    assert (found.epistemic > 0).all()


def test_the_two_parts_of_a_bernoulli_are_the_whole_variance():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with batch_plate(x):
            pyro.sample("y", dist.Bernoulli(logits=(x * w).sum(-1)), obs=y)

    x, y = regression_rows(50)
    posterior = fit(model, (x, (y > 0).float()), method=svi(steps=50), seed=0, progress=False)
    mean, aleatoric, epistemic = posterior.uncertainty((NEW, None))
    torch.testing.assert_close(aleatoric + epistemic, mean * (1 - mean))


def test_the_pixels_of_a_reconstruction():
    model, guide, x = vae.example()
    posterior = fit(model, x, guide=guide, method=svi(steps=2), seed=0, progress=False)
    found = posterior.uncertainty(draws=20)
    assert found.mean.shape == found.epistemic.shape == x.shape and (found.epistemic > 0).any()


def test_a_likelihood_without_moments_is_refused():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with batch_plate(x):
            pyro.sample("y", dist.Cauchy((x * w).sum(-1), 1.0), obs=y)

    posterior = fit(model, regression_rows(20), method=svi(steps=2), progress=False)
    with pytest.raises(ValueError, match="site 'y' has no finite mean: use predict"):
        posterior.uncertainty((NEW, None))
