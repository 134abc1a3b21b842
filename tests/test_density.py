"""Log-weights, minibatch scaling and the energy against closed forms."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from truth import (
    biased_guide,
    exact_guide,
    gaussian_mean,
    gaussian_mean_evidence,
    gaussian_mean_posterior,
    ppca,
    stubborn,
)

from pyro_ae import batch_plate, elbo, importance, iwae, log_weights
from pyro_ae.density import log_joint
from pyro_ae.energy import Energy
from pyro_ae.guides import together
from pyro_ae.particles import why_serial
from pyro_ae.plates import Scaled, batched, tempered
from pyro_ae.sites import inspect_sites


def sampled(z):
    """A guide that gives z its value, so that losses have no noise."""

    def guide(x, **_):
        with batch_plate(x):
            pyro.sample("z", dist.Delta(z[: len(x)], event_dim=1))

    return guide


@pytest.mark.parametrize("bound", [elbo, iwae])
def test_minibatch_losses_average_to_the_full_loss(bound):
    """For any bound, as N/B stands outside it. With q exact there is no noise, so it holds exactly."""
    model, x = ppca(rows=12)
    loss = importance(bound, particles=3)
    full = loss(model, exact_guide(model), x)
    torch.testing.assert_close(full, -model.marginal().log_prob(x).sum())
    scaled, guide = Scaled(model, "data", 12), Scaled(exact_guide(model), "data", 12)
    parts = torch.stack([loss(scaled, guide, batch) for batch in x.split(4)])
    assert parts.std() > 0.1
    torch.testing.assert_close(parts.mean(), full)


def test_minibatch_losses_are_unbiased_with_an_inexact_guide():
    model, x = ppca(rows=12)
    loss, guide = importance(iwae, particles=5), biased_guide(model)
    full = torch.stack([loss(model, guide, x) for _ in range(400)])
    scaled = [Scaled(fn, "data", 12) for fn in (model, guide)]
    parts = torch.stack([torch.stack([loss(*scaled, b) for b in x.split(3)]).mean() for _ in range(400)])
    error = (full.var() / 400 + parts.var() / 400).sqrt()
    assert abs(full.mean() - parts.mean()) < 4 * error


def test_our_minibatch_bound_is_below_the_evidence_where_pyros_is_not():
    """RenyiELBO keeps N/B inside its logsumexp, which puts its 'bound' above log p(x); ours stays below."""
    from pyro.infer import RenyiELBO

    model, x = ppca(rows=100)
    guide, evidence = biased_guide(model, shift=0.8, stretch=1.5), model.marginal().log_prob(x).sum()
    scaled = [Scaled(fn, "data", 100) for fn in (model, guide)]
    ours = torch.stack([-importance(iwae, 50)(*scaled, b) for _ in range(20) for b in x.split(10)])
    pyros = [-RenyiELBO(0.0, num_particles=50, vectorize_particles=True).loss(*scaled, b) for b in x.split(10)]
    assert ours.mean() < evidence
    assert torch.tensor(pyros).mean() > evidence + 5


def test_a_plate_that_subsamples_by_itself_is_not_scaled_twice():
    y = torch.randn(20)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=5) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    for fn in (model, Scaled(model, "data", 20)):
        trace = pyro.poutine.trace(fn).get_trace(y)
        assert trace.nodes["y"]["scale"] == 4.0
        assert trace.nodes["mu"]["scale"] == 1.0


def test_scaling_touches_local_sites_alone_and_names_its_size():
    _, _, x = together.example()
    model = together.example()[0]
    trace = pyro.poutine.trace(Scaled(model, "data", 160)).get_trace(x)
    assert {n: trace.nodes[n]["scale"] for n in ("mean", "z", "x")} == {"mean": 1.0, "z": 10.0, "x": 10.0}
    assert trace.nodes["x"]["cond_indep_stack"][0].full_size == 160


def test_our_elbo_is_pyros():
    """Same density, same scale: with latents that have no noise both losses agree to rounding."""
    model, x = ppca(rows=8)
    guide = sampled(torch.randn(8, 2))
    scaled = [Scaled(fn, "data", 80) for fn in (model, guide)]
    torch.testing.assert_close(
        importance(elbo)(*scaled, x), torch.as_tensor(Trace_ELBO().differentiable_loss(*scaled, x))
    )


def test_a_latent_outside_the_rows_ties_them():
    """The weight of all rows together is one for each particle, and its mean is the joint evidence."""
    y = torch.randn(30) + 2
    loc, scale = gaussian_mean_posterior(y)

    def exact(y):
        pyro.sample("mu", dist.Normal(loc, scale))

    log_w, factor = log_weights(gaussian_mean, exact, y, particles=6)
    assert (log_w.shape, factor) == ((6,), 1)
    torch.testing.assert_close(log_w, gaussian_mean_evidence(y).expand(6), atol=1e-4, rtol=1e-5)


def test_a_nonlinear_bound_of_a_subsample_is_refused_where_rows_are_tied():
    y = torch.randn(30)
    guide = AutoNormal(gaussian_mean)
    scaled = [Scaled(fn, "data", 300) for fn in (gaussian_mean, guide)]
    with pytest.raises(ValueError, match="'mu'.*elbo"):
        importance(iwae, 3)(*scaled, y)
    with pytest.raises(ValueError, match="'mu'"):
        log_weights(*scaled, y, particles=3)
    assert torch.isfinite(importance(elbo, 3)(*scaled, y))


def test_tempered_scales_latents_of_both_sides():
    model, x = ppca(rows=6)
    guide = sampled(torch.randn(6, 2))
    beta = 3.0
    trace = pyro.poutine.trace(pyro.poutine.replay(model, trace=pyro.poutine.trace(guide).get_trace(x))).get_trace(x)
    trace.compute_log_prob()
    log_w, _ = log_weights(tempered(model, beta), tempered(guide, beta), x)
    expected = trace.nodes["x"]["log_prob"] + beta * trace.nodes["z"]["log_prob"]  # a Delta has log-density 0
    torch.testing.assert_close(log_w[0], expected)


def test_several_plates_are_all_rows():
    """Every plate that all sites share is a batch dim of the log-weights."""

    def model():
        with pyro.plate("groups", 3, dim=-2), pyro.plate("data", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3, 4))

    def guide():
        with pyro.plate("groups", 3, dim=-2), pyro.plate("data", 4, dim=-1):
            pyro.sample("z", dist.Normal(0.5, 0.5**0.5))  # the exact posterior

    log_w, _ = log_weights(model, guide, None, particles=5)
    expected = dist.Normal(0.0, 2**0.5).log_prob(torch.ones(5, 3, 4))
    torch.testing.assert_close(log_w, expected)


def test_a_model_that_does_not_broadcast_runs_particle_by_particle_and_says_so():
    model, x = ppca(rows=6)
    guide = exact_guide(model)

    with pytest.warns(UserWarning, match="particles.*one by one"):
        log_w, _ = log_weights(stubborn(model), guide, x, particles=4)
    torch.testing.assert_close(log_w, model.marginal().log_prob(x).expand(4, 6), atol=1e-4, rtol=0)


def test_a_model_that_mixes_particles_up_is_found_out():
    """No error is raised inside: each row of z meets the particles' mean, so only the densities tell."""
    model, x = ppca(rows=6)

    def mixing(x):
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pooled = z.mean(0, keepdim=True).expand_as(z) if z.dim() == 3 else z
            pyro.sample("x", dist.Normal(pooled @ model.weight.T, 1.0).to_event(1), obs=x)

    with pytest.warns(UserWarning, match="one by one.*'x' has another density"):
        log_weights(mixing, exact_guide(model), x, particles=4)


def test_a_deterministic_site_that_mixes_particles_up_is_found_out():
    def model():
        with pyro.plate("rows", 3):
            b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("total", b.sum(0))

    layout = inspect_sites(model, None, None)
    assert "'total' has another value" in why_serial(model, None, layout.model, layout.nesting)


def test_a_plate_that_subsamples_by_itself_runs_in_one_go():
    y = torch.randn(20)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=5) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    layout = inspect_sites(model, None, None)
    assert why_serial(model, None, layout.model, layout.nesting) is None


def test_a_guide_for_other_rows_is_refused():
    """Its plate would otherwise set the size of the model's, without a word."""
    model, x = ppca(rows=6)

    def guide(x):
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match="'data' has 4 rows in the guide and 6 in the model"):
        log_weights(model, guide, x)


def test_factors_count_and_are_no_observation():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("twice", -z.square())

    layout = inspect_sites(model, None, None)
    assert layout.model["twice"].kind == "factor"
    z = torch.tensor(0.5)
    torch.testing.assert_close(log_joint(model, {"z": z}, None), dist.Normal(0.0, 1.0).log_prob(z) - 0.25)


def test_batched_folds_leading_dims():
    conv = nn.Conv2d(1, 3, 3)
    x = torch.randn(4, 5, 1, 8, 8)
    torch.testing.assert_close(batched(conv, 3)(x)[2, 3], conv(x[2, 3][None])[0])
    with pytest.raises(ValueError, match="at least 3 dims"):
        batched(conv, 3)(torch.zeros(8, 8))


def test_log_joint_is_the_density_at_given_latents():
    model, x = ppca(rows=6)
    z = torch.randn(6, 2)
    expected = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(z)
    expected = expected + dist.Normal(z @ model.weight.T + model.mean, 0.7).to_event(1).log_prob(x)
    torch.testing.assert_close(log_joint(model, {"z": z}, x), expected)
    with pytest.raises(ValueError, match="'z'"):
        log_joint(model, {}, x)


def test_log_weights_name_the_site_that_does_not_fit():
    model, x = ppca(rows=3)
    for guide, match in [
        (lambda x: None, "lacks 'z'"),
        (lambda x: pyro.sample("u", dist.Normal(0.0, 1.0)), "lacks 'z'; it samples 'u'"),
        (lambda x: pyro.sample("x", dist.Normal(0.0, 1.0)), "samples 'x', which the model observes"),
        (lambda x: pyro.sample("z", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2)), "'z'.*plates 'data'.*none"),
    ]:
        with pytest.raises(ValueError, match=match):
            log_weights(model, guide, x)


# -- the energy --------------------------------------------------------------------------------------------


def constrained(y):
    s = pyro.sample("s", dist.Gamma(3.0, 2.0))
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    w = pyro.sample("w", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(p + w[0], s), obs=y)


def test_energy_is_the_negative_joint_with_the_jacobian():
    """The density of v = log s is p(s) s, and so on: checked against transformed distributions of torch."""
    y = torch.randn(4)
    energy = Energy(constrained, y)
    v = {"s": torch.tensor(0.3), "p": torch.tensor(-0.4), "w": torch.tensor([0.2, -0.7])}
    values = energy.constrain(v)
    assert values["w"].shape == (3,)
    torch.testing.assert_close(values["w"].sum(), torch.tensor(1.0))
    expected = log_joint(constrained, values, y)
    for name, transform in energy.transforms.items():
        x = v[name].clone()
        jacobian = torch.autograd.functional.jacobian(transform, x)
        # the simplex has one dim less than its coordinates: drop the last
        square = jacobian[:-1] if x.dim() else jacobian.reshape(1, 1)
        expected = expected + torch.linalg.slogdet(square).logabsdet
    torch.testing.assert_close(energy(v), -expected)
    back = energy.unconstrain(values)
    for name in v:
        torch.testing.assert_close(back[name], v[name])


def test_energy_scales_a_minibatch():
    y = torch.randn(40)
    scaled = Scaled(gaussian_mean, "data", 40)
    v = {"mu": torch.tensor(0.7)}
    full = Energy(gaussian_mean, y)(v)
    energy = Energy(scaled, y[:10])
    parts = [energy(v, y[i : i + 10]) for i in range(0, 40, 10)]
    torch.testing.assert_close(torch.stack(parts).mean(), full)


@pytest.mark.parametrize("strategy", ["prior", "median", "uniform"])
def test_energy_starts_where_the_density_is_finite(strategy):
    y = torch.randn(5)
    energy = Energy(constrained, y)
    assert torch.isfinite(energy(energy.init(strategy)))
    with pytest.raises(ValueError, match="unknown init 'none'"):
        energy.init("none")


def test_energy_refuses_what_it_cannot_do():
    def discrete():
        pyro.sample("k", dist.Poisson(3.0))

    def summed_out():
        pyro.sample("k", dist.Categorical(torch.ones(3)))

    def moving():
        a = pyro.sample("a", dist.Exponential(1.0))
        pyro.sample("b", dist.Uniform(0.0, a))

    with pytest.raises(ValueError, match="'k' is discrete"):
        Energy(discrete, None)
    with pytest.raises(ValueError, match="support of site 'b' depends"):
        Energy(moving, None)
    with pytest.raises(ValueError, match="besides 'k', which are summed out"):
        Energy(summed_out, None)
    with pytest.raises(ValueError, match="no latent site"):
        Energy(lambda: None, None)


def test_densities_leave_no_warning_and_no_state_behind():
    model, x = ppca(rows=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_weights(model, exact_guide(model), x, particles=2)
    assert len(pyro.get_param_store()) == 0
