"""Bounds: tight at the posterior, ordered, right about log K, and equal where their definitions meet."""

import itertools
import math

import pytest
import torch
from truth import biased_guide, exact_guide, ppca

from pyro_ae import bounds, elbo, iwae, log_weights
from pyro_ae.bounds import ciwae, cubo, is_linear, is_upper, jackknife, miwae, renyi, tvo
from pyro_ae.losses.importance import name_of

INFINITY = float("inf")
LOWER = [elbo, iwae, miwae(4, 3), ciwae(0.3), renyi(0.5), renyi(1.0), renyi(INFINITY), tvo(4), tvo([0.0, 0.2])]
OTHERS = [renyi(-1.0), renyi(-INFINITY), cubo(2.0), cubo(3.0), jackknife(1), jackknife(2), jackknife(0)]
BOUNDS = [*LOWER, *OTHERS]


@pytest.mark.parametrize("bound", BOUNDS, ids=name_of)
@pytest.mark.parametrize("particles", [1, 3, 12])
def test_tight_at_the_posterior(bound, particles):
    """With q = p(z | x) every weight equals p(x), so a bound does too, without Monte Carlo error."""
    wanted = getattr(bound, "particles", particles)
    if isinstance(bound, jackknife):
        wanted = max(wanted, bound.order + 1)
    model, x = ppca()
    log_w, scale = log_weights(model, exact_guide(model), x, particles=wanted)
    assert scale == 1
    # the jackknife's factors, of about K^m, magnify the rounding of the log-weights
    tolerance = 1e-3 if isinstance(bound, jackknife) else 1e-4
    torch.testing.assert_close(bound(log_w), model.marginal().log_prob(x), atol=tolerance, rtol=0)


def test_every_bound_is_here():
    """So that a new one is held to these tests."""
    public = {n for n, b in vars(bounds).items() if callable(b) and getattr(b, "__module__", "") == bounds.__name__}
    tested = {getattr(b, "__name__", type(b).__name__) for b in BOUNDS}
    assert public - {"linear", "is_linear", "is_upper"} == tested


@pytest.mark.parametrize("bound", LOWER, ids=name_of)
def test_lower_bounds_are_below_the_evidence(bound):
    """In the mean, for few particles and a guide that is off; and so they are above it nowhere by chance."""
    model, x = ppca(rows=4000)
    log_w, _ = log_weights(model, biased_guide(model), x, particles=12)
    gap = (model.marginal().log_prob(x) - bound(log_w)).detach()
    assert gap.mean() > 2 * gap.std() / math.sqrt(len(gap))


def test_bounds_are_ordered():
    model, x = ppca(rows=200)
    evidence = model.marginal().log_prob(x).mean()
    log_w, _ = log_weights(model, biased_guide(model), x, particles=1024)
    groups = [log_w.unflatten(0, (k, -1)) for k in (1, 4, 16, 64)]
    ladders = {
        "iwae in K": [*(iwae(g).mean() for g in groups), evidence],
        "iwae in K, as miwae": [*(miwae(1024 // k, k)(log_w).mean() for k in (1, 4, 16, 64)), evidence],
        "ciwae in beta": [ciwae(beta)(log_w).mean() for beta in (1.0, 0.6, 0.2, 0.0)],
        "renyi in alpha": [renyi(a)(log_w).mean() for a in (INFINITY, 5.0, 1.0, 0.5, 0.0, -1.0, -5.0, -INFINITY)],
        "tvo in its points": [*(tvo(n)(log_w).mean() for n in (1, 2, 3, 10)), iwae(log_w).mean()],
        "cubo in n": [evidence, *(cubo(n)(log_w).mean() for n in (1.5, 2.0, 4.0))],
    }
    for name, ladder in ladders.items():
        assert all(a < b for a, b in itertools.pairwise(ladder)), (name, ladder)


def test_definitions_meet():
    log_w = torch.randn(12, 5, dtype=torch.float64)
    for ours, theirs in [
        (miwae(12, 1), elbo),
        (miwae(1, 12), iwae),
        (ciwae(1.0), elbo),
        (ciwae(0.0), iwae),
        (renyi(1.0), elbo),
        (renyi(0.0), iwae),
        (renyi(-1.0), cubo(2.0)),
        (jackknife(0), iwae),
        (tvo(1), elbo),
        (tvo([j / 4000 for j in range(4000)]), iwae),
    ]:
        torch.testing.assert_close(ours(log_w), theirs(log_w), atol=1e-3 if isinstance(ours, tvo) else 1e-12, rtol=0)


@pytest.mark.parametrize("alpha", [0.99, 0.9985, 0.9995, 1.0005, 1.0015, 1.01])
def test_renyi_goes_through_its_limit(alpha):
    log_w = 3 * torch.randn(50, 4, dtype=torch.float64)
    exact = ((1 - alpha) * log_w).exp().mean(0).log() / (1 - alpha)
    torch.testing.assert_close(renyi(alpha)(log_w), exact, atol=2e-5, rtol=0)
    torch.testing.assert_close(renyi(alpha)(log_w.float()), exact.float(), atol=2e-3, rtol=0)


def test_jackknife_is_what_nowozin_defines():
    """Order 1 is the classic jackknife; order 2 by a loop over all pairs that are left out."""
    log_w = torch.randn(6, 3, dtype=torch.float64)

    def without(*gone):
        return iwae(log_w[[k for k in range(6) if k not in gone]])

    first = sum(without(k) for k in range(6)) / 6
    second = sum(without(*pair) for pair in itertools.combinations(range(6), 2)) / 15
    torch.testing.assert_close(jackknife(1)(log_w), 6 * iwae(log_w) - 5 * first)
    torch.testing.assert_close(jackknife(2)(log_w), 18 * iwae(log_w) - 25 * first + 8 * second)


def test_jackknife_removes_the_bias():
    """For log w ~ N(0, s^2) the evidence is s^2 / 2; the error of order m falls as K to the power -(m + 1)."""
    log_w = 0.7 * torch.randn(8, 400_000, dtype=torch.float64)
    errors = [abs(bound(log_w).mean().item() - 0.245) for bound in (iwae, jackknife(1), jackknife(2))]
    assert errors[1] < 0.25 * errors[0]
    assert errors[2] < 0.6 * errors[1] + 1e-3


def test_tvo_is_a_left_riemann_sum():
    log_w = torch.randn(7, 3, dtype=torch.float64)

    def slope(beta):
        return ((beta * log_w).softmax(0) * log_w).sum(0)

    torch.testing.assert_close(tvo([0.0, 0.3, 0.5])(log_w), 0.3 * slope(0.0) + 0.2 * slope(0.3) + 0.5 * slope(0.5))
    assert tvo(3).points == (0.0, 0.025, math.sqrt(0.025))
    assert (tvo(5)(log_w) < iwae(log_w)).all()
    assert (tvo(5)(log_w) > elbo(log_w)).all()


def test_iwae_is_the_log_of_the_mean_weight():
    log_w = torch.randn(7, 3, 2)
    torch.testing.assert_close(iwae(log_w), log_w.exp().mean(0).log())
    torch.testing.assert_close(iwae(torch.full((5, 2), 800.0)), torch.full((2,), 800.0))  # no overflow


@pytest.mark.parametrize("bound", BOUNDS, ids=name_of)
def test_large_weights_do_not_overflow_and_gradients_sum_to_one(bound):
    """A bound moves with its log-weights: adding a constant to all of them adds it to the bound."""
    particles = getattr(bound, "particles", 6)
    log_w = (1000 * torch.randn(particles, 4, dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(bound(log_w).sum(), log_w)
    torch.testing.assert_close(gradient.sum(0), torch.ones(4, dtype=torch.float64))
    assert torch.isfinite(gradient).all()


def test_bias_of_iwae_is_the_known_one():
    """log w ~ N(m, s^2) has E[w] = exp(m + s^2/2); K = 1 gives m, many particles approach the log of that mean."""
    log_w = 0.8 * torch.randn(200_000, 1, dtype=torch.float64)
    assert abs(elbo(log_w).item()) < 0.01
    assert abs(iwae(log_w).item() - 0.32) < 0.01


@pytest.mark.parametrize("bound", [*BOUNDS, miwae(6, 1), ciwae(1.0), tvo(1)], ids=name_of)
def test_linear_is_said_of_linear_bounds_alone(bound):
    log_w = torch.randn(getattr(bound, "particles", 6), 4, dtype=torch.float64)
    other = torch.randn_like(log_w)
    adds = torch.allclose(bound(log_w + other), bound(log_w) + bound(other), atol=1e-9)
    assert is_linear(bound) == adds
    assert is_upper(bound) == isinstance(bound, cubo)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: miwae(0, 3), "at least one"),
        (lambda: miwae(2, 3)(torch.zeros(5, 1)), "needs 6 particles, and there are 5"),
        (lambda: ciwae(1.5), r"in \[0, 1\]"),
        (lambda: renyi(float("nan")), "nan"),
        (lambda: cubo(1.0), "greater than 1"),
        (lambda: jackknife(-1), "at least 0"),
        (lambda: jackknife(2)(torch.zeros(2, 1)), "more than 2 particles"),
        (lambda: tvo([0.1, 0.5]), "begin at 0"),
        (lambda: tvo([0.0, 0.5, 0.4]), "rise"),
        (lambda: tvo([0.0, 1.0]), "below 1"),
        (lambda: tvo(0), "begin at 0"),
    ],
)
def test_values_out_of_range_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
