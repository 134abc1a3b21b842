"""Layers in bfloat16, and nothing else."""

import copy

import pyro.distributions as dist
import pytest
import torch
from replays import agree, both
from torch import nn

from pyro_ae import batch_plate, bayesian, fit, importance, iwae, log_weights, nuts, observe, sghmc, svi
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.models.vae import VAE
from pyro_ae.nn import MLP
from pyro_ae.precision import LAYERS, layers_in

D = 20


def bernoulli(logits):
    return dist.Bernoulli(logits=logits).to_event(1)


def example():
    torch.manual_seed(0)
    x = (torch.rand(60, D) < 0.3).float()
    guide = Amortized(nn.Sequential(nn.Linear(D, 32), nn.Tanh()), MeanField(32, 4))
    return VAE(nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, D)), 4, bernoulli), guide, x


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv1d(6, 5, 3, padding=1), nn.ConvTranspose1d(6, 5, 3)])
def test_layers_are_of_rounded_inputs_and_give_single_precision(layer):
    x = torch.randn(2, 6, 6)
    with layers_in("bf16"):
        found = layer(x)
    assert found.dtype == torch.float32
    rounded = copy.deepcopy(layer).bfloat16()(x.bfloat16()).float()
    torch.testing.assert_close(found, rounded)
    assert not torch.equal(found, layer(x))
    torch.testing.assert_close(found, layer(x), rtol=0.02, atol=0.02)


def test_what_is_no_layer_is_left_alone():
    x, double = torch.randn(30, 30), torch.randn(3, 3, dtype=torch.float64)
    with layers_in("bf16"):
        assert torch.equal(x @ x, torch.mm(x, x))
        assert torch.equal(torch.linalg.cholesky(x @ x.T + 99 * torch.eye(30)).exp(), _plain(x))
        assert torch.nn.functional.linear(double, double).dtype == torch.float64
    assert torch.nn.functional.linear in LAYERS


def _plain(x):
    return torch.linalg.cholesky(x @ x.T + 99 * torch.eye(30)).exp()


def test_gradients_are_those_of_single_precision_but_for_rounding():
    layer, x = nn.Linear(50, 30), torch.randn(40, 50)
    gradients = []
    for precision in ("float32", "bf16"):
        with layers_in(precision):
            loss = layer(x).tanh().square().sum()
        gradients.append(torch.autograd.grad(loss, layer.weight)[0])
    assert all(g.dtype == torch.float32 for g in gradients)
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert 0 < difference < 0.02


def test_log_weights_are_summed_in_single_precision():
    """As errors of a layer they would be the same for all particles; those of a sum in bfloat16 are of whole nats."""
    model, guide, x = example()
    seen = {}

    def loss(model, guide, x):
        seen["log_weights"], _ = log_weights(model, guide, x, particles=8)
        return importance(iwae, 8)(model, guide, x)

    fit(model, x, guide=guide, method=svi(loss=loss, steps=1), precision="bf16", progress=False, check=False)
    assert seen["log_weights"].dtype == torch.float32
    assert not torch.equal(seen["log_weights"], seen["log_weights"].bfloat16().float())


@pytest.mark.parametrize("loss", [importance(), importance(iwae, 20)])
def test_fits_come_to_the_same_bound(loss):
    bounds = []
    for precision in ("float32", "bf16"):
        model, guide, x = example()
        posterior = fit(
            model,
            x,
            guide=guide,
            method=svi(loss=loss, steps=300, lr=3e-3),
            precision=precision,
            seed=0,
            progress=False,
        )
        bounds.append(sum(posterior.history["loss"][-20:]) / 20)
    assert bounds[0] != bounds[1]
    assert bounds[1] == pytest.approx(bounds[0], abs=0.1)


def test_rounded_steps_are_replayed_as_they_are(monkeypatch):
    out, steps = both(example, importance(iwae, 5), monkeypatch, batch_size=20, precision="bf16")
    assert steps.reason is None
    agree(out)


def test_samplers_by_gradients_take_it_too():
    model, _, x = example()
    net = bayesian(MLP(4, [8], 2), start="module")

    def regression(x, y=None):
        loc = net(x)
        with batch_plate(x):
            observe("y", dist.Normal(loc, 0.3).to_event(1), y)

    rows = torch.randn(40, 4)
    data = (rows, rows[:, :2].sin())
    method = sghmc(lr=1e-4, chains=2, warmup=30, draws=5, thinning=2)
    options = {"method": method, "seed": 0, "progress": False, "check": False}
    exact, rounded = (fit(regression, data, precision=p, **options).history["energy"] for p in ("float32", "bf16"))
    assert exact != rounded
    torch.testing.assert_close(torch.tensor(rounded), torch.tensor(exact), rtol=0.02, atol=0.02)


def test_what_needs_its_precision_refuses():
    model, _, x = example()
    with pytest.raises(ValueError, match="nuts needs the precision"):
        fit(lambda: None, None, method=nuts(), precision="bf16")
    with pytest.raises(ValueError, match="precision must be one of 'float32', 'bf16', got 'half'"):
        fit(model, x, precision="half")
