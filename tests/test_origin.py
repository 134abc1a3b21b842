"""The gradient-origin guide, where the gradient at the origin has a closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from truth import ppca

from pyro_ae import elbo, fit, importance, log_weights, svi
from pyro_ae.data import observe
from pyro_ae.guides.gradient_origin import GradientOrigin
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.losses import wasserstein
from pyro_ae.models.ppca import PPCA
from pyro_ae.models.vae import VAE
from pyro_ae.nn import MLP
from pyro_ae.plates import Minibatch, batch_plate


def exact(model: PPCA, x: Tensor) -> Tensor:
    """The gradient of log p(x | z) at z = 0; what is missing counts as the mean."""
    return torch.nan_to_num(x - model.mean, nan=0.0) @ model.weight * (-2 * model.log_noise).exp()


@pytest.mark.parametrize("missing", [False, True])
def test_the_code_is_the_gradient_of_the_log_likelihood_at_the_origin(missing):
    model, x = ppca()
    if missing:
        x[::2, 1] = torch.nan
        x[3] = torch.nan
    torch.testing.assert_close(GradientOrigin(model, 2, step=0.3)(x), 0.3 * exact(model, x))


def test_a_code_depends_on_its_row_alone():
    model, x = ppca()
    guide = GradientOrigin(model, 2)
    torch.testing.assert_close(guide(x)[:7], guide(x[:7]))


def test_no_handler_outside_changes_the_code():
    """Particles, the scale of a minibatch, tempering and values of another run stay outside."""
    model, x = ppca()
    guide = GradientOrigin(model, 2)
    with Minibatch("data", 1000), poutine.scale(scale=3.0), poutine.trace() as trace:
        torch.testing.assert_close(guide(x), exact(model, x))
    assert [n for n, s in trace.trace.nodes.items() if s["type"] == "sample"] == ["data", "z"]
    with pyro.plate("particles", 6, dim=-2):
        torch.testing.assert_close(guide(x), exact(model, x).expand(6, *x.shape[:1], 2))
    log_w, _ = log_weights(model, guide, x, particles=6)
    point = dist.Normal(exact(model, x) @ model.weight.T + model.mean, 0.7).to_event(1).log_prob(x)
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(exact(model, x))
    torch.testing.assert_close(log_w, (point + prior).expand(6, -1))


def test_only_the_likelihood_counts_and_counts_once():
    """Neither a prior whose mean is elsewhere nor a scale of the model's own changes a code."""
    plain, x = ppca()

    def model(x: Tensor) -> None:
        with batch_plate(x), poutine.scale(scale=5.0):
            z = pyro.sample("z", dist.Normal(torch.ones(2), 0.1).to_event(1))
            observe("x", dist.Normal(z @ plain.weight.T + plain.mean, 0.7).to_event(1), x)

    torch.testing.assert_close(GradientOrigin(model, 2)(x), exact(plain, x))


def test_without_gradients_the_code_is_the_same_and_has_none():
    model, x = ppca()
    model.requires_grad_(True)
    guide = GradientOrigin(model, 2, MeanField(2, 2))
    head = poutine.trace(guide).get_trace(x).nodes["z"]["fn"]
    with torch.no_grad():
        still = poutine.trace(guide).get_trace(x).nodes["z"]["fn"]
    torch.testing.assert_close(head.mean, still.mean)
    assert head.mean.requires_grad
    assert not still.mean.requires_grad


def test_the_model_learns_through_the_step():
    """The derivative of the loss by the weights, with that of the code in it, against finite differences."""
    model = PPCA(4, 2).double()
    x = torch.randn(6, 4, dtype=torch.double)
    guide = GradientOrigin(model, 2, step=0.1)

    def loss(weight: Tensor) -> Tensor:
        with torch.no_grad():
            model.weight.copy_(weight)
        return importance(elbo)(model, guide, x)

    start = model.weight.detach().clone()
    value = importance(elbo)(model, guide, x)
    (found,) = torch.autograd.grad(value, model.weight)
    steps = torch.eye(8, dtype=torch.double).reshape(8, 4, 2) * 1e-5
    differences = [(loss(start + h) - loss(start - h)).item() / 2e-5 for h in steps]
    torch.testing.assert_close(found.flatten(), torch.tensor(differences, dtype=torch.double), rtol=1e-6, atol=1e-6)


def test_latents_of_any_shape_and_integer_rows():
    def model(x: Tensor) -> None:
        with batch_plate(x):
            z = pyro.sample("code", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
            rate = (1.0 + z).sum((-2, -1)).exp()
            observe("x", dist.Poisson(rate), x)

    x = torch.tensor([3, 400, 5])
    # d/dz [x (6 + sum z) - exp(6 + sum z)] at zero
    wanted = (x - torch.tensor(6.0).exp()).reshape(3, 1, 1).expand(3, 2, 3)
    torch.testing.assert_close(GradientOrigin(model, (2, 3), site="code")(x), wanted)
    assert GradientOrigin(model, (2, 3), MeanField(6, (2, 3)), site="code")(x).shape == (3, 2, 3)


def test_a_linear_head_makes_it_the_exact_posterior():
    """The posterior's mean is its covariance times the gradient at the origin."""
    model, x = ppca()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.qr(model.weight).Q)
    variance = 1 / (1 + 0.7**-2)
    guide = GradientOrigin(model, 2, MeanField(2, 2))
    with torch.no_grad():
        guide.head.linear.weight.copy_(torch.cat([variance * torch.eye(2), torch.zeros(2, 2)]))
        guide.head.linear.bias.copy_(torch.tensor([0.0, 0.0, 0.5, 0.5]) * math.log(variance))
    log_w, _ = log_weights(model, guide, x, particles=3)
    torch.testing.assert_close(log_w, model.marginal().log_prob(x).expand(3, -1))


def test_without_a_head_a_network_learns_as_an_autoencoder():
    x = (torch.rand(200, 1) * 6).sin() * torch.tensor([1.0, -1.0, 0.5]) + torch.tensor([0.0, 1.0, 2.0])
    model = VAE(MLP(2, [16], 3), 2, lambda mean: dist.Normal(mean, 0.5**0.5).to_event(1))
    guide = GradientOrigin(model, 2, step=0.1)
    assert sum(p.numel() for p in guide.parameters()) == 0
    method = svi(loss=wasserstein(weight=0.0), lr=1e-2, steps=200)
    posterior = fit(model, x, guide=guide, method=method, seed=0, progress=False)
    assert (posterior.reconstruct() - x).square().mean() < 0.02 * x.var(0).mean()


def test_what_it_cannot_do_is_refused():
    model, x = ppca()
    with pytest.raises(ValueError, match="step must be positive, got 0"):
        GradientOrigin(model, 2, step=0)
    with pytest.raises(ValueError, match="'z' needs rows"):
        GradientOrigin(model, 2)(size=3)
    with pytest.raises(ValueError, match="'code'.*alone, and this one has 'z'"):
        GradientOrigin(model, 2, site="code")(x)

    def shared(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        model(x)

    with pytest.raises(ValueError, match="'z' is for a model with that latent alone, and this one has 'w', 'z'"):
        GradientOrigin(shared, 2)(x)
