"""The posterior: draws, predictions, evidence and generation, against what is known of them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn
from truth import exact_guide, gaussian_mean, ppca

from pyro_ae import Posterior, batch_plate, cite, elbo, fit, importance, iwae, nuts, observe, svi
from pyro_ae.data import as_rows
from pyro_ae.guides import together
from pyro_ae.models import ppca as ppca_file
from pyro_ae.program import Program


def posterior_of(model, guide, x, plate="data") -> Posterior:
    """A posterior without any training."""
    rows = as_rows(x)
    program = Program(model, guide, plate=plate, total=rows.size)
    program.build(rows.call())
    return Posterior(program, data=rows, method="none")


@pytest.fixture
def exact() -> tuple[Posterior, nn.Module, torch.Tensor]:
    model, x = ppca(rows=12)
    return posterior_of(model, exact_guide(model), x), model, x


def test_draws_have_the_posteriors_moments(exact):
    posterior, model, x = exact
    z = posterior.sample(4000)["z"]
    q = model.posterior(x)
    assert z.shape == (4000, 12, 2)
    torch.testing.assert_close(z.mean(0), q.loc, atol=0.06, rtol=0)
    torch.testing.assert_close(z[:, 0].T.cov(), q.covariance_matrix[0], atol=0.06, rtol=0)
    new = posterior.sample(10, data=x[:3] + 1.0)["z"]
    assert new.shape == (10, 3, 2)


def test_evidence_is_exact_with_the_exact_posterior_in_any_chunks(exact, monkeypatch):
    from pyro_ae import particles

    posterior, model, x = exact
    expected = model.marginal().log_prob(x)
    torch.testing.assert_close(posterior.log_evidence(particles=50), expected, atol=1e-4, rtol=0)
    monkeypatch.setattr(particles, "CHUNK", 200)
    torch.testing.assert_close(posterior.log_evidence(particles=50), expected, atol=1e-4, rtol=0)
    assert posterior.sample(50)["z"].shape == (50, 12, 2)
    torch.testing.assert_close(posterior.log_evidence(x[:5], particles=7), expected[:5], atol=1e-4, rtol=0)


def test_a_point_has_no_evidence():
    """Its log-density of 0 would count as if the posterior had no spread to account for."""
    from pyro.infer.autoguide import AutoDelta

    posterior = fit(gaussian_mean, torch.randn(5), guide=AutoDelta(gaussian_mean), progress=False, method=svi(steps=5))
    with pytest.raises(ValueError, match="gives 'mu' a single point"):
        posterior.log_evidence()


def test_chunks_of_particles_add_up(monkeypatch):
    """Weights that differ: the estimate in chunks is the estimate in one go, for the same noise in total."""
    from pyro_ae import particles

    model, guide, x = ppca_file.example()
    posterior = posterior_of(model, guide, x)
    one = posterior.log_evidence(particles=20_000)
    monkeypatch.setattr(particles, "CHUNK", 80_000)
    chunked = posterior.log_evidence(particles=20_000)
    torch.testing.assert_close(one, chunked, atol=0.3, rtol=0)
    assert not torch.equal(one, chunked)


def test_minibatched_fits_give_unscaled_evidence():
    model, x = ppca(rows=12)
    rows = as_rows(x)
    program = Program(model, exact_guide(model), total=12)
    program.build(rows.first(4), minibatched=True)
    posterior = Posterior(program, data=rows, method="none")
    torch.testing.assert_close(posterior.log_evidence(particles=3), model.marginal().log_prob(x), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        posterior.log_evidence(x[:4], particles=3), model.marginal().log_prob(x[:4]), atol=1e-4, rtol=0
    )


def test_encode_and_reconstruct(exact):
    posterior, model, x = exact
    q = model.posterior(x)
    torch.testing.assert_close(posterior.encode(), q.loc)
    expected = q.loc @ model.weight.T + model.mean
    torch.testing.assert_close(posterior.reconstruct(draws=4000), expected, atol=0.1, rtol=0)
    assert posterior.reconstruct(x[:1]).shape == (1, 5)


def test_generate_has_the_models_moments(exact):
    posterior, model, _ = exact
    x = posterior.generate(50_000)
    torch.testing.assert_close(x.mean(0), model.mean.detach(), atol=0.05, rtol=0)
    torch.testing.assert_close(x.T.cov(), model.marginal().covariance_matrix, atol=0.1, rtol=0.05)
    means = posterior.generate(50_000, mean=True)
    torch.testing.assert_close(means.T.cov(), model.weight @ model.weight.T, atol=0.1, rtol=0.05)


def test_generate_draws_shared_latents_from_the_posterior():
    """Each row has a draw of its own; the posterior of the mean is far from its prior."""
    y = 20.0 + torch.randn(400)

    def model(y=None, *, size=1):
        mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
        with batch_plate(y, size):
            return observe("y", dist.Normal(mu, 1.0), y)

    posterior = fit(model, y, method=svi(lr=0.1, steps=800), seed=0, progress=False)
    generated = posterior.generate(500)
    assert generated.shape == (500,)
    assert abs(generated.mean() - 20) < 0.5
    assert abs(generated.std() - 1) < 0.2
    assert posterior.generate(3, mean=True).std() < 0.5


def test_predict_is_the_predictive_distribution(exact):
    posterior, model, x = exact
    q = model.posterior(x)
    replicated = posterior.predict(draws=4000)["x"]
    assert replicated.shape == (4000, 12, 5)
    expected = q.loc @ model.weight.T + model.mean
    torch.testing.assert_close(replicated.mean(0), expected, atol=0.1, rtol=0)
    covariance = model.weight @ q.covariance_matrix[0] @ model.weight.T + 0.49 * torch.eye(5)
    torch.testing.assert_close(replicated[:, 0].T.cov(), covariance, atol=0.12, rtol=0)
    with pytest.raises(ValueError, match="no site 'y' to predict; there are 'x'"):
        posterior.predict(sites=["y"])


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    mean = pyro.deterministic("mean", (x * w).sum(-1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.1), obs=y)


@pytest.mark.parametrize(
    "method", [svi(lr=0.05, steps=600), nuts(draws=100, warmup=100, chains=2)], ids=["svi", "nuts"]
)
def test_predict_at_new_inputs(method):
    x = torch.randn(40, 2)
    y = x @ torch.tensor([1.0, -2.0]) + 0.1 * torch.randn(40)
    posterior = fit(regression, (x, y), method=method, seed=0, progress=False)
    new = torch.randn(7, 2)
    predicted = posterior.predict((new, None), draws=80)
    assert predicted["y"].shape == predicted["mean"].shape == (80, 7)
    torch.testing.assert_close(predicted["y"].mean(0), new @ torch.tensor([1.0, -2.0]), atol=0.2, rtol=0)
    w = posterior.sample(80)["w"]
    assert w.shape == (80, 2)


def test_log_likelihood_is_pointwise_and_unscaled(exact):
    posterior, model, x = exact
    values = posterior.log_likelihood(draws=3)["x"]
    assert values.shape == (3, 12)
    y = torch.randn(9)
    chains = fit(gaussian_mean, y, method=nuts(draws=5, warmup=5, chains=2), seed=0, progress=False)
    expected = dist.Normal(chains.sample()["mu"][:, None], 1.5).log_prob(y)
    torch.testing.assert_close(chains.log_likelihood()["y"], expected)


def test_draws_of_chains_are_taken_evenly():
    chains = fit(gaussian_mean, torch.zeros(5), method=nuts(draws=20, warmup=10, chains=2), seed=0, progress=False)
    everything = chains.sample()["mu"]
    assert torch.equal(everything, chains.draws["mu"].flatten())
    some = chains.sample(10)["mu"]
    assert len(some) == 10 and set(some.tolist()) <= set(everything.tolist())
    with pytest.raises(ValueError, match="hold 40 draws, fewer than 41"):
        chains.sample(41)
    with pytest.raises(ValueError, match="chains have none"):
        chains.log_evidence()


def test_shared_and_local_latents():
    model, guide, x = together.example()
    posterior = posterior_of(model, guide, x)
    draws = posterior.sample(6)
    assert {n: tuple(v.shape) for n, v in draws.items()} == {"mean": (6, 3), "z": (6, 16, 3)}
    assert posterior.log_evidence(particles=4).dim() == 0
    assert posterior.encode().shape == (16, 3)
    assert posterior.generate(4).shape == (4, 3)


def test_a_guide_with_parameters_for_each_row():
    """It cannot be run on some of the rows, so all are run at once; other rows are refused."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.randn(6)
    method = svi(loss=importance(elbo, 20), lr=0.05, schedule="cosine", steps=400)
    posterior = fit(model, y, guide=AutoNormal(model), method=method, seed=0, progress=False)
    torch.testing.assert_close(posterior.encode(draws=4000), y / 2, atol=0.15, rtol=0)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(y)
    torch.testing.assert_close(posterior.log_evidence(particles=4000), evidence, atol=0.05, rtol=0)
    with pytest.raises(ValueError, match="6 rows in the guide and 3 in the model"):
        posterior.log_evidence(y[:3])


def test_sequential_loops_over_a_plate_work():
    """Plates that are not vectorised: one site a row."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        for i in pyro.plate("data", len(y)):
            pyro.sample(f"y_{i}", dist.Normal(mu, 1.0), obs=y[i])

    y = torch.randn(4) + 1
    posterior = fit(model, y, method=svi(lr=0.05, steps=500), seed=0, progress=False)
    assert abs(posterior.sample(4000)["mu"].mean() - y.sum() / (4 + 0.25)) < 0.2
    assert posterior.predict(draws=3)["y_2"].shape == (3,)


def test_what_makes_no_sense_says_so():
    posterior = fit(gaussian_mean, torch.zeros(5), method=svi(steps=2), progress=False)
    with pytest.raises(ValueError, match="encode is for models with a latent for each row.*'mu' outside"):
        posterior.encode()
    with pytest.raises(ValueError, match="draws must be at least 1"):
        posterior.sample(0)
    with pytest.raises(ValueError, match="n must be at least 1"):
        posterior.generate(0)
    with pytest.raises(ValueError, match="particles must be at least 1"):
        posterior.log_evidence(particles=0)


def test_repr_says_what_how_and_how_well():
    model, guide, x = ppca_file.example()
    posterior = fit(model, x, guide=guide, method=svi(steps=5), validation=x, progress=False)
    text = repr(posterior)
    for part in ("PPCA", "svi(", "[16, 5]", "z [2] for each row", "5 steps", "validation", "nats per row"):
        assert part in text
    chains = fit(gaussian_mean, torch.zeros(5), method=nuts(5, 5, 2), seed=0, progress=False)
    assert "gaussian_mean" in repr(chains)
    assert "2 chains of 5 draws" in repr(chains)


def test_global_random_state_is_the_users():
    """Posterior methods draw from the user's stream, so they can be repeated by torch.manual_seed."""
    model, guide, x = ppca_file.example()
    posterior = posterior_of(model, guide, x)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(posterior.sample(3)["z"])
    assert torch.equal(*draws)


def test_cite():
    assert "Kingma" in cite(elbo)
    assert "arxiv.org/abs/1509.00519" in cite(iwae)
    assert "Tipping" in cite(ppca_file) and "Tipping" in cite(ppca_file.example()[0])
    assert "Hoffman" in cite(svi())
    with pytest.raises(ValueError, match="no References"):
        cite(len)
