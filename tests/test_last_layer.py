"""Variational Bayesian last layers against closed forms and Monte Carlo; and the calibration error."""

import math
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions import MultivariateNormal

from pyro_ae import Posterior, fit, importance, log_weights, svi
from pyro_ae.diagnostics.calibration import calibration_error
from pyro_ae.last_layer import LastLayer, LastLayerGuide, bayesian_last_layer, last_layer_bound, predictive
from pyro_ae.nn import MLP
from pyro_ae.plates import Minibatch

LIKELIHOODS, COVARIANCES = ["regression", "discriminative", "generative"], ["diagonal", "dense", "low_rank"]
ALL = list(product(LIKELIHOODS, COVARIANCES))
BOUND = last_layer_bound()


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def system(likelihood, covariance="dense", *, features=3, outputs=2, rows=8, network=None, **settings):
    """A model, a guide with a wide and irregular Gaussian, and data."""
    model = LastLayer(network or nn.Identity(), features, outputs, likelihood, **settings)
    guide = LastLayerGuide(model, covariance, rank=2)
    with torch.no_grad():
        for p in guide.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
    y = torch.randn(rows, outputs) if likelihood == "regression" else torch.randint(outputs, (rows,))
    return model, guide, torch.randn(rows, features), y


def covariances(guide):
    """S of each output, ``[outputs, h, h]``."""
    q = guide.posterior.base_dist
    return q.covariance_matrix if q.event_shape else q.variance.diag_embed()


def set_tril(guide, tril):
    scale = tril.diagonal(dim1=-1, dim2=-2)
    guide.log_scale.copy_(scale.log())
    guide.factor.copy_(tril / scale.unsqueeze(-1))


# --------------------------------------------------------------------------------------------- the bound


@pytest.mark.parametrize(("likelihood", "covariance"), ALL)
def test_the_bound_is_the_elbo_or_below_it(likelihood, covariance):
    model, guide, x, y = system(likelihood, covariance)
    with torch.no_grad():
        bound = -BOUND(model, guide, x, y)
        draws = log_weights(model, guide, (x, y), particles=20_000)[0]
    error = 4 * draws.std() / len(draws) ** 0.5
    if likelihood == "regression":
        assert abs(draws.mean() - bound) < error
    else:
        assert bound < draws.mean() - error, "Jensen's inequality is strict for a wide posterior"


@pytest.mark.parametrize(("likelihood", "covariance"), ALL)
def test_the_bound_is_tight_without_a_spread(likelihood, covariance):
    """With a narrow posterior, and no noise of the logits, it is the likelihood at the mean less the KL divergence."""
    model, guide, x, y = system(likelihood, covariance, noise=0.0 if likelihood == "discriminative" else 0.7)
    with torch.no_grad():
        guide.log_scale.fill_(-12.0)
        if covariance != "diagonal":
            guide.factor.mul_(1e-6)
        prior = MultivariateNormal(torch.zeros(3), model.prior * torch.eye(3))
        divergence = torch.distributions.kl_divergence(MultivariateNormal(guide.mean, covariances(guide)), prior).sum()
        found = -BOUND(model, guide, x, y) + divergence
    if likelihood == "regression":
        at_mean = dist.Normal(x @ guide.mean.mT, 0.7**0.5).log_prob(y).sum()
    else:
        densities = MultivariateNormal(guide.mean, 0.7 * torch.eye(3)).log_prob(x.unsqueeze(1))
        logits = densities if likelihood == "generative" else x @ guide.mean.mT
        at_mean = logits.log_softmax(-1)[range(8), y].sum()
    torch.testing.assert_close(found, at_mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("likelihood", "covariance"), ALL)
def test_the_divergence_has_all_its_terms(likelihood, covariance):
    """What one more copy of each row adds is the likelihood; the rest is the KL divergence and the noise's prior."""
    model, guide, x, y = system(likelihood, covariance)
    twice = torch.cat([x, x]), torch.cat([y, y])
    with torch.no_grad():
        found = 2 * BOUND(model, guide, x, y) - BOUND(model, guide, *twice)
        noise = guide.log_noise.exp()
    prior = MultivariateNormal(torch.zeros(3), model.prior * torch.eye(3))
    kl = torch.distributions.kl_divergence(MultivariateNormal(guide.mean, covariances(guide)), prior).sum().item()
    scale = 0.01 if likelihood == "regression" else 1.0
    wishart = sum(scipy.stats.invwishart(df=1.0, scale=scale).logpdf(v) for v in noise.tolist())
    assert len(noise) == (3 if likelihood == "generative" else 2)
    assert found.item() == pytest.approx(kl - wishart, abs=1e-8)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_regression_by_the_expected_square(covariance):
    model, guide, x, y = system("regression", covariance, noise=0.5)
    with torch.no_grad():
        found = BOUND(model, guide, x, y) - BOUND(model, guide, x[1:], y[1:])  # of the first row alone
        mean, spread = guide.mean @ x[0], torch.einsum("h,ohg,g->o", x[0], covariances(guide), x[0])
    square = ((y[0] - mean).square() + spread).sum()
    assert found.item() == pytest.approx((square / 1.0 + math.log(2 * math.pi * 0.5)).item())


def test_discriminative_by_hand():
    model = LastLayer(nn.Identity(), 1, 2, "discriminative", noise=0.3)
    guide = LastLayerGuide(model, "diagonal")
    with torch.no_grad():
        guide.mean.copy_(torch.tensor([[0.5], [-1.0]]))
        guide.log_scale.copy_(torch.tensor([[0.2], [0.4]]).log())
    x, y = torch.tensor([[2.0]]), torch.tensor([1])
    # logits N(1, 0.16 + 0.3) and N(-2, 0.64 + 0.3)
    likelihood = -2 - math.log(math.exp(1 + 0.23) + math.exp(-2 + 0.47))
    kl = sum((m**2 + s**2) / 4 - 0.5 - math.log(s / 2**0.5) for m, s in ((0.5, 0.2), (-1.0, 0.4)))
    assert -BOUND(model, guide, x, y).item() == pytest.approx(likelihood - kl)


def test_generative_by_hand():
    model = LastLayer(nn.Identity(), 1, 2, "generative", noise=0.5)
    guide = LastLayerGuide(model, "diagonal")
    with torch.no_grad():
        guide.mean.copy_(torch.tensor([[1.0], [-1.0]]))
        guide.log_scale.copy_(torch.tensor([[0.5], [1.0]]).log())
    x, y = torch.tensor([[0.4]]), torch.tensor([0])
    own = scipy.stats.norm(1.0, 0.5**0.5).logpdf(0.4) - 0.25 / 0.5 / 2
    both = scipy.stats.norm(1.0, 0.75**0.5).pdf(0.4) + scipy.stats.norm(-1.0, 1.5**0.5).pdf(0.4)
    kl = sum((1 + s**2) / 4 - 0.5 - math.log(s / 2**0.5) for s in (0.5, 1.0))
    assert -BOUND(model, guide, x, y).item() == pytest.approx(own - math.log(both) - kl)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_covariances_that_are_the_same_give_the_same(likelihood):
    model, low, x, y = system(likelihood, "low_rank")
    dense, diagonal, flat = (LastLayerGuide(model, c, rank=2) for c in ("dense", "diagonal", "low_rank"))
    with torch.no_grad():
        tril = torch.linalg.cholesky(covariances(low))
        set_tril(dense, tril)
        flat.factor.zero_()
        for guide in (dense, diagonal, flat):
            guide.mean.copy_(low.mean)
            guide.log_noise.copy_(low.log_noise)
        for guide in (diagonal, flat):
            guide.log_scale.copy_(low.log_scale)

        for one, other in ((dense, low), (diagonal, flat)):
            torch.testing.assert_close(BOUND(model, one, x, y), BOUND(model, other, x, y))
            found, wanted = (predictive(model, guide, x, samples=20_000) for guide in (one, other))
            if likelihood == "regression":
                torch.testing.assert_close(found.variance, wanted.variance)
            else:
                torch.testing.assert_close(found.probs, wanted.probs, rtol=0, atol=0.02)
        assert abs(BOUND(model, low, x, y) - BOUND(model, flat, x, y)) > 0.1


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_minibatches_average_to_the_whole_with_the_prior_counted_once(likelihood):
    model, guide, x, y = system(likelihood, rows=12)

    def bound(rows):
        with Minibatch("data", 12):
            return BOUND(model, guide, x[rows], y[rows])

    parts = torch.stack([bound(slice(i, i + 3)) for i in range(0, 12, 3)])
    torch.testing.assert_close(parts.mean(), BOUND(model, guide, x, y), rtol=1e-10, atol=0)
    assert parts.std() > 0.1


class RandomScale(nn.Module):
    """Features with a latent of their own."""

    def forward(self, x):
        return x * pyro.sample("a", dist.Normal(0.0, 1.0)).unsqueeze(-1)


def test_other_latents_are_drawn():
    model, layer, x, y = system("regression", network=RandomScale())

    def guide(x, y=None):
        pyro.sample("a", dist.Normal(0.3, 0.2))
        return layer(x, y)

    with torch.no_grad():
        bounds = torch.stack([-BOUND(model, guide, x, y) for _ in range(200)])
        draws = log_weights(model, guide, (x, y), particles=20_000)[0]
    error = (bounds.var() / len(bounds) + draws.var() / len(draws)).sqrt()
    assert abs(bounds.mean() - draws.mean()) < 4 * error
    assert bounds.std() < draws.std() / 1.1, "with the weights integrated out there is less noise"


# ----------------------------------------------------------------------- linear regression with its evidence


def linear_regression(rows=30, features=3, noise=0.4, prior=0.8):
    x = torch.randn(rows, features)
    y = x @ torch.randn(features, 2) + noise**0.5 * torch.randn(rows, 2)
    precision = torch.eye(features) / prior + x.mT @ x / noise
    covariance = torch.linalg.inv(precision)
    mean = (covariance @ x.mT @ y / noise).mT
    evidence = MultivariateNormal(torch.zeros(rows), prior * x @ x.mT + noise * torch.eye(rows)).log_prob(y.mT).sum()
    model = LastLayer(nn.Identity(), features, 2, prior=prior, noise=noise)
    return model, x, y, mean, covariance, evidence


def test_the_bound_is_the_evidence_at_the_posterior():
    model, x, y, mean, covariance, evidence = linear_regression()
    guide = LastLayerGuide(model)
    tril = torch.linalg.cholesky(covariance)
    with torch.no_grad():
        guide.mean.copy_(mean)
        set_tril(guide, tril.expand(2, 3, 3))
        torch.testing.assert_close(-BOUND(model, guide, x, y), evidence, rtol=0, atol=1e-8)
        found = predictive(model, guide, x)
    torch.testing.assert_close(found.mean, x @ mean.mT)
    variance = torch.einsum("nh,hg,ng->n", x, covariance, x) + 0.4
    torch.testing.assert_close(found.variance, variance.unsqueeze(-1).expand(-1, 2))


def test_fit_finds_the_posterior():
    model, x, y, mean, covariance, evidence = linear_regression()
    method = svi(loss=BOUND, lr=3e-2, steps=1000, schedule="cosine")
    guide = LastLayerGuide(model)
    posterior = fit(model, (x, y), guide=guide, method=method, seed=0, progress=False)
    torch.testing.assert_close(guide.mean, mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(covariances(guide), covariance.expand(2, 3, 3), atol=1e-5, rtol=0)
    assert posterior.history["loss"][-1] * len(x) == pytest.approx(-evidence.item(), abs=1e-4)
    drawn = posterior.predict((x, None), 4000)["y"]
    torch.testing.assert_close(drawn.mean(0), x @ mean.mT, atol=0.07, rtol=0)


# -------------------------------------------------------------------------------- prediction and the whole way


@pytest.mark.parametrize(("likelihood", "covariance"), ALL)
def test_predictive_is_the_average_over_weights(likelihood, covariance):
    model, guide, x, _ = system(likelihood, covariance)
    with torch.no_grad():
        found = predictive(model, guide, x, samples=20_000)
        w, noise = guide.posterior.sample((20_000,)), guide.log_noise.exp()
        if likelihood == "regression":
            y = x @ w.mT + noise.sqrt() * torch.randn(20_000, 8, 2)
            torch.testing.assert_close(found.mean, y.mean(0), atol=0.1, rtol=0.05)
            torch.testing.assert_close(found.variance, y.var(0), atol=0.1, rtol=0.1)
            return
        if likelihood == "discriminative":
            logits = x @ w.mT + noise.sqrt() * torch.randn(20_000, 8, 2)
            average = logits.softmax(-1).mean(0)
        else:  # the density of the features is averaged, not the probability of the class
            densities = dist.Normal(w.unsqueeze(1), noise.sqrt()).to_event(1).log_prob(x.unsqueeze(1)).exp().mean(0)
            average = densities / densities.sum(-1, keepdim=True)
    torch.testing.assert_close(found.probs, average, atol=0.02, rtol=0)


@pytest.mark.parametrize(("likelihood", "covariance"), ALL)
def test_every_parameter_is_trained(likelihood, covariance):
    recipe = bayesian_last_layer(MLP(4, [6]), 6, 3, likelihood, covariance=covariance, rank=2)
    x = torch.randn(20, 4)
    y = torch.randn(20, 3) if likelihood == "regression" else torch.randint(3, (20,))
    BOUND(recipe.model, recipe.guide, x, y).backward()
    for side in (recipe.model, recipe.guide):
        for name, p in side.named_parameters():
            assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name


@pytest.mark.parametrize(("likelihood", "covariance"), ALL)
def test_fit_predict_save_and_load(likelihood, covariance, tmp_path):
    def make():
        return bayesian_last_layer(MLP(4, [16]), 16, 3, likelihood, covariance=covariance)

    x = torch.randn(200, 4)
    y = x[:, :3].sin() if likelihood == "regression" else x[:, :3].argmax(-1)
    method = svi(loss=BOUND, lr=1e-2, epochs=30)
    posterior = fit(make(), (x, y), method=method, batch_size=50, seed=0, progress=False)
    drawn = posterior.predict((x[:7], None), 10)["y"]
    assert drawn.shape == ((10, 7, 3) if likelihood == "regression" else (10, 7))
    with torch.no_grad():
        torch.manual_seed(0)
        found = predictive(posterior.model, posterior.guide, x)
        wrong = (found.mean - y).square() if likelihood == "regression" else (found.probs.argmax(-1) != y).double()
        assert wrong.mean() < 0.1
        posterior.save(tmp_path / "posterior")
        again = Posterior.load(tmp_path / "posterior", *make()[:2])
        torch.manual_seed(0)
        torch.testing.assert_close(predictive(again.model, again.guide, x).mean, found.mean, equal_nan=True)
        torch.testing.assert_close(again.guide.posterior.stddev, posterior.guide.posterior.stddev)


def test_a_dense_guide_stays_well_conditioned_in_large_steps():
    """By Monte Carlo the inverse of its factor matters, and Adam moves all of its elements at once."""
    torch.set_default_dtype(torch.float32)
    recipe = bayesian_last_layer(nn.Identity(), 64, 2)
    x = torch.randn(200, 64)
    method = svi(loss=importance(), lr=1e-2, steps=30)
    posterior = fit(recipe, (x, x[:, :2]), method=method, seed=0, progress=False)
    tril = posterior.guide.posterior.base_dist.scale_tril
    assert torch.linalg.cond(tril).max() < 100


def test_the_model_takes_other_guides_and_losses():
    model, x, y, mean, covariance, _ = linear_regression()
    method = svi(loss=importance(particles=8), lr=5e-2, steps=500, schedule="cosine")
    posterior = fit(model, (x, y), guide=AutoNormal(model), method=method, seed=0, progress=False)
    torch.testing.assert_close(posterior.sample(4000)["w"].mean(0), mean, atol=0.03, rtol=0)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"likelihood": "poisson"}, "likelihood must be one of 'regression'"),
        ({"covariance": "full"}, "covariance must be one of 'diagonal'"),
        ({"covariance": "low_rank", "rank": 0}, "rank must be at least 1"),
        ({"features": 0}, "features must be at least 1"),
        ({"likelihood": "generative", "outputs": 1}, "outputs 2"),
        ({"prior": 0.0}, "prior must be positive"),
        ({"noise": 0.0}, "noise must be positive"),
        ({"noise": math.inf}, "noise must be positive"),
        ({"wishart": (1.0, -1.0)}, "wishart must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(settings, what):
    with pytest.raises(ValueError, match=what):
        bayesian_last_layer(**{"network": nn.Identity(), "features": 3, "outputs": 2} | settings)


@pytest.mark.parametrize(
    ("likelihood", "x", "y", "what"),
    [
        ("regression", torch.zeros(5, 4), torch.zeros(5, 2), r"features of shape \(5, 4\).*takes \[N, 3\]"),
        ("regression", torch.zeros(5, 3), torch.zeros(5), r"y must be numbers of shape \(5, 2\)"),
        ("regression", torch.zeros(5, 3), torch.zeros(5, 3), r"y must be numbers of shape \(5, 2\)"),
        ("generative", torch.zeros(5, 3), torch.zeros(4).long(), r"of shape \(5,\), got torch.int64 of shape \(4,\)"),
        ("discriminative", torch.zeros(5, 3), torch.zeros(5), "whole numbers"),
        ("discriminative", torch.zeros(5, 3), torch.full((5,), 2), r"classes must be in \[0, 2\), got 2 to 2"),
    ],
)
def test_data_that_does_not_fit_is_refused(likelihood, x, y, what):
    recipe = bayesian_last_layer(nn.Identity(), 3, 2, likelihood)
    with pytest.raises(ValueError, match=what):
        fit(recipe, (x, y), progress=False)


def test_models_and_guides_of_other_kinds_are_refused():
    model, guide, x, y = system("regression")

    def plain(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w, 1.0), obs=None if y is None else y[:, 0])

    with pytest.raises(ValueError, match="a model that is a LastLayer"):
        BOUND(plain, lambda x, y=None: pyro.sample("w", dist.Normal(0.0, 1.0)), x, y)
    automatic = AutoNormal(model)
    for call in (lambda: BOUND(model, automatic, x, y), lambda: predictive(model, automatic, x)):
        with pytest.raises(ValueError, match="'w' is Delta, and only a Gaussian"):
            call()
    with pytest.raises(ValueError, match="samples must be at least 1"):
        predictive(model, guide, x, samples=0)


# -------------------------------------------------------------------------------------- calibration error


def test_calibration_error_is_the_sum_over_bins():
    probabilities = torch.rand(300, 4).softmax(-1) ** 3
    probabilities /= probabilities.sum(-1, keepdim=True)
    labels = torch.randint(4, (300,))
    confidence, guess = probabilities.max(-1)
    expected = 0.0
    for m in range(10):
        inside = (confidence > m / 10) & (confidence <= (m + 1) / 10)
        if inside.any():
            gap = (guess == labels)[inside].double().mean() - confidence[inside].mean()
            expected += inside.double().mean().item() * abs(gap.item())
    assert calibration_error(probabilities, labels, bins=10) == pytest.approx(expected)


def test_calibration_error_by_hand():
    """Too little confidence in one bin does not make up for too much in another; an upper edge is of its bin."""
    probabilities = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]])
    assert calibration_error(probabilities, torch.tensor([0, 0, 1]), bins=2) == pytest.approx((0.5 + 0.75) / 3)


def test_calibration_error_of_known_classifiers():
    probabilities = torch.randn(200_000, 3).mul(2).softmax(-1)
    labels = torch.multinomial(probabilities, 1).squeeze(-1)
    assert calibration_error(probabilities, labels) < 0.01
    sure = torch.nn.functional.one_hot(probabilities.argmax(-1), 3).double()
    accuracy = (sure.argmax(-1) == labels).double().mean().item()
    assert calibration_error(sure, labels) == pytest.approx(1 - accuracy)


@pytest.mark.parametrize(
    ("probabilities", "labels", "bins", "what"),
    [
        (torch.ones(3), torch.zeros(3), 15, r"shapes \(3,\) and \(3,\)"),
        (torch.full((3, 2), 0.5), torch.zeros(2), 15, r"shapes \(3, 2\) and \(2,\)"),
        (torch.zeros(0, 2), torch.zeros(0), 15, "at least one row"),
        (torch.ones(3, 2), torch.zeros(3), 15, "softmax"),
        (torch.tensor([[1.5, -0.5]]), torch.zeros(1), 15, "softmax"),
        (torch.full((3, 2), 0.5), torch.full((3,), 2), 15, r"labels must be in \[0, 2\)"),
        (torch.full((3, 2), 0.5), torch.zeros(3), 0, "bins must be at least 1"),
    ],
)
def test_calibration_error_refuses(probabilities, labels, bins, what):
    with pytest.raises(ValueError, match=what):
        calibration_error(probabilities, labels, bins)
