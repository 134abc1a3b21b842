"""Networks with latent weights: densities in closed form, particles against one by one, engines, and refusals."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_ae import Posterior, batch_plate, fit, nuts, svi
from pyro_ae.bayesian import Bayesian, bayesian
from pyro_ae.density import log_joint
from pyro_ae.energy import Energy
from pyro_ae.nn import MLP
from pyro_ae.particles import pad_particles, why_serial
from pyro_ae.plates import particle_plate
from pyro_ae.priors import fan_in, hierarchical, horseshoe, learnable, normal
from pyro_ae.sites import Recorder, inspect_sites, site_log_prob

X, Y = torch.randn(9, 3, generator=torch.Generator().manual_seed(1)), torch.linspace(-1.0, 1.0, 9)
IMAGES = torch.randn(9, 1, 6, 6, generator=torch.Generator().manual_seed(2))
quick = svi(steps=5, lr=0.01)


def mlp(hidden: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def regression(net: nn.Module):
    """The model of a regression on a network's output."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        f = pyro.deterministic("f", net(x).squeeze(-1))
        with batch_plate(x):
            pyro.sample("y", dist.Normal(f, sigma), obs=y)

    return model


def trace_of(net: nn.Module, x: Tensor = X) -> poutine.Trace:
    return poutine.trace(net).get_trace(x)


# ---------------------------------------------------------------------------------------------- densities


def test_linear_regression_has_its_closed_form():
    net = bayesian(nn.Linear(3, 1), normal(0.5, 2.0))

    def model(x: Tensor, y: Tensor) -> None:
        f = net(x).squeeze(-1)
        with batch_plate(x):
            pyro.sample("y", dist.Normal(f, 0.3), obs=y)

    w, b = torch.randn(1, 3), torch.randn(1)
    prior = torch.distributions.Normal(0.5, 2.0)
    likelihood = torch.distributions.Normal(X @ w[0] + b, 0.3)
    expected = prior.log_prob(w).sum() + prior.log_prob(b).sum() + likelihood.log_prob(Y).sum()
    torch.testing.assert_close(log_joint(model, {"w.weight": w, "w.bias": b}, (X, Y)), expected)


def test_linear_regression_has_its_exact_posterior():
    """The energy is quadratic: its Hessian and minimum are those of the conjugate posterior."""
    net = bayesian(nn.Linear(3, 1, bias=False), dist.Normal(0.0, 2.0)).double()
    x, y = X.double(), Y.double()

    def model() -> None:
        f = net(x).squeeze(-1)
        with batch_plate(x):
            pyro.sample("y", dist.Normal(f, 0.3), obs=y)

    energy = Energy(model, None)
    precision = x.T @ x / 0.3**2 + torch.eye(3).double() / 2.0**2
    mean = torch.linalg.solve(precision, x.T @ y / 0.3**2)

    def of(w: Tensor) -> Tensor:
        return energy({"w.weight": w.reshape(1, 3)})

    torch.testing.assert_close(torch.autograd.functional.hessian(of, mean), precision)
    torch.testing.assert_close(torch.func.grad(of)(mean), torch.zeros(3).double(), atol=1e-10, rtol=0)


# ---------------------------------------------------------------------------------------------- particles


def plain(x: Tensor) -> None:
    f = NETS["mlp"](x).squeeze(-1)
    with batch_plate(x):
        pyro.sample("y", dist.Normal(f, 1.0), obs=Y)


def classifier(x: Tensor) -> None:
    logits = NETS["conv"](x)
    with batch_plate(x):
        pyro.sample("y", dist.Categorical(logits=logits), obs=torch.arange(len(x)) % 3)


def autoencoder(x: Tensor) -> None:
    """The codes carry particles, and so does what the second network gets; images in a transposed convolution too."""
    h = NETS["encoder"](x.flatten(1))
    with batch_plate(x):
        z = pyro.sample("z", dist.Normal(h, 0.1).to_event(1))
    y = NETS["decoder"](z.unflatten(-1, (2, 2, 2)))
    with batch_plate(x):
        pyro.sample("x", dist.Normal(y, 1.0).to_event(3), obs=x)


def two_plates(x: Tensor) -> None:
    """Rows alone, rows by tasks, and a latent of the tasks alone, into networks."""
    f = NETS["mlp"](x).squeeze(-1)
    tasks = pyro.plate("tasks", 2, dim=-2)
    with tasks, batch_plate(x):
        z = pyro.sample("z", dist.Normal(f[..., None].expand(*f.shape, 3), 1.0).to_event(1))
    with tasks:
        t = pyro.sample("t", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    g = NETS["of z"](z).squeeze(-1) + NETS["of t"](t).squeeze(-1)
    with tasks, batch_plate(x):
        pyro.sample("y", dist.Normal(g, 1.0), obs=Y.expand(2, -1))


def scaled(x: Tensor) -> None:
    """Scales that are latent, tied weights and particles in a mean of two inputs."""
    f = NETS["hierarchical"](x) + NETS["horseshoe"](x) + NETS["tied"](x)
    with batch_plate(x):
        y = pyro.sample("z", dist.Normal(f, 1.0).to_event(1))
    g = NETS["two inputs"](x, y[..., None]).squeeze(-1)
    with batch_plate(x):
        pyro.sample("y", dist.Normal(g, 1.0), obs=Y)


class TwoInputs(nn.Module):
    """With a parameter of its own, and nothing that resets it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((x * self.a)[..., None] * y).sum(-2)


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


@pytest.fixture(autouse=True)
def networks(isolated):
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    decoder = nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.ReLU(), nn.ConvTranspose2d(3, 1, 3))
    NETS["mlp"] = bayesian(mlp(), name="mlp")
    NETS["conv"] = bayesian(conv)
    NETS["encoder"] = bayesian(MLP(36, [5], 8), fan_in(), name="encoder", deterministic="layers.0")
    NETS["decoder"] = bayesian(decoder, name="decoder")
    NETS["of z"], NETS["of t"] = bayesian(mlp(), name="of z"), bayesian(nn.Linear(3, 1), name="of t")
    NETS["hierarchical"] = bayesian(nn.Linear(3, 3), hierarchical(), name="hierarchical")
    NETS["horseshoe"] = bayesian(nn.Linear(3, 3), horseshoe(), name="horseshoe")
    NETS["tied"] = bayesian(tied(), name="tied")
    NETS["two inputs"] = bayesian(TwoInputs(), name="two inputs", event_dims=(1, 2))


NETS: dict[str, Bayesian] = {}
MODELS = [(plain, X), (classifier, IMAGES), (autoencoder, IMAGES), (two_plates, X), (scaled, X)]


@pytest.mark.parametrize(("model", "x"), MODELS, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("particles", [1, 5])
def test_particles_together_are_particles_one_by_one(model, x, particles):
    layout = inspect_sites(model, None, x)
    alone = []
    for _ in range(particles):
        with Recorder() as r:
            model(x)
        alone.append(r.sites)
    latents = {n: torch.stack([sites[n]["value"] for sites in alone]) for n in layout.names("latent")}
    padded = {n: pad_particles(v, layout.model[n], layout.nesting) for n, v in latents.items()}
    with particle_plate(particles, layout.nesting), Recorder(padded) as together:
        model(x)
    for site in together.scored:
        density = site_log_prob(site)
        assert density.dim() == layout.nesting + 1, site["name"]
        expected = torch.stack([site_log_prob(sites[site["name"]]) for sites in alone])
        torch.testing.assert_close(density.reshape(expected.shape), expected, msg=lambda m, s=site: f"{s['name']}: {m}")
    assert why_serial(model, x, layout.model, layout.nesting) is None
    with particle_plate(particles, layout.nesting), Recorder() as prior:  # weights from the prior, for each particle
        model(x)
    for name, value in padded.items():
        assert prior.sites[name]["value"].shape == value.shape, name


def test_the_energy_under_vmap_is_a_loop_over_chains():
    energy = Energy(regression(bayesian(mlp(), hierarchical(), deterministic="0")), (X, Y))
    v = {name: torch.randn(3, *x.shape) for name, x in energy.init().items()}
    gradient = torch.func.grad_and_value(energy)
    with pyro.validation_enabled(False):
        together = torch.func.vmap(gradient)(v)
        alone = [gradient({n: x[k] for n, x in v.items()}) for k in range(3)]
    torch.testing.assert_close(together[1], torch.stack([value for _, value in alone]))
    for name in v:
        torch.testing.assert_close(together[0][name], torch.stack([g[name] for g, _ in alone]))


def test_particles_under_vmap():
    """A model with the particle plate, mapped once more over chains."""
    net = NETS["mlp"]
    values = {w.site: torch.randn(2, 4, 1, *net._initial(w).shape) for w in net.weights}

    def run(values: dict[str, Tensor]) -> Tensor:
        with pyro.validation_enabled(False), particle_plate(4, 1), Recorder(values):
            return net(X)

    found = torch.func.vmap(run)(values)
    assert found.shape == (2, 4, 9, 1)
    torch.testing.assert_close(found, torch.stack([run({n: v[c] for n, v in values.items()}) for c in range(2)]))


def test_a_recurrent_network_sees_its_weights():
    lstm = nn.LSTM(3, 4, batch_first=True)
    values = {f"w.{n}": torch.randn_like(p) for n, p in lstm.named_parameters()}
    x = torch.randn(2, 5, 3)
    with Recorder(values):
        found, _ = bayesian(lstm)(x)
    lstm.load_state_dict({n.removeprefix("w."): v for n, v in values.items()})
    torch.testing.assert_close(found, lstm(x)[0])


# ---------------------------------------------------------------------------------------------- parameters and starts


def test_the_users_network_stays_as_it_is_and_tied_weights_are_one_site():
    module = tied()
    before = copy.deepcopy(module.state_dict())
    net = bayesian(module, deterministic="*.bias")
    assert trace_of(net).stochastic_nodes == ["w.0.weight"]
    assert sorted(dict(net.named_parameters())) == ["module.0.bias", "module.2.bias"]
    assert list(dict(net.named_buffers())) == ["initial.0-weight"] and "initial.0-weight" in net.state_dict()
    value = torch.randn(3, 3)
    with Recorder({"w.0.weight": value}):
        found = net(X)
    torch.testing.assert_close(found, (X @ value.T + module[0].bias).tanh() @ value.T + module[2].bias)
    assert (
        all(torch.equal(before[n], t) for n, t in module.state_dict().items()) and len(list(module.parameters())) == 3
    )


def test_starts_are_pytorchs_default_initialisation_or_the_networks_own():
    module = nn.Sequential(nn.Conv2d(4, 50, 3), nn.LSTM(25, 4), nn.Embedding(40, 30), nn.LayerNorm(6), TwoInputs())
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(7.0)
    fresh, own = (copy.deepcopy(bayesian(module, start=s)) for s in ("fresh", "module"))
    torch.manual_seed(0)
    values = {w.site: (fresh._start(i), own._start(i), fresh._start(i)) for i, w in enumerate(fresh.weights)}
    assert all((start == 7.0).all() for _, start, _ in values.values())
    bounds = {"w.0.weight": 1 / 6, "w.0.bias": 1 / 6, "w.1.weight_ih_l0": 1 / 2}
    for name, bound in bounds.items():
        value = values[name][0]
        assert value.abs().max() <= bound and value.abs().max() > 0.9 * bound, name
        assert not torch.equal(value, values[name][2]), name
    assert abs(values["w.2.weight"][0].std() - 1) < 0.1
    assert (values["w.3.weight"][0] == 1).all() and (values["w.3.bias"][0] == 0).all()
    assert (values["w.4.a"][0] == 7.0).all(), "it has nothing to reset"
    sites = trace_of(NETS["mlp"]).nodes
    assert sites["mlp.0.weight"]["infer"]["start"]().shape == (4, 3)


def test_a_network_without_parameters_follows_its_input():
    with pyro.validation_enabled(False):
        assert bayesian(mlp())(X.to("meta")).device.type == "meta"
        net = bayesian(mlp(), deterministic="0")
        with pytest.raises(RuntimeError):
            net(X.to("meta"))


# ---------------------------------------------------------------------------------------------- engines


def test_svi_trains_the_deterministic_part_of_a_plain_function_and_predicts_together():
    net = bayesian(mlp(), deterministic="0")
    net.module[0].bias.requires_grad_(False)
    before = copy.deepcopy(net.module[0])
    posterior = fit(regression(net), (X, Y), method=quick, seed=0, progress=False)
    assert posterior.program.layout.serial is None
    assert not torch.equal(net.module[0].weight, before.weight) and torch.equal(net.module[0].bias, before.bias)
    assert posterior.sample(4)["w.2.weight"].shape == (4, 1, 4)
    predicted = posterior.predict((X[:5], None), draws=6)
    assert predicted["y"].shape == (6, 5) and predicted["f"].std(0).min() > 0


def test_svi_recovers_a_conjugate_posterior():
    net = bayesian(nn.Linear(3, 1, bias=False))

    def model(x: Tensor, y: Tensor) -> None:
        f = net(x).squeeze(-1)
        with batch_plate(x):
            pyro.sample("y", dist.Normal(f, 0.5), obs=y)

    posterior = fit(model, (X, Y), method=svi(steps=600, lr=0.03), seed=0, progress=False)
    exact = torch.linalg.solve(X.T @ X / 0.25 + torch.eye(3), X.T @ Y / 0.25)
    torch.testing.assert_close(posterior.sample(4000)["w.weight"].mean((0, 1)), exact, atol=0.06, rtol=0)


@pytest.mark.parametrize("backend", ["numpyro", "pyro"])
def test_nuts_runs(backend):
    net = bayesian(nn.Linear(3, 1), deterministic="bias")
    method = nuts(draws=6, warmup=6, chains=2, backend=backend)
    posterior = fit(regression(net), (X, Y), method=method, seed=0, progress=False)
    assert posterior.draws["w.weight"].shape == (2, 6, 1, 3)
    assert posterior.draws["w.weight"].std() > 0
    assert posterior.predict(draws=5)["y"].shape == (5, 9)


class Regression(nn.Module):
    """A network that the model owns."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bayesian(mlp(), learnable(), deterministic="0")

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        regression(self.net)(x, y)


@pytest.mark.parametrize("make", [Regression, lambda: regression(bayesian(mlp(), learnable(), deterministic="0"))])
def test_a_posterior_is_saved_and_loaded(make, tmp_path):
    posterior = fit(make(), (X, Y), method=quick, seed=0, progress=False)
    path = posterior.save(tmp_path / "posterior")
    loaded = Posterior.load(path, make(), data=(X, Y))
    found = []
    for one in (posterior, loaded):
        torch.manual_seed(3)
        found.append(one.predict(draws=4)["f"])
    torch.testing.assert_close(*found)
    names = posterior.program.parameters.named()
    assert sum("module.0" in n for n in names) == 2 and sum("priors" in n for n in names) == 4


# ---------------------------------------------------------------------------------------------- refusals


def test_normalisation_is_held_in_evaluation_mode():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    module(X)
    net = bayesian(module.eval(), deterministic="1")
    before = net.module[1].running_mean.clone()
    net.train()
    assert net.module[0].training and not net.module[1].training
    fit(regression(net), (X, Y), method=quick, progress=False)
    assert torch.equal(net.module[1].running_mean, before)
    assert bayesian(module, deterministic=("1.weight", "1.bias")).frozen
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) mixes the rows.*LayerNorm"):
        bayesian(module.train(), deterministic="1")
    with pytest.raises(ValueError, match="'1'"):
        bayesian(module.eval())


def conv(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), layer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bayesian(conv(nn.BatchNorm2d(2))), "'1' .BatchNorm2d. mixes the rows"),
        (lambda: bayesian(conv(nn.SyncBatchNorm(2))), "SyncBatchNorm"),
        (lambda: bayesian(conv(nn.InstanceNorm2d(2, track_running_stats=True))), "InstanceNorm2d"),
        (lambda: bayesian(conv(nn.BatchNorm2d(2, track_running_stats=False)).eval(), deterministic="1"), "BatchNorm2d"),
        (lambda: bayesian(conv(nn.Dropout(0.1)).eval()), "'1' .Dropout. draws noise.*set it to 0"),
        (lambda: bayesian(conv(nn.Dropout2d(1))), "Dropout2d"),
        (lambda: bayesian(nn.MultiheadAttention(4, 2, dropout=0.1)), "MultiheadAttention draws noise"),
        (lambda: bayesian(nn.LSTM(3, 4, num_layers=2, dropout=0.1)), "LSTM draws noise"),
        (lambda: bayesian(nn.LazyLinear(2)), "'weight' has no shape yet"),
        (lambda: bayesian(nn.Tanh()), "Tanh has no parameters"),
        (lambda: bayesian(mlp(), deterministic=["encoder"]), "'encoder' matches nothing; there are 0, 1, 2, 0.weight"),
        (lambda: bayesian(mlp(), {"*.weight": normal()}), "no prior for '0.bias'.*add '\\*'"),
        (lambda: bayesian(mlp(), dist.Normal(torch.zeros(4), 1.0)), r"'0.weight' has shape \(4,\)"),
        (lambda: bayesian(mlp(), 1.0), "prior of '0.weight' is 1.0"),
        (lambda: bayesian(mlp(), start="zero"), "start is"),
        (lambda: learnable(per="layer"), "per="),
        (lambda: bayesian(mlp(), lambda n, t: dist.Normal(torch.zeros(2), 1.0))(X), r"'w.0.weight' is over \(2,\)"),
    ],
)
def test_mistakes_are_refused_with_a_cure(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_allowed_of_these():
    bayesian(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1)), deterministic=("0", "1"))
    bayesian(conv(nn.Dropout(0.0)))
    bayesian(conv(nn.InstanceNorm2d(2)))
    bayesian(conv(nn.GroupNorm(1, 2)))


def particles(net: nn.Module, x: Tensor, depth: int = 1) -> Tensor:
    with particle_plate(4, depth):
        return net(x)


def test_shapes_that_do_not_fit_are_refused_with_a_cure():
    with pytest.raises(ValueError, match="cannot be told from its first layer.*event_dims=3"):
        particles(bayesian(nn.Sequential(nn.Flatten(), nn.Linear(36, 2))), IMAGES)
    flat = bayesian(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), event_dims=3)
    assert particles(flat, IMAGES).shape == (4, 9, 2) and particles(flat, IMAGES, depth=2).shape == (4, 1, 9, 2)
    assert particles(NETS["conv"], IMAGES.expand(4, 1, *IMAGES.shape), depth=2).shape == (4, 1, 9, 3)
    with pytest.raises(ValueError, match=r"shape \(9, 2, 3\).*event_dims"):
        particles(bayesian(mlp()), X[:, None].expand(9, 2, 3))
    with pytest.raises(ValueError, match="event_dims for 2 tensors and was given 1"):
        particles(bayesian(mlp(), event_dims=(1, 1)), X)
    with batch_plate(X), pytest.raises(ValueError, match="'w.0.weight' is inside plate 'data': call"):
        bayesian(mlp())(X)
    values = {"w.weight": torch.randn(4, 2, 1, 3)}
    with pytest.raises(ValueError, match=r"'w.weight' has values of leading dims \(4, 2\)"), Recorder(values):
        bayesian(nn.Linear(3, 1))(X)
