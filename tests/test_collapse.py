"""When the latents of linear autoencoders collapse: closed forms against direct optimisation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_ae.diagnostics.collapse import hierarchical_collapse, linear_collapse, residual_variances
from pyro_ae.models.ppca import PPCA

NOISE = 0.6


def rows(size: int = 400) -> tuple[Tensor, Tensor]:
    """Rows of 5 dims, of which a condition of 2 explains some; their spread falls from dim to dim."""
    x = torch.randn(size, 2, dtype=torch.double)
    own = torch.randn(size, 5, dtype=torch.double) * torch.tensor([2.0, 1.3, 0.9, 0.5, 0.2], dtype=torch.double)
    return own @ torch.linalg.qr(torch.randn(5, 5, dtype=torch.double)).Q + x @ torch.randn(2, 5).double() + 1.0, x


def minimised(objective: Callable[..., Tensor], *shapes: tuple[int, ...]) -> list[Tensor]:
    """Where the lowest value is, of what is found from two random starts."""
    found = [_minimised(objective, [0.5 * torch.randn(shape, dtype=torch.double) for shape in shapes]) for _ in "ab"]
    return min(found, key=lambda values: objective(*values).item())


def _minimised(objective: Callable[..., Tensor], values: list[Tensor]) -> list[Tensor]:
    for value in values:
        value.requires_grad_()
    optimizer = torch.optim.LBFGS(values, max_iter=400, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(*values)
        loss.backward()
        return loss

    optimizer.step(closure)
    return [value.detach() for value in values]


def normal_kl(mean: Tensor, variance: Tensor) -> Tensor:
    """The mean over the rows of KL(N(mean, variance) || N(0, I)), for each latent."""
    return 0.5 * (mean.square().mean(0) + variance - 1 - variance.log())


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("beta", [1.0, 3.0])
@pytest.mark.parametrize("scale", [None, 1.1])
def test_linear_collapse_is_the_optimum_of_the_objective(conditional, beta, scale):
    y, x = rows()
    centred, given = y - y.mean(0), (x - x.mean(0)) * conditional
    found = linear_collapse(residual_variances(y, x if conditional else None), NOISE, beta=beta, scale=scale, latent=5)

    def parts(w: Tensor, v: Tensor, encode: Tensor, look: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance = (2 * log_scale).exp() if scale is None else torch.full((5,), scale**2, dtype=torch.double)
        mean = centred @ encode + given @ look
        error = (centred - mean @ w - given @ v).square().sum(1).mean() + (variance @ w.square()).sum()
        return error, normal_kl(mean, variance), variance

    def objective(*values: Tensor) -> Tensor:
        error, kl, _ = parts(*values)
        return error / (2 * NOISE**2) + beta * kl.sum()

    w, v, *rest = minimised(objective, (5, 5), (2, 5), (5, 5), (2, 5), (5,))
    error, kl, variance = parts(w, v, *rest)
    assert 0 < found.active.sum() < 5, "the case says something"
    torch.testing.assert_close(torch.linalg.svdvals(w), found.weights, atol=2e-3, rtol=0)
    torch.testing.assert_close(kl.sum(), found.kl.sum(), atol=2e-3, rtol=0)
    if scale is None:  # else the latents may be rotated
        order = kl.argsort(descending=True)
        torch.testing.assert_close(kl[order], found.kl, atol=2e-3, rtol=0)
        torch.testing.assert_close(variance.sqrt()[order], found.scales, atol=2e-3, rtol=0)


def test_weights_are_those_of_the_maximum_likelihood():
    """PPCA with these weights has no gradient, and its exact posterior the KL divergences that are told."""
    y, _ = rows()
    centred = y - y.mean(0)
    values, directions = torch.linalg.eigh(centred.T @ centred / len(y))
    found = linear_collapse(residual_variances(y), NOISE, latent=3)
    torch.set_default_dtype(torch.double)
    try:
        model = PPCA(5, 3, noise=NOISE)
        with torch.no_grad():
            model.weight.copy_(directions.flip(1)[:, :3] * found.weights)
            model.mean.copy_(y.mean(0))
        model.marginal().log_prob(y).mean().backward()
        assert found.active.all()
        assert model.weight.grad.abs().max() < 1e-8
        with torch.no_grad():
            q = model.posterior(y)
            kl = kl_divergence(q, MultivariateNormal(torch.zeros(3), torch.eye(3))).mean()
    finally:
        torch.set_default_dtype(torch.float)
    torch.testing.assert_close(kl, found.kl.sum())


CASES = [(0.4, 1.0, 1.0), (0.4, 1.0, 3.0), (0.4, 3.0, 1.0), (0.9, 1.0, 1.0), (0.2, 1.0, 0.8)]


@pytest.mark.parametrize(("scale", "beta1", "beta2"), [*CASES, (None, 1.0, 2.0)])
def test_hierarchical_collapse_is_the_optimum_of_the_objective(scale, beta1, beta2):
    y, _ = rows()
    found = hierarchical_collapse(
        residual_variances(y), NOISE, prior_noise=0.8, scale=scale, beta1=beta1, beta2=beta2, latent=3
    )
    centred = y - y.mean(0)
    covariance = centred.T @ centred / len(y)

    def parts(u1: Tensor, a: Tensor, u2: Tensor, b: Tensor, log1: Tensor, log2: Tensor) -> tuple[Tensor, ...]:
        """From second moments alone: of z1 over the rows, and of z2 given z1."""
        s1 = (2 * log1).exp() if scale is None else torch.full((3,), scale**2, dtype=torch.double)
        s2 = (2 * log2).exp()
        means = a @ covariance @ a.T
        z1 = means + s1.diag()
        z2 = b @ z1 @ b.T + s2.diag()
        error = (covariance - 2 * u1 @ a @ covariance + u1 @ z1 @ u1.T).trace()
        above = (z1 - 2 * u2 @ b @ z1 + u2 @ z2 @ u2.T).diagonal()
        kl1 = 0.5 * (above / 0.64 - 1 + (0.64 / s1).log())
        return error, kl1, 0.5 * (z2.diagonal() - 1 - s2.log()), means

    def objective(*values: Tensor) -> Tensor:
        error, kl1, kl2, _ = parts(*values)
        return error / (2 * NOISE**2) + beta1 * kl1.sum() + beta2 * kl2.sum()

    values = minimised(objective, (5, 3), (3, 5), (3, 3), (3, 3), (3,), (3,))
    _, kl1, kl2, means = parts(*values)
    torch.testing.assert_close(kl2.sort(descending=True).values, found.kl2, atol=3e-3, rtol=0)
    torch.testing.assert_close(kl1.sum(), found.kl1.sum(), atol=3e-3, rtol=0)
    torch.testing.assert_close(torch.linalg.eigvalsh(means).flip(0), found.means, atol=5e-3, rtol=5e-3)


def test_cases_of_the_hierarchy_are_of_all_kinds():
    """Latents of the upper level that all, in part or none collapse; of the lower level too."""
    lam = residual_variances(rows()[0])
    used = [
        int((hierarchical_collapse(lam, NOISE, prior_noise=0.8, scale=s, beta1=b, beta2=c, latent=3).kl2 > 0).sum())
        for s, b, c in CASES
    ]
    assert len(set(used)) >= 3, used


@pytest.mark.parametrize(("scale", "beta1", "beta2"), CASES)
def test_spread_of_the_lower_level_is_the_lowest_point_of_its_cost(scale, beta1, beta2):
    """For data of many variances, on both sides of where the upper level collapses."""
    lam = torch.linspace(0.05, 30.0, 400, dtype=torch.double)
    found = hierarchical_collapse(lam, NOISE, prior_noise=0.8, scale=scale, beta1=beta1, beta2=beta2)
    tau, grid = 0.64 * beta2 / beta1, torch.linspace(scale**2, 20.0, 20_000, dtype=torch.double)
    height = torch.where(grid > tau, 1 + (grid / tau).log(), grid / tau) * beta2 / 2
    cost = found.variances.unsqueeze(1) * scale**2 / (2 * NOISE**2 * grid) + height
    torch.testing.assert_close(found.spread.clamp(max=20.0), grid[cost.argmin(1)], atol=4e-3, rtol=0)
    assert ((found.kl2 > 0) == (found.spread > tau)).all()


def test_what_makes_latents_collapse():
    y, x = rows()

    def active(condition: Tensor | None, noise: float, beta: float) -> int:
        return int(linear_collapse(residual_variances(y, condition), noise, beta=beta).active.sum())

    assert active(None, 0.6, 1.0) > active(None, 1.2, 1.0)
    assert active(None, 0.6, 1.0) > active(None, 0.6, 4.0)
    assert active(None, 0.6, 4.0) == active(None, 1.2, 1.0)
    assert residual_variances(y, x).sum() < 0.8 * residual_variances(y).sum()
    torch.testing.assert_close(residual_variances(y, torch.zeros(400, 1)), residual_variances(y))
    assert not linear_collapse(residual_variances(y, y), 0.1).active.any()


def test_variances_are_of_any_event_and_of_few_rows():
    y = torch.randn(5, 3, 4)
    found = residual_variances(y)
    assert found.shape == (12,)
    torch.testing.assert_close(found.sum(), y.double().var(0, correction=0).sum())
    assert (found[4:] < 1e-9).all()


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="noise must be positive, got 0"):
        linear_collapse(torch.ones(2), 0.0)
    with pytest.raises(ValueError, match="variances must be a vector of numbers of at least 0"):
        linear_collapse(-torch.ones(2), 1.0)
    with pytest.raises(ValueError, match=r"two rows or more.* got \[3, 2\] and \[4, 2\]"):
        residual_variances(torch.randn(3, 2), torch.randn(4, 2))
    with pytest.raises(ValueError, match="none missing"):
        residual_variances(torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match="beta2=1.0 below beta1=2.0 there is no optimum"):
        hierarchical_collapse(torch.ones(2), 1.0, prior_noise=1.0, scale=None, beta1=2.0)
