"""Dropout as a posterior: the penalty it comes to in closed form, its draws, and which units it leaves out."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ae import Posterior, batch_plate, bayesian, fit, map_, mc_dropout
from pyro_ae.data import as_rows
from pyro_ae.engines.run import Run
from pyro_ae.engines.stochastic import Stacked
from pyro_ae.models.bayesian_autoencoder import BayesianAutoencoder
from pyro_ae.nn import MLP
from pyro_ae.priors import normal

NOISE, PRIOR = 0.8, 0.5


def quick(engine, model, given, **kwargs):
    return fit(model, given, method=engine, **({"seed": 0, "progress": False} | kwargs))


def rows(size=100):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, generator=generator) * torch.tensor([1.0, 2.0, 0.5])
    return x, x @ torch.tensor([1.0, -2.0, 0.5]) + NOISE * torch.randn(size, generator=generator)


def of(net, inside=lambda net, x: net(x)):
    def model(x, y=None):
        mean = inside(net, x).flatten(1).sum(-1)
        with batch_plate(x):
            pyro.sample("y", dist.Normal(mean, NOISE), obs=y)

    return model


def linear():
    return of(bayesian(nn.Linear(3, 1, bias=False), normal(0.0, PRIOR)))


def mlp(hidden=4):
    return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def fitted(draws):
    """The weights ``[chains, 1, d]`` of which draws ``[chains, draws, d]`` leave some out."""
    return draws.gather(1, draws.abs().argmax(1, keepdim=True))


def prepared(engine, model, given):
    """A run before its first step, whose engine knows the units of the model."""
    run = Run(data=as_rows(given), batch_size=None, plate="data", device=torch.device("cpu"), progress=False)
    return Stacked(engine, model, run)


# -- what it minimises ---------------------------------------------------------------------------------------------


def ridge(x, y, p):
    r"""What minimises E_b[|y - X diag(b) m|^2 / 2 s^2 + |b m|^2 / 2 t^2], in which Var b = p (1 - p)."""
    q = 1.0 - p
    gram = x.T @ x
    penalty = q * p * gram.diagonal().diag() + q * NOISE**2 / PRIOR**2 * torch.eye(3)
    return torch.linalg.solve(q**2 * gram + penalty, q * x.T @ y)


@pytest.mark.parametrize("batch_size", [None, 50])
def test_linear_regression_is_the_ridge_regression_that_dropout_is_known_to_be(batch_size):
    p, (x, y) = 0.3, rows()
    posterior = quick(
        mc_dropout(p=p, inputs=True, chains=20, steps=1000, lr=0.03), linear(), (x, y), batch_size=batch_size
    )
    found = fitted(posterior.draws["w.weight"].squeeze(2)).mean(0).squeeze()
    torch.testing.assert_close(found, ridge(x, y, p), rtol=0.02, atol=0.01)
    assert (ridge(x, y, p) - ridge(x, y, 0.0)).abs().max() > 0.2


def test_a_hidden_layer_that_is_held_is_the_design_of_that_regression():
    """Units of the hidden layer are left out, and not its inputs, as they are data."""
    hidden = nn.Linear(3, 3, bias=False)
    nn.init.orthogonal_(hidden.weight)
    net = bayesian(nn.Sequential(hidden, nn.Linear(3, 1, bias=False)), normal(0.0, PRIOR), deterministic=["0"])
    held = net.module[0].weight.requires_grad_(False)
    p, (x, y) = 0.3, rows()
    posterior = quick(mc_dropout(p=p, chains=20, steps=1000, lr=0.03), of(net), (x, y))
    expected = ridge(x @ held.T, y, p)
    found = fitted(posterior.draws["w.1.weight"].squeeze(2)).mean(0).squeeze()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


def test_the_energy_and_its_gradient_are_those_at_the_weights_that_are_left():
    torch.manual_seed(0)
    run = prepared(mc_dropout(p=0.5, chains=3), of(bayesian(mlp(6))), rows())
    engine, state, batch = run.config, run.state, run.energy.batch
    torch.manual_seed(1)
    kept = engine.units.kept(3)
    torch.manual_seed(1)
    energies, gradient = engine.energies(state, run.stacked, batch, ())
    for c in range(3):
        w = (state["position"][c] * kept[c]).requires_grad_()
        energy = run.energy(run.stacked.unpack(w))
        torch.testing.assert_close(energies[c], energy.detach())
        expected = torch.where(kept[c], torch.autograd.grad(energy, w)[0], 0.0)
        torch.testing.assert_close(gradient[c], expected)
    assert (~kept).any(1).all() and (kept[0] != kept[1]).any(), "each chain leaves out units of its own"


@pytest.mark.parametrize("batch_size", [None, 30])
def test_without_dropout_it_is_the_maximum_a_posteriori(batch_size):
    found, expected = (
        quick(engine, of(bayesian(mlp())), rows(), batch_size=batch_size)
        for engine in (mc_dropout(p=0.0, steps=50, draws=3), map_(steps=50))
    )
    for name, value in expected.draws.items():
        assert torch.equal(found.draws[name], value.expand_as(found.draws[name]))


# -- what it draws -------------------------------------------------------------------------------------------------


def test_draws_are_the_fitted_weights_with_units_left_out_as_often_as_p_says():
    p, draws = 0.3, 2000
    posterior = quick(mc_dropout(p=p, draws=draws, steps=20, chains=2), of(bayesian(mlp(5))), rows())
    for name in ("w.0.weight", "w.0.bias", "w.2.bias"):
        assert torch.equal(posterior.draws[name], posterior.draws[name][:, :1].expand_as(posterior.draws[name]))
    w = posterior.draws["w.2.weight"].squeeze(2)
    assert ((w == 0) | (w == fitted(w))).all()
    kept = (w != 0).double()
    error = math.sqrt(p * (1 - p) / draws)
    assert ((kept.mean(1) - (1 - p)).abs() < 4 * error).all()
    correlation = torch.corrcoef(kept.transpose(1, 2).reshape(10, draws)) - torch.eye(10)
    assert correlation.abs().max() < 4.5 / math.sqrt(draws), "units are left out independently of each other"


def left_out(model, given, **settings):
    """Of each site, which weights are zero in the draws around the starting point: ``[draws, *shape]``."""
    run = prepared(mc_dropout(p=0.5, draws=60, **settings), model, given)
    draws = run.config.finish(run.state["position"][:, None])
    return {name: w.squeeze(0) == 0 for name, w in run.stacked.unpack(draws).items()}


def alike(zeros, dims):
    """Whether weights are left out along with all others that differ in these dims only; and some, and not all, are."""
    return bool((zeros.all(dims) == zeros.any(dims)).all()) and 0 < zeros.double().mean() < 1


def test_all_weights_of_an_input_unit_go_together():
    zeros = left_out(of(bayesian(nn.Sequential(mlp(4), nn.Tanh(), nn.Linear(1, 3)))), rows())
    assert alike(zeros["w.0.2.weight"], (1,)) and alike(zeros["w.2.weight"], (1,))
    assert zeros["w.0.2.weight"].any(1).logical_xor(zeros["w.0.2.weight"].any(1)[:, :1]).any(), "units differ"
    assert not any(zeros[name].any() for name in zeros if name.endswith("bias") or name == "w.0.0.weight")
    everything = left_out(of(bayesian(mlp())), rows(), inputs=True)
    assert alike(everything["w.0.weight"], (1,)) and alike(everything["w.2.weight"], (1,))
    first, last = (everything[f"w.{i}.weight"].any(1) for i in (0, 2))
    assert (first != last[:, :3]).any(0).all(), "layers have units of their own"


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_convolutions_leave_out_whole_input_channels(make, groups):
    """So that a network without biases gives at those weights what it gives with the channels themselves set to 0."""
    torch.manual_seed(0)
    dims = 1 if "1d" in make.__name__ else 2
    shape = (5,) * dims
    first = (nn.Conv1d if dims == 1 else nn.Conv2d)(2, 4, 1, bias=False)
    net = nn.Sequential(first, nn.Tanh(), make(4, 6, 3, groups=groups, bias=False))
    x, y = torch.randn(7, 2, *shape), torch.randn(7)
    zeros = left_out(of(bayesian(net)), (x, y))
    assert not zeros["w.0.weight"].any()
    h, layer = torch.tanh(first(x)), net[2]
    patterns = set()
    for z in zeros["w.2.weight"][:20]:
        channel = torch.stack([(layer_at(layer, z, h, c) == 0).all() for c in range(4)])
        expected = layer(h * ~channel.view(4, *(1,) * dims))
        torch.testing.assert_close(layer_at(layer, z, h), expected)
        whole = z.numel() // 4 if make.__name__.startswith("ConvT") else 6 // groups * 3**dims
        assert z.sum() == whole * channel.sum()
        patterns.add(tuple(channel.tolist()))
    assert len(patterns) > 4, "channels are left out independently, whatever their group"


def layer_at(layer, zeros, h, channel=None):
    """A layer's output with some weights zero; from one input channel, where one is given."""
    only = torch.ones(4) if channel is None else torch.eye(4)[channel]
    weight = {"weight": layer.weight * ~zeros}
    return torch.func.functional_call(layer, weight, h * only.view(4, *(1,) * (h.dim() - 2)))


# -- which networks -------------------------------------------------------------------------------------------------


def test_behind_a_deterministic_layer_the_first_latent_one_sees_units():
    net = bayesian(mlp(5), deterministic=["0"])
    zeros = left_out(of(net), rows())
    assert set(zeros) == {"w.2.weight", "w.2.bias"} and alike(zeros["w.2.weight"], (1,))


def test_other_latents_and_other_layers_are_points():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)

        def forward(self, x):
            return self.last(self.norm(self.first(x)))

    net = bayesian(Net())

    def model(x, y=None):
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        mean = net(x).squeeze(-1)
        with batch_plate(x):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    posterior = quick(mc_dropout(p=0.5, draws=60, steps=2), model, rows())
    for name, value in posterior.draws.items():
        assert (value == value[:, :1]).all() == (name != "w.last.weight")
    assert (posterior.draws["noise"] > 0).all()


def test_a_bayesian_autoencoder_by_the_method_alone(tmp_path):
    x = torch.rand(60, 6)
    model = BayesianAutoencoder(MLP(6, [8], 2), MLP(2, [8], 6), latent=2)
    engine = mc_dropout(p=0.2, steps=100, draws=10, chains=2)
    posterior = quick(engine, model, x, batch_size=20)
    dropped = {name for name, w in posterior.draws.items() if (w == 0).any()}
    assert len(dropped) == 2 and {name.split(".")[0] for name in dropped} == {"encoder", "decoder"}
    assert posterior.predict((x,), draws=20)["x"].shape == (20, 60, 6)
    again = Posterior.load(posterior.save(tmp_path / "p"), model)
    assert again.method == posterior.method == repr(engine) and "units" not in again.method
    torch.testing.assert_close(again.log_likelihood((x,))["x"], posterior.log_likelihood((x,))["x"])


def test_knows_more_where_there_were_data():
    x = torch.linspace(-1, 1, 100)[:, None]
    net = bayesian(nn.Sequential(nn.Linear(1, 50), nn.ReLU(), nn.Linear(50, 1)))

    def model(x, y=None):
        mean = pyro.deterministic("mean", net(x).squeeze(-1))
        with batch_plate(x):
            pyro.sample("y", dist.Normal(mean, 0.2), obs=y)

    posterior = quick(mc_dropout(p=0.05, steps=1000), model, (x, (3 * x).sin().squeeze(-1)))
    found = posterior.predict((torch.tensor([[0.5], [4.0]]), None), draws=100, sites=["mean"])["mean"]
    assert found.std(0)[1] > 2 * found.std(0)[0] > 0
    assert abs(found.mean(0)[0] - math.sin(1.5)) < 0.15


# -- refusals ------------------------------------------------------------------------------------------------------


def test_what_has_no_units_is_refused():
    def plain(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with batch_plate(x):
            pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

    with pytest.raises(ValueError, match=r"none whose weights are latent.*bayesian\(network\)"):
        quick(mc_dropout(), plain, rows())
    with pytest.raises(ValueError, match=r"no unit to leave out.*inputs=True"):
        quick(mc_dropout(), linear(), rows())
    positive = of(bayesian(mlp(), {"2.weight": dist.HalfNormal(1.0), "*": normal()}))
    with pytest.raises(ValueError, match=r"prior of site 'w.2.weight' is not over all real numbers.*normal\(\)"):
        quick(mc_dropout(init="median"), positive, rows())
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"p must lie in \[0, 1\)"):
            mc_dropout(p=p)
    with pytest.raises(ValueError, match="chains must be at least 1"):
        mc_dropout(chains=0)
