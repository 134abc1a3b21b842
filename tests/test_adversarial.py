"""Attacks on amortised posteriors, against the closed form for linear normals."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence
from truth import exact_guide, gaussian_mean, ppca

from pyro_ae import Posterior, batch_plate, fit, svi
from pyro_ae.data import as_rows
from pyro_ae.diagnostics.adversarial import adversarial_shift
from pyro_ae.guides.amortized import Amortized
from pyro_ae.guides.mean_field import MeanField
from pyro_ae.guides.shared import Shared
from pyro_ae.models.ppca import example
from pyro_ae.nn import MLP
from pyro_ae.program import Program


def posterior_of(model, guide, data, **state) -> Posterior:
    """A guide as it is, not trained."""
    rows = as_rows(data)
    program = Program(model, guide, total=rows.size)
    program.build(rows.first(None))
    return Posterior(program, data=rows, method="none", **state)


def whitened(model) -> Tensor:
    """The exact posterior's location by the row, in units of its own spread, ``[latent, features]``."""
    x = torch.zeros(6, 5)
    x[1:] = torch.eye(5)
    q = model.posterior(x)
    return torch.linalg.solve_triangular(q.scale_tril[0], (q.mean[1:] - q.mean[0]).T, upper=False)


@pytest.mark.parametrize("eps", [0.05, 1.0])
def test_worst_shift_of_a_linear_normal_posterior_is_its_top_singular_vector(eps):
    """KL = |L^-1 A d|^2 / 2, with no noise of the draws, however small the shift."""
    model, x = ppca()
    _, values, directions = torch.linalg.svd(whitened(model))
    found = adversarial_shift(posterior_of(model, exact_guide(model), x), eps=eps, unit=1.0, steps=100)
    torch.testing.assert_close(found.kl / eps**2, (values[0] ** 2 / 2).expand(40), rtol=1e-3, atol=1e-3)
    assert ((found.shift / eps @ directions[0]).abs() > 0.999).all()
    assert (found.shift.norm(dim=1) <= eps * 1.0001).all()
    torch.testing.assert_close(found.data - x, found.shift)
    # in a random direction of 5 dims it is the mean of the squared singular values
    assert abs(found.random.mean() / eps**2 - values.square().sum() / 10) < 0.3 * values.square().sum() / 10


def test_units_are_deviations_of_the_elements_by_default():
    model, x = ppca()
    stretch = x.std(0, correction=0)
    _, values, directions = torch.linalg.svd(whitened(model) * stretch)
    found = adversarial_shift(posterior_of(model, exact_guide(model), x), eps=0.3, steps=100)
    torch.testing.assert_close(found.kl / 0.3**2, (values[0] ** 2 / 2).expand(40), rtol=1e-3, atol=1e-3)
    assert ((found.shift / stretch / 0.3 @ directions[0]).abs() > 0.999).all()


def test_an_element_without_a_unit_and_a_missing_one_stay_as_they_are():
    model, _ = ppca()
    x = model(size=20)
    x[3, 2] = torch.nan
    guide = Amortized(MLP(5, [8], missing=True), MeanField(8, 2))
    found = adversarial_shift(posterior_of(model, guide, x), unit=torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0]))
    assert (found.shift[:, 3] == 0).all()
    assert torch.isnan(found.data[3, 2])
    assert torch.isfinite(found.shift).all()
    assert torch.isfinite(found.kl).all()


def test_divergence_of_a_network_is_that_of_its_normals_and_near_the_worst():
    """Against the closed form of KL, and the best of many directions tried."""
    model, x = ppca(20)
    guide = Amortized(MLP(5, [16], activation=nn.Tanh), MeanField(16, 2))
    with torch.no_grad():
        guide.encoder.layers[0].weight.mul_(2.0)
        guide.head.linear.weight.mul_(2.0)
    found = adversarial_shift(posterior_of(model, guide, x), eps=1.0, unit=1.0, draws=2000)
    with torch.no_grad():
        clean, moved = (guide.head(guide.encoder(rows)) for rows in (x, found.data))
        exact = kl_divergence(clean, moved)
        directions = nn.functional.normalize(torch.randn(5000, 1, 5), dim=-1)
        tried = kl_divergence(clean.expand((5000, 20)), guide.head(guide.encoder(x + directions))).max(0).values
    torch.testing.assert_close(found.kl, exact, rtol=0.1, atol=0.05)
    assert (exact > 0.95 * tried).float().mean() >= 0.9  # an ascent may end at a lower summit
    assert (found.kl > found.random).all()


def test_is_repeatable_and_leaves_the_random_state_alone():
    model, guide, x = example()
    posterior = posterior_of(model, guide, x)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, other = (adversarial_shift(posterior, seed=seed, steps=3) for seed in (0, 1))
    with torch.no_grad():
        second = adversarial_shift(posterior, seed=0, steps=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.shift, second.shift)
    assert not torch.equal(first.shift, other.shift)
    assert not any(p.grad is not None for p in guide.parameters())


def test_several_arguments_and_some_of_the_rows():
    def model(x: Tensor, y: Tensor) -> None:
        with batch_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1) + x.sum(-1), 1.0), obs=y)

    guide = Amortized(nn.Linear(4, 8), MeanField(8, 2), inputs=lambda x, y: torch.cat([x, y.unsqueeze(-1)], -1))
    data = {"x": torch.randn(50, 3), "y": torch.randn(50)}
    posterior = posterior_of(model, guide, data)
    found = adversarial_shift(posterior, argument="y", rows=10)
    assert found.shift.shape == found.kl.shape == (10,)
    torch.testing.assert_close(found.data - found.shift, data["y"][torch.linspace(0, 49, 10).round().long()])
    assert adversarial_shift(posterior, tuple(data.values()), argument=0, rows=4).shift.shape == (4, 3)
    assert adversarial_shift(posterior, rows=4).shift.shape == (4, 3)
    with pytest.raises(ValueError, match="no argument 'w' of floating point rows to attack; there are x, y"):
        adversarial_shift(posterior, argument="w")


def test_parts_that_fit_into_memory_are_the_same_as_all_at_once(monkeypatch):
    model, x = ppca()
    posterior = posterior_of(model, exact_guide(model), x)
    whole = adversarial_shift(posterior, eps=0.5)
    monkeypatch.setattr("pyro_ae.diagnostics.adversarial.chunk_size", lambda layout: 64 * 4 * 7)
    parts = adversarial_shift(posterior, eps=0.5)
    torch.testing.assert_close(parts.kl, whole.kl, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_attacked_is_refused():
    model, guide, x = example()
    posterior = posterior_of(model, guide, x)
    for name in ("eps", "steps", "starts", "draws", "rows"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            adversarial_shift(posterior, **{name: 0})
    with pytest.raises(ValueError, match="the unit of shifts must be at least 0, and above it somewhere"):
        adversarial_shift(posterior, unit=-1.0)
    with pytest.raises(ValueError, match="pass unit=1.0"):
        adversarial_shift(posterior, x[:1])
    with pytest.raises(ValueError, match="does not depend on the argument that is attacked"):
        adversarial_shift(posterior_of(model, Shared(model, plate=None), x))
    y = torch.randn(10)
    with pytest.raises(ValueError, match="no latent is inside plate 'data'"):
        adversarial_shift(fit(gaussian_mean, y, method=svi(steps=1), progress=False, check=False))
    chains = posterior_of(model, None, x, draws={"z": torch.randn(1, 5, 16, 2)})
    with pytest.raises(ValueError, match="chains have no guide"):
        adversarial_shift(chains)
