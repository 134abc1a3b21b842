"""Losses beside the bounds: against their formulas, with draws that have no noise or the same noise."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from truth import biased_guide, exact_guide, ppca, same_noise

from pyro_ae import batch_plate, elbo, fit, importance, iwae, losses, svi
from pyro_ae.bounds import miwae
from pyro_ae.density import weigh
from pyro_ae.divergences import mmd
from pyro_ae.estimators import analytic_kl, element_kl, kl, reconstruction
from pyro_ae.losses import (
    aggregate,
    aggregate_moments,
    annealed,
    autogen,
    capacity,
    fisher,
    free_bits,
    info_vae,
    piwae,
    soft_free_bits,
    total_correlation,
    wake_sleep,
    wasserstein,
)
from pyro_ae.losses.importance import name_of
from pyro_ae.models import ppca as ppca_file
from pyro_ae.plates import Scaled
from pyro_ae.schedules import cyclical, linear, now, progress
from pyro_ae.types import Sides


class Line(nn.Module):
    """x = w z + b + noise, with one latent."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor([1.0, -0.5])), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        with batch_plate(x, size):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z * self.w + self.b, 0.8).to_event(1), obs=x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.log_scale = nn.Parameter(torch.tensor([0.1, 0.3])), nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> None:
        with batch_plate(x):
            pyro.sample("z", dist.Normal((x @ self.a).unsqueeze(-1), self.log_scale.exp()).to_event(1))


def posterior_of_line() -> tuple[Tensor, Tensor]:
    """Slope and log-scale of the exact posterior of Line, which Encoder can be."""
    w = torch.tensor([1.0, -0.5])
    variance = 1 / (1 + w.square().sum() / 0.64)
    return variance * w / 0.64, 0.5 * variance.log()


# ------------------------------------------------------------------------------------------ one scalar a side


def test_piwae_gives_each_side_its_bound():
    model, guide, x = ppca_file.example()
    sides, weights = same_noise(lambda: piwae(3, 4)(model, guide, x), lambda: weigh(model, guide, x, 12))
    torch.testing.assert_close(sides.model, -iwae(weights.log_weights).sum())
    torch.testing.assert_close(sides.guide, -miwae(3, 4)(weights.log_weights).sum())


class Product(nn.Module):
    """A loss of its own: a side each for the weights of model, guide and critic."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(2.0))

    def forward(self, model, guide, x) -> Sides:
        w, a = model.fn.w, guide.fn.a
        both = (w * a).sum() * self.c
        return Sides(model=both, guide=-both, critic=(self.c - 5).square())


def test_each_side_is_trained_by_its_own_scalar():
    model, guide, loss = Line(), Encoder(), Product()
    w, a = model.w.detach().clone(), guide.a.detach().clone()
    method = svi(loss=loss, optimizer=torch.optim.SGD, lr=0.1, steps=1)
    posterior = fit(model, torch.randn(4, 2), guide=guide, method=method, progress=False, plate=None)
    torch.testing.assert_close(model.w.detach(), w - 0.1 * 2 * a)
    torch.testing.assert_close(guide.a.detach(), a + 0.1 * 2 * w)
    torch.testing.assert_close(loss.c.detach(), torch.tensor(2.0 + 0.1 * 6))
    assert posterior.history["loss"] == [pytest.approx(float(2 * (w * a).sum()))]


def test_params_of_plain_functions_know_their_side():
    def model(x):
        b = pyro.param("b", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + b, 1.0), obs=x)

    def guide(x):
        c = pyro.param("c", torch.tensor(2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(c, 1.0).expand([len(x)]))

    def loss(model, guide, x):
        b, c = pyro.param("b"), pyro.param("c")
        return Sides(model=b * c, guide=-b * c)

    method = svi(loss=loss, optimizer=torch.optim.SGD, lr=0.1, steps=1)
    posterior = fit(model, torch.randn(4), guide=guide, method=method, progress=False, plate=None)
    assert {n: round(v.item(), 4) for n, v in posterior.params.items()} == {"b": 0.8, "c": 2.1}


@pytest.mark.parametrize(
    "loss", [piwae(4, 4), importance(iwae, 8), wake_sleep(10), wake_sleep(1, sleep=1.0)], ids=name_of
)
def test_guide_finds_the_exact_posterior(loss):
    """Whatever way a loss goes, the posterior that is in the guide's family is where it ends."""
    torch.manual_seed(0)
    model, guide = Line().requires_grad_(False), Encoder()
    x = model(size=1000)
    method = svi(loss=loss, lr=0.02, epochs=60, schedule="linear")
    fit(model, x, guide=guide, method=method, batch_size=100, progress=False, seed=0)
    a, log_scale = posterior_of_line()
    torch.testing.assert_close(guide.a.detach(), a, atol=0.04, rtol=0)
    torch.testing.assert_close(guide.log_scale.detach(), log_scale, atol=0.06, rtol=0)


def test_wake_sleep_gives_the_model_the_gradient_of_iwae():
    model, guide, x = ppca_file.example()
    sides, bound = same_noise(lambda: wake_sleep(6)(model, guide, x), lambda: importance(iwae, 6)(model, guide, x))
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(s, parameters, retain_graph=True) for s in (sides.model, bound))
    torch.testing.assert_close(ours, theirs)
    assert not any(p.grad_fn for p in weigh_values(model, guide, x))


def weigh_values(model, guide, x):
    from pyro_ae.losses.wake_sleep import _Detached

    with _Detached():
        return list(weigh(model, guide, x, 2).passes[0].values.values())


def test_wake_phase_is_the_weighted_log_density():
    model, x = ppca(rows=5)
    offset = torch.zeros(2, requires_grad=True)

    def guide(x):
        with batch_plate(x):
            exact = model.posterior(x)
            pyro.sample("z", dist.MultivariateNormal(exact.loc + 0.3 + offset, 1.3 * exact.covariance_matrix))

    sides, weights = same_noise(lambda: wake_sleep(6)(model, guide, x), lambda: weigh(model, guide, x, 6))
    (run,) = weights.passes
    z, q = run.values["z"].detach(), run.latents[0]["fn"]
    expected = -(weights.log_weights.detach().softmax(0) * q.log_prob(z)).sum()
    torch.testing.assert_close(sides.guide, expected)
    torch.testing.assert_close(torch.autograd.grad(sides.guide, offset), torch.autograd.grad(expected, offset))


def test_wake_sleep_is_scaled_and_says_what_it_cannot_dream():
    model, x = ppca(rows=5)
    guide = biased_guide(model)
    scaled = [Scaled(fn, "data", 50) for fn in (model, guide)]
    for sleep in (0.0, 1.0):
        loss = wake_sleep(4, sleep=sleep)
        big, small = same_noise(lambda loss=loss: loss(*scaled, x), lambda loss=loss: loss(model, guide, x))
        torch.testing.assert_close(torch.stack(big[:2]), 10 * torch.stack(small[:2]))

    def hidden(x):
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ model.weight.T, 1.0).to_event(1), obs=2 * x)

    with pytest.raises(ValueError, match="cannot put dreams of 'x'"):
        wake_sleep(sleep=0.5)(hidden, guide, x)


# ----------------------------------------------------------------------------------------------- the KL divergence


def parts(model, guide, x):
    (run,) = weigh(model, guide, x, 1).passes
    return reconstruction(run)[0], kl(run)[0], element_kl(run, "z")[0], run


def test_annealed_scales_the_kl_and_autogen_the_likelihood():
    model, guide, x = ppca_file.example()
    plain = importance(elbo, 1, analytic_kl)
    # a tempered KL is a multiple, also in closed form
    (likelihood, divergence, *_), tempered, copied = same_noise(
        lambda: parts(model, guide, x),
        lambda: annealed(3.0, plain)(model, guide, x),
        lambda: autogen(2.0, plain)(model, guide, x),
    )
    torch.testing.assert_close(tempered, (3 * divergence - likelihood).sum())
    torch.testing.assert_close(copied, (divergence - 3 * likelihood).sum())


def test_autogen_bounds_the_evidence_of_copies():
    """m + 1 equal rows of one latent are one row of a larger PPCA, whose evidence is known."""
    model, x = ppca(rows=30)
    larger = ppca_file.PPCA(features=15, latent=2, noise=0.7)
    with torch.no_grad():
        larger.weight.copy_(model.weight.repeat(3, 1))
        larger.mean.copy_(model.mean.repeat(3))

    def guide(x):
        exact_guide(larger)(x.repeat(1, 3))

    torch.testing.assert_close(
        -autogen(2.0, importance(iwae, 5))(model, guide, x), larger.marginal().log_prob(x.repeat(1, 3)).sum()
    )


def test_schedules_follow_the_fit_and_evaluation_is_at_its_end():
    seen: list[tuple[bool, float]] = []

    def beta(done: float) -> float:
        seen.append((torch.is_grad_enabled(), done))
        return 1.0

    model, guide, x = ppca_file.example()
    method = svi(loss=annealed(beta), epochs=2)
    fit(model, x, guide=guide, method=method, batch_size=4, progress=False, validation=x)
    training = [done for grad, done in seen if grad]
    assert training == [i / 8 for i in range(8)]
    assert {done for grad, done in seen if not grad} == {1.0}


@pytest.mark.parametrize("aim", [0.1, 50.0])
def test_capacity_is_the_distance_from_its_aim(aim):
    model, guide, x = ppca_file.example()
    scaled = [Scaled(fn, "data", 160) for fn in (model, guide)]
    (likelihood, divergence, *_), loss = same_noise(
        lambda: parts(model, guide, x), lambda: capacity(aim, gamma=7.0)(*scaled, x)
    )
    expected = -likelihood.mean() + 7 * (divergence.mean() - aim).abs()
    torch.testing.assert_close(loss, 160 * expected)


def test_free_bits_stop_at_their_threshold():
    model, guide, x = ppca_file.example()
    (likelihood, _, each, _), *found = same_noise(
        lambda: parts(model, guide, x),
        *(lambda nats=nats: free_bits(nats)(model, guide, x) for nats in (0.0, 0.15, 99)),
    )
    mean = each.mean(0)
    assert mean.min() < 0.15 < mean.max()
    for nats, loss in zip((0.0, 0.15, 99.0), found, strict=True):
        torch.testing.assert_close(loss, 16 * mean.clamp(min=nats).sum() - likelihood.sum())
    gradients = torch.autograd.grad(found[2], list(guide.parameters()), retain_graph=True)
    (run,) = weigh(model, guide, x, 1).passes
    assert gradients  # with the KL for nothing, only the likelihood moves the guide
    torch.testing.assert_close(
        gradients, torch.autograd.grad(-likelihood.sum(), list(guide.parameters()), retain_graph=True)
    )


def test_soft_free_bits_turn_the_weight_up_and_down():
    model, guide, x = ppca_file.example()
    (likelihood, divergence, *_), _ = same_noise(lambda: parts(model, guide, x), lambda: None)
    size = divergence.mean().item()
    up, down, kept = (soft_free_bits(nats) for nats in (0.5 * size, 2 * size, size))
    for loss in (up, down, kept):
        loss.gamma.fill_(0.5)
    (value,) = same_noise(lambda: down(model, guide, x))
    torch.testing.assert_close(value, (0.5 * divergence - likelihood).sum())
    for loss in (up, kept):
        loss(model, guide, x)
    assert [round(loss.gamma.item(), 3) for loss in (up, down, kept)] == [0.55, 0.455, 0.5]
    with torch.no_grad():
        down(model, guide, x)
    assert round(down.gamma.item(), 3) == 0.455, "an evaluation changed the weight"
    for _ in range(30):
        up(model, guide, x)
    assert up.gamma == 1


def test_total_correlation_telescopes_to_the_elbo():
    model, guide, x = ppca_file.example()
    scaled = [Scaled(fn, "data", 160) for fn in (model, guide)]
    ours, plain = same_noise(lambda: total_correlation(beta=1.0)(*scaled, x), lambda: importance(elbo)(*scaled, x))
    torch.testing.assert_close(ours, plain)


def test_total_correlation_is_its_formula():
    """Minibatch-weighted sampling, written as sums over the rows of the batch."""
    model, guide, x = ppca_file.example()
    scaled = [Scaled(fn, "data", 160) for fn in (model, guide)]
    loss, weights = same_noise(
        lambda: total_correlation(beta=5.0, alpha=2.0, gamma=3.0)(*scaled, x), lambda: weigh(model, guide, x, 1)
    )
    (run,) = weights.passes
    q, z = run.latents[0]["fn"].base_dist, run.values["z"]
    expected = -reconstruction(run).sum()
    for i in range(len(x)):
        each = torch.stack([dist.Normal(q.loc[j], q.scale[j]).log_prob(z[i]) for j in range(len(x))])  # [j, element]
        joint = each.sum(1).exp().sum().div(160 * 16).log()
        marginals = each.exp().sum(0).div(160 * 16).log().sum()
        prior = dist.Normal(0.0, 1.0).log_prob(z[i]).sum()
        expected = expected + 2 * (each[i].sum() - joint) + 5 * (joint - marginals) + 3 * (marginals - prior)
    torch.testing.assert_close(loss, 10 * expected)


def test_total_correlation_is_zero_for_independent_elements_and_not_for_others():
    """From the difference of two weights, for an aggregate posterior that is known: nearly deterministic codes."""

    def correlation(codes: Tensor) -> float:
        def model(x):
            with batch_plate(x):
                pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)

        def guide(x):
            with batch_plate(x):
                pyro.sample("z", dist.Normal(x, 0.3).to_event(1))

        low, high = same_noise(*(lambda b=b: total_correlation(beta=b)(model, guide, codes) for b in (1.0, 2.0)))
        return (high - low).item() / len(codes)

    torch.manual_seed(0)
    a, b = torch.randn(2, 2000)
    dependent = 0.95 * a + math.sqrt(1 - 0.95**2) * b
    # the codes are normal: variances 1.09, correlation 0.95 / 1.09
    exact = -0.5 * math.log(1 - (0.95 / 1.09) ** 2)
    # the estimate of minibatch-weighted sampling is off by a constant of the batch for one set of codes and the other
    difference = correlation(torch.stack([a, dependent], 1)) - correlation(torch.stack([a, b], 1))
    assert abs(difference - exact) < 0.12


# ------------------------------------------------------------------------------------------------ schedules, errors


def test_schedules():
    ramp = linear(1.0, 5.0, begin=0.25, end=0.75)
    assert [ramp(t) for t in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1.0, 1.0, 3.0, 5.0, 5.0]
    saw = cyclical(0.0, 1.0, cycles=2, rising=0.5)
    assert [saw(t) for t in (0.0, 0.125, 0.25, 0.49, 0.5, 0.625, 0.99, 1.0)] == [0, 0.5, 1, 1, 0, 0.5, 1, 1]
    assert now(ramp) == 5.0
    with progress(0.5):
        assert now(ramp) == 3.0
    assert now(2.5) == 2.5


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: importance(iwae, 0), "at least 1, got 0"),
        (lambda: importance(miwae(2, 3), 5), "needs particles=6, got 5"),
        (lambda: piwae(0, 4), "at least one bound"),
        (lambda: capacity(linear(0.0, 25.0, begin=0.5, end=0.2)), "must end after it begins"),
        (lambda: cyclical(cycles=0), "at least one cycle"),
        (lambda: capacity(-1.0), "at least 0"),
        (lambda: annealed(-1.0), "at least 0"),
        (lambda: autogen(-1.0), "at least 0"),
        (lambda: free_bits(-1.0), "at least 0"),
        (lambda: soft_free_bits(0.0), "positive"),
        (lambda: total_correlation(beta=-1.0), "at least 0"),
        (lambda: aggregate(mmd(), weight=-1.0), "weight must be at least 0"),
        (lambda: info_vae(alpha=2.0), "alpha must be at most 1"),
        (lambda: wake_sleep(0), "at least 1"),
        (lambda: wake_sleep(sleep=1.5), r"in \[0, 1\]"),
    ],
)
def test_values_out_of_range_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_tied_elements_are_refused_where_single_ones_are_needed():
    model, x = ppca(rows=5)
    for loss in (free_bits(0.1), total_correlation()):
        with pytest.raises(ValueError, match="'z' are tied together by MultivariateNormal"):
            loss(model, exact_guide(model), x)


def test_every_loss_trains_and_has_a_repr():
    model, guide, x = ppca_file.example()
    every = [
        importance(miwae(2, 3)), piwae(2, 3), wake_sleep(3, sleep=0.5), annealed(linear(0.0, 1.0)), autogen(),
        capacity(linear(0.0, 5.0)), free_bits(0.1), soft_free_bits(1.0), total_correlation(), info_vae(), wasserstein(),
        aggregate_moments(), fisher(0.01),
    ]  # fmt: skip
    assert {type(loss).__name__ for loss in every} | {"info_vae", "wasserstein"} == set(losses.__all__)
    for loss in every:
        posterior = fit(model, x, guide=guide, method=svi(loss=loss, steps=4), batch_size=8, progress=False)
        assert torch.isfinite(torch.tensor(posterior.history["loss"])).all(), loss
        assert "object at" not in repr(loss)
