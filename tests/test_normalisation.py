"""Networks made Bayesian in their normalisation layers, against the layers as they were, formulas and closed forms."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_ae import batch_plate, fit, log_weights, sghmc, svi
from pyro_ae.normalisation import BayesianNormalisation, bayesian_normalisation, class_weighted, noise_guide
from pyro_ae.plates import Minibatch

ROWS, IMAGES = torch.randn(7, 4), torch.randn(7, 2, 6, 6)


def perceptron(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3))


def convolution(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(96, 3))


NETWORKS = {
    "BatchNorm1d": (lambda: perceptron(nn.BatchNorm1d(6)), ROWS),
    "LayerNorm": (lambda: perceptron(nn.LayerNorm(6)), ROWS),
    "LayerNorm without beta": (lambda: perceptron(nn.LayerNorm(6, bias=False)), ROWS),
    "RMSNorm": (lambda: perceptron(nn.RMSNorm(6)), ROWS),
    "BatchNorm2d": (lambda: convolution(nn.BatchNorm2d(6)), IMAGES),
    "GroupNorm": (lambda: convolution(nn.GroupNorm(2, 6)), IMAGES),
    "InstanceNorm2d": (lambda: convolution(nn.InstanceNorm2d(6, affine=True)), IMAGES),
    "LayerNorm of images": (lambda: convolution(nn.LayerNorm((6, 4, 4))), IMAGES),
}


def trained(name: str) -> tuple[nn.Module, Tensor]:
    """A network whose gamma, beta and running statistics are not those it started with."""
    make, x = NETWORKS[name]
    network = make()
    with torch.no_grad():
        for p in network[1].parameters():
            p.add_(torch.randn_like(p))
        network(3.0 * x + 1.0)  # moves running statistics
    return network.eval(), x


def classifier(net: nn.Module):
    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = net(x)
        with batch_plate(x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model


def run(net: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
    return poutine.condition(net, {"w.1.noise": noise})(x)


# ------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("name", NETWORKS)
def test_without_noise_it_is_the_network_that_it_was(name: str) -> None:
    network, x = trained(name)
    net = bayesian_normalisation(network)
    assert torch.equal(run(net, x, torch.zeros_like(network[1].weight)), network(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_noise_multiplies_gamma(name: str) -> None:
    network, x = trained(name)
    noise = torch.randn_like(network[1].weight)
    found = run(bayesian_normalisation(network), x, noise)
    with torch.no_grad():
        network[1].weight.mul_(1.0 + noise)
    torch.testing.assert_close(found, network(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_all_particles_at_once_are_as_one_by_one(name: str) -> None:
    network, x = trained(name)
    net = bayesian_normalisation(network)
    noise = torch.randn(3, 1, *network[1].weight.shape)
    together = run(net, x, noise)
    assert together.shape == (3, 7, 3)
    torch.testing.assert_close(together, torch.stack([run(net, x, n[0]) for n in noise]))


def test_a_layer_in_two_places_has_one_noise() -> None:
    norm = nn.LayerNorm(4)
    net = bayesian_normalisation(nn.Sequential(norm, nn.Linear(4, 4), norm), event_dims=1)
    assert [w.site for w in net.weights] == ["w.0.noise"]


def test_dropout_is_left_as_it_is() -> None:
    net = bayesian_normalisation(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Dropout(0.5)))
    noise = torch.zeros(6)
    assert torch.equal(run(net.eval(), ROWS, noise), run(net, ROWS, noise))
    assert not torch.equal(run(net.train(), ROWS, noise), run(net, ROWS, noise))


# ------------------------------------------------------------------------------------------- densities


def test_predictions_of_a_linear_network_have_their_closed_form() -> None:
    """f = W (gamma h (1 + eps) + beta) + b is normal, with variance sum_j (W_j gamma_j h_j scale)^2."""
    network, x = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 1)), ROWS
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(6))
        network[1].bias.copy_(torch.randn(6))
    net = bayesian_normalisation(network, 0.7)

    def model(x: Tensor, y: Tensor | None = None) -> None:

        f = pyro.deterministic("f", net(x).squeeze(-1))
        with batch_plate(x):
            pyro.sample("y", dist.Normal(f, 1.0), obs=y)

    posterior = fit(model, (x, torch.zeros(7)), guide=noise_guide(net), method=svi(steps=1, lr=1e-9), progress=False)
    f = posterior.predict((x, None), 40_000, sites=["f"])["f"]
    scaled = nn.functional.layer_norm(network[0](x), (6,)) * network[1].weight * network[2].weight
    torch.testing.assert_close(f.mean(0), network(x).squeeze(-1), atol=0.03, rtol=0)
    torch.testing.assert_close(f.std(0), 0.7 * scaled.norm(dim=-1), atol=0, rtol=0.03)


def test_log_weights_are_the_likelihood_as_the_guide_is_the_prior() -> None:
    network, x = trained("BatchNorm2d")
    net, y = bayesian_normalisation(network, 0.3), torch.randint(3, (7,))
    model = classifier(net)
    trace = poutine.trace(noise_guide(net)).get_trace(x, y)
    noise = trace.nodes["w.1.noise"]["value"]
    log_p = poutine.trace(poutine.replay(model, trace)).get_trace(x, y).log_prob_sum()
    likelihood = -nn.functional.cross_entropy(run(net, x, noise), y, reduction="sum")
    torch.testing.assert_close(log_p, likelihood + dist.Normal(0.0, 0.3).log_prob(noise).sum())
    torch.testing.assert_close(log_p - trace.log_prob_sum(), likelihood)
    spread = log_weights(model, noise_guide(net), (x, y), particles=50)[0]
    assert spread.shape[0] == 50 and spread.std() > 0 and bool((spread < 0).all())


# ------------------------------------------------------------------------------------------------ fits


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "LayerNorm"])
def test_a_fit_trains_gamma_and_beta_alone(name: str) -> None:
    network, x = trained(name)
    network.train()
    before = copy.deepcopy(network.state_dict())
    net = bayesian_normalisation(network, 0.1)
    y = torch.randint(3, (7,))
    start = copy.deepcopy(net.state_dict())
    fit(classifier(net), (x, y), guide=noise_guide(net), method=svi(steps=5, lr=0.1), batch_size=4, progress=False)
    changed = {n for n, v in net.state_dict().items() if not torch.equal(v, start[n])}
    assert changed == {"module.1.layer.weight", "module.1.layer.bias"}
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items()), "the network itself was changed"


def test_a_sampler_infers_the_noise() -> None:
    network, x = trained("LayerNorm")
    net = bayesian_normalisation(network, 0.5)
    y = network(x).argmax(-1)
    method = sghmc(lr=1e-3, chains=2, draws=5, warmup=20, thinning=2)
    posterior = fit(classifier(net), (x, y), method=method, seed=0, progress=False)
    assert posterior.sample()["w.1.noise"].shape == (10, 6)


# --------------------------------------------------------------------------------------- weights of classes


def test_rows_count_by_their_class() -> None:
    network, x = trained("LayerNorm")
    net, y = bayesian_normalisation(network), torch.tensor([0, 1, 2, 0, 1, 2, 2])
    weights = torch.tensor([1.0, 7.0, 0.5])
    weighted = class_weighted(classifier(net), weights)
    fixed = {"w.1.noise": torch.randn(6)}
    each = nn.functional.log_softmax(run(net, x, fixed["w.1.noise"]), -1)[range(7), y]
    trace = poutine.trace(poutine.condition(weighted, fixed)).get_trace(x, y)
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], weights[y] * each)
    trace = poutine.trace(Minibatch("data", 70)(poutine.condition(weighted, fixed))).get_trace(x, y)
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], 10 * weights[y] * each)
    assert poutine.trace(weighted).get_trace(x).nodes["y"]["scale"] == 1.0


def test_a_heavier_class_is_predicted_more_often() -> None:
    x, y = torch.zeros(30, 3), torch.arange(30) % 3
    method = svi(steps=300, lr=0.05, schedule="cosine")
    shares = []
    for heavy in (0, 2):
        torch.manual_seed(0)
        net = bayesian_normalisation(nn.LayerNorm(3), 0.01, event_dims=1)  # logits are beta
        model = class_weighted(classifier(net), torch.ones(3).index_fill(0, torch.tensor([heavy]), 7.0))
        posterior = fit(model, (x, y), guide=noise_guide(net), method=method, seed=0, progress=False)
        shares.append((posterior.predict((x, None), 50, sites=["y"])["y"] == heavy).float().mean())
    torch.testing.assert_close(torch.stack(shares), torch.tensor([7 / 9, 7 / 9]), atol=0.06, rtol=0)


# ------------------------------------------------------------------------------------------------ refusals


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="no normalisation layer"):
        bayesian_normalisation(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no normalisation layer"):
        bayesian_normalisation(nn.LayerNorm(2, elementwise_affine=False))
    with pytest.raises(ValueError, match="mixes the rows"):
        bayesian_normalisation(perceptron(nn.BatchNorm1d(6, track_running_stats=False)))
    with pytest.raises(ValueError, match="scale must be positive"):
        bayesian_normalisation(nn.LayerNorm(2), 0.0)
    assert isinstance(bayesian_normalisation(nn.LayerNorm(2)).module, BayesianNormalisation)
