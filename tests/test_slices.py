"""Sliced Wasserstein distances that learn: against closed forms of Gaussians, and against the plain one."""

import pytest
import torch

from pyro_ae.divergences import sliced_wasserstein, wasserstein_1d
from pyro_ae.slices import (
    _along,
    _distances,
    distributional_sliced_wasserstein,
    generalised_sliced_wasserstein,
    max_sliced_wasserstein,
)

ALL = {
    "max": max_sliced_wasserstein(),
    "distributional": distributional_sliced_wasserstein(projections=100, steps=50, lr=1e-2, diversity=1.0),
    "generalised": generalised_sliced_wasserstein(),
}
SHIFT = torch.tensor([0.0, 3.0, 0.0, 0.0])


def gaussians(rows=1000):
    a = torch.randn(rows, 4)
    return a, a[torch.randperm(rows)] + SHIFT


def fresh(name):
    return distributional_sliced_wasserstein(100, 50, 1e-2, 1.0) if name == "distributional" else ALL[name]


@pytest.mark.parametrize("name", ALL)
def test_is_zero_for_the_same_rows_in_any_order_and_has_a_gradient_elsewhere(name):
    a = torch.randn(50, 4)
    assert fresh(name)(a, a[torch.randperm(50)]) < 1e-9
    b = (a + SHIFT).requires_grad_()
    (gradient,) = torch.autograd.grad(fresh(name)(a, b), b)
    assert torch.isfinite(gradient).all() and gradient[:, 1].mean() > 0  # descent moves b back to a


def test_the_largest_slice_of_a_shift_is_the_shift():
    """W_2^2 of two Gaussians that differ in their mean alone is the squared shift, along its own direction."""
    a, b = gaussians()
    assert abs(max_sliced_wasserstein()(a, b) - 9.0) < 0.15
    assert abs(sliced_wasserstein(2000)(a, b) - 9.0 / 4) < 0.3  # a quarter of it, averaged over directions


def test_the_learned_distribution_lies_between_all_directions_and_the_best():
    a, b = gaussians()
    found = {}
    for diversity in (0.0, 10.0, 1000.0):
        torch.manual_seed(0)
        distance = distributional_sliced_wasserstein(300, 300, 1e-2, diversity)
        found[diversity] = distance(a, b).item()
        directions = distance.directions().detach()
        torch.testing.assert_close(directions.norm(dim=0), torch.ones(300))
        alike = (directions.T @ directions).abs().mean().item()
        assert alike > 0.99 if diversity == 0 else alike < 0.65
    assert found[0.0] > 8.0  # without the penalty, all directions become the best one
    assert found[0.0] > found[10.0] > found[1000.0] > 1.8


def test_the_distance_as_a_sum_is_that_of_rows_times_their_number():
    a, b = gaussians(200)
    pairs = []
    for sum in (False, True):
        torch.manual_seed(1)
        distance = distributional_sliced_wasserstein(20, 1, 1e-9, 0.0, sum=sum)
        pairs.append(float(distance(a, b)))
    assert pairs[1] == pytest.approx(200 * pairs[0], rel=1e-4)


def test_a_fitted_distance_is_of_any_other_pair_and_keeps_its_directions():
    a, b = gaussians()
    for distance in (max_sliced_wasserstein(), distributional_sliced_wasserstein(50, 5)):
        fitted = distance.fitted(a, b)
        assert fitted(a[:500], b[:400]) == fitted(a[:500], b[:400])
        assert abs(float(fitted(a, a))) < 1e-9


@pytest.mark.parametrize("rows", [(6, 6), (12, 4), (4, 12), (7, 5), (5, 7), (1, 3)])
@pytest.mark.parametrize("p", [1.0, 2.0, 2.5])
def test_distances_of_rows_and_their_gradients_are_those_of_columns(rows, p):
    """With ties, too, of which each is a neighbour of another."""
    a, b = (torch.randint(-3, 4, (8, n)).double() for n in rows)
    a[4:], b[4:] = torch.randn(4, rows[0]), torch.randn(4, rows[1])
    expected = wasserstein_1d(a.T, b.T, p)
    torch.testing.assert_close(_distances(a, b, p), expected)
    torch.testing.assert_close(_distances(a.float(), b.float(), p), expected.float(), atol=1e-5, rtol=1e-4)
    a.requires_grad_()
    found, wanted = (torch.autograd.grad(f[4:].sum(), a)[0] for f in (_distances(a, b, p), wasserstein_1d(a.T, b.T, p)))
    assert wanted[4:].abs().max() > 0
    torch.testing.assert_close(found, wanted)


def test_the_network_ascends_the_distance_less_the_mean_cosine():
    a, b = (torch.randn(n, 3, dtype=torch.float64) for n in (12, 4))
    distance = distributional_sliced_wasserstein(projections=7, steps=1, lr=1e-2, diversity=3.0, sum=True)
    distance.fitted(a, b)
    weight, bias = (p.detach().clone().requires_grad_() for p in distance.network.parameters())
    torch.manual_seed(0)
    distance.fitted(a, b)
    torch.manual_seed(0)
    theta = torch.nn.functional.normalize(torch.randn(7, 3, dtype=torch.float64), dim=1)
    f = torch.nn.functional.normalize(theta @ weight.T + bias, dim=1)
    loss = 3.0 * (f @ f.T).abs().mean() - 12 * _along(f.T, 2.0)(a, b)
    for p, wanted in zip(distance.network.parameters(), torch.autograd.grad(loss, (weight, bias)), strict=True):
        torch.testing.assert_close(p.grad, wanted)


def test_a_state_goes_on_as_the_network_it_is_of():
    a, b = gaussians(60)
    one, other = (distributional_sliced_wasserstein(20, 3, 1e-2) for _ in range(2))
    assert one.state() == {}
    one(a, b)
    state = {n: v.clone() for n, v in one.state().items()}
    other.resume(state)
    found = []
    for distance in (one, other):
        torch.manual_seed(0)
        found.append([float(distance(a, b)) for _ in range(3)])
    assert found[0] == found[1]
    one.resume({})
    assert one.network is None
    one.resume(state)
    torch.manual_seed(0)
    assert float(one(a, b)) == found[0][0]


def test_a_network_goes_on_learning_where_it_was():
    a, b = gaussians()
    distance = distributional_sliced_wasserstein(100, 30, 1e-2, 0.0)
    first = float(distance(a, b))
    for _ in range(10):
        last = float(distance(a, b))
    assert last > first
    with pytest.raises(ValueError, match="made for samples of width 4, and these have 3"):
        distance(a[:, :3], b[:, :3])


def test_circles_are_the_distances_to_points():
    a, b = torch.randn(30, 2), torch.randn(40, 2)
    torch.manual_seed(0)
    found = generalised_sliced_wasserstein(radius=2.0, projections=5)(a, b)
    torch.manual_seed(0)
    points = 2.0 * torch.nn.functional.normalize(torch.randn(5, 2), dim=1)
    by_hand = [wasserstein_1d((a - p).norm(dim=1)[:, None], (b - p).norm(dim=1)[:, None], 2.0) for p in points]
    torch.testing.assert_close(found, torch.cat(by_hand).mean())


@pytest.mark.parametrize(
    "make",
    [
        lambda: max_sliced_wasserstein(steps=0),
        lambda: distributional_sliced_wasserstein(projections=0),
        lambda: distributional_sliced_wasserstein(diversity=-1.0),
        lambda: generalised_sliced_wasserstein(radius=0.0),
        lambda: generalised_sliced_wasserstein(p=0.5),
        lambda: max_sliced_wasserstein()(torch.zeros(3, 2), torch.zeros(3, 4)),
    ],
)
def test_out_of_range_is_refused(make):
    with pytest.raises(ValueError, match=r"must|expected samples"):
        make()
