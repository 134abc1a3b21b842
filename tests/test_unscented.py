"""Sigma points: what their averages are exact for, against the Gaussian that they stand for."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal, Normal, constraints, kl_divergence
from truth import ppca

from pyro_ae import elbo, log_weights
from pyro_ae.density import weigh
from pyro_ae.estimators import kl
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.guides.unscented import Unscented
from pyro_ae.nn import MLP


class Correlated(nn.Module):
    """Features ``[*, 12]`` to normal vectors ``[3]`` with a full covariance."""

    def forward(self, features: Tensor) -> Distribution:
        loc, low = features[..., :3], features[..., 3:].unflatten(-1, (3, 3)).tril(-1)
        return MultivariateNormal(loc, scale_tril=low + torch.diag(torch.tensor([0.5, 1.0, 2.0])))


HEADS = [
    pytest.param(MeanField(12, 3).double(), id="independent"),
    pytest.param(Correlated().double(), id="correlated"),
]


def gaussian(head: nn.Module) -> tuple[Tensor, Distribution, Tensor]:
    """Features of 5 rows, and their distribution with its covariances."""
    features = torch.randn(5, 12, dtype=torch.double)
    q = head(features)
    covariance = q.covariance_matrix if isinstance(q, MultivariateNormal) else torch.diag_embed(q.variance)
    return features, q, covariance


@pytest.mark.parametrize(("kappa", "points"), [(0.5, 7), (0.0, 6)])
@pytest.mark.parametrize("head", HEADS)
def test_the_plain_average_of_all_points_is_exact_for_quadratic_functions(head, kappa, points):
    features, q, covariance = gaussian(head)
    z = Unscented(head, kappa=kappa)(features).expand((points, 5)).rsample()
    assert z.shape == (points, 5, 3)
    torch.testing.assert_close(z.mean(0), q.mean)
    from_mean = z - q.mean
    torch.testing.assert_close(torch.einsum("kbi,kbj->bij", from_mean, from_mean) / points, covariance)
    a, b = torch.randn(3, 3, dtype=torch.double), torch.randn(3, dtype=torch.double)
    found = torch.einsum("kbi,ij,kbj->kb", z, a, z) + z @ b
    exact = torch.einsum("bi,ij,bj->b", q.mean, a, q.mean) + torch.einsum("ij,bji->b", a, covariance) + q.mean @ b
    torch.testing.assert_close(found.mean(0), exact)


@pytest.mark.parametrize("head", HEADS)
def test_for_another_kappa_the_weights_of_the_unscented_transform_make_it_exact(head):
    features, q, covariance = gaussian(head)
    z = Unscented(head, kappa=2.0)(features).expand((7, 5)).rsample()
    at_mean = (z - q.mean).square().sum(-1) < 1e-12
    weights = torch.where(at_mean, 2.0, 0.5) / (3 + 2.0)
    torch.testing.assert_close(weights.sum(0), torch.ones(5))
    torch.testing.assert_close((weights.unsqueeze(-1) * z).sum(0), q.mean)
    from_mean = z - q.mean
    torch.testing.assert_close(torch.einsum("kb,kbi,kbj->bij", weights.double(), from_mean, from_mean), covariance)
    torch.testing.assert_close(torch.einsum("kbi,kbj->bij", from_mean, from_mean) / 7, covariance * 2 * (3 + 2) / 7)


def test_points_lie_along_the_columns_of_the_factor():
    head = Correlated().double()
    features, q, _ = gaussian(head)
    z = Unscented(head)(features).expand((7, 5)).rsample()
    noise = torch.linalg.solve_triangular(q.scale_tril, (z - q.mean).unsqueeze(-1), upper=False).squeeze(-1)
    expected = 3.5**0.5 * torch.cat([torch.zeros(1, 3), torch.eye(3), -torch.eye(3)]).double()
    for row in noise.unbind(1):
        order = torch.cdist(row, expected).argmin(0)
        assert sorted(order.tolist()) == list(range(7))
        torch.testing.assert_close(row[order], expected)


def test_particles_are_drawn_evenly_and_without_replacement():
    head = MeanField(4, 2)
    q = Unscented(head)(torch.randn(3000, 4))

    def points(copies: int) -> Tensor:
        """Which point each particle of each row is, ``[copies, rows]``."""
        noise = (q.expand((copies, 3000)).rsample() - q.base.loc) / q.base.scale
        sides = torch.cat([torch.zeros(1, 2), torch.eye(2), -torch.eye(2)])
        return torch.cdist(noise.sign() * (noise.abs() > 1e-3), sides).argmin(-1)

    some = points(4)
    assert (some.sort(0).values.diff(dim=0) > 0).all()
    counts = nn.functional.one_hot(some, 5).sum(1)  # each of 4 particles is by itself uniform over the 5 points
    assert ((counts - 600).abs() < 5 * (3000 * 0.2 * 0.8) ** 0.5).all()
    assert (nn.functional.one_hot(points(10), 5).sum(0) == 2).all()
    assert (nn.functional.one_hot(points(13), 5).sum(0) >= 2).all()


def test_the_elbo_of_a_linear_model_is_exact():
    """Its likelihood and its KL divergence are quadratic, so no noise is left."""
    model, x = ppca()
    head = MeanField(8, 2)
    guide = Amortized(MLP(5, [8]), Unscented(head))
    q = head(guide.encoder(x))
    likelihood = Normal(q.mean @ model.weight.T + model.mean, 0.7).log_prob(x).sum(-1)
    spread = (q.variance @ model.weight.T.square()).sum(-1) / (2 * 0.7**2)
    exact = likelihood - spread - kl_divergence(q.base_dist, Normal(torch.zeros(2), 1.0)).sum(-1)
    log_w, _ = log_weights(model, guide, x, particles=5)
    torch.testing.assert_close(elbo(log_w), exact)
    by_estimator = kl(weigh(model, guide, x, 5).passes[0]).mean(0)
    torch.testing.assert_close(by_estimator, kl_divergence(q.base_dist, Normal(torch.zeros(2), 1.0)).sum(-1))


@pytest.mark.parametrize("head", HEADS)
def test_density_moments_and_shapes_are_the_gaussians(head):
    features, q, _ = gaussian(head)
    points = Unscented(head)(features)
    z = torch.randn(4, 5, 3, dtype=torch.double)
    torch.testing.assert_close(points.expand((4, 5)).log_prob(z), q.log_prob(z))
    torch.testing.assert_close(points.mean, q.mean)
    torch.testing.assert_close(points.variance, q.variance)
    assert points.rsample((2, 3)).shape == (2, 3, 5, 3)
    # in a hierarchical model features already have particles: each row's point is then drawn alone
    assert Unscented(head)(features.expand(6, 5, 12)).expand((6, 5)).rsample().shape == (6, 5, 3)
    torch.testing.assert_close(points.expand((4, 5)).variance, q.variance.expand(4, 5, 3))


def test_gradients_reach_location_and_scale():
    head = MeanField(4, 2)
    z = Unscented(head)(torch.randn(6, 4)).expand((5, 6)).rsample()
    z.square().mean().backward()
    assert (head.linear.weight.grad != 0).all()


def test_what_is_not_gaussian_is_refused():
    with pytest.raises(ValueError, match="kappa must be at least 0, got -1"):
        Unscented(MeanField(4, 2), kappa=-1)
    for head in (MeanField(4, 2, support=constraints.positive), MeanField(4, (2, 3)), MeanField(4, ())):
        with pytest.raises(ValueError, match="sigma points are of Normal or MultivariateNormal vectors"):
            Unscented(head)(torch.randn(5, 4))
