"""Guides made of guides and heads: what they draw and how they weigh it, against what is known of it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor, nn
from truth import (
    biased_guide,
    exact_guide,
    gaussian_mean,
    gaussian_mean_evidence,
    ppca,
    same_noise,
    stubborn,
)

from pyro_ae import batch_plate, elbo, fit, importance, iwae, log_weights, svi
from pyro_ae.density import Weights, weigh
from pyro_ae.estimators import dreg, sticking_the_landing
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.importance_weighted import ImportanceWeighted
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.guides.semi_amortized import SemiAmortized
from pyro_ae.guides.shared import Shared
from pyro_ae.nn import MLP
from pyro_ae.sites import inspect_sites


def amortized(features: int = 5, latent: int = 2) -> Amortized:
    return Amortized(MLP(features, [8]), MeanField(8, latent))


# -- importance-weighted -----------------------------------------------------------------------------------


def test_the_elbo_of_a_resampled_guide_is_the_iwae_of_the_guide_within() -> None:
    """Value and gradient, from the same draws; and IWAE over M of K particles is that over M K."""
    model, x = ppca()
    model.requires_grad_(True)
    guide = amortized()
    wrapped = ImportanceWeighted(model, guide, 6)

    def gradients(bound, q, particles: int):
        layout = inspect_sites(model, q, x)  # before the draws, which it would move
        layout.checked = True

        def run() -> tuple[Tensor, ...]:
            value = bound(weigh(model, q, x, particles, layout=layout).log_weights).sum()
            return value, *torch.autograd.grad(value, [*model.parameters(), *guide.parameters()])

        return run

    for bound, particles in [(elbo, 1), (iwae, 4)]:
        a, b = same_noise(gradients(bound, wrapped, particles), gradients(iwae, guide, 6 * particles))
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_resampled_draws_are_nearer_the_posterior() -> None:
    model, x = ppca()
    exact, off = model.posterior(x), biased_guide(model)
    with pyro.plate("_particles", 3000, dim=-2):
        draws = pyro.poutine.trace(ImportanceWeighted(model, off, 100)).get_trace(x).nodes["z"]["value"]
    error = 1 / 3000**0.5
    assert ((draws.mean(0) - exact.mean).abs() / exact.stddev).max() < 5 * error + 0.02
    assert (draws.var(0) / exact.variance).mean() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("wrap", [lambda model: model, stubborn])
@pytest.mark.filterwarnings("ignore:the model or guide does not broadcast")
def test_resampling_the_posterior_leaves_its_weights_alone(wrap, particles) -> None:
    model, x = ppca()
    log_w, _ = log_weights(wrap(model), ImportanceWeighted(wrap(model), exact_guide(model), 5), x, particles=particles)
    assert log_w.shape == (particles, 40)
    torch.testing.assert_close(log_w, model.marginal().log_prob(x).expand_as(log_w), atol=1e-4, rtol=0)


def test_resampling_in_parts_that_fit_into_memory(monkeypatch) -> None:
    """Draws and densities of each part are those of its own particles, so the weights of the posterior stay."""
    model, x = ppca()
    monkeypatch.setattr("pyro_ae.particles.CHUNK", 5 * 2 * x.numel())  # two copies of five particles
    passes = []
    record = Weights.align
    monkeypatch.setattr(Weights, "align", lambda self, *args: (passes.append(len(args[0])), record(self, *args))[1])
    wrapped = ImportanceWeighted(model, exact_guide(model), 5)
    layout = inspect_sites(model, wrapped, x)
    layout.checked = True
    with torch.no_grad():
        log_w = weigh(model, wrapped, x, 7, layout=layout).log_weights
    assert passes[-4:] == [10, 10, 10, 5]
    torch.testing.assert_close(log_w, model.marginal().log_prob(x).expand_as(log_w), atol=1e-4, rtol=0)


def test_resampling_a_latent_that_rows_share() -> None:
    y = torch.randn(30) + 2
    guide = Shared(gaussian_mean, start=init_to_value(values={"mu": torch.tensor(1.7)}), scale=0.5)
    wrapped = ImportanceWeighted(gaussian_mean, guide, 50)
    with torch.no_grad():
        log_w, _ = log_weights(gaussian_mean, wrapped, y, particles=400)
    assert log_w.shape == (400,)
    assert float(iwae(log_w)) == pytest.approx(float(gaussian_mean_evidence(y)), abs=0.1)
    with pytest.raises(ValueError, match="needs the whole data set where 'mu' stands outside"):
        fit(gaussian_mean, y, guide=wrapped, method=svi(steps=2), batch_size=10, progress=False)


@pytest.mark.parametrize("estimator", [dreg, sticking_the_landing])
def test_a_density_that_is_an_estimate_is_refused_where_others_are_needed(estimator) -> None:
    model, x = ppca()
    with pytest.raises(ValueError, match="density at other values.*'z'.*use pathwise"):
        importance(elbo, 3, estimator)(model, ImportanceWeighted(model, amortized(), 4), x)


def test_a_fitted_posterior_is_resampled_without_training() -> None:
    model, x = ppca()
    posterior = fit(model, x, guide=amortized(), method=svi(steps=20), seed=0, progress=False)
    before = posterior.program.parameters.state()
    better = posterior.with_guide(ImportanceWeighted(posterior.model, posterior.guide, 50))
    assert (better.log_evidence(particles=20) - posterior.log_evidence(particles=20)).mean() > 0.01
    exact = model.posterior(x).mean
    assert (better.encode(draws=200) - exact).norm() < 0.8 * (posterior.encode() - exact).norm()
    assert "ImportanceWeighted" in repr(better)
    after = posterior.program.parameters.state()
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_another_guide_finds_what_a_plain_function_learnt() -> None:
    """Parameters in the fit's own param store, and a network that only ``pyro.module`` knows."""
    net = nn.Linear(2, 5)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), scale).to_event(1), obs=x)

    x = 0.1 * torch.randn(20, 5)
    posterior = fit(model, x, guide=amortized(), method=svi(steps=50, lr=0.05), progress=False)
    better = posterior.with_guide(ImportanceWeighted(posterior.model, posterior.guide, 5))
    assert better.params["scale"] < 1
    assert better.params.keys() == posterior.params.keys()
    assert torch.equal(better.params["scale"], posterior.params["scale"])
    assert (better.log_evidence(particles=50) - posterior.log_evidence(particles=250)).abs().mean() < 0.2


def test_importance_weighted_bad_input() -> None:
    model, guide, _ = ppca()[0], amortized(), None
    with pytest.raises(ValueError, match="at least 2 particles"):
        ImportanceWeighted(model, guide, 1)

    def discrete(x: Tensor) -> None:
        with batch_plate(x):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    class Guess(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> None:
            with batch_plate(x):
                pyro.sample("c", dist.Bernoulli(logits=self.logit))

    with pytest.raises(ValueError, match="'c' has no reparameterised sampler"):
        importance()(discrete, ImportanceWeighted(discrete, Guess(), 4), torch.randn(5))


# -- semi-amortised ----------------------------------------------------------------------------------------


def best_factorised(model, x: Tensor) -> Tensor:
    """The highest ELBO of each row with independent latents: the gap is known in closed form."""
    precision = model.posterior(x).precision_matrix[0]
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    return model.marginal().log_prob(x) - gap


def test_refining_an_untrained_encoder_reaches_the_best_of_its_family() -> None:
    model, x = ppca()
    guide = amortized()
    refined = SemiAmortized(model, guide, steps=300, lr=0.05, particles=8)
    with torch.no_grad():
        bound = [elbo(log_weights(model, q, x, particles=500)[0]) for q in (guide, refined)]
    best = best_factorised(model, x)
    assert (best - bound[0]).mean() > 0.5
    assert abs((best - bound[1]).mean()) < 0.05


def test_the_gradient_goes_through_the_steps() -> None:
    """To the encoder and to the model, against finite differences with the same noise."""
    model, x = ppca(rows=3)
    model.double().requires_grad_(True)
    x = x.double()
    guide = SemiAmortized(model, amortized().double(), steps=3, lr=0.02)
    inspect_sites(model, guide, x)
    loss = importance(elbo, 2)

    def value() -> Tensor:
        torch.manual_seed(3)
        return loss(model, guide, x)

    for parameter in (guide.guide.head.linear.bias, model.weight):
        (gradient,) = torch.autograd.grad(value(), parameter)
        with torch.no_grad():
            flat = parameter.view(-1)
            flat[0] += 1e-5
            above = value()
            flat[0] -= 2e-5
            below = value()
            flat[0] += 1e-5
        assert gradient.view(-1)[0] == pytest.approx(float(above - below) / 2e-5, rel=1e-4)


def test_refining_leaves_no_gradient_behind_and_works_without() -> None:
    model, x = ppca()
    model.requires_grad_(True)
    guide = SemiAmortized(model, amortized(), steps=2)
    with torch.no_grad():
        log_w, _ = log_weights(model, guide, x, particles=3)
    assert not log_w.requires_grad
    assert all(p.grad is None for p in [*model.parameters(), *guide.parameters()])


def test_semi_amortized_bad_input() -> None:
    model, _ = ppca()
    with pytest.raises(ValueError, match="steps must be positive"):
        SemiAmortized(model, amortized(), steps=0)
    with pytest.raises(ValueError, match="no parameters of a row"):
        SemiAmortized(model, Amortized(MLP(5, [8]), {"z": MeanField(8, 2)}))


def test_math_of_the_factorised_gap() -> None:
    """The closed form that the tests above hold against is the ELBO of the normal with the posterior's precisions."""
    model, x = ppca()
    exact = model.posterior(x)
    q = dist.Normal(exact.mean, exact.precision_matrix.diagonal(dim1=-2, dim2=-1) ** -0.5).to_event(1)
    z = q.sample((20000,))
    with torch.no_grad():
        log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_p = log_p + dist.Normal(z @ model.weight.T + model.mean, model.log_noise.exp()).log_prob(x).sum(-1)
        bound = (log_p - q.log_prob(z)).mean(0)
    torch.testing.assert_close(bound, best_factorised(model, x), atol=0.05, rtol=0)
    assert math.isfinite(float(bound.sum()))


# -- what does not fit the model ---------------------------------------------------------------------------


def test_a_head_of_another_size_than_the_site() -> None:
    model, x = ppca()
    with pytest.raises(ValueError, match=r"site 'z'.*\(40, 3\) in the guide and.*\(40, 2\).*latent=2"):
        fit(model, x, guide=Amortized(MLP(5, [8]), MeanField(8, 3)), method=svi(steps=1), progress=False)

    def scalar(x: Tensor) -> None:
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = Amortized(MLP(1, [8]), MeanField(8, 1), inputs=lambda x: x.unsqueeze(-1))
    with pytest.raises(ValueError, match=r"\(7, 1\) in the guide.*latent=\(\)"):
        log_weights(scalar, guide, torch.randn(7))


def test_a_head_that_leaves_the_support() -> None:
    def model(x: Tensor) -> None:
        with batch_plate(x):
            rate = pyro.sample("rate", dist.Gamma(torch.ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    def guide(**support) -> Amortized:
        return Amortized(MLP(2, [8]), MeanField(8, 2, **support), site="rate")

    x = torch.ones(3, 2)
    far = guide()
    with torch.no_grad():
        far.head.linear.bias[:2] = 100.0  # so that no draw is outside, and some would be later
    for normal in (guide(), far):
        with pytest.raises(ValueError, match="leaves the support of site 'rate'.*support="):
            log_weights(model, normal, x)
    with pytest.raises(ValueError, match="leaves the support of site 'rate'"):
        log_weights(model, guide(support=dist.constraints.less_than(0.0)), x)
    log_weights(model, guide(support=dist.constraints.positive), x)


def test_features_of_another_width() -> None:
    model, x = ppca()
    with pytest.raises(ValueError, match=r"features \[\*, 9\], and the encoder gave \[40, 8\]"):
        log_weights(model, Amortized(MLP(5, [8]), MeanField(9, 2)), x)


def test_a_mixture_as_prior_has_the_support_of_its_components():
    def model(x):
        parts = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
        with batch_plate(x):
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), parts))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = Amortized(nn.Linear(2, 4), MeanField(4, 2))
    assert torch.isfinite(importance(iwae, 3)(model, guide, torch.randn(5, 2)))
