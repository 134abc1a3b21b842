"""The Bayesian autoencoder: its density, its variants, its codes, and what every method makes of it."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ae import ensemble, fit, map_, sghmc, svi
from pyro_ae.density import log_joint
from pyro_ae.engines.prior_matching import match_prior
from pyro_ae.latent_densities import gaussian
from pyro_ae.models.bayesian_autoencoder import BayesianAutoencoder
from pyro_ae.nn import MLP, Convolutional, ConvolutionalDecoder
from pyro_ae.plates import particle_plate
from pyro_ae.priors import learnable, normal
from pyro_ae.slices import distributional_sliced_wasserstein

SHORT = sghmc(warmup=5, draws=4, thinning=1, chains=2)


def linear(bayesian=("encoder", "decoder"), prior=None, **options):
    return BayesianAutoencoder(
        *(nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False), 2, lambda h: dist.Normal(h, 0.5)),
        prior=prior or normal(0.0, 0.7),
        bayesian=bayesian,
        **options,
    )


def test_its_density_is_the_priors_and_the_likelihoods():
    model, x = linear(), torch.randn(9, 6)
    e, d = torch.randn(2, 6), torch.randn(6, 2)
    prior = sum(torch.distributions.Normal(0.0, 0.7).log_prob(w).sum() for w in (e, d))
    likelihood = torch.distributions.Normal(x @ e.T @ d.T, 0.5).log_prob(x).sum()
    found = log_joint(model, {"encoder.weight": e, "decoder.weight": d}, x)
    torch.testing.assert_close(found, prior + likelihood)


@pytest.mark.parametrize("bayesian", [("encoder", "decoder"), ("encoder",), ("decoder",)], ids="-".join)
def test_each_part_may_be_bayesian_and_the_other_is_trained_along(bayesian):
    torch.manual_seed(0)
    x, model = torch.randn(40, 6) @ torch.randn(6, 6), linear(bayesian)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    posterior = fit(model, x, method=SHORT, seed=0, progress=False, check=False)
    assert {n.split(".")[0] for n in posterior.draws} == set(bayesian)
    assert len(before) == 2 - len(bayesian)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_codes_and_reconstructions_are_means_over_draws():
    torch.manual_seed(0)
    x, new = torch.randn(20, 6), torch.randn(7, 6)
    posterior = fit(linear(), x, method=SHORT, seed=0, progress=False, check=False)
    e, d = (posterior.sample()[f"{n}.weight"] for n in ("encoder", "decoder"))
    torch.testing.assert_close(posterior.encode(new), new @ e.mean(0).T)
    torch.testing.assert_close(posterior.encode(new, code="z"), new @ e.mean(0).T)
    decoded = new @ e.mT @ d.mT
    torch.testing.assert_close(posterior.reconstruct(new), decoded.mean(0))
    assert posterior.reconstruct(draws=3).shape == (20, 6)
    found = posterior.uncertainty(new)
    torch.testing.assert_close(found.mean, decoded.mean(0))
    torch.testing.assert_close(found.epistemic, decoded.var(0, correction=0))
    torch.testing.assert_close(found.aleatoric, torch.full((7, 6), 0.25))
    with pytest.raises(ValueError, match="no site 'code'"):
        posterior.encode(code="code")


def test_a_plain_autoencoder_is_the_variant_without_latent_weights():
    """Without latents it is fitted by maximum likelihood, and a linear one finds the principal subspace."""
    torch.manual_seed(0)
    x = torch.randn(200, 6) * torch.tensor([3.0, 2.0, 0.3, 0.3, 0.2, 0.1])
    model = linear(())
    posterior = fit(
        model, x, guide=lambda *_, **__: None, method=svi(steps=600, lr=0.02), seed=0, progress=False, check=False
    )
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    best = u[:, :2] * s[:2] @ vt[:2]
    torch.testing.assert_close(posterior.reconstruct(), best, rtol=0, atol=0.1)
    assert posterior.encode().shape == (200, 2)
    assert posterior.generate(5, density=gaussian()).shape == (5, 6)


NETWORKS = {
    "mlp": lambda: (MLP((8, 8), [10], 3), MLP(3, [10], (8, 8))),
    "convolutional": lambda: (
        nn.Sequential(Convolutional((8, 8), (4, 6), 10), nn.Linear(10, 3)),
        ConvolutionalDecoder(3, (6, 4), (8, 8)),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", [SHORT, ensemble(members=3, steps=4), map_(steps=4), svi(steps=3)], ids=repr)
def test_one_model_any_method(name, method):
    torch.manual_seed(0)
    x = torch.rand(12, 8, 8)
    x[3, 2] = 0.0  # the edges of the support
    x[4, 2] = 1.0
    model = BayesianAutoencoder(*NETWORKS[name](), latent=3)
    posterior = fit(model, x, method=method, batch_size=5, seed=0, progress=False, check=False)
    assert posterior.reconstruct().shape == (12, 8, 8) and posterior.encode().shape == (12, 3)
    assert torch.isfinite(posterior.log_likelihood(draws=2 if posterior.draws is None else None)["x"]).all()
    rows = posterior.generate(7, density=gaussian())
    assert rows.shape == (7, 8, 8) and rows.min() >= 0 and rows.max() <= 1


@pytest.mark.parametrize("bayesian", [("encoder",), ("decoder",)], ids="-".join)
def test_plain_convolutions_take_the_particles_of_the_other_part(bayesian):
    encoder = nn.Sequential(nn.Unflatten(-2, (1, 8)), nn.Conv2d(1, 3, 3, 2), nn.Flatten(), nn.Linear(27, 2))
    decoder = nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, (3, 2, 2)), nn.ConvTranspose2d(3, 1, 8), nn.Flatten(-3))
    model = BayesianAutoencoder(encoder, decoder, 2, lambda h: dist.Normal(h[..., :64], 1.0), bayesian=bayesian)
    model.encoder.event_dims = 2
    x = torch.randn(5, 8, 8)
    with particle_plate(4, 1), torch.no_grad():
        z = model.encoder(x)
        out = model.decoder(z)
        together = out if out.dim() == 3 else out.expand(4, *out.shape)
    assert together.shape == (4, 5, 81)


def test_missing_values_are_left_out_for_encoder_and_likelihood():
    torch.manual_seed(0)
    encoder, decoder = MLP(6, [8], 2, missing=True), MLP(2, [8], 6)
    model = BayesianAutoencoder(encoder, decoder, 2, lambda h: dist.Normal(h, 1.0))
    x = torch.randn(10, 6)
    x[torch.rand(10, 6) < 0.3] = math.nan
    posterior = fit(model, x, method=SHORT, batch_size=4, seed=0, progress=False, check=False)
    assert torch.isfinite(posterior.log_likelihood()["x"]).all() and torch.isfinite(posterior.encode()).all()


def test_its_prior_is_matched_from_a_pretrained_autoencoder():
    """The means start at the networks' own weights, and the matched prior draws images that are nearer to the data."""
    torch.manual_seed(0)
    encoder, decoder = MLP(6, [8], 2), MLP(2, [8], 6)
    x = torch.rand(60, 6).mul(0.3) + torch.tensor([0.6, 0.0, 0.6, 0.0, 0.6, 0.0])
    plain = BayesianAutoencoder(encoder, decoder, 2, bayesian=())
    fit(plain, x, guide=lambda *_, **__: None, method=svi(steps=50), seed=0, progress=False, check=False)
    model = BayesianAutoencoder(
        *(plain.encoder.module, plain.decoder.module, 2),
        prior=learnable(loc="module", log_variance=-6.0, per="weight"),
    )
    means = dict(model.decoder.priors[0].loc.items())
    torch.testing.assert_close(
        next(m for m in means.values() if m.shape == (8, 2)).detach(), plain.decoder.module.layers[0].weight.detach()
    )
    distance = distributional_sliced_wasserstein(projections=20, steps=2)
    history = match_prior(model, x, distance, steps=60, samples=16, lr=0.02, seed=0, progress=False)["distance"]
    assert sum(history[-10:]) < 0.7 * sum(history[:10])
    posterior = fit(model, x, method=SHORT, batch_size=20, seed=0, progress=False, check=False)
    assert posterior.sample()["decoder.layers.0.weight"].shape == (8, 8, 2)


@pytest.mark.parametrize("bayesian", ["encoder", ("encoder", "both")])
def test_other_parts_are_refused(bayesian):
    with pytest.raises(ValueError, match='collection of "encoder" and "decoder"'):
        linear(bayesian)


def test_a_new_row_is_a_code_of_the_density_decoded_by_a_draw_of_the_weights():
    torch.manual_seed(0)
    x, z = torch.randn(20, 6), torch.randn(4, 2)
    given = []

    class Given(nn.Module):  # a density whose draws are known
        def sample(self, shape):
            return z[: shape[0]]

    def density(codes):
        given.append(codes)
        return Given()

    posterior = fit(linear(), x, method=SHORT, seed=0, progress=False, check=False)
    with pytest.raises(ValueError, match="no site 'y' to generate; there are.*'x'"):
        posterior.generate(3, sites=["y"])
    encoders, decoders = (posterior.draws[f"{n}.weight"] for n in ("encoder", "decoder"))  # [2, 4, ...]
    averaged = posterior.generate(4, density=density, mean=True)
    torch.testing.assert_close(averaged, torch.einsum("cdl,kl->ckd", decoders.mean(1), z[:2]).flatten(0, 1))
    for codes, encoder in zip(given, encoders.mean(1), strict=True):  # each chain has a code of its own
        torch.testing.assert_close(codes, x @ encoder.T)
    z = torch.randn(5 * 4, 2)
    rows = posterior.generate(36, density=density)  # five of each draw, and the last of a chain has three
    decoded = torch.einsum("cskl,srl->csrk", decoders, z.reshape(4, 5, 2)).flatten(1, 2)[:, :18].flatten(0, 1)
    assert 0.4 < (rows - decoded).std() < 0.6  # the likelihood's 0.5


def test_members_of_an_ensemble_have_codes_of_their_own():
    torch.manual_seed(0)
    given = []

    def density(codes):
        given.append(codes)
        return gaussian()(codes)

    posterior = fit(
        linear(), torch.randn(20, 6), method=ensemble(members=3, steps=2), seed=0, progress=False, check=False
    )
    assert posterior.generate(7, density=density).shape == (7, 6) and len(given) == 3
    assert posterior.generate(2, density=density).shape == (2, 6) and len(given) == 5
