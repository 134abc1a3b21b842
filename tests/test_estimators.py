"""Gradients of bounds: their mean is the exact gradient, by quadrature or by summing over all draws."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from truth import exact_guide, ppca, stubborn

from pyro_ae import batch_plate, elbo, importance, iwae, svi
from pyro_ae.bounds import ciwae, cubo, jackknife, miwae, renyi, tvo
from pyro_ae.density import weigh
from pyro_ae.estimators import (
    _derivatives,
    analytic_kl,
    dreg,
    element_kl,
    kl,
    pathwise,
    reconstruction,
    score_function,
    sticking_the_landing,
)
from pyro_ae.losses.importance import name_of
from pyro_ae.relaxations import gumbel, straight_through
from pyro_ae.types import Sides


class Model(nn.Module):
    """Probabilistic PCA with one latent: x = w z + b + noise."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64))

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        likelihood = dist.Normal(z.unsqueeze(-1) * self.w + self.b, 0.8).log_prob(x).sum(-1)
        return likelihood + dist.Normal(0.0, 1.0).log_prob(z)

    def forward(self, x: Tensor) -> None:
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) * self.w + self.b, 0.8).to_event(1), obs=x)


class Guide(nn.Module):
    """A normal guide that is off."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.6, 0.1, 0.0], dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor(-0.2, dtype=torch.float64))

    def forward(self, x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Normal(x @ self.a, self.log_scale.exp()))


X = torch.tensor([[0.5, -1.0, 0.3], [2.0, 0.4, -0.2]], dtype=torch.float64)


def exact_gradient(bound, model: Model, guide: Guide) -> list[Tensor]:
    """The gradient of the mean bound of two particles, by quadrature over their noise."""
    import numpy as np

    nodes, mass = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(60))
    mass = mass / mass.sum()
    loc, scale = X @ guide.a, guide.log_scale.exp()
    z = loc + scale * nodes.unsqueeze(-1)  # [60, rows]
    log_w = model.log_joint(X, z) - dist.Normal(loc, scale).log_prob(z)
    pairs = torch.stack(torch.broadcast_tensors(log_w.unsqueeze(0), log_w.unsqueeze(1)))  # [2, 60, 60, rows]
    mean = (mass[:, None, None] * mass[:, None] * bound(pairs)).sum()
    return list(torch.autograd.grad(mean, [*model.parameters(), *guide.parameters()]))


def sampled_gradients(bound, estimator, model: Model, guide: Guide, repeats: int = 50, rows: int = 2500) -> Tensor:
    """Gradients of a bound of two particles, each of them a mean over many draws, ``[repeats, parameters]``."""
    x = X.repeat(rows, 1)
    loss = importance(bound, 2, estimator)
    parameters = [*model.parameters(), *guide.parameters()]
    out = []
    for _ in range(repeats):
        found = loss(model, guide, x)
        assert isinstance(found, Tensor)
        gradients = torch.autograd.grad(-found / rows, parameters, allow_unused=True)
        out.append(torch.cat([g.reshape(-1) for g in gradients if g is not None]))
    return torch.stack(out)


BOUNDS = [elbo, iwae, miwae(2, 1), ciwae(0.3), renyi(0.5), renyi(-1.0), jackknife(1), tvo([0.0, 0.3])]
PAIRS = [
    *((bound, estimator) for bound in BOUNDS for estimator in (pathwise, dreg)),
    *((elbo, estimator) for estimator in (sticking_the_landing, analytic_kl)),
]


@pytest.mark.parametrize(("bound", "estimator"), PAIRS, ids=name_of)
def test_mean_gradient_is_the_exact_one(bound, estimator):
    model, guide = Model(), Guide()
    exact = torch.cat([g.reshape(-1) for g in exact_gradient(bound, model, guide)])
    found = sampled_gradients(bound, estimator, model, guide)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - exact).abs() < 4.5 * error + 1e-9).all(), (found.mean(0), exact, error)
    # and the error is small enough to tell a wrong factor
    assert (error < 0.03 * exact.abs().max()).all()


def test_sticking_the_landing_is_biased_for_iwae_and_dreg_is_why():
    """So the test above can fail: the score that is left out has no mean of zero inside a logarithm."""
    model, guide = Model(), Guide()
    exact = exact_gradient(iwae, model, guide)[-1]
    found = sampled_gradients(iwae, sticking_the_landing, model, guide)[:, -1]
    assert abs(found.mean() - exact) > 8 * found.std() / math.sqrt(len(found))


class Exact(nn.Module):
    """The posterior of a chain z2 -> z1 -> x of unit normals, as a guide with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.tensor([2 / 3, 1 / 2]))
        self.variances = nn.Parameter(torch.tensor([2 / 3, 1 / 2]))

    def forward(self, x: Tensor) -> None:
        with batch_plate(x):
            z1 = pyro.sample("z1", dist.Normal(self.slopes[0] * x, self.variances[0].sqrt()))
            pyro.sample("z2", dist.Normal(self.slopes[1] * z1, self.variances[1].sqrt()))


def chain(x: Tensor) -> None:
    with batch_plate(x):
        z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
        z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
        pyro.sample("x", dist.Normal(z1, 1.0), obs=x)


@pytest.mark.parametrize(
    ("bound", "estimator"), [(elbo, sticking_the_landing), (elbo, dreg), (iwae, dreg)], ids=name_of
)
@pytest.mark.parametrize("particles", [1, 4])
def test_no_variance_at_the_posterior(bound, estimator, particles):
    """Also for a guide of several layers, in which a draw goes into the distribution of the next."""
    guide = Exact()
    x = torch.randn(5)
    loss = importance(bound, particles, estimator)(chain, guide, x)
    found = torch.cat(torch.autograd.grad(loss, [*guide.parameters()]))
    torch.testing.assert_close(found, torch.zeros(4), atol=2e-5, rtol=0)
    loss = importance(bound, particles, pathwise)(chain, guide, x)
    assert torch.cat(torch.autograd.grad(loss, [*guide.parameters()])).abs().max() > 0.01


def test_no_variance_at_the_posterior_of_ppca():
    model, x = ppca()
    offset = torch.zeros(2, requires_grad=True)

    def guide(x):
        with batch_plate(x):
            exact = model.posterior(x)
            pyro.sample("z", dist.MultivariateNormal(exact.loc + offset, exact.covariance_matrix))

    (found,) = torch.autograd.grad(importance(elbo, 1, sticking_the_landing)(model, guide, x), offset)
    torch.testing.assert_close(found, torch.zeros(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("estimator", [dreg, sticking_the_landing], ids=name_of)
def test_layered_guides_have_the_right_mean(estimator):
    """Against the plain gradient, for a guide that is off; the model's z1 depends on its z2 the other way round."""
    bound, particles = (iwae, 3) if estimator is dreg else (elbo, 1)
    guide = Exact()
    with torch.no_grad():
        guide.slopes.add_(0.2)
        guide.variances.mul_(1.3)
    x = torch.full((20_000,), 0.7)

    def gradients(by):
        loss = importance(bound, particles, by)
        rows = [
            torch.cat(torch.autograd.grad(loss(chain, guide, x) / len(x), [*guide.parameters()])) for _ in range(30)
        ]
        return torch.stack(rows)

    ours, plain = gradients(estimator), gradients(pathwise)
    error = ((ours.var(0) + plain.var(0)) / len(ours)).sqrt()
    assert ((ours.mean(0) - plain.mean(0)).abs() < 4 * error).all()


def test_factor_of_dreg_is_the_squared_weight():
    log_w = torch.randn(5, 3, dtype=torch.float64)
    weights = log_w.softmax(0)
    first, second = _derivatives(iwae, log_w)
    torch.testing.assert_close(first, weights)
    torch.testing.assert_close(first - second, weights**2)
    first, second = _derivatives(elbo, log_w)
    torch.testing.assert_close((first, second), (torch.full_like(log_w, 0.2), torch.zeros_like(log_w)))


def test_values_are_the_bounds():
    model, guide = Model(), Guide()
    for bound, estimator in [*PAIRS, (iwae, score_function())]:
        weights = weigh(model, guide, X, 2)
        if estimator is not analytic_kl:
            torch.testing.assert_close(estimator(bound, weights), bound(weights.log_weights))


# ------------------------------------------------------------------------------------------ discrete latents

LOGITS = torch.tensor([0.3, -0.4])


def binary(x: Tensor) -> None:
    with batch_plate(x):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
        pyro.sample("x", dist.Normal(z @ torch.tensor([1.0, 2.0]), 1.0), obs=x)


class Bits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(LOGITS.clone())

    def forward(self, x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Bernoulli(logits=self.logits.expand(len(x), 2)).to_event(1))


def exact_bits(bound, x: float) -> Tensor:
    """The gradient of the mean bound of three particles, summed over all of their values."""
    logits = LOGITS.clone().requires_grad_()
    q = dist.Bernoulli(logits=logits).to_event(1)
    z = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)))
    log_p = dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1).log_prob(z)
    log_p = log_p + dist.Normal(z @ torch.tensor([1.0, 2.0]), 1.0).log_prob(torch.tensor(x))
    log_q = q.log_prob(z)
    triples = torch.tensor(list(itertools.product(range(4), repeat=3))).T
    mean = (log_q[triples].sum(0).exp() * bound((log_p - log_q)[triples])).sum()
    return torch.autograd.grad(mean, logits)[0]


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("bound", [elbo, iwae, renyi(0.5), tvo([0.0, 0.4])], ids=name_of)
def test_score_function_has_the_exact_mean(bound, baseline):
    guide, rows = Bits(), 5000
    loss = importance(bound, 3, score_function(baseline))
    x = torch.full((rows,), 1.7)
    found = torch.stack([torch.autograd.grad(-loss(binary, guide, x) / rows, guide.logits)[0] for _ in range(60)])
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - exact_bits(bound, 1.7)).abs() < 4 * error).all()


def test_baseline_lowers_the_variance():
    guide, x = Bits(), torch.full((1,), 1.7)

    def spread(baseline):
        loss = importance(iwae, 5, score_function(baseline))
        rows = [torch.autograd.grad(loss(binary, guide, x), guide.logits)[0] for _ in range(300)]
        return torch.stack(rows).var(0)

    assert (spread(True) < 0.7 * spread(False)).all()


def test_a_mixed_guide_has_both_gradients():
    """A discrete draw chooses the mean of a continuous one: against the exact sum over the discrete one."""

    def model(x):
        with batch_plate(x):
            k = pyro.sample("k", dist.Bernoulli(0.4))
            z = pyro.sample("z", dist.Normal(2 * k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    logit, shift = (torch.tensor(v, requires_grad=True) for v in (0.2, 0.5))

    def guide(x):
        with batch_plate(x):
            k = pyro.sample("k", dist.Bernoulli(logits=logit.expand(len(x))))
            pyro.sample("z", dist.Normal(k + shift, 0.7))

    x, p = torch.full((5000,), 0.8), torch.sigmoid(logit)
    parts = []
    for k in (torch.tensor(0.0), torch.tensor(1.0)):
        q, prior = dist.Normal(k + shift, 0.7), dist.Normal(2 * k, 1.0)
        likelihood = dist.Normal(0.8, 1.0).log_prob(q.mean) - 0.5 * 0.49
        parts.append(likelihood - torch.distributions.kl_divergence(q, prior) + dist.Bernoulli(0.4).log_prob(k))
    log_q = torch.stack([torch.log1p(-p), p.log()])
    exact = torch.autograd.grad((log_q.exp() * (torch.stack(parts) - log_q)).sum(), [logit, shift])
    loss = importance(elbo, 2, score_function())
    found = torch.stack(
        [torch.stack(torch.autograd.grad(-loss(model, guide, x) / len(x), [logit, shift])) for _ in range(50)]
    )
    assert ((found.mean(0) - torch.stack(exact)).abs() < 4 * found.std(0) / math.sqrt(len(found))).all()


def one_hot(x: Tensor) -> None:
    with batch_plate(x):
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("x", dist.Normal(z @ torch.tensor([-1.0, 0.0, 2.0]), 1.0), obs=x)


class Choice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.OneHotCategorical(logits=self.logits.expand(len(x), 3)))


@pytest.mark.parametrize(("model", "guide"), [(binary, Bits()), (one_hot, Choice())], ids=["bernoulli", "one-hot"])
def test_straight_through_draws_are_discrete_and_the_loss_is_the_models_own(model, guide):
    x = torch.full((20_000,), 1.2)
    with straight_through(0.7).handler():
        weights = weigh(model, guide, x, 2)
    (z,) = (s["value"] for s in weights.passes[0].latents)
    assert set(z.unique().tolist()) == {0.0, 1.0}
    plain = weigh(model, guide, x, 2)
    ours, theirs = weights.log_weights, plain.log_weights
    assert abs(ours.mean() - theirs.mean()) < 4 * (2 * theirs.var() / theirs.numel()).sqrt()
    # the same density at the same draws, too
    (run,) = weights.passes
    for site in run.modelled:
        if site["name"] == "z":
            original = next(s for s in plain.passes[0].modelled if s["name"] == "z")["fn"]
            torch.testing.assert_close(site["fn"].log_prob(z), original.log_prob(z.detach()))


@pytest.mark.parametrize("estimator", [straight_through(0.7), gumbel(0.3), score_function()], ids=name_of)
def test_relaxations_learn_a_categorical_posterior(estimator):
    from pyro_ae import fit

    x = torch.full((64,), 0.6)
    guide = Choice()
    method = svi(loss=importance(elbo, 4, estimator), lr=0.03, steps=400)
    fit(one_hot, x, guide=guide, method=method, progress=False, seed=0)
    log_p = torch.tensor([0.2, 0.3, 0.5]).log() + dist.Normal(torch.tensor([-1.0, 0.0, 2.0]), 1.0).log_prob(x[0])
    # the score function has the exact gradient, the others are biased by their temperature
    tolerance = 0.03 if isinstance(estimator, score_function) else 0.12
    torch.testing.assert_close(guide.logits.softmax(0), log_p.softmax(0), atol=tolerance, rtol=0)


@pytest.mark.parametrize("estimator", [straight_through(0.7), gumbel(0.3)], ids=name_of)
def test_relaxations_learn_binary_latents(estimator):
    """Apart from the prior's, whose probabilities are 0.3 and 0.6, towards the exact posterior of each bit."""
    from pyro_ae import fit

    x, guide = torch.full((64,), 2.5), Bits()
    method = svi(loss=importance(elbo, 4, estimator), lr=0.03, steps=400)
    fit(binary, x, guide=guide, method=method, progress=False, seed=0)
    z = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)))
    log_p = dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1).log_prob(z)
    log_p = log_p + dist.Normal(z @ torch.tensor([1.0, 2.0]), 1.0).log_prob(x[0])
    exact = log_p.softmax(0) @ z
    # a guide of independent bits is off by itself, as is the temperature
    torch.testing.assert_close(torch.sigmoid(guide.logits).detach(), exact, atol=0.12, rtol=0)


@pytest.mark.parametrize("estimator", [pathwise, sticking_the_landing, dreg, analytic_kl], ids=name_of)
def test_a_discrete_site_without_an_estimator_is_refused(estimator):
    with pytest.raises(ValueError, match="'z' has no reparameterised sampler.*score_function.*enumerate"):
        importance(elbo, 2, estimator)(binary, Bits(), torch.zeros(3))


def test_analytic_kl_is_for_linear_bounds():
    with pytest.raises(ValueError, match="analytic_kl is for elbo"):
        importance(iwae, 2, analytic_kl)(Model(), Guide(), X)


def test_parts_add_up():
    """Reconstruction and KL of a draw are its log-weight, where the KL has no closed form; else in the mean."""
    model, guide = Model(), Guide()
    (run,) = weigh(model, guide, X.repeat(20_000, 1), 1).passes
    log_w = (run.log_p - run.log_q).reshape(-1, 2)
    ours = (reconstruction(run) - kl(run)).reshape(-1, 2)
    assert ((log_w.mean(0) - ours.mean(0)).abs() < 4 * log_w.std(0) / math.sqrt(len(log_w))).all()
    expected = torch.distributions.kl_divergence(
        dist.Normal(X @ guide.a, guide.log_scale.exp()), dist.Normal(X.new_zeros(()), 1.0)
    )
    torch.testing.assert_close(kl(run)[0, :2], expected)
    torch.testing.assert_close(element_kl(run, "z")[0, :2, 0], expected)


def test_an_upper_bound_is_minimised_by_the_guide_alone():
    model, guide = Model(), Guide()
    torch.manual_seed(0)
    loss = importance(cubo(2), 50)(model, guide, X)
    assert isinstance(loss, Sides)
    torch.manual_seed(0)
    log_w = weigh(model, guide, X, 50).log_weights
    torch.testing.assert_close(loss.guide, cubo(2)(log_w).sum())
    torch.testing.assert_close(loss.model, -iwae(log_w).sum())


def test_estimators_work_where_particles_run_one_by_one():
    model, x = ppca(rows=6)
    guide = exact_guide(model)

    for estimator in (pathwise, dreg, score_function()):
        with pytest.warns(UserWarning, match="one by one"):
            loss = importance(iwae, 4, estimator)(stubborn(model), guide, x)
        torch.testing.assert_close(-loss, model.marginal().log_prob(x).sum())
