"""The svi engine: right answers, repeatable, best state kept, stops when told, survives interruption."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from truth import gaussian_mean, gaussian_mean_evidence, gaussian_mean_posterior, ppca

from pyro_ae import Posterior, batch_plate, bayesian, elbo, fit, importance, iwae, log_weights, sghmc, svi
from pyro_ae.engines.run import NonFiniteError
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.models import ppca as ppca_file
from pyro_ae.models import vae
from pyro_ae.nn import MLP
from pyro_ae.priors import fan_in

RELIABLE = svi(loss=importance(elbo, 20), lr=0.05, schedule="cosine", steps=800)


def quick(**kwargs):
    return svi(**({"steps": 30} | kwargs))


@pytest.mark.parametrize("batch_size", [None, 20])
def test_finds_a_conjugate_posterior(batch_size):
    """The exact posterior is in the family of the guide; the ELBO is then the evidence. Also in minibatches."""
    y = torch.randn(100) + 2
    posterior = fit(gaussian_mean, y, method=RELIABLE, batch_size=batch_size, seed=0, progress=False)
    loc, scale = gaussian_mean_posterior(y)
    mu = posterior.sample(20_000)["mu"]
    tolerance = 0.02 if batch_size is None else 0.1  # minibatch gradients keep the parameters moving
    assert abs(mu.mean() - loc) < 2 * tolerance * scale + 4 * scale / math.sqrt(20_000)
    assert abs(mu.std() / scale - 1) < tolerance + 0.02
    assert abs(posterior.log_evidence(particles=2000) - gaussian_mean_evidence(y)) < 0.02


def test_finds_a_skewed_posterior_with_a_positive_support():
    """Gamma prior, exponential observations: the posterior is Gamma; a log-normal guide has nearly its moments."""
    y = dist.Exponential(2.0).sample((60,))

    def model(y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    posterior = fit(model, y, method=RELIABLE, seed=0, progress=False)
    exact = dist.Gamma(2.0 + len(y), 1.0 + y.sum())
    rate = posterior.sample(20_000)["rate"]
    assert abs(rate.mean() / exact.mean - 1) < 0.02
    assert abs(rate.std() / exact.stddev - 1) < 0.05


def test_learns_ppca_to_the_maximum_likelihood():
    """The maximum of PPCA's likelihood is known from the eigenvalues of the covariance (Tipping and Bishop)."""
    _, x = ppca(rows=400)
    values = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)) / len(x)).flip(0)
    noise = values[2:].mean()
    best = -0.5 * (5 * math.log(2 * math.pi) + values[:2].log().sum() + 3 * noise.log() + 5)
    torch.manual_seed(3)
    model = ppca_file.PPCA(5, 2)
    guide = Amortized(nn.Identity(), MeanField(5, 2))
    posterior = fit(model, x, guide=guide, method=svi(loss=importance(iwae, 20), lr=2e-2, steps=800), progress=False)
    assert best - model.marginal().log_prob(x).mean() < 0.01
    assert abs(posterior.log_evidence(particles=500).mean() - best) < 0.02


def test_same_seed_same_result_and_global_states_are_left_alone():
    states = torch.get_rng_state()

    def run(seed):
        model, guide, x = ppca_file.example()
        posterior = fit(model, x, guide=guide, method=quick(), batch_size=5, seed=seed, progress=False, validation=0.25)
        return posterior.history["loss"], posterior.program.parameters.state()

    (a, p), (b, q), (c, _) = run(1), run(1), run(2)
    assert a == b
    assert all(torch.equal(p[n], q[n]) for n in p)
    assert a != c
    assert torch.equal(states, torch.get_rng_state())


def test_history_has_each_sites_share():
    model, guide, x = ppca_file.example()
    posterior = fit(model, x, guide=guide, method=quick(), progress=False, validation=x)
    history = posterior.history
    assert set(history) == {"step", "epoch", "loss", "validation", "log p(z)", "log p(x)", "log q(z)"}
    assert len({len(v) for v in history.values()}) == 1
    # the same quantity twice, each from draws of its own: rows' mean ELBO
    elbos = [a + b - c for a, b, c in zip(history["log p(x)"], history["log p(z)"], history["log q(z)"], strict=True)]
    assert abs(sum(elbos) / len(elbos) + sum(history["loss"]) / len(history["loss"])) < 1.0


def test_losses_are_per_row_whatever_the_batch():
    torch.manual_seed(0)
    model, x = ppca(rows=60)
    guide = Amortized(MLP(5, [8]), MeanField(8, 2))
    first = [
        fit(model, x, guide=guide, method=svi(lr=1e-9, steps=60), batch_size=b, progress=False).history["loss"]
        for b in (None, 20, 7)
    ]
    means = [sum(f) / len(f) for f in first]
    assert max(means) - min(means) < 0.15 * abs(means[0])


def test_the_best_state_is_kept():
    """The held-out loss of what is returned is the lowest in the history, not the last."""
    model, guide, x = vae.example()
    posterior = fit(
        model, x, guide=guide, method=svi(lr=0.05, steps=400), batch_size=8, validation=x[:8], seed=0, progress=False
    )
    validation = posterior.history["validation"]
    assert min(validation) < validation[-1]
    again = fit(
        posterior.model, x, guide=guide, method=svi(lr=1e-12, steps=2), batch_size=8, validation=x[:8], progress=False
    )
    assert abs(again.history["validation"][-1] - min(validation)) < 1e-3


def test_early_stopping_ignores_noise_and_stops_at_a_plateau():
    model, guide, x = vae.example()
    held = torch.bernoulli(torch.full((64, 12), 0.4))
    posterior = fit(
        model,
        x,
        guide=guide,
        method=svi(lr=0.02, epochs=500, early_stopping=5),
        batch_size=8,
        validation=held,
        seed=0,
        progress=False,
    )
    epochs = posterior.history["epoch"]
    assert 5 < epochs[-1] < 300  # overfits 16 rows, so it must stop, but not before it learnt
    y = torch.randn(50)
    plain = fit(gaussian_mean, y, method=svi(steps=20_000, lr=0.05, early_stopping=True), seed=0, progress=False)
    assert plain.history["step"][-1] < 20_000
    assert abs(plain.sample(5000)["mu"].mean() - gaussian_mean_posterior(y)[0]) < 0.2  # one standard deviation


def test_callbacks_see_each_evaluation_and_can_stop():
    seen = []

    def callback(event):
        seen.append(event)
        return event.epoch == 3

    model, guide, x = ppca_file.example()
    posterior = fit(model, x, guide=guide, batch_size=4, method=svi(epochs=10), callbacks=[callback], progress=False)
    assert [e.epoch for e in seen] == [1, 2, 3] == posterior.history["epoch"]
    assert [e.step for e in seen] == [4, 8, 12]
    assert seen[0].metrics["loss"] == posterior.history["loss"][0]


def test_interruption_leaves_the_best_state():
    def callback(event):
        if event.epoch == 3:
            raise KeyboardInterrupt

    model, guide, x = ppca_file.example()
    posterior = fit(
        model, x, guide=guide, batch_size=4, method=svi(epochs=10), callbacks=[callback], validation=x, progress=False
    )
    assert posterior.interrupted
    assert "interrupted" in repr(posterior)
    assert posterior.history["epoch"] == [1, 2, 3]
    assert torch.isfinite(posterior.log_evidence(particles=10)).all()


def test_nan_names_site_batch_and_step_and_keeps_the_last_good_state():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            loc = self.w if self.calls < 25 else self.w * float("nan")
            with batch_plate(x):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z + loc, 1.0, validate_args=False).to_event(1), obs=x)

    model, guide = Bad(), Amortized(MLP(2, [4]), MeanField(4, 2))
    with pytest.raises(
        NonFiniteError, match=r"the loss is nan at step \d+ \(epoch \d+, batch \d+\).*'x' of the model"
    ) as e:
        fit(model, torch.randn(12, 2), guide=guide, batch_size=4, method=svi(epochs=10), progress=False)
    assert torch.isfinite(model.w).all()
    assert isinstance(e.value, ValueError)
    assert e.value.posterior.history["loss"]
    assert all(torch.isfinite(p).all() for p in e.value.posterior.program.parameters.named().values())


def test_a_gradient_that_is_not_finite_is_not_applied():
    def model(y):
        a = pyro.param("a", torch.tensor(0.0))
        # finite value, infinite slope at zero
        pyro.sample("y", dist.Normal((a.abs() + 1e-45).sqrt() * 0 + a.abs().sqrt(), 1.0), obs=y)

    with pytest.raises(NonFiniteError, match="gradient of 'a'") as e:
        fit(model, torch.tensor([1.0]), guide=lambda y: None, method=quick(), progress=False)
    assert e.value.posterior.params["a"] == 0


def test_parameter_groups_schedule_clip_and_optimizers():
    model, guide, x = ppca_file.example()
    before = {n: p.clone() for n, p in model.named_parameters()}
    fit(
        model,
        x,
        guide=guide,
        method=quick(groups={"model.weight": {"lr": 1e-12}, "guide.*": {"lr": 1e-2}}, schedule="linear", clip=1.0),
        progress=False,
    )
    torch.testing.assert_close(model.weight, before["weight"])
    assert not torch.allclose(model.mean, before["mean"])
    with pytest.raises(ValueError, match="no parameter matches 'encoder.*'.*model.weight"):
        fit(model, x, guide=guide, method=quick(groups={"encoder.*": {"lr": 1.0}}), progress=False)
    for optimizer in (torch.optim.SGD, pyro.optim.ClippedAdam({"lr": 1e-3, "clip_norm": 1.0})):
        fit(model, x, guide=guide, method=quick(optimizer=optimizer), progress=False)


def test_clipping_bounds_the_step():
    model, guide, x = ppca_file.example()
    before = torch.cat([p.flatten() for p in [*model.parameters(), *guide.parameters()]]).detach().clone()
    method = svi(optimizer=torch.optim.SGD, lr=1.0, clip=1e-3, steps=1)
    fit(model, x, guide=guide, method=method, progress=False)
    after = torch.cat([p.flatten() for p in [*model.parameters(), *guide.parameters()]]).detach()
    assert abs((after - before).norm().item() - 1e-3) < 1e-6


def test_pyros_losses_are_losses():
    model, guide, x = ppca_file.example()
    for loss in (Trace_ELBO(num_particles=2), Trace_ELBO().differentiable_loss):
        posterior = fit(model, x, guide=guide, method=quick(loss=loss), batch_size=8, progress=False)
        assert posterior.history["loss"][-1] > 0


def test_pyros_enumeration_trains_discrete_latents():
    y = torch.cat([torch.randn(40) - 3, torch.randn(40) + 3])

    @config_enumerate
    def model(y):
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("y", dist.Normal(locs[k], 1.0), obs=y)

    posterior = fit(
        model,
        y,
        guide=lambda y: None,
        method=svi(loss=TraceEnum_ELBO(max_plate_nesting=1), lr=0.1, steps=300),
        progress=False,
    )
    torch.testing.assert_close(posterior.params["locs"], torch.tensor([-3.0, 3.0]), atol=0.4, rtol=0)


def test_a_discrete_latent_in_the_guide_is_refused_by_our_loss():
    def model(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    def guide(y):
        p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        with pyro.plate("data", len(y)):
            pyro.sample("k", dist.Bernoulli(p))

    with pytest.raises(ValueError, match="'k' has no reparameterised sampler.*score_function"):
        fit(model, torch.zeros(3), guide=guide, progress=False)


def test_two_fits_share_no_store_and_leave_the_global_one_alone():
    pyro.param("loc", torch.tensor(7.0))

    def model(y):
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("y", dist.Normal(loc, 1.0).expand([len(y)]).to_event(1), obs=y)

    fits = [
        fit(model, torch.full((5,), v), guide=lambda y: None, method=svi(lr=0.1, steps=200), progress=False)
        for v in (1.0, -1.0)
    ]
    assert [round(f.params["loc"].item(), 1) for f in fits] == [1.0, -1.0]
    assert pyro.param("loc") == 7


def test_an_unregistered_network_is_refused():
    net = nn.Linear(2, 2)

    def model(x):
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    guide = Amortized(MLP(2, [4]), MeanField(4, 2))
    with pytest.raises(ValueError, match="2 tensors that require a gradient.*pyro.module"):
        fit(model, torch.randn(8, 2), guide=guide, method=quick(), progress=False)
    net.requires_grad_(False)
    fit(model, torch.randn(8, 2), guide=guide, method=quick(), progress=False)


def test_a_data_loader_brings_its_own_batches():
    model, guide, x = ppca_file.example()
    loader = DataLoader(TensorDataset(x), batch_size=5, shuffle=True)
    posterior = fit(model, loader, guide=guide, method=svi(epochs=2), seed=0, progress=False)
    assert posterior.history["step"] == [4, 8]
    assert posterior.log_evidence(particles=5).shape == (16,)
    with pytest.raises(ValueError, match="makes its own batches"):
        fit(model, loader, guide=guide, batch_size=4, progress=False)


def test_a_richer_guide_closes_the_gap_that_a_mean_field_guide_must_leave():
    """With posterior precision P the best mean-field guide is off by half log(prod diag P / det P)."""

    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    y = torch.randn(4)
    evidence = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 2).log_prob(y)
    precision = torch.eye(2) + 4
    expected = 0.5 * (precision.diagonal().prod() / precision.det()).log()
    gaps = []
    for guide in (None, AutoMultivariateNormal(model)):
        posterior = fit(model, y, guide=guide, method=RELIABLE, seed=0, progress=False)
        gaps.append(evidence - elbo(log_weights(model, posterior.guide, y, particles=20_000)[0]))
    assert abs(gaps[0] - expected) < 0.05
    assert abs(gaps[1]) < 0.05


@pytest.mark.parametrize("which", ["lasting", "own", "network", "own and network"])
def test_tensors_outside_every_module_are_refused_unless_a_run_makes_them(which):
    """Noise that a run differentiates is a leaf too, but nothing to be trained."""
    lasting = torch.zeros(3, requires_grad=True)

    def model(y):
        extra = {
            "lasting": lambda: lasting,
            "own": lambda: torch.randn(3).requires_grad_(),
            "network": lambda: torch.nn.Linear(1, 3).bias,
            "own and network": lambda: torch.nn.Linear(1, 3).bias + torch.randn(3).requires_grad_(),
        }[which]()
        u = pyro.sample("u", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(u + extra, 1.0).to_event(1), obs=y)

    def run():
        return fit(model, torch.randn(5, 3), method=svi(steps=2), progress=False)

    if which == "own":
        run()
    else:
        with pytest.raises(ValueError, match="belong to no module"):
            run()


# -- mean-field networks -------------------------------------------------------------------------------------------


def noisy_sine(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x = 4.0 * torch.rand(rows, 1, generator=generator) - 2.0
    return x, (2.0 * x).sin().squeeze(-1) + 0.3 * torch.randn(rows, generator=generator)


def network_model(net):
    def model(x, y=None):
        noise = pyro.sample("noise", dist.Uniform(0.2, 0.4))
        mean = net(x).squeeze(-1)
        with batch_plate(x):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    return model


def test_an_automatic_guide_starts_where_the_model_proposes_and_is_narrow_there(tmp_path):
    module = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 1))
    model = network_model(bayesian(module, start="module"))
    posterior = fit(model, noisy_sine(50, 0), method=svi(steps=1, lr=1e-9), seed=0, progress=False)
    found = {site: posterior.guide._get_loc_and_scale(site) for site in posterior.sample(1)}
    for name, value in module.named_parameters():
        loc, scale = found[f"w.{name}"]
        torch.testing.assert_close(loc, value)
        size = value.detach().square().mean().sqrt()
        torch.testing.assert_close(scale, torch.full_like(value, max(1e-3, 0.05 * float(size))), rtol=1e-4, atol=0)
    for value, expected in zip(found["noise"], (0.0, 0.1), strict=True):
        assert value.item() == pytest.approx(expected, abs=1e-6), "as Pyro's guide has it"
    again = Posterior.load(posterior.save(tmp_path / "p"), model)
    ours, theirs = (p.program.parameters.state() for p in (posterior, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_mean_field_weights_leave_their_prior_and_predict_as_those_of_chains_do():
    train, (x, y) = noisy_sine(200, 0), noisy_sine(400, 1)
    torch.manual_seed(0)
    layers = nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1)
    net = bayesian(nn.Sequential(*layers), fan_in(2.0))

    def loss(log_likelihood):
        return float(math.log(len(log_likelihood)) - log_likelihood.logsumexp(0).mean())

    prior = loss(torch.stack([dist.Normal(net(x).squeeze(-1), 0.3).log_prob(y) for _ in range(200)]).detach())
    chains = sghmc(chains=2, draws=20, warmup=800, thinning=10)
    mean_field, sampled = (
        loss(fit(network_model(net), train, method=method, seed=0, progress=False).log_likelihood((x, y))["y"])
        for method in (svi(steps=500), chains)
    )
    assert mean_field < prior - 0.5 and abs(mean_field - sampled) < 0.25, f"{prior=} {mean_field=} {sampled=}"
