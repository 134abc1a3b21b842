"""Every model of the zoo: observes exactly x, generates rows, broadcasts over particles, scales its rows."""

import pyro
import pytest
import torch
from torch import Tensor

from discovery import modules
from pyro_ae import elbo, fit, importance, iwae, log_weights, svi
from pyro_ae.bounds import ciwae, cubo, jackknife, miwae, renyi, tvo
from pyro_ae.data import call_with
from pyro_ae.density import log_joint
from pyro_ae.losses.importance import name_of
from pyro_ae.particles import gather, run_particles
from pyro_ae.plates import Scaled
from pyro_ae.sites import inspect_sites, is_deterministic, site_log_prob

BOUNDS = [elbo, iwae, miwae(2, 2), ciwae(0.5), renyi(0.5), cubo(2), jackknife(1), tvo(3)]
MODELS = [pytest.param(m, id=n) for n, m in modules("pyro_ae.models")]


@pytest.mark.parametrize("module", MODELS)
def test_observes_exactly_x(module):
    model, guide, x = module.example()
    layout = inspect_sites(model, guide, x)
    assert layout.names("observed") == ["x"]
    assert layout.model["x"].shape == x.shape
    trace = pyro.poutine.trace(model).get_trace(x)
    torch.testing.assert_close(trace.nodes["x"]["value"], x)


@pytest.mark.parametrize("module", MODELS)
@pytest.mark.parametrize("size", [1, 7])
def test_generates_rows_like_its_data(module, size):
    model, _, x = module.example()
    with torch.no_grad():
        rows = model(size=size)
    assert rows.shape == (size, *x.shape[1:])
    assert torch.isfinite(rows).all()


@pytest.mark.parametrize("module", MODELS)
def test_broadcasts_over_particles(module):
    """A vectorised run has the densities of a run for each particle."""
    model, guide, x = module.example()
    batch = call_with(x)
    with torch.no_grad():
        layout = inspect_sites(model, guide, batch)
        (run,) = run_particles(guide, batch, 3, layout, layout.guide)
        z = gather([run], layout.names("latent"), layout.guide, 3, lambda s: s["value"])
        (together,) = run_particles(model, batch, 3, layout, layout.model, z)
        for k in range(3):
            alone = log_joint(model, {n: v[k] for n, v in z.items()}, x)
            wanted = (-1, *alone.shape)  # of each row, or of all where a latent ties them together
            vectorised = sum(site_log_prob(s)[k].reshape(wanted).sum(0) for s in together.scored)
            torch.testing.assert_close(vectorised, alone)


@pytest.mark.parametrize("module", MODELS)
def test_local_terms_scale_by_n_over_b_and_global_ones_do_not(module):
    model, _, x = module.example()
    trace = pyro.poutine.trace(Scaled(model, "data", 10 * len(x))).get_trace(x)
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
            local = any(f.name == "data" for f in site["cond_indep_stack"])
            assert local or not site["is_observed"] or is_deterministic(site), name
            assert site["scale"] == (10.0 if local else 1.0), name


@pytest.mark.parametrize("module", MODELS)
def test_gradients_are_finite(module):
    model, guide, x = module.example()
    importance(iwae, 4)(model, guide, x).backward()
    bad = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not bad


@pytest.mark.parametrize("bound", BOUNDS, ids=name_of)
@pytest.mark.parametrize("module", MODELS)
def test_every_bound_trains_every_model(module, bound):
    model, guide, x = module.example()
    tied = bound is not elbo and not inspect_sites(model, guide, x).local("data")  # where a nonlinear bound is refused
    method, size = svi(loss=importance(bound, 4), steps=2), None if tied else 5
    posterior = fit(model, x, guide=guide, method=method, batch_size=size, progress=False)
    values = [v for values in posterior.history.values() for v in values]
    assert torch.isfinite(torch.tensor(values)).all()


def test_ppca_knows_its_evidence_and_posterior():
    """Bayes' rule ties the three: log p(x) = log p(x | z) + log p(z) - log p(z | x), for any z."""
    from pyro_ae.models import ppca

    model, _, x = ppca.example()
    z: Tensor = torch.randn(len(x), 2)
    with torch.no_grad():
        torch.testing.assert_close(
            log_joint(model, {"z": z}, x) - model.posterior(x).log_prob(z), model.marginal().log_prob(x)
        )
        rows = model(size=200_000)
        torch.testing.assert_close(rows.T.cov(), model.marginal().covariance_matrix, atol=0.05, rtol=0.05)


def test_vae_takes_any_likelihood():
    import pyro.distributions as dist

    from pyro_ae.guides.amortized import Amortized
    from pyro_ae.guides.mean_field import MeanField
    from pyro_ae.models.vae import VAE
    from pyro_ae.nn import MLP

    images = torch.randint(0, 17, (6, 4, 4)).float()
    model = VAE(MLP(2, [8], (4, 4)), 2, lambda h: dist.Binomial(16, logits=h).to_event(2))
    guide = Amortized(MLP((4, 4), [8]), MeanField(8, 2))
    log_w, _ = log_weights(model, guide, images, particles=2)
    assert log_w.shape == (2, 6)
    assert model(size=3).shape == (3, 4, 4)
